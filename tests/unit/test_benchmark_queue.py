"""The queue's benchmark: traces in the Standard Workload Format, and a small simulation that one can do by hand."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from benchmarks.queue import easy, fifo, queue, simulate
from benchmarks.swf import Work, read
from launch.queue.state import Node

# Two slots: 1 runs on one; 2 needs both and was given a wrong estimate; 3 fits beside 1, and ends before it.
TRACE = """\
; Version: 2.2
; MaxProcs: 2
  1    0  7  100   1 -1 -1   1  100 -1 1  1 1 -1 1 -1 -1 -1
  3   20 -1   50  -1 -1 -1   1   60 -1 1  1 1 -1 1 -1 -1 -1

  2   10 -1   40   2 -1 -1  -1   10 -1 1  2 1 -1 1 -1 -1 -1
  4   30 -1   -1   1 -1 -1   1   10 -1 5  1 1 -1 1 -1 -1 -1
  5   31 -1   10   4 -1 -1   4   10 -1 1  1 1 -1 1 -1 -1 -1
"""


def test_a_trace_is_read_and_replayed(tmp_path: Path) -> None:
    path = tmp_path / "x.swf"
    path.write_text(TRACE)
    jobs, left_out = read(path, 2)
    assert jobs == [Work(1, 0.0, 1, 100.0, 100.0), Work(2, 10.0, 2, 40.0, 40.0), Work(3, 20.0, 1, 50.0, 60.0)]
    assert left_out == 2  # 4 never ran, 5 is too wide
    (tmp_path / "x.swf.gz").write_bytes(gzip.compress(TRACE.encode()))
    assert read(tmp_path / "x.swf.gz", 2) == (jobs, 2)
    assert len(read(path, 2, 1)[0]) == 1
    nodes = [Node("n", 2)]
    waits = {name: simulate(jobs, nodes, decider)["wait_s"] for name, decider in
             (("fifo", fifo), ("easy", easy), ("queue", queue))}  # fmt: skip
    assert waits == {"fifo": (90 + 120) / 3, "easy": 90 / 3, "queue": 90 / 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 0 7 100 1\n", "line 1: a job has 18 numbers"),
        ("; only\n" + "x " * 18, "line 2: a job has 18 numbers"),
        ("; a header alone\n", "has no job that ran and fits 2 slots"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.swf").write_text(text)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "x.swf", 2)
