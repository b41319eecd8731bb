"""parallel.sequence on real DeepSpeed ranks: the losses and gradient norms of whole images, under every ZeRO stage."""

from __future__ import annotations

import pytest

from launch.testing.ranks import run_ranks
from tests.distributed import sequence_workers

STEPS = 20


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """One rank with whole images."""
    [found] = run_ranks(sequence_workers.runs_of, 1, [[1, 1, "fp32", "none", False]], STEPS)[0]
    assert found["losses"][-1] < found["losses"][0]
    assert min(found["norms"][:3]) > sequence_workers.OPTIM.clip_norm
    return found


def assert_alike(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    if min(found["norms"]) >= 0:
        assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-4)


def test_two_ranks_an_image_train_as_one_under_every_stage_and_the_same_bits_again(alone: dict) -> None:
    cases = [
        [2, 0, "fp32", "none", False],
        [2, 2, "fp32", "optimizer", True],
        [2, 3, "fp32", "none", False],
        [2, 3, "fp32", "none", False],
    ]
    every = run_ranks(sequence_workers.runs_of, 2, cases, STEPS, timeout=240)
    assert every[0] == every[1]
    for found in every[0]:
        assert_alike(found, alone)
    assert every[0][-1] == every[0][-2]


@pytest.mark.drill
@pytest.mark.parametrize(("ranks", "sequence"), [(2, 1), (3, 3), (4, 2), (4, 4)])
def test_any_groups_train_as_one_rank_under_every_stage(ranks: int, sequence: int, alone: dict) -> None:
    cases = [[sequence, stage, "fp32", "none", False] for stage in (0, 1, 2, 3)] + [[sequence, 3, "fp32", "all", True]]
    for found in run_ranks(sequence_workers.runs_of, ranks, cases, STEPS, timeout=1200)[0]:
        assert_alike(found, alone)


@pytest.mark.drill
def test_bf16_parts_train_close_to_whole_images() -> None:
    [whole] = run_ranks(sequence_workers.runs_of, 1, [[1, 1, "bf16", "none", False]], STEPS)[0]
    cases = [[2, stage, "bf16", "none", False] for stage in (1, 2, 3)]
    for found in run_ranks(sequence_workers.runs_of, 2, cases, STEPS, timeout=240)[0]:
        assert found["losses"] == pytest.approx(whole["losses"], rel=2e-2)


def test_groups_are_of_neighbours_and_exchange_among_themselves() -> None:
    found = run_ranks(sequence_workers.exchanged, 4)
    assert [rank["sum"] for rank in found] == [[1.0, 2.0], [1.0, 2.0], [5.0, 2.0], [5.0, 2.0]]
    assert [rank["own"] for rank in found] == [[float(rank), 1.0] for rank in range(4)]
    assert [rank["above"] for rank in found] == [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [2.0, 1.0]]
    assert [rank["below"] for rank in found] == [[1.0, 1.0], [0.0, 0.0], [3.0, 1.0], [0.0, 0.0]]
    pairs = [[[0.0, 1.0], [1.0, 1.0]], [[2.0, 1.0], [3.0, 1.0]]]
    assert [rank["all"] for rank in found] == [pairs[0], pairs[0], pairs[1], pairs[1]]
    assert all(rank["metered"] for rank in found)
