"""A task with counts has the same loss on any number of ranks, in micro batches of any size, under every ZeRO stage."""

from __future__ import annotations

import pytest

from launch.testing.ranks import run_ranks
from tests.distributed import counted_workers

STEPS = 6


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """One rank, one micro batch: nothing is shared and nothing is added up."""
    found = run_ranks(counted_workers.losses_of, 1, 0, counted_workers.GLOBAL, STEPS)[0]
    assert found["accumulation"] == 1
    losses: list[float] = found["losses"]
    return losses


@pytest.mark.parametrize(("ranks", "stage", "micro"), [(1, 2, 2), (2, 0, 6), (2, 3, 3), (3, 2, 4), (3, 3, 8)])
def test_the_loss_does_not_depend_on_how_the_batch_is_cut(
    ranks: int, stage: int, micro: int, alone: list[float]
) -> None:
    assert alone[2] == 0  # nothing counts in this step
    assert alone[-1] < alone[0]
    found = run_ranks(counted_workers.losses_of, ranks, stage, micro, STEPS)
    for rank in found:
        assert rank["losses"] == pytest.approx(alone, rel=1e-5)


def test_a_mean_of_means_would_depend_on_it() -> None:
    whole = run_ranks(counted_workers.losses_of, 1, 0, 24, 2, True)[0]["losses"]
    cut = run_ranks(counted_workers.losses_of, 3, 0, 4, 2, True)[0]["losses"]
    assert cut[0] != pytest.approx(whole[0], rel=1e-3)
