"""eval.patience: a run ends early after evaluations that were no better, on any ranks, interrupted or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.reader import open_checkpoint
from launch.testing.commands import losses, setformer, train_words
from setformer_dist.core.ledger import read_events
from tests.integration.test_bad_input import assert_one_sentence

# So small a learning rate changes no prediction: the first evaluation is the best, and no later one is better.
STANDING_STILL = ("~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=9", "optim.lr=1e-12",
                  "schedule.min_lr=0", "run.log_every=1", "eval.every_steps=2", "eval.every_epochs=0",
                  "checkpoint.every_steps=3")  # fmt: skip


def run_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = open_checkpoint(run).trainer["run"]
    return state


def words(digits: Path, out: Path, *more: str, ranks: int = 1) -> list[str]:
    return train_words(digits, out, *STANDING_STILL, *more, ranks=ranks)


@pytest.mark.drill
def test_a_run_ends_early_and_goes_on_with_more_patience(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    ended = setformer(*words(digits, tmp_path, "eval.patience=2", ranks=2))
    assert ended.code == 0, ended.err
    told = "ended early and saved at step 6: 2 evaluations without a better top1 than at step 2"
    assert told in ended.out + ended.err
    assert run_state(run)["since_best"] == 2
    assert "top1" in json.loads((run / "checkpoints" / "step-00000006" / "manifest.json").read_text())["metrics"]
    assert json.loads((run / "summary.json").read_text())["finished"]
    again = setformer(*words(digits, tmp_path, "eval.patience=2", ranks=1))  # nothing is trained again
    assert again.code == 0, again.err
    assert told in again.out + again.err
    assert [event["why"] for event in read_events(run) if event["event"] == "ended"] == ["done", "done"]
    more = setformer(*words(digits, tmp_path, "eval.patience=3", ranks=2))
    assert more.code == 0, more.err
    assert "ended early and saved at step 8: 3 evaluations" in more.out + more.err
    to_the_end = setformer(*words(digits, tmp_path, ranks=2))
    assert to_the_end.code == 0, to_the_end.err
    whole = setformer(*words(digits, tmp_path / "whole", ranks=2))
    assert whole.code == 0, whole.err
    assert losses(run) == losses(tmp_path / "whole" / "demo")


def test_an_evaluation_of_no_date_does_not_count(digits: Path, tmp_path: Path) -> None:
    """The end of a shorter run evaluates step 3; the run that goes on from there counts as if it had not."""
    change = 'checkpoint.allow_changes=["schedule"]'
    short = setformer(*words(digits, tmp_path, "eval.patience=2", "schedule.steps=3", change))
    assert short.code == 0, short.err
    assert run_state(tmp_path / "demo")["since_best"] == 0
    ended = setformer(*words(digits, tmp_path, "eval.patience=2", change))
    assert ended.code == 0, ended.err
    assert "ended early and saved at step 6" in ended.out + ended.err


@pytest.mark.parametrize("key", ["eval.patience", "patience"])
def test_patience_needs_evaluations(digits: Path, tmp_path: Path, key: str) -> None:
    refused = setformer(*train_words(digits, tmp_path, f"{key}=2", "eval.every_epochs=0", ranks=1))
    assert_one_sentence(refused, 2, "eval.patience")
    assert not (tmp_path / "demo").exists()
