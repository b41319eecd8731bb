"""`setformer ckpt` on real runs and on directories that DeepSpeed itself wrote."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import timm
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import setformer_dist.models  # noqa: F401  (registers the models)
from checkpoints import deepspeed_files, layout
from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.reader import open_checkpoint
from dataloaders.packing.pack import pack_image_folder
from launch.ckpt import export
from launch.cli.main import app
from launch.run.trained import Trained, load_trained
from launch.testing.commands import setformer, train_words
from launch.testing.ranks import run_ranks
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError, ConfigError, LaunchError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.store import Snapshot
from setformer_dist.core.task_config import TaskConfig
from setformer_dist.engine.comm import connect
from setformer_dist.tasks.build import build_task
from tests.distributed.workers import Trainee, small_model

NAMES = {"fp32": "float32", "bf16": "bfloat16"}
STATES = ("param", "exp_avg", "exp_avg_sq")


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["ckpt", *map(str, words)])


def save(root: Path, step: int, top1: float = 0.5, kept: object = None, **tensors: torch.Tensor) -> Path:
    fragments = [Fragment(n, "param", 0, tuple(t.shape), t.reshape(-1)) for n, t in tensors.items()]
    manager = CheckpointManager(root, Alone(), CheckpointConfig(keep_last=99))
    trainer = {"config": {"optim": {"lr": top1}, **({"checkpoint": kept} if kept else {})}}
    return manager.save(Snapshot(step, fragments, trainer, {"top1": top1}), Identity(model="m"))


def deepspeed_writes(root: str, stage: int, dtype: str) -> dict[str, dict[str, list[float]]]:
    """Train two steps, let DeepSpeed save, and return the masters and states by our own fragments."""
    trainee = Trainee(stage, dtype)
    for k in range(2):
        trainee.step(k)
    trainee.engine.save_checkpoint(root, tag="global_step2", client_state={"note": "plain"})
    mine = [[f.name, f.state, f.start, f.tensor.tolist()] for f in trainee.master.fragments(*STATES)]
    pieces = [piece for part in trainee.comm.gather_json(mine) for piece in part]
    return {f"{name}|{state}|{start}": values for name, state, start, values in pieces}  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"),
    [
        (0, 1, "fp32"),
        pytest.param(1, 2, "bf16", marks=pytest.mark.drill),
        pytest.param(2, 4, "fp32", marks=pytest.mark.drill),
        (3, 2, "fp32"),
    ],
)
def test_what_deepspeed_saved_is_imported_element_by_element(tmp_path, stage, ranks, dtype):
    truth = {}
    for part in run_ranks(deepspeed_writes, ranks, str(tmp_path / "ds"), stage, dtype)[:1]:
        truth |= part
    done = run("import", tmp_path / "ds", tmp_path / "ours", "--model", "small")
    assert done.exit_code == 0, done.output
    checkpoint = open_checkpoint(tmp_path / "ours")
    assert checkpoint.step == checkpoint.trainer["optimizer_steps"] == 2
    wanted = STATES if stage else ("param",)
    assert set(checkpoint.states()) == set(wanted)
    full = {state: checkpoint.read_full(state) for state in wanted}
    assert len(full["param"]) == 33  # one of them does not train
    assert torch.equal(full["param"]["pos_embed"], small_model().pos_embed.to(getattr(torch, NAMES[dtype])).float())
    compared = 0
    for key, values in truth.items():
        name, state, start = key.rsplit("|", 2)
        if state in wanted:
            found = full[state][name].reshape(-1)[int(start) : int(start) + len(values)]
            assert found.tolist() == values, key
            compared += len(values)
    assert compared >= sum(t.numel() for tensors in full.values() for t in tensors.values())


def test_a_pickle_with_a_foreign_class_needs_trust_and_is_not_run_before(tmp_path):
    folder = tmp_path / "ds"
    deepspeed_files.write(folder, 1, {"param": {"w": torch.ones(3)}})
    target = next(folder.rglob("mp_rank_00_model_states.pt"))

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    state = torch.load(target, weights_only=False)
    torch.save({**state, "client": Evil()}, target)
    refused = CliRunner().invoke(app, ["ckpt", "import", str(folder), str(tmp_path / "out")])
    assert isinstance(refused.exception, CheckpointError)
    assert "--trust-pickle" in str(refused.exception)
    assert not (tmp_path / "ran").exists()
    trusted = run("import", folder, tmp_path / "out", "--trust-pickle")
    assert trusted.exit_code == 0, trusted.exception
    assert (tmp_path / "ran").exists()  # which is why trust is asked for


def test_a_directory_without_its_fp32_weights_is_not_taken_for_one_of_stage_0(tmp_path):
    tag = deepspeed_files.write(tmp_path, 1, {"param": {"w": torch.ones(3)}})
    next(tag.glob("*_optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks all \*_optim_states.pt"):
        deepspeed_files.read(tmp_path)


def test_a_latest_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="no folder next to it"):
        deepspeed_files.read(tmp_path)


def test_what_is_exported_for_deepspeed_is_read_by_its_own_tool(tmp_path):
    tensors = {"a.weight": torch.randn(7, 3), "b": torch.randn(5), "c": torch.randn(())}
    save(tmp_path / "run", 4, **tensors)
    done = run("export", tmp_path / "run", tmp_path / "ds", "--deepspeed")
    assert done.exit_code == 0, done.exception
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds"))
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(deepspeed_files.read(tmp_path / "ds").states["param"]["a.weight"], tensors["a.weight"])


def test_what_does_not_train_is_exported_for_deepspeed(tmp_path):
    weights = {"trains": torch.randn(7, 3), "fixed": torch.randn(5)}
    fragments = [Fragment(n, "param", 0, tuple(t.shape), t.reshape(-1)) for n, t in weights.items()]
    fragments += [Fragment("trains", state, 0, (7, 3), torch.full((21,), 0.5)) for state in ("exp_avg", "exp_avg_sq")]
    manager = CheckpointManager(tmp_path / "run", Alone(), CheckpointConfig(keep_last=99))
    optimizer = {"config": {"optim": {"name": "adamw", "lr": 0.1}}, "optimizer_steps": 4}
    manager.save(Snapshot(4, fragments, optimizer, {}), Identity(model="m"))
    done = run("export", tmp_path / "run", tmp_path / "ds", "--deepspeed")
    assert done.exit_code == 0, done.exception
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds"))
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    read = deepspeed_files.read(tmp_path / "ds").states
    assert all(torch.equal(read["param"][name], tensor) for name, tensor in weights.items())
    assert set(read.get("exp_avg", {"trains": None})) == {"trains"}


def deepspeed_resumes(exported: str, ours: str, stage: int) -> dict[str, Any]:
    """Let DeepSpeed load an export with all of its optimizer's states; return what differs, and the counters."""
    connect(RankInfo.from_env(), os.environ["SETFORMER_RENDEZVOUS"])
    checkpoint = open_checkpoint(Path(ours))
    model = load_trained(Path(ours), "plain").model
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    config = {"train_batch_size": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=9.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.load_checkpoint(exported)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    (adam,) = engine.optimizer.optimizer.state.values()
    flat = {"param": engine.optimizer.single_partition_of_fp32_groups[0], **adam}
    stored = {state: checkpoint.read_full(state) for state in STATES}
    wrong, offset = [], 0
    for parameter in engine.optimizer.round_robin_bit16_groups[0]:  # the order in which DeepSpeed cuts its vectors
        for state in STATES:
            value = flat[state][offset : offset + parameter.numel()].view(parameter.shape)
            whole = stored[state][names[id(parameter)]]
            if not torch.equal(value, whole) or (state == "param" and not torch.equal(parameter, whole)):
                wrong.append(f"{names[id(parameter)]} {state}")
        offset += parameter.numel()
    assert offset == sum(parameter.numel() for parameter in model.parameters())
    group = engine.optimizer.param_groups[0]
    return {"wrong": wrong, "steps": engine.global_steps, "skipped": engine.skipped_steps, "lr": group["lr"]}


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_continues_from_an_export_with_every_state_in_its_place(trained, tmp_path, stage):
    exported = tmp_path / "ds"
    done = run("export", trained, exported, "--deepspeed")
    assert done.exit_code == 0, done.exception
    (found,) = run_ranks(deepspeed_resumes, 1, str(exported), str(trained), stage)
    checkpoint = open_checkpoint(trained)
    lr = checkpoint.trainer["config"]["optim"]["lr"]
    assert found == {"wrong": [], "steps": checkpoint.step, "skipped": 0, "lr": lr}
    assert "load_checkpoint" in (exported / "README.md").read_text()


def test_steps_that_were_skipped_are_known_both_ways(tmp_path):
    states = {state: {"w": torch.ones(3)} for state in STATES}
    deepspeed_files.write(tmp_path, 7, states, updates=5)
    found = deepspeed_files.read(tmp_path)
    assert (found.steps, found.updates) == (7, 5)


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    ended = setformer(*train_words(digits, out, "schedule.epochs=1", ranks=1))
    assert ended.code == 0, ended.err
    return out / "demo"


def test_a_run_with_other_classes_begins_with_the_weights_of_another_and_continues_without_them(
    digits: Path, trained: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        for label in range(4):
            shutil.copytree(digits / "images" / split / str(label), tmp_path / "images" / split / str(label))
        pack_image_folder(tmp_path / "images" / split, tmp_path / "data" / split)
    shutil.copytree(trained / "checkpoints", tmp_path / "before" / "checkpoints")
    words = train_words(
        tmp_path / "data", tmp_path, f"model.weights={tmp_path / 'before'}", "~schedule.epochs", "schedule.steps=2",
        "~schedule.warmup_epochs", "batch.global_size=16", "checkpoint.every_steps=1", "optim.lr=1e-30",
        "schedule.warmup_lr=0", "schedule.min_lr=0", "optim.weight_decay=0", ranks=1,
    )  # fmt: skip
    tried = setformer(*words, "--dry-run")
    assert tried.code == 0, tried.err
    assert "left as drawn from the seed: head.fc.bias, head.fc.weight" in " ".join(tried.out.split())
    ended = setformer(*words)
    assert ended.code == 0, ended.err
    assert "left as drawn from the seed: head.fc.bias, head.fc.weight" in " ".join(ended.err.split())
    ours, before = open_checkpoint(tmp_path / "demo"), open_checkpoint(trained)
    state = "ema" if before.metrics["ema_top1"] > before.metrics["top1"] else "param"
    theirs, plain, averaged = before.read_full(state), ours.read_full(), ours.read_full("ema")
    for name in theirs.keys() - {"head.fc.weight", "head.fc.bias"}:  # a learning rate of nothing leaves them
        assert torch.equal(plain[name], theirs[name]), name
        assert torch.equal(averaged[name], theirs[name]), name
    assert plain["head.fc.weight"].shape[0] == 4
    shutil.rmtree(tmp_path / "before")
    shutil.rmtree(layout.step_folder(tmp_path / "demo" / "checkpoints", 2))
    again = setformer(*words)
    assert again.code == 0, again.err
    assert "resumed at step 1" in again.err


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """Let every write beyond a few bytes of a file fail, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(kind: type[Exception], *words: object) -> str:
    done = run(*words)
    assert isinstance(done.exception, kind), done.exception
    return str(done.exception)


def test_a_destination_that_is_there_or_cannot_be_written_stays_as_it_is(tmp_path):
    save(tmp_path / "run" / "checkpoints", 4, w=torch.randn(500))
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for dest in ("file", "file/below"):
        refused(ConfigError, "export", tmp_path / "run", tmp_path / dest, "--deepspeed")
    with small_files_only():
        text = refused(ConfigError, "export", tmp_path / "run", tmp_path / "out", "--deepspeed")
    assert "out cannot be written" in text
    assert sorted(tmp_path.rglob("*")) == before
    assert run("export", tmp_path / "run", tmp_path / "ds", "--deepspeed").exit_code == 0
    assert "is a file" in refused(ConfigError, "import", tmp_path / "ds", tmp_path / "file")
    with small_files_only():
        refused(CheckpointError, "import", tmp_path / "ds", tmp_path / "new" / "checkpoints")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    assert "step-00000004 already exists" in refused(
        ConfigError, "import", tmp_path / "ds", tmp_path / "run" / "checkpoints"
    )


def test_nothing_is_imported_into_a_run_that_trains(tmp_path):
    deepspeed_files.write(tmp_path / "ds", 1, {"param": {"w": torch.ones(3)}})
    holder = (
        "import sys; from pathlib import Path; from launch.ranks.lock import held; "
        "from setformer_dist.core.comm import Alone"
    )
    code = f"{holder}\nwith held(Path(sys.argv[1]), Alone()): print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused(LaunchError, "import", tmp_path / "ds", tmp_path / "run" / "checkpoints")
        assert not (tmp_path / "run" / "checkpoints").exists()
        other.stdin.close()
    assert run("import", tmp_path / "ds", tmp_path / "run" / "checkpoints").exit_code == 0


def test_plain_timm_loads_what_is_exported(trained, tmp_path):
    done = run("export", trained, tmp_path / "out", "--weights", "plain")
    assert done.exit_code == 0, done.exception
    card = (tmp_path / "out" / "README.md").read_text()
    call = next(line for line in card.splitlines() if "timm.create_model" in line)
    code = call.partition("= ")[2].replace('"local-dir:out"', repr(f"local-dir:{tmp_path / 'out'}"))
    model = eval(code, {"timm": timm})  # the line of the card, as a reader would run it
    weights = open_checkpoint(trained).read_full()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert "| top1 |" in card


class OwnNet(nn.Module):
    """Known to timm, and no more like its models than it must be."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean((2, 3)))


def own_net(pretrained: bool = False, num_classes: int = 10, **_: Any) -> nn.Module:
    return OwnNet(num_classes)


def test_the_card_of_a_model_of_ones_own_loads_its_weights(trained, tmp_path, monkeypatch):
    timm.models.register_model(own_net)
    model = OwnNet(10)

    def own(*args: Any, **options: Any) -> Trained:
        made = load_trained(*args, **options)
        table = made.config.model.model_copy(update={"name": "own_net", "args": {}})
        return replace(made, model=model, config=made.config.model_copy(update={"model": table}))

    monkeypatch.setattr(export, "load_trained", own)
    done = run("export", trained, tmp_path / "out")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert f"import {__name__}  # registers the architecture with timm" in card
    code = [line for line in card if line.startswith(("import", "about =", "model =", "transform ="))]
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec("\n".join(code), found)  # the lines of the card, as a reader would run them
    assert torch.equal(found["model"].head.weight, model.head.weight)
    assert found["about"]["label_names"] == [str(digit) for digit in range(10)]
    assert found["transform"] is not None


def test_weights_with_two_names_are_written_under_both(trained, tmp_path, monkeypatch):
    def tied(*args: Any, **options: Any) -> Trained:
        made = load_trained(*args, **options)
        made.model.twin = made.model.get_classifier()
        made.model.part = nn.Parameter(made.model.twin.weight.data[:3])
        return made

    monkeypatch.setattr(export, "load_trained", tied)
    done = run("export", trained, tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "out" / "model.safetensors")
    [name] = {name for name, tensor in found.items() if torch.equal(tensor, found["twin.weight"])} - {"twin.weight"}
    assert torch.equal(found[name][:3], found["part"])


def test_show_ls_and_verify_of_a_run(trained, tmp_path):
    shown = json.loads(run("show", trained, "--json").output)
    assert shown["step"] == 22
    assert shown["elements"]["param"] == shown["elements"]["exp_avg"] > 100_000
    assert shown["trainer"]["stream"]["seed"] == 0
    listed = json.loads(run("ls", trained, "--verify", "--json").output)
    assert [entry["fault"] for entry in listed] == [None] * len(listed)
    chosen = setformer("eval", str(trained), "--best", "--json")
    assert [entry["path"] for entry in listed if entry["best"]] == [json.loads(chosen.out)["checkpoint"]], chosen.err
    copy = tmp_path / "demo"
    shutil.copytree(trained / "checkpoints", copy)
    assert run("verify", copy).exit_code == 0
    path = next(iter(layout.step_folders(copy))) / layout.rank_file(0, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    broken = run("verify", copy)
    assert broken.exit_code == 4
    assert "is damaged" in broken.output.replace("\n", "")


def test_the_best_is_listed_by_the_metric_of_the_run(tmp_path):
    for step, top1 in ((1, 0.5), (2, 0.75), (3, 0.25)):
        save(tmp_path / "checkpoints", step, top1=top1, w=torch.ones(4))

    def best() -> list[int]:
        return [entry["step"] for entry in json.loads(run("ls", tmp_path, "--json").output) if entry["best"]]

    assert best() == [2]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"checkpoint": {"best_mode": "min"}}))
    assert best() == [3]
    assert run("ls", tmp_path).output.count("best") == 1
    for damaged in ("{", json.dumps({"checkpoint": {"no_such_key": 1}}), json.dumps({"checkpoint": []})):
        config.write_text(damaged)
        assert best() == []
    save(tmp_path / "checkpoints", 4, top1=0.5, w=torch.ones(4), kept={"best_mode": "min"})
    assert best() == [3], "the newest checkpoint says it, as for --best"


