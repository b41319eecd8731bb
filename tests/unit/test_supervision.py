"""What the supervisor decides and records: verdicts, the ledger's arithmetic, the heartbeat."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch import entry
from launch.history.show import list_runs, show_run
from launch.ranks import attempt
from launch.ranks.attempt import AttemptError, FolderLostError
from launch.ranks.logs import LOG_DIR_VARIABLE
from launch.ranks.restarts import Failure, GiveUp, Restart, RestartConfig, verdict
from launch.ranks.supervise import how_to_resume, run_supervised
from launch.run.config import load_run
from setformer_dist.core import ledger
from setformer_dist.core.errors import ConfigError, TransientError
from setformer_dist.core.heartbeat import FD_VARIABLE, Heartbeat, Pulse

DEMO = Path(__file__).parent.parent.parent / "configs" / "runs" / "demo.toml"
POLICY = RestartConfig(limit=4, window_minutes=10, backoff_s=1, backoff_max_s=6, same_step=3)


def failures(*steps, how="killed", every=1.0):
    return [Failure(at * every, step, how) for at, step in enumerate(steps)]


def test_a_first_death_is_followed_by_a_restart():
    assert verdict(failures(40), POLICY) == Restart(1)


def test_hosts_that_are_lost_at_one_step_are_not_the_runs_own_failure():
    assert isinstance(verdict(failures(40, 40, 40), POLICY), GiveUp)
    assert isinstance(verdict(failures(40, 40, 40, how="host"), POLICY), Restart)
    assert isinstance(verdict([*failures(40, 40, how="host"), Failure(9, 40, "killed")], POLICY), Restart)


def test_the_wait_doubles_without_progress_and_begins_again_with_it():
    assert verdict(failures(40, 39), POLICY) == Restart(2)
    assert verdict(failures(40, 39, 38), POLICY) == Restart(4)
    assert verdict(failures(40, 39, 38, 37), POLICY) == Restart(6)
    assert verdict(failures(40, 39, 60), POLICY) == Restart(1)


def test_failures_at_one_step_are_of_the_runs_own_making():
    assert isinstance(verdict(failures(40, 40), POLICY), Restart)
    judged = verdict(failures(7, 40, 40, 40), POLICY)
    assert isinstance(judged, GiveUp)
    assert "3 times at step 40" in judged.reason


@pytest.mark.parametrize(
    ("said", "apart"),
    [
        ("what(): 272 vs 170. Is there a distributed collective mismatch in your code?", True),
        ("RuntimeError: Detected a disagreement on list contents between rank0 and rank1:", True),
        ("RuntimeError: no bf16 here", False),
    ],
)
def test_ranks_that_use_different_layers_are_told_so(said, apart):
    member = SimpleNamespace(rank=1, host="", code=-signal.SIGABRT, log=Path("rank.log"), said=lambda: said)
    assert ("zero.stage = 3 all must use the same layers" in attempt._describe(member)) is apart


class _Crew:
    """Starts nothing; its run's folder is removed while it does."""

    hosts = ()
    ranks = 1

    def __init__(self, folder, when):
        self.folder, self.when = folder, when

    def machines(self):
        return {}

    def show_life(self):
        pass

    def close(self):
        pass

    def prepare(self, received):
        if self.when == "prepare":
            shutil.rmtree(self.folder)

    def attempt(self, log_dir, watch):
        shutil.rmtree(self.folder)
        if self.when == "end":
            raise AttemptError("a rank failed", "killed", 0)
        (log_dir / "rank-00000.log").open("ab")
        return 0


@pytest.mark.parametrize("when", ["prepare", "start", "end"])
def test_a_run_folder_that_is_removed_meanwhile_is_one_sentence_and_not_made_again(tmp_path, when):
    folder = tmp_path / "run"
    with pytest.raises(FolderLostError, match=r"run was moved or removed.*start the run again"):
        run_supervised(_Crew(folder, when), folder, POLICY)
    assert not folder.exists()


def test_a_rank_whose_log_is_gone_says_so_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(LOG_DIR_VARIABLE, str(tmp_path / "run" / "logs"))
    # The rest of a rank's start changes this process.
    for name in ("bear_lost_streams", "use_scratch", "redact_tracebacks"):
        monkeypatch.setattr(f"launch.entry.{name}", lambda: None)
    assert entry.main([str(DEMO)]) == TransientError.exit_code
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: \S*/run/logs was moved or removed [^\n]*\n", said), said
    (tmp_path / "run" / "logs" / "rank-00000.log").mkdir(parents=True)
    with pytest.raises(TransientError, match=r"rank-00000.log cannot be written \(Is a directory\)"):
        entry.write_stacks_when_asked()


def test_the_window_forgets():
    many = (10, 20, 30, 40, 50)
    judged = verdict(failures(*many, every=10), POLICY)
    assert isinstance(judged, GiveUp)
    assert "5 times within 10 minutes" in judged.reason
    assert isinstance(verdict(failures(*many, every=200), POLICY), Restart)


