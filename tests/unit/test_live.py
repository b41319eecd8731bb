"""What the supervisor shows of its ranks, and the table made of it."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from launch.history.top import top
from launch.ranks.board import Board
from launch.ranks.usage import Use
from setformer_dist.core import ledger, live
from setformer_dist.core.errors import DataError
from setformer_dist.core.heartbeat import Beat


@dataclass
class Rank:
    """A rank as the supervisor sees one."""

    rank: int
    seen: Beat
    host: str = ""
    log: Path = field(default_factory=Path)
    log_start: int = 0
    ended_at: float | None = None
    code: int | None = None
    used: Use = field(default_factory=lambda: Use(1.52, None))

    def beat(self) -> Beat:
        return self.seen

    def said(self) -> str:
        return ""

    def last_lines(self) -> list[str]:
        return []

    def is_suspended(self) -> bool:
        return False

    def memory_mib(self) -> float | None:
        return 512.0

    def use(self) -> Use:
        return self.used


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"batch": {"global_size": 64}}))
    ledger.record(tmp_path, "attempt", number=1, ranks=2)
    return tmp_path


def shown(run: Path) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    top(run, console, once=True)
    return console.export_text()


def test_a_rank_that_is_behind_is_named(run: Path) -> None:
    Board(run).look([Rank(0, Beat(9, 12, "communication", 0.1), "a"), Rank(1, Beat(7, 11, "data", 6.0), "b")])
    text = shown(run)
    assert "step 12, 2 ranks on 2 hosts" in " ".join(text.replace("\n", " ").split())
    assert "behind, in data" in text
    assert "512 MiB" in text
    assert "100%" in text
    assert "1.5 cores" in text


def test_a_gpus_use_comes_before_that_of_cores(run: Path) -> None:
    Board(run).look([Rank(0, Beat(9, 12, "forward", 0.1), used=Use(1.0, 0.87)), Rank(1, Beat(9, 12, "forward", 0.1))])
    text = shown(run)
    assert "87% of GPU" in text
    assert "1.5 cores" in text


def test_a_look_of_an_older_version_is_shown(run: Path) -> None:
    rank = {"rank": 0, "host": "", "step": 3, "phase": "data", "silent_s": 0.1, "memory_mib": 1.0, "waiting": 0.0}
    (run / live.LIVE).write_text(json.dumps({"time": time.time(), "steps_per_s": None, "ranks": [rank]}))
    assert "step 3" in shown(run)


def test_it_is_written_at_most_once_a_second(run: Path) -> None:
    board = Board(run)
    board.look([Rank(0, Beat(1, 1, "forward", 0.0))])
    board.look([Rank(0, Beat(2, 9, "forward", 0.0))])
    seen = live.read(run)
    assert seen is not None
    assert seen.ranks[0].step == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"time": 9e9, "steps_per_s": 1, "ranks": []}',
        "",
        "[",
        "{}",
        '{"time": 1, "steps_per_s": null, "ranks": [1]}',
        "null",
    ],
)
def test_a_damaged_file_shows_nothing(run: Path, text: str) -> None:
    (run / live.LIVE).write_text(text)
    with pytest.raises(DataError, match="is not running under a supervisor"):
        top(run, Console(), once=True)


def test_an_old_look_is_no_news_and_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    live.write(run, live.Live(time.time() - 60, 1.0, ()))
    with pytest.raises(DataError, match="is not running"):
        top(run, Console(), once=True)
    (tmp_path / "precious").write_text("mine")
    (run / f".{live.LIVE}.part").symlink_to(tmp_path / "precious")
    live.write(run, live.Live(time.time(), 1.0, ()))
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_look_costs_a_supervisor_next_to_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether somebody watches or not: `runs top` reads what is written anyway, and no rank takes part."""
    monkeypatch.setattr("launch.ranks.board._EVERY_S", 0.0)
    ranks = [Rank(rank, Beat(9, 12, "forward", 0.1), f"host-{rank // 8}") for rank in range(64)]
    board = Board(run)
    begun = time.process_time()
    for _ in range(20):
        board.look(ranks)
    assert (time.process_time() - begun) / 20 < 0.02, "seconds of a core, once a second; measured: 0.0008"


def test_top_leaves_the_run_as_it_is(run: Path) -> None:
    Board(run).look([Rank(0, Beat(9, 12, "forward", 0.1))])
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
    shown(run)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()} == before
