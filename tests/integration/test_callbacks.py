"""A callback in a file outside the package, through the command line: order of events, an exception, and a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.testing.commands import losses, setformer, train_words
from setformer_dist.core.ledger import read_events

# Notes every event; fails at a step while a file is there.
OUTSIDE = """
import json
from pathlib import Path
from setformer_dist.callbacks.build import register_callback
from setformer_dist.core.callback import Callback


class Notes(Callback):
    def __init__(self, args):
        self.path, self.fails_at, self.seen = Path(args["path"]), args["fails_at"], 0

    def note(self, event, step, **values):
        with self.path.open("a") as file:
            print(json.dumps({"event": event, "step": step, **values}), file=file)

    def on_run_start(self, run):
        resumed = run.resumed_from and run.resumed_from.name
        self.note("start", run.step, total=run.total_steps, resumed=resumed, seen=self.seen, run=run.folder.name)

    def on_step_end(self, step):
        self.seen += 1
        self.note("step", step)
        if step == self.fails_at and self.path.with_name("broken").exists():
            raise ValueError("no\\nanswer")

    def on_metrics(self, step, metrics):
        self.note("metrics", step, loss=metrics["loss"])

    def on_evaluation_end(self, step, metrics):
        self.note("evaluation", step, top1=metrics["top1"])

    def on_checkpoint_saved(self, step, folder):
        assert (folder / "manifest.json").exists()
        self.note("saved", step)

    def on_run_end(self, end):
        self.note("end", end.step, signum=end.signum, top1=end.evaluation["top1"])

    def on_exception(self, error):
        self.note("exception", 0, error=type(error).__name__)

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]


class Watcher(Notes):
    pass


register_callback("notes", Notes)
register_callback("watcher", Watcher)
"""


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.drill
def test_a_callback_outside_the_package_fails_is_mended_and_resumes(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(OUTSIDE)
    (tmp_path / "broken").touch()
    notes, watched = tmp_path / "notes.jsonl", tmp_path / "watched.jsonl"
    words = train_words(digits, tmp_path / "runs", "~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=8",
                        "run.log_every=2", "eval.every_steps=4", "checkpoint.every_steps=4",
                        "checkpoint.asynchronous=false", 'run.imports=["my_callbacks"]',
                        'run.callbacks=["notes", "watcher"]', f"run.callback_args.notes={{path='{notes}', fails_at=7}}",
                        f"run.callback_args.watcher={{path='{watched}', fails_at=0}}", ranks=2)  # fmt: skip
    failed = setformer(*words, cwd=tmp_path)
    assert failed.code == 7, failed.err
    assert "callback 'notes' failed in on_step_end at step 7 (ValueError: no answer)" in failed.err
    run = tmp_path / "runs" / "demo"
    log = "".join(path.read_text() for path in (run / "logs").glob("*"))
    assert 'raise ValueError("no\\nanswer")' in log  # the traceback
    assert events(watched)[-1] == {"event": "exception", "step": 0, "error": "TrainingError"}
    assert [(e["event"], e["step"]) for e in events(notes)] == [
        ("start", 0),
        *(("step", 1), ("step", 2), ("metrics", 2), ("step", 3)),
        *(("step", 4), ("metrics", 4), ("evaluation", 4), ("saved", 4)),
        *(("step", 5), ("step", 6), ("metrics", 6), ("step", 7)),
    ]
    notes.unlink()
    (tmp_path / "broken").unlink()
    ended = setformer(*words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    seen = events(notes)
    assert [(e["event"], e["step"]) for e in seen] == [
        ("start", 4),
        *(("step", 5), ("step", 6), ("metrics", 6), ("step", 7)),
        *(("step", 8), ("metrics", 8), ("evaluation", 8), ("saved", 8)),
        ("end", 8),
    ]
    assert seen[0] == {
        "event": "start", "step": 4, "total": 8, "resumed": "step-00000004", "seen": 4, "run": "demo",
    }  # fmt: skip
    assert seen[-1]["signum"] is None
    assert {e["step"]: e["loss"] for e in seen if e["event"] == "metrics"}[8] == losses(run)["train", 8][0]


EARLY = """
from pathlib import Path
from setformer_dist.callbacks.build import register_callback
from setformer_dist.core.callback import Callback
from setformer_dist.core.ranks import RankInfo


class Patience(Callback):
    def __init__(self, args):
        self.flag = Path(args["flag"])

    def on_evaluation_end(self, step, metrics):
        self.should_stop = self.flag.exists() and step >= 4


class Budget(Callback):
    every_rank = True

    def __init__(self, args):
        self.steps = args["steps"]

    def on_step_end(self, step):
        self.should_stop = RankInfo.from_env().rank == 1 and step == self.steps


register_callback("patience", Patience)
register_callback("budget", Budget)
"""


@pytest.mark.drill
def test_a_callback_ends_the_run_early_on_all_ranks(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(EARLY)
    (tmp_path / "flag").touch()
    words = train_words(digits, tmp_path / "runs", "~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=12",
                        "run.log_every=2", "eval.every_steps=4", "checkpoint.every_steps=5",
                        'run.imports=["my_callbacks"]', 'run.callbacks=["patience", "budget"]',
                        f"run.callback_args.patience.flag={tmp_path / 'flag'}", "run.callback_args.budget.steps=6",
                        ranks=2)  # fmt: skip
    run = tmp_path / "runs" / "demo"
    # At the evaluation in which rank 0 asks: its metrics are in that step's checkpoint, and a report is there.
    ended = setformer(*words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "ended early and saved at step 4: callback 'patience' asked for it" in ended.out + ended.err
    manifest = json.loads((run / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert "top1" in manifest["metrics"]
    assert json.loads((run / "summary.json").read_text())["finished"]
    assert (run / "report.html").exists()
    assert [event["why"] for event in read_events(run) if event["event"] == "ended"] == ["done"]
    # Rank 1 alone asks after step 6: both ranks end after step 7, which is evaluated though no evaluation is due.
    (tmp_path / "flag").unlink()
    ended = setformer(*words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "ended early and saved at step 7: a callback asked for it" in ended.out + ended.err
    manifest = json.loads((run / "checkpoints" / "step-00000007" / "manifest.json").read_text())
    assert "top1" in manifest["metrics"]
    # Nobody asks any more: the run comes to its end, with the losses of a run that was never ended early.
    ended = setformer(*words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    whole = setformer(*[word for word in words if "callback" not in word], "run.name=whole", cwd=tmp_path)
    assert whole.code == 0, whole.err
    there, here = losses(tmp_path / "runs" / "whole"), losses(run)
    assert {key: here[key] for key in there} == there


def test_names_that_nobody_registered_are_refused(digits: Path, tmp_path: Path) -> None:
    words = train_words(digits, tmp_path, 'run.callbacks=["notes"]', ranks=1)
    for ended in (setformer(*words, "--dry-run"), setformer(*words)):
        assert ended.code == 2
        assert "run.callbacks names 'notes', and no callback is registered under that name" in ended.err
        assert not (tmp_path / "demo").exists()