def test_an_error_before_the_first_step_is_not_tried_again_but_a_death_is():
    assert isinstance(verdict(failures(-1, how="error"), POLICY), GiveUp)
    assert isinstance(verdict(failures(-1, how="killed"), POLICY), Restart)
    assert isinstance(verdict([*failures(40), Failure(5, -1, "error")], POLICY), Restart)


def test_limit_zero_never_restarts():
    assert isinstance(verdict(failures(40), RestartConfig(limit=0)), GiveUp)


def test_a_bad_restart_table_is_named():
    with pytest.raises(ConfigError, match=r"demo.toml: restart.limit = -1"):
        load_run(DEMO, ["restart.limit=-1"])
    with pytest.raises(ConfigError, match=r"unknown key 'restart.foo'"):
        load_run(DEMO, ["restart.foo=1"])


def event(name, at, **values):
    return {"event": name, "time": float(at), **values}


def test_an_undisturbed_run_adds_up():
    account = ledger.account(
        [
            event("attempt", 0, number=1, ranks=2),
            event("began", 10, step=0),
            event("spent", 20, step=10, seconds={"data": 1, "forward": 4, "backward": 4, "checkpoint": 0.5}),
            event("spent", 30, step=20, seconds={"data": 1, "forward": 4, "evaluation": 2, "other": 3}),
            event("ended", 33, why="done", final=True),
        ]
    )
    assert account.total == pytest.approx(33)
    assert account.seconds["start"] == 10
    assert account.seconds["data"] == 2
    assert account.seconds["checkpoint"] == 0.5
    assert account.seconds["evaluation"] == 2
    assert account.seconds["finish"] == 3
    assert account.seconds["training"] == pytest.approx(33 - 10 - 2 - 0.5 - 2 - 3)
    assert account.goodput == pytest.approx(account.seconds["training"] / 33)
    assert (account.attempts, account.failures, account.steps_lost) == (1, [], 0)


def test_lost_work_is_what_was_computed_beyond_the_checkpoint():
    account = ledger.account(
        [
            event("attempt", 0),
            event("began", 5, step=0),
            event("spent", 15, step=10, seconds={"forward": 10}),
            event("spent", 25, step=20, seconds={"forward": 8, "data": 2}),
            event("ended", 28, why="killed", step=23),  # 3 s since the last line are nobody's
            event("attempt", 29),
            event("began", 34, step=15),  # half of the second line was in vain
            event("spent", 44, step=30, seconds={"forward": 10}),
            event("ended", 45, why="done", final=True),
        ]
    )
    assert account.total == pytest.approx(45)
    assert account.seconds["lost"] == pytest.approx(3 + 5)
    assert account.seconds["restart"] == pytest.approx(34 - 28)
    assert account.seconds["data"] == pytest.approx(1)
    assert account.steps_lost == 8
    assert account.failures == [(28.0, "killed", 23)]
    assert account.attempts == 2


def test_the_time_between_a_stop_and_the_next_start_is_nobodys():
    account = ledger.account(
        [
            event("attempt", 0),
            event("began", 5, step=0),
            event("ended", 10, why="stopped", final=True),
            event("attempt", 10_000),
            event("began", 10_004, step=2),
            event("ended", 10_005, why="done", final=True),
        ]
    )
    assert account.total == pytest.approx(10 + 5)
    assert account.seconds["start"] == pytest.approx(9)


def test_a_supervisor_that_was_killed_left_no_end():
    account = ledger.account(
        [
            event("attempt", 0),
            event("began", 5, step=0),
            event("spent", 9, step=4, seconds={"forward": 4}),
            event("attempt", 5_000),
            event("began", 5_003, step=2),
            event("ended", 5_004, why="done", final=True),
        ]
    )
    assert account.total == pytest.approx(9 + 4)
    assert account.seconds["lost"] == pytest.approx(2)
    assert account.steps_lost == 2
    assert account.failures == [(9.0, "supervisor killed", 4)]


def test_of_the_time_since_the_last_line_what_a_later_checkpoint_holds_is_not_lost():
    account = ledger.account(
        [
            event("attempt", 0),
            event("began", 5, step=0),
            event("spent", 45, step=40, seconds={"forward": 40}),
            event("ended", 54, why="killed", step=49),
            event("attempt", 54),
            event("began", 60, step=48),
            event("ended", 61, why="done", final=True),
        ]
    )
    assert account.seconds["lost"] == pytest.approx(1)
    assert account.steps_lost == 1
    assert account.total == pytest.approx(61)


def test_an_attempt_that_dies_before_its_first_step_forgets_nothing():
    account = ledger.account(
        [
            event("attempt", 0),
            event("began", 5, step=0),
            event("spent", 15, step=10, seconds={"forward": 10}),
            event("ended", 18, why="killed", step=13),
            event("attempt", 19),
            event("ended", 22, why="killed", step=-1),
            event("attempt", 23),
            event("began", 28, step=0),
            event("ended", 29, why="done", final=True),
        ]
    )
    assert account.steps_lost == 13
    assert account.seconds["lost"] == pytest.approx(13)
    assert account.seconds["restart"] == pytest.approx(10)


