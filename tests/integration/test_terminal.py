"""A run in a terminal: Ctrl-C, kills, and a terminal or a pipe that goes away in mid run."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.testing.commands import ROOT, children, environment, losses, start, train_words, wait_for
from launch.testing.terminal import InTerminal
from launch.testing.warm import Warm, possible
from setformer_dist.core import ledger

pytestmark = pytest.mark.skipif(not possible(), reason="commands start cold here")

LONG = "schedule.epochs=50"
NEVER = "checkpoint.every_steps=1000"


@contextmanager
def training(data: Path, out: Path, *overrides: str, obeys_hangup: bool = True, ranks: int = 2) -> Iterator[InTerminal]:
    words = train_words(data, out, *overrides, ranks=ranks)
    with InTerminal(["launch.cli.main", *words], environment(), ROOT, obeys_hangup) as terminal:
        yield terminal


def shown(text: str) -> list[str]:
    """Return the lines that a terminal shows in the end: what is cleared or written over is not."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        left = re.sub(r"\x1b\[[0-9;?]*[A-JL-Za-z]", "", re.split(r"\r?\x1b\[2K\r?", line)[-1])
        lines.append(left.rpartition("\r")[2].strip())
    return [line for line in lines if line]


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/manifest.json"))


def last_step(run: Path) -> int:
    return max(step for _, step in losses(run))


def attempts(run: Path) -> int:
    return sum(event["event"] == "attempt" for event in ledger.read_events(run))


def ends(run: Path) -> list[dict[str, object]]:
    return [event for event in ledger.read_events(run) if event["event"] == "ended"]


def test_ctrl_c_in_a_terminal_leaves_lines_whole_and_says_what_was_saved(digits: Path, tmp_path: Path) -> None:
    with training(digits, tmp_path, LONG, NEVER) as terminal:
        terminal.wait_until(lambda: (tmp_path / "demo" / "metrics.jsonl").exists() and terminal.text.count("loss") > 3)
        terminal.press(b"\x03")
        assert terminal.ended() == 130, terminal.text
    lines = shown(terminal.text)
    step = last_step(tmp_path / "demo")
    assert lines[-1] == f"stopped and saved at step {step}; the same command resumes from there"
    assert saved_steps(tmp_path / "demo") == [step]
    (warning,) = [line for line in lines if "SIGINT" in line]
    assert warning.startswith("WARNING  SIGINT: ranks have 60 s to save a checkpoint")
    (bar,) = [line for line in lines if f"{step}/1100" in line]  # in 80 columns
    assert re.fullmatch(r"[━╸╺ ]+ +\d+/1100 epoch \d\.\d · loss .* \d:\d\d:\d\d left [\d:-]+", bar), bar
    assert terminal.text.count("\x1b[?25l") == terminal.text.count("\x1b[?25h")


def stop_at_once(digits: Path, out: Path) -> str:
    """Start a run, press Ctrl-C as soon as its rank is there, and return the last line."""
    before = attempts(out / "demo")
    with training(digits, out, LONG, NEVER, ranks=1) as terminal:
        terminal.wait_until(lambda: attempts(out / "demo") > before)
        terminal.press(b"\x03")
        assert terminal.ended() == 130, terminal.text[-2000:]
    return shown(terminal.text)[-1]


NOTHING_NEW = "stopped before the first step, with nothing new to save; the same command "


def test_ctrl_c_before_the_first_step_says_where_the_run_resumes(digits: Path, tmp_path: Path) -> None:
    assert stop_at_once(digits, tmp_path) == f"{NOTHING_NEW}begins at step 0"


@pytest.mark.drill
def test_ctrl_c_says_where_a_run_with_a_checkpoint_resumes(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    with training(digits, tmp_path, LONG, NEVER, ranks=1) as terminal:
        terminal.wait_for("loss")
        terminal.press(b"\x03")
        assert terminal.ended() == 130
    (step,) = saved_steps(run)
    resumes = f"resumes from the newest checkpoint, step {step}"
    assert stop_at_once(digits, tmp_path) == f"{NOTHING_NEW}{resumes}"
    with training(digits, tmp_path, LONG, NEVER, ranks=1) as terminal:
        terminal.wait_for("loss")
        (rank,) = children(terminal.process.pid)
        os.kill(rank, signal.SIGSTOP)  # it will save nothing
        terminal.press(b"\x03")
        terminal.wait_for("ends them at once")
        terminal.press(b"\x03")
        assert terminal.ended() == 130
    said = "ended at once, without waiting for a checkpoint; the same command "
    assert shown(terminal.text)[-1] == f"{said}{resumes}"


def test_a_killed_rank_0_leaves_the_terminal_usable(digits: Path, tmp_path: Path) -> None:
    with training(digits, tmp_path, LONG, NEVER, "restart.limit=0", ranks=1) as terminal:
        terminal.wait_for("loss")
        (rank,) = Path(f"/proc/{terminal.process.pid}/task/{terminal.process.pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
        assert terminal.ended() == 6
    lines = shown(terminal.text)
    assert any(line.startswith("error: rank 0 was ended by SIGKILL") for line in lines), lines
    assert terminal.text.count("\x1b[?25l") == terminal.text.count("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("first", [False, True], ids=["before the first save", "after a save"])
def test_a_terminal_that_is_closed_stops_the_run_saved(digits: Path, tmp_path: Path, first: bool) -> None:
    """The kernel sends SIGHUP to the command, and every write of it and of rank 0 fails from then on."""
    run = tmp_path / "demo"
    with training(digits, tmp_path, LONG, "checkpoint.every_steps=5" if first else NEVER) as terminal:
        if first:
            terminal.wait_until((run / "checkpoints" / "step-00000005" / "manifest.json").exists)
        else:
            terminal.wait_until(lambda: terminal.text.count("loss") > 2)
        terminal.take_away()
        assert terminal.process.wait(120) == 129
    assert saved_steps(run)[-1] == last_step(run)
    assert [(end["why"], end.get("signal")) for end in ends(run)] == [("stopped", signal.SIGHUP)]
    assert ledger.account(ledger.read_events(run)).attempts == 1
    assert not json.loads((run / "summary.json").read_text())["finished"]


@pytest.mark.parametrize(
    "first",
    [pytest.param(False, marks=pytest.mark.drill, id="before the first save"), pytest.param(True, id="after a save")],
)
def test_under_nohup_a_terminal_that_is_closed_stops_nothing(digits: Path, tmp_path: Path, first: bool) -> None:
    run = tmp_path / "demo"
    every = "checkpoint.every_steps=5" if first else NEVER
    with training(digits, tmp_path, every, obeys_hangup=False) as terminal:
        if first:
            terminal.wait_until((run / "checkpoints" / "step-00000005" / "manifest.json").exists)
        else:
            terminal.wait_until(lambda: terminal.text.count("loss") > 2)
        terminal.take_away()
        assert terminal.process.wait(120) == 0
    went_on_to_its_end(run)


def went_on_to_its_end(run: Path) -> None:
    """All in one attempt, so every step was made once."""
    assert sorted(step for kind, step in losses(run) if kind == "train") == list(range(1, 23))
    assert saved_steps(run)[-1] == 22
    assert [end["why"] for end in ends(run)] == ["done"]
    assert ledger.account(ledger.read_events(run)).attempts == 1
    assert (run / "report.html").exists()


def test_a_pipe_that_nobody_reads_any_more_stops_nothing(digits: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "wb") as out:
        process = Warm(
            ["launch.cli.main", *train_words(digits, tmp_path, "eval.every_steps=8")], environment(), ROOT, out
        )
    try:
        assert os.read(read, 1)  # `| head -c 1`
        os.close(read)
        assert process.wait(120) == 0
    finally:
        process.kill()
    went_on_to_its_end(tmp_path / "demo")


def test_sighup_to_the_command_alone_stops_the_run_saved(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    process = start(*train_words(digits, tmp_path, LONG, NEVER))
    wait_for(run / "metrics.jsonl", process)
    while not losses(run):
        assert process.poll() is None
    ranks = children(process.pid)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 129, err
    assert len(ranks) >= 2
    assert saved_steps(run) == [last_step(run)]
    assert [(end["why"], end.get("signal")) for end in ends(run)] == [("stopped", signal.SIGHUP)]