def test_diff_names_parameters_metrics_and_config(tmp_path):
    a = save(tmp_path / "a", 1, top1=0.5, w=torch.ones(4), same=torch.zeros(2), gone=torch.ones(1))
    b = save(tmp_path / "b", 2, top1=0.75, w=torch.tensor([1.0, 1, 1, 3]), same=torch.zeros(2))
    found = json.loads(run("diff", a, b, "--json").output)
    assert found["parameters"] == {"w": [2.0, 2.0]}
    assert found["only_first"] == ["gone"]
    assert found["metrics"] == {"top1": [0.5, 0.75]}
    assert found["config"] == {"optim.lr": [0.5, 0.75]}
    text = run("diff", a, b).output
    assert "1 of 2 common parameters are the same bit by bit" in text


def test_prune_keeps_what_verifies(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        save(root, step, w=torch.ones(4))
    path = layout.step_folder(root, 4) / layout.rank_file(0, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)  # same size: only reading it tells
    words = ("prune", tmp_path, "--keep-last", 1, "--keep-best", 0)
    dry = run(*words, "--dry-run")
    assert dry.exit_code == 0, dry.exception
    assert len(layout.step_folders(root)) == 4
    assert run(*words).exit_code == 0
    assert [layout.step_of(folder) for folder in layout.step_folders(root)] == [4, 3]
    assert open_checkpoint(root).step == 3


@pytest.mark.parametrize("words", ["show", "verify", "diff", "export", "import", "prune", "ls"])
def test_every_command_has_an_example(words):
    done = run(words, "--help")
    assert done.exit_code == 0
    assert f"setformer ckpt {words}" in done.output
    assert sys.executable not in done.output


def card_of(run_folder: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> str:
    """Export a run that is changed as it is loaded, and return the program of its card."""
    monkeypatch.setattr(export, "load_trained", lambda *args, **options: change(load_trained(*args, **options)))
    done = run("export", run_folder, dest)
    assert done.exit_code == 0, done.output
    return (dest / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def test_the_card_of_a_model_without_classes_asks_for_none(trained, tmp_path, monkeypatch):
    def encoder(made: Trained) -> Trained:
        task = build_task(TaskConfig(name="simmim", args={}), made.classes)
        made.model.reset_classifier(0)
        return replace(made, task=task)

    program = card_of(trained, tmp_path / "out", monkeypatch, encoder)
    assert "print(features.shape)" in program
    assert "label_names" not in program
    assert "parameters, trained by" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("table", [{"pixels": "uint16"}, {"mean": (0.5,) * 4, "std": (0.5,) * 4}])
def test_the_card_of_other_pixels_reads_them_as_the_run_does(trained, tmp_path, monkeypatch, table):
    def other(made: Trained) -> Trained:
        return replace(made, config=made.config.model_copy(update={"data": made.config.data.model_copy(update=table)}))

    program = card_of(trained, tmp_path / "out", monkeypatch, other)
    assert 'setformer.load("out")' in program
    assert 'convert("RGB")' not in program