def test_runs_under_a_launcher_that_writes_no_ends():
    account = ledger.account(
        [
            event("began", 0, step=0),
            event("spent", 100, step=10, seconds={"forward": 100}),
            event("began", 90_000, step=10),
            event("spent", 90_100, step=20, seconds={"forward": 100}),
        ]
    )
    assert account.total == pytest.approx(200)
    assert account.attempts == 2


def test_a_torn_line_is_skipped(tmp_path):
    ledger.record(tmp_path, "attempt", number=1)
    with (tmp_path / ledger.LEDGER).open("ab") as file:
        file.write(b'{"event": "ended", "ti')
    assert [e["event"] for e in ledger.read_events(tmp_path)] == ["attempt"]
    ledger.record(tmp_path, "began", step=1)  # begins a line of its own
    assert [e["event"] for e in ledger.read_events(tmp_path)] == ["attempt", "began"]


CHILD = """
import time
from setformer_dist.core.heartbeat import Heartbeat
heart = Heartbeat.from_env()
heart.step = 41
heart.beat("forward")
heart.warm = True
heart.beat("a phase with a long name")
time.sleep(60)
"""


def test_a_damaged_run_does_not_hide_the_others_in_the_list(tmp_path):
    for name, text in (("bad", "{{{"), ("good", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    console = Console(width=300)
    with console.capture() as shown:
        list_runs(tmp_path, console)
    lines = {line.split()[0]: line for line in shown.get().splitlines()[1:]}
    assert "is damaged" in lines[str(tmp_path / "bad")]
    assert "unknown" in lines[str(tmp_path / "good")]


def test_a_run_that_was_stopped_before_its_first_step_is_in_the_list(tmp_path):
    """It has no config.json yet."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        ledger.record(tmp_path / name, "attempt", number=1)
        ledger.record(tmp_path / name, "ended", why="stopped", final=True)
    (tmp_path / "second" / "config.json").write_text("{}")
    console = Console(width=300)
    with console.capture() as shown:
        list_runs(tmp_path, console)
    (first, *said), (second, *_) = (line.split() for line in shown.get().splitlines()[1:])
    assert (first, second) == (str(tmp_path / "first"), str(tmp_path / "second"))
    assert said[:2] == ["stopped", "0"]


def test_the_step_shown_is_the_one_that_the_run_is_at(tmp_path, capsys):
    """Not every step is logged: of 276 that are done and saved, 275 is the last in metrics.jsonl."""
    (tmp_path / "config.json").write_text("{}")
    rows = ({"kind": "train", "step": step, "loss": 0.5} for step in (250, 275))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def shown():
        console = Console(width=300)
        with console.capture() as out:
            list_runs(tmp_path, console)
            show_run(tmp_path, console)
        show_run(tmp_path, console, as_json=True)
        listed, said = out.get().splitlines()[1:3]
        return listed, said, json.loads(capsys.readouterr().out)["step"]

    assert shown()[2] == 275  # a run of before there were ledgers
    ledger.record(tmp_path, "attempt", number=1, ranks=2)
    ledger.record(tmp_path, "began", step=0)
    ledger.record(tmp_path, "spent", step=276, seconds={})
    ledger.record(tmp_path, "ended", why="stopped", final=True)
    listed, said, step = shown()
    assert " 276 " in listed
    assert said.endswith(": stopped, step 276")
    assert step == 276
    ledger.record(tmp_path, "attempt", number=1, ranks=2)
    ledger.record(tmp_path, "began", step=260)  # the newest checkpoint did not verify
    assert shown()[2] == 260


def test_where_the_same_command_resumes(tmp_path):
    assert how_to_resume(tmp_path) == "the same command begins at step 0"
    for step in (5, 10, 15):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        if step < 15:  # the last one was not committed
            (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text("{}")
    assert how_to_resume(tmp_path) == "the same command resumes from the newest checkpoint, step 10"


def test_a_beat_is_seen_from_outside_also_after_a_kill():
    pulse = Pulse()
    assert (pulse.read().count, pulse.read().step, pulse.read().phase) == (0, -1, "start")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**os.environ, FD_VARIABLE: str(pulse.fileno())},
        pass_fds=(pulse.fileno(),),
        start_new_session=True,
    )
    limit = time.monotonic() + 20
    while pulse.read().count < 2:
        assert time.monotonic() < limit
        time.sleep(0.01)
    child.kill()
    child.wait()
    time.sleep(0.2)
    beat = pulse.read()
    assert (beat.step, beat.phase) == (41, "a phase with a l")
    assert 0.2 <= beat.age < 20
    pulse.close()


def test_without_a_supervisor_it_beats_in_private(monkeypatch):
    monkeypatch.delenv(FD_VARIABLE, raising=False)
    Heartbeat.from_env().beat("forward")
