"""Recipes through the command line: optimizer, schedule, loss, layer decay, layout and a teacher; cut and gone on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from launch.testing.commands import Ended, losses, setformer, start, train_words, wait_for

RECIPE = (
    "optim.name=lion",
    "optim.lr=3e-4",
    "optim.layer_decay=0.8",
    "schedule.name=wsd",
    "schedule.decay_steps=6",
    "task.args.loss=focal",
    'task.args.class_weights={"3"=2.0}',
    "data.channels_last=true",
)


@pytest.fixture(scope="module")
def teacher(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    ended = setformer(*train_words(digits, out, "optim.lr=2e-3", "schedule.epochs=3", ranks=1))
    assert ended.code == 0, ended.err
    return out / "demo"


def test_a_recipe_with_a_teacher_goes_on_under_another_layout(digits: Path, teacher: Path, tmp_path: Path) -> None:
    learns = f"distill.teacher={teacher}"
    ended = setformer(*train_words(digits, tmp_path / "whole", *RECIPE, learns, ranks=2))
    assert ended.code == 0, ended.err
    moved = shutil.copytree(teacher, tmp_path / "moved")
    process = start(*train_words(digits, tmp_path / "parts", *RECIPE, learns, "zero.stage=3", ranks=2))
    wait_for(tmp_path / "parts" / "demo" / "checkpoints" / "step-00000005" / "manifest.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    again = (*RECIPE, f"distill.teacher={moved}", "zero.stage=1")
    ended = setformer(*train_words(digits, tmp_path / "parts", *again, ranks=1))
    assert ended.code == 0, ended.err
    ours, theirs = losses(tmp_path / "parts" / "demo"), losses(tmp_path / "whole" / "demo")
    assert ours.keys() == theirs.keys()
    for place, (loss, _) in theirs.items():
        assert ours[place][0] == pytest.approx(loss, rel=1e-4), place
    said = setformer("eval", str(tmp_path / "whole" / "demo"))
    assert said.code == 0, said.err
    without = refused(digits, tmp_path / "parts", *RECIPE)
    assert "was trained with teacher" in without.err
    assert "and this run has no teacher" in without.err
    refuse_another_teacher(digits, tmp_path)


def refuse_another_teacher(digits: Path, tmp_path: Path) -> None:
    """The student itself is a teacher of the same classes, but not the one that the run has."""
    other = refused(digits, tmp_path / "parts", *RECIPE, f"distill.teacher={tmp_path / 'whole' / 'demo'}")
    assert "put the same one back" in other.err


def refused(data: Path, out: Path, *words: str) -> Ended:
    ended = setformer(*train_words(data, out, *words, ranks=1))
    assert ended.code != 0
    assert "Traceback" not in ended.err
    return ended


def test_a_teacher_that_does_not_fit_is_refused_before_training(digits: Path, teacher: Path, tmp_path: Path) -> None:
    for words, said in (
        (("distill.teacher=nowhere",), "nowhere"),
        (("distill.share=0.3",), "distill.teacher is missing"),
        ((f"distill.teacher={teacher}", "data.mean=[0.4,0.4,0.4]"), "was trained with data.mean"),
        ((f"distill.teacher={teacher}", "data.image_size=40", "data.augment.crop=none"), "data.image_size = 16"),
    ):
        assert said in refused(digits, tmp_path, *words).err


def test_a_run_without_a_teacher_writes_nothing_of_one(teacher: Path) -> None:
    trainer = json.loads(next((teacher / "checkpoints").glob("step-*/trainer.json")).read_text())
    assert "teacher" not in trainer
