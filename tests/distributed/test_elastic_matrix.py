"""A checkpoint of W ranks under ZeRO stage s continues on W' ranks under s': same losses, same samples, none twice.

With or without offload on either side.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.elastic import compare, holds, layouts_of, measure
from launch.testing.elastic import Where


def check(rows: list[dict[str, Any]]) -> None:
    assert rows
    wrong = [row for row in rows if not holds(row)]
    assert not wrong, wrong


@pytest.mark.drill
def test_a_few_layouts_continue_each_other() -> None:
    rows = measure([Where(3, 1, "fp32", "optimizer"), Where(2, 3, "fp32")], steps=4)
    assert len(rows) == 4
    check(rows)


def test_bf16_continues_bit_by_bit_in_the_same_layout() -> None:
    check(measure([Where(2, 2, "bf16", "optimizer")], steps=4))


def test_a_lost_or_repeated_sample_is_noticed() -> None:
    where = Where(1, 0, "fp32")
    whole = {"losses": [1.0], "ids": list(range(24, 48)), "before": list(range(72))}
    assert not holds(compare(where, where, whole, {"losses": [1.0], "ids": list(range(24, 48))}))


@pytest.mark.drill
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sample_of_the_layouts_that_changes_with_the_commit(dtype: str) -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    draw = random.Random(head.stdout)  # of no checkout: the same sample every time
    every = layouts_of([1, 2, 3, 4], [0, 1, 2, 3], ["optimizer", "all"], dtype)
    check(measure(draw.sample(every, 2), steps=6))


@pytest.mark.drill
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_layout_continues_every_other(dtype: str) -> None:
    rows = measure(layouts_of([1, 2, 3, 4], [0, 1, 2, 3], ["optimizer", "all"], dtype), steps=20)
    assert len(rows) == (16 + 8) ** 2
    check(rows)
