"""Every example runs as its first lines say, shortened, and leaves a run that the commands read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.testing.commands import ROOT, Ended, module, setformer

EXAMPLES = ("own_callback", "own_data", "own_loop", "own_model", "own_task", "train", "use_checkpoint")


def example(name: str, *words: object, cwd: Path) -> Ended:
    ended = module(f"examples.{name}", *map(str, words), cwd=cwd)
    assert ended.code == 0, ended.err
    return ended


def test_every_example_is_run_here() -> None:
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.py")) == list(EXAMPLES)


@pytest.fixture(scope="module")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder as `make demo` leaves it, with a run of `examples/train.py`."""
    root = tmp_path_factory.mktemp("examples")
    (root / "runs").mkdir()
    (root / "runs" / "demo-data").symlink_to(digits)
    said = example("train", "--steps", 6, cwd=root).out
    assert "half way, at step 3: {'loss': " in said
    assert "at the end, at step 6: {'loss': " in said
    return root


def test_a_run_from_python_is_read_by_the_commands(place: Path) -> None:
    run = "runs/from-python"
    for words, said in (
        (("runs", "ls", "runs"), "from-python"),
        (("runs", "show", run), "done"),
        (("ckpt", "ls", run, "--verify"), "verified"),
        (("eval", run), "top-1"),
        (("predict", run, str(next((place / "runs/demo-data/images/val/3").iterdir()))), "%"),
    ):
        ended = setformer(*words, cwd=place)
        assert ended.code == 0, ended.err
        assert said in ended.out
    assert (place / run / "report.html").exists()


def test_use_checkpoint(place: Path) -> None:
    images = sorted((place / "runs/demo-data/images/val/3").iterdir())[:2]
    said = example("use_checkpoint", "runs/from-python", *images, cwd=place).out
    assert "10 classes" in said
    assert said.count(".png: ") == 2
    assert "torch.Size([1, 10])" in said


def test_own_callback(place: Path) -> None:
    said = example("own_callback", "--steps", 4, cwd=place).out
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("step ")] == ["step 2", "step 4"]


def test_own_data(tmp_path: Path) -> None:
    said = example("own_data", "--steps", 4, cwd=tmp_path).out
    assert "'top1': " in said
    assert "('left', 'right') tensor([[" in said


def test_own_model(place: Path) -> None:
    assert "'top1': " in example("own_model", "--steps", 6, cwd=place).out
    refused = setformer("eval", "runs/own-model", cwd=place)
    assert refused.code == 4
    assert len(refused.error_lines) == 1
    assert "its code (Patches) was given to the run as an object, and no file holds it: give it again" in refused.err
    ended = setformer("ckpt", "ls", "runs/own-model", "--verify", cwd=place)
    assert ended.code == 0, ended.err


def test_own_task(place: Path) -> None:
    assert "'top1': " in example("own_task", "--steps", 6, cwd=place).out
    refused = setformer("eval", "runs/own-task", cwd=place)
    assert refused.code == 4
    assert "task.name = 'poly' is not a task" in refused.err
    shutil.copytree(ROOT / "examples", place / "examples")  # as the user's own folder
    scored = setformer("eval", "runs/own-task", "--import", "examples.own_task", cwd=place)
    assert scored.code == 0, scored.err
    assert "top-1" in scored.out


def test_own_loop(place: Path) -> None:
    said = example("own_loop", "--steps", 11, cwd=place).out
    assert "step 10 loss" in said
    assert "top-1 " in said
