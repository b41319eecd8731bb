"""Imports go one way (docs/architecture.md), and no import of ours hides inside a function."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dataloaders
import setformer_dist

ROOT = Path(__file__).parent.parent.parent
OURS = ("setformer", "setformer_dist", "dataloaders", "checkpoints", "launch")

FORBIDDEN = {
    "setformer_dist/core": (
        "setformer_dist.engine", "setformer_dist.models", "setformer_dist.ops", "dataloaders", "checkpoints", "launch",
        "torch.distributed",
    ),
    "setformer_dist/ops": ("setformer_dist.engine", "setformer_dist.models", "dataloaders", "checkpoints", "launch"),
    "setformer_dist/models": ("setformer_dist.engine", "dataloaders", "checkpoints", "launch", "torch.distributed"),
    "setformer_dist/engine": ("dataloaders", "checkpoints", "launch", "setformer_dist.models", "setformer_dist.tasks",
                              "setformer_dist.callbacks"),
    "setformer_dist/tasks": (
        "setformer_dist.engine", "setformer_dist.models", "setformer_dist.ops", "dataloaders", "checkpoints", "launch",
        "torch.distributed",
    ),
    "setformer_dist/callbacks": (
        "setformer_dist.engine", "setformer_dist.models", "setformer_dist.ops", "dataloaders", "checkpoints", "launch",
        "torch.distributed",
    ),
    "setformer_dist/report": ("setformer_dist.engine", "dataloaders", "checkpoints", "launch"),
    "dataloaders": ("setformer_dist.engine", "setformer_dist.models", "checkpoints", "launch", "torch.distributed"),
    "dataloaders/storage": ("dataloaders.packing", "dataloaders.reading", "dataloaders.opening"),
    "dataloaders/sources": ("dataloaders.packing", "dataloaders.reading", "dataloaders.opening"),
    "dataloaders/order": ("dataloaders.packing", "dataloaders.reading", "dataloaders.sources", "dataloaders.storage"),
    "dataloaders/pixels": ("dataloaders.packing", "dataloaders.reading", "dataloaders.sources", "dataloaders.storage"),
    "dataloaders/reading": ("dataloaders.packing", "dataloaders.opening"),
    "checkpoints": ("setformer_dist.engine", "setformer_dist.models", "dataloaders", "launch", "torch.distributed"),
}  # fmt: skip


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_continuee_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(ast.parse(path.read_text())):
            for forbidden in FORBIDDEN[folder]:
                assert f"{name}.".startswith(f"{forbidden}.") is False, f"{path} imports {name}"


# Rooms of launch/, and which of them each may import besides itself and what lies at the top of launch/.
ROOMS = {
    "cli": {"ckpt", "data", "drill", "examples", "history", "hosts", "machine", "plan", "queue", "ranks", "ray",
            "record", "run", "sweep"},
    "ckpt": {"ranks", "run"},
    "data": set(),
    "drill": {"examples", "ranks"},
    "examples": {"ranks", "record", "run"},
    "history": {"ranks", "record"},
    "hosts": {"ranks", "record"},
    "machine": {"hosts", "ranks"},
    "plan": {"run"},
    "queue": {"hosts", "ranks", "run", "sweep"},
    "ranks": set(),
    "ray": {"hosts", "machine", "ranks", "record", "run"},
    "record": {"ranks"},
    "run": {"hosts", "ranks", "record"},
    "sweep": {"hosts", "ranks", "ray", "record", "run"},
}  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_launch_import_one_way(room: str) -> None:
    for path in sorted((ROOT / "launch" / room).rglob("*.py")):
        for name in imports(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "launch" and len(parts) > 1 and parts[1] in {*ROOMS, "testing"} - {room}:
                assert parts[1] in ROOMS[room], f"{path} imports {name}"


def test_every_room_is_listed() -> None:
    rooms = {path.parent.name for path in (ROOT / "launch").glob("*/__init__.py")}
    assert rooms == {*ROOMS, "testing"}


@pytest.mark.parametrize("package", [name for name in OURS if name != "setformer"])
def test_nothing_imports_the_library(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not [name for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "setformer"], path


def test_no_import_of_ours_inside_a_function() -> None:
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.parent == ROOT / "launch" / "cli":  # commands import what they need when they run
                continue
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                    hidden = [name for name in imports(function) if name.split(".")[0] in OURS]
                    assert not hidden, f"{path}: {function.name} imports {hidden}"


def test_modules_that_are_imported_by_name_exist() -> None:
    found = 0
    for path in sorted(path for folder in (*OURS, "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")):
        for name in re.findall(r'import_module\("([\w.]+)"\)', path.read_text()):
            if name.split(".")[0] in (*OURS, "benchmarks"):
                found += 1
                assert (ROOT / name.replace(".", "/")).is_dir() or (ROOT / f"{name.replace('.', '/')}.py").is_file(), (
                    f"{path} imports {name}"
                )
    assert found > 5


def test_no_pickle_on_any_load_path() -> None:
    # Two exceptions, by torch's restricted unpickler: `setformer ckpt import` reads DeepSpeed's own files, and
    # `setformer ckpt convert` turns a file of torch.save into .safetensors.
    importer, converter = ROOT / "checkpoints" / "deepspeed_files.py", ROOT / "launch" / "ckpt" / "convert.py"
    assert "weights_only=True" in converter.read_text()
    assert "weights_only=False" not in converter.read_text()
    files = [path for package in OURS for path in (ROOT / package).rglob("*.py")]
    users = [p for p in files if any("deepspeed_files" in name for name in imports(ast.parse(p.read_text())))]
    assert [str(p.relative_to(ROOT)) for p in users] == ["launch/ckpt/transfer.py"]
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path in (importer, converter):
                continue
            text = path.read_text()
            assert not {"pickle", "torch.load"} & set(imports(ast.parse(text))), path
            assert "torch.load(" not in text, path
            assert "allow_pickle=True" not in text, path


@pytest.mark.parametrize("module", ["launch.cli.main", "launch.run.config", "launch.history.top"])
def test_typos_and_looks_at_runs_need_no_heavy_imports(module: str) -> None:
    heavy = {"torch", "timm", "deepspeed", "numpy", "PIL", "ray", "matplotlib", "jinja2"}
    program = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_the_server_of_the_queue_imports_no_torch() -> None:
    heavy = {"torch", "timm", "deepspeed", "PIL", "ray", "matplotlib"}
    program = f"import sys, launch.queue.serve, launch.queue.page.server; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_names_of_dataloaders_are_where_they_are_said_to_be() -> None:
    tree = ast.parse((ROOT / "dataloaders" / "__init__.py").read_text())
    typed = {name for name in imports(tree) if name.count(".") > 1 or name.startswith("dataloaders.source.")}
    assert sorted(dataloaders.__all__) == sorted(dataloaders._HOME)
    for name in dataloaders.__all__:
        assert f"dataloaders.{dataloaders._HOME[name]}.{name}" in {*typed, *imports(tree)}
        assert getattr(dataloaders, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = dataloaders.nosuch


def test_a_rank_imports_no_packing_code_no_loggers_and_no_compiler() -> None:
    unwanted = (
        "dataloaders.packing.", "mlflow.", "pandas.", "pyarrow.", "ray.", "optuna.", "plotly.", "sklearn.",
        "wandb.", "torch._inductor.compile_fx.",
    )  # fmt: skip
    program = f"""if True:
        import sys, launch.entry
        import deepspeed.runtime.zero.muon.muon_optimizer  # as DeepSpeed does for any optimizer
        print([name for name in sys.modules if f"{{name}}.".startswith({unwanted!r})])
        import mlflow  # who asks for it gets it
        print(mlflow.__version__)"""
    loaded, version = subprocess.check_output([sys.executable, "-c", program], text=True).splitlines()[-2:]
    assert not ast.literal_eval(loaded), loaded
    assert version


def test_few_files_of_the_engine_know_deepspeed() -> None:
    knowing = {
        path.name
        for path in (ROOT / "setformer_dist" / "engine").glob("*.py")
        for name in imports(ast.parse(path.read_text()))
        if name.startswith("deepspeed") and not name.startswith("deepspeed.accelerator")
    }
    # offload.py and zero.py know it by names alone
    assert knowing == {
        "comm.py", "deepspeed_engine.py", "fused_update.py", "gathering.py", "master.py", "reduction.py"
    }  # fmt: skip


def test_a_checkout_that_is_not_installed_knows_its_version() -> None:
    """A machine without a network has it on its path alone (docs/gpu.md)."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == setformer_dist.__version__
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(r"version\(.setformer_dist.\)", path.read_text()), path
