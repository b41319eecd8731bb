"""Ranks that are forked from one interpreter: the same losses, the same ends, and no process left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launch.testing.commands import Process, assert_gone, children, losses, setformer, start, train_words
from setformer_dist.core import ledger

pytestmark = pytest.mark.drill

WORDS = ("schedule.epochs=3", "launch.warm=true")


@pytest.fixture(autouse=True)
def cold_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start commands as users do; the tests' own server forks ranks in another way."""
    monkeypatch.setenv("SETFORMER_COLD_TESTS", "1")


@pytest.fixture(scope="module")
def cold(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose ranks each started cold."""
    out = tmp_path_factory.mktemp("cold")
    ended = setformer(*train_words(digits, out, "schedule.epochs=3", "launch.warm=false"))
    assert ended.code == 0, ended.err
    return out / "demo"


def named(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def begun(words: list[str], run: Path, step: int = 12) -> tuple[Process, list[int]]:
    process = start(*words)
    limit = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or max((s for _, s in losses(run)), default=0) < step:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    return process, children(process.pid)


def whys(run: Path) -> list[str]:
    return [event["why"] for event in ledger.read_events(run) if event["event"] == "ended"]


def test_a_killed_rank_is_forked_again_and_nothing_differs(cold: Path, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    process, found = begun(train_words(digits, tmp_path, *WORDS), run)
    ranks = [pid for pid in found if named(pid).startswith("rank ")]
    assert sorted(named(pid) for pid in ranks) == ["rank 0", "rank 1"]
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=200)
    assert process.returncode == 0
    assert whys(run) == ["killed", "done"]
    assert losses(run) == losses(cold)
    assert_gone(found)


def test_a_killed_server_takes_its_ranks_along_and_the_run_continues_without_it(
    cold: Path, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "demo"
    process, found = begun(train_words(digits, tmp_path, *WORDS), run)
    servers = [pid for pid in found if b"launch.ranks.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (server,) = (pid for pid in servers if not named(pid).startswith("rank "))
    os.kill(server, signal.SIGKILL)
    process.communicate(timeout=200)
    assert process.returncode == 0
    assert whys(run) == ["killed", "done"]
    assert losses(run) == losses(cold)
    assert_gone(found)


def test_the_supervisors_death_leaves_nothing(digits: Path, tmp_path: Path) -> None:
    process, found = begun(train_words(digits, tmp_path, *WORDS), tmp_path / "demo")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert_gone(found)


def test_a_stop_while_the_server_imports_ends_at_once(digits: Path, tmp_path: Path) -> None:
    process = start(*train_words(digits, tmp_path, *WORDS))
    limit = time.monotonic() + 60
    while not (found := children(process.pid)):
        assert time.monotonic() < limit
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    begun_at = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - begun_at < 10
    assert_gone(found)
    assert not (tmp_path / "demo" / "checkpoints").exists() or not any((tmp_path / "demo" / "checkpoints").iterdir())
