"""Continuations of real runs: another global batch, an evaluation that a stop had put off, a second run at one time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.manager import CheckpointManager
from checkpoints.reader import open_checkpoint
from launch.ranks.lock import held
from launch.testing.commands import setformer, train_words
from setformer_dist.core.comm import Alone
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on one rank with all its checkpoints."""
    out = tmp_path_factory.mktemp("finished")
    ended = setformer(*train_words(digits, out, "checkpoint.keep_last=99", ranks=1))
    assert ended.code == 0, ended.err
    return out / "demo"


def at_step(finished: Path, out: Path, step: int) -> Path:
    """Copy the run as it was at one of its checkpoints."""
    run = out / "demo"
    shutil.copytree(finished, run)
    for folder in layout.step_folders(run / "checkpoints"):
        if (layout.step_of(folder) or 0) > step:
            shutil.rmtree(folder)
    return run


def test_after_another_global_batch_the_new_count_of_steps_is_gone_on_with(
    digits: Path, tmp_path: Path, finished: Path
) -> None:
    run = at_step(finished, tmp_path, 20)
    (run / "guard.json").write_text(json.dumps({"passed_over": [13], "skipped": []}))
    words = train_words(
        digits,
        tmp_path,
        "checkpoint.keep_last=99",
        f"batch.global_size={2 * 64}",
        'checkpoint.allow_changes=["global_batch"]',
        ranks=1,
    )
    ended = setformer(*words)
    assert ended.code == 0, ended.err
    root = run / "checkpoints"
    assert [layout.step_of(folder) for folder in layout.step_folders(root)] == [11, 10, 5]
    kept = sorted(path.name.rpartition("-")[0] for path in (root / layout.ASIDE).iterdir() if path.is_dir())
    assert kept == [f"superseded-step-{step:08d}" for step in (10, 15, 20)]
    assert not (run / "guard.json").exists()
    shutil.rmtree(layout.step_folder(root, 11))
    again = setformer(*words)
    assert again.code == 0, again.err
    assert "resumed at step 10 " in again.err + again.out
    assert open_checkpoint(run).step == 11


def test_an_evaluation_that_a_stop_put_off_is_made_and_saved(digits: Path, tmp_path: Path, finished: Path) -> None:
    run = at_step(finished, tmp_path, 22)
    owing(layout.step_folder(run / "checkpoints", 22))
    ended = setformer(*train_words(digits, tmp_path, "checkpoint.keep_last=99", ranks=1))
    assert ended.code == 0, ended.err
    checkpoint = open_checkpoint(run)
    assert checkpoint.step == 22
    assert not checkpoint.trainer["run"]["evaluation_owed"]
    assert checkpoint.metrics["top1"] == open_checkpoint(finished).metrics["top1"]
    assert checkpoint.trainer["run"]["best"]["step"] == 22


def owing(folder: Path) -> None:
    """Write the run's last checkpoint as a stop within its evaluation leaves it: without metrics."""
    old = open_checkpoint(folder)
    trainer = json.loads(json.dumps(old.trainer))
    trainer["run"] |= {"evaluation_owed": True, "evaluation": {}, "best": {"metric": "top1", "value": None, "step": 0}}
    fragments = [
        Fragment(name, state, 0, tuple(tensor.shape), tensor.reshape(-1))
        for state in old.states()
        for name, tensor in old.read_full(state).items()
    ]
    shutil.rmtree(folder)
    CheckpointManager(folder.parent, Alone(), CheckpointConfig(keep_last=99)).save(
        Snapshot(old.step, fragments, trainer, {}), old.identity
    )


def test_a_second_run_in_one_folder_is_refused_and_changes_nothing(
    digits: Path, tmp_path: Path, finished: Path
) -> None:
    run = at_step(finished, tmp_path, 22)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with held(run, Alone()):
        refused = setformer(*train_words(digits, tmp_path, "checkpoint.keep_last=99", ranks=1))
    assert refused.code == 5, refused.err
    assert "another process trains in run folder" in refused.err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_a_run_that_is_done_is_made_longer_bit_by_bit(digits: Path, tmp_path: Path) -> None:
    steady = ("schedule.name=constant", "checkpoint.every_steps=11")
    longer = (*steady, "schedule.epochs=2", 'checkpoint.allow_changes=["schedule"]')
    whole = setformer(*train_words(digits, tmp_path / "whole", *longer, ranks=1))
    assert whole.code == 0, whole.err
    first = setformer(*train_words(digits, tmp_path, *steady, ranks=1))
    assert first.code == 0, first.err
    refused = setformer(*train_words(digits, tmp_path, *longer[:-1], ranks=1))
    assert refused.code == 2, refused.err
    assert 'checkpoint.allow_changes = ["schedule"]' in refused.err
    ended = setformer(*train_words(digits, tmp_path, *longer, ranks=1))
    assert ended.code == 0, ended.err
    assert "schedule.epochs was 1 and is 2 from here on" in ended.err + ended.out
    run = tmp_path / "demo"
    assert '"event": "changed"' in (run / "ledger.jsonl").read_text()
    found, wanted = open_checkpoint(run), open_checkpoint(tmp_path / "whole" / "demo")
    assert found.step == wanted.step == 44
    for state in wanted.states():
        theirs = wanted.read_full(state)
        assert all(tensor.equal(theirs[name]) for name, tensor in found.read_full(state).items()), state
    again = setformer("train", "--from", str(run), "--ranks", "1")
    assert again.code == 0, again.err
    assert "schedule.epochs was 1 at first and changed on the way" in again.err + again.out
    shorter = setformer(*train_words(digits, tmp_path, *steady, 'checkpoint.allow_changes=["schedule"]', ranks=1))
    assert shorter.code != 0
    assert "is at step 44, and the run now ends at step 22" in shorter.err
    assert json.loads((run / "config.json").read_text())["schedule"]["epochs"] == 2
    dry = setformer(
        *train_words(digits, tmp_path, *steady, 'checkpoint.allow_changes=["schedule"]', ranks=1), "--dry-run"
    )
    assert "is at step 44, and the run now ends at step 22" in dry.err


def test_a_run_that_is_made_shorter_is_evaluated_at_its_end(digits: Path, tmp_path: Path) -> None:
    words = ("schedule.name=constant", 'checkpoint.allow_changes=["schedule"]', "~schedule.epochs")
    whole = setformer(*train_words(digits, tmp_path, *words, "schedule.steps=8", ranks=1))
    assert whole.code == 0, whole.err
    run = tmp_path / "demo"
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    ended = setformer(*train_words(digits, tmp_path, *words, "schedule.steps=5", ranks=1))
    assert ended.code == 0, ended.err
    assert open_checkpoint(run).step == 5
    assert "top1" in open_checkpoint(run).metrics
    assert json.loads((run / "summary.json").read_text())["evaluation"]
