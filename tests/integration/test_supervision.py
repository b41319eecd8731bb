"""Deaths, hangs and signals of a real run through the command line: it continues by itself, or stops as asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launch.testing.commands import (
    assert_gone,
    children,
    losses,
    setformer,
    start,
    train_words,
    wait_for,
)


@pytest.fixture(scope="module")
def whole_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's config for one epoch, uninterrupted."""
    out = tmp_path_factory.mktemp("whole")
    ended = setformer(*train_words(digits, out))
    assert ended.code == 0, ended.err
    return out / "demo"


def at_step(run: Path, step: int, process: subprocess.Popen[str]) -> list[int]:
    """Wait for a checkpoint; return the pids of the ranks, by rank."""
    wait_for(run / "checkpoints" / f"step-{step:08d}" / "manifest.json", process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()  # not what they started
    return [int(pid) for pid in ranks]


def test_a_rank_that_hangs_is_found_its_stack_written_and_the_run_resumes(
    digits: Path, tmp_path: Path, whole_run: Path
) -> None:
    process = start(*train_words(digits, tmp_path, "restart.hang_after_s=3"))
    pids = at_step(tmp_path / "demo", 5, process)
    os.kill(pids[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "rank 1 sent no heartbeat for" in err
    assert "rank 1 is suspended by SIGSTOP" in err
    assert_gone(pids)
    stacks = (tmp_path / "demo" / "logs" / "rank-00000.log").read_text()
    assert "most recent call first" in stacks  # where rank 0 waited for it
    assert "train_until" in stacks
    assert losses(tmp_path / "demo") == losses(whole_run)
    shown = json.loads(setformer("runs", "show", str(tmp_path / "demo"), "--json").out)
    assert [f["how"] for f in shown["failures"]] == ["hang"]
    assert shown["attempts"] == 2
    assert shown["seconds"]["restart"] > 1
    assert shown["state"] == "done"


@pytest.mark.drill
def test_a_rank_that_goes_on_while_stacks_are_written_is_not_killed(
    digits: Path, tmp_path: Path, whole_run: Path
) -> None:
    process = start(*train_words(digits, tmp_path, "restart.hang_after_s=3"))
    pids = at_step(tmp_path / "demo", 5, process)
    os.kill(pids[1], signal.SIGSTOP)
    log = tmp_path / "demo" / "logs" / "rank-00000.log"
    limit = time.monotonic() + 60
    while "most recent call first" not in log.read_text():
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGCONT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "sent its next heartbeat after more than 3 s; the run continues" in err
    assert losses(tmp_path / "demo") == losses(whole_run)
    assert json.loads(setformer("runs", "show", str(tmp_path / "demo"), "--json").out)["attempts"] == 1


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    process = start(*train_words(digits, tmp_path, "schedule.epochs=50", "checkpoint.every_steps=5"))
    pids = at_step(tmp_path / "demo", 5, process)
    os.kill(pids[1], signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 138, err
    assert "restarting" not in err
    assert_gone(pids)
    last = max(step for kind, step in losses(tmp_path / "demo"))
    assert (tmp_path / "demo" / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()


def test_without_restarts_a_death_is_an_error_with_the_last_words_of_the_rank(digits: Path, tmp_path: Path) -> None:
    words = train_words(digits, tmp_path)
    process = start(*words, "--restarts", "0")
    pids = at_step(tmp_path / "demo", 5, process)
    os.kill(pids[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 6
    assert "error: rank 1 was ended by SIGKILL" in err
    assert f"the last lines of {tmp_path / 'demo' / 'logs' / 'rank-00001.log'}" in err
    assert_gone(pids)


def test_deaths_at_one_and_the_same_step_end_the_run(digits: Path, tmp_path: Path) -> None:
    """Ranks that die before their first step: killed as soon as they are there."""
    process = start(*train_words(digits, tmp_path, "restart.same_step=2", "restart.backoff_s=0.1"))
    killed: set[int] = set()
    while process.poll() is None:
        for pid in children(process.pid):
            if pid not in killed:
                killed.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 6
    assert "not restarted: it failed 2 times" in err
    assert len(killed) <= 12  # of two attempts: ranks, what cleans up after them, git for the record
    assert not (tmp_path / "demo" / "checkpoints").exists()


def test_a_scheduler_that_signals_every_process_and_then_loses_patience(digits: Path, tmp_path: Path) -> None:
    """USR1 to the command and to every rank at once, as Slurm does; SIGTERM comes when the job is over already."""
    process = start(*train_words(digits, tmp_path, "schedule.epochs=50", "checkpoint.every_steps=1000"))
    wait_for(tmp_path / "demo" / "metrics.jsonl", process)
    ranks = children(process.pid)
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 138, err
    assert_gone(ranks)
    last = max(step for kind, step in losses(tmp_path / "demo"))
    assert (tmp_path / "demo" / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()


def test_a_deadline_that_passes_shows_in_the_exit_code(digits: Path, tmp_path: Path) -> None:
    process = start(*train_words(digits, tmp_path, "schedule.epochs=50"), "--grace", "2")
    pids = at_step(tmp_path / "demo", 5, process)
    os.kill(pids[1], signal.SIGSTOP)  # it will not save
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 6, err
    assert "asked to stop by SIGUSR1, but rank" in err
    assert_gone(pids)
