"""Every optimizer and schedule: the same losses under every ZeRO stage, and a checkpoint of each continues in each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.testing import elastic
from launch.testing.elastic import RECIPES, Where
from launch.testing.ranks import run_ranks
from setformer_dist.engine.optim import OPTIMIZERS

BEFORE, AFTER = 3, 4
LAYOUTS = [Where(1, 0, "fp32"), Where(2, 1, "fp32"), Where(3, 2, "fp32", "optimizer"), Where(2, 3, "fp32")]
LOW = [Where(2, 0, "bf16"), Where(2, 2, "bf16"), Where(1, 3, "bf16", "all")]


_Written = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Where], _Written]:
    """Return what trains every recipe under a layout, once, with a checkpoint on the way."""

    @functools.cache
    def write(where: Where) -> _Written:
        root = tmp_path_factory.mktemp(where.name)
        arguments = (str(root), where.stage, where.dtype, where.offload, BEFORE, AFTER)
        return root, run_ranks(elastic.write_recipes, where.ranks, *arguments, timeout=300)[0]

    return write


def test_every_optimizer_is_tried() -> None:
    assert {optim["name"] for optim, _ in RECIPES.values()} == set(OPTIMIZERS)


def test_losses_do_not_depend_on_the_layout(written: Callable[[Where], _Written]) -> None:
    one, other = (written(where)[1] for where in (LAYOUTS[0], LAYOUTS[3]))
    for recipe in RECIPES:
        assert other[recipe]["losses"] == pytest.approx(one[recipe]["losses"], rel=2e-5), recipe
    assert len({found["losses"][0] for found in one.values()}) == len(RECIPES)  # each trains in its own way


def test_one_rank_continues_from_two(written: Callable[[Where], _Written]) -> None:
    check_resumes(LAYOUTS[0], LAYOUTS[3], written)


@pytest.mark.drill
def test_losses_of_every_layout_agree(written: Callable[[Where], _Written]) -> None:
    first = written(LAYOUTS[0])[1]
    for where in (*LAYOUTS[1:], *LOW):
        for recipe in RECIPES:
            rel = 2e-5 if where in LAYOUTS else 2e-2
            assert written(where)[1][recipe]["losses"] == pytest.approx(first[recipe]["losses"], rel=rel), where


@pytest.mark.drill
@pytest.mark.parametrize("reader", [*LAYOUTS, *LOW], ids=lambda where: where.name)
def test_each_continues_from_another_layout_and_its_own(reader: Where, written: Callable[[Where], _Written]) -> None:
    layouts = LAYOUTS if reader in LAYOUTS else LOW
    check_resumes(reader, layouts[layouts.index(reader) - 1], written)
    check_resumes(reader, reader, written)


def check_resumes(reader: Where, writer: Where, written: Callable[[Where], _Written]) -> None:
    """Check that one layout continues another; its own bit by bit."""
    rel = 0.0 if reader == writer else 2e-5 if reader.dtype == "fp32" else 2e-2
    root, whole = written(writer)
    arguments = (str(root), reader.stage, reader.dtype, reader.offload, AFTER)
    again = run_ranks(elastic.resume_recipes, reader.ranks, *arguments, timeout=300)[0]
    for recipe in RECIPES:
        assert again[recipe]["losses"] == pytest.approx(whole[recipe]["losses"], rel=rel, abs=0), recipe
        assert again[recipe]["ids"] == whole[recipe]["ids"]
