"""K-means over gloo ranks: the same bits on 1, 2 and 3 of them, however the points are distributed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.testing.ranks import run_ranks
from setformer_dist.engine.comm import TensorSums
from setformer_dist.ops.kmeans import KMeansResult, distributed_kmeans, kmeans

POINTS = 301


def points() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(4, 8, 24, generator=generator)
    return centres[:, torch.arange(POINTS) % 8] + torch.randn(4, POINTS, 24, generator=generator)


def start() -> torch.Tensor:
    """Centroids of which some are empty at once."""
    return torch.cat([points()[:, :5], torch.full((4, 2, 24), 100.0) + torch.arange(2.0).view(2, 1)], 1)


def ids_of(rank: int, world: int, deal: str) -> torch.Tensor:
    ids = torch.arange(POINTS)
    if deal == "stripes":
        return ids[rank::world].flip(0)
    if deal == "runs":
        return ids.tensor_split(world)[rank]
    return ids if rank == world - 1 else ids[:0]  # all on one rank


CASES: tuple[dict[str, Any], ...] = (
    {"metric": "euclidean", "init": None},
    {"metric": "spherical", "init": None},
    {"metric": "euclidean", "init": start()},
)


def bits(result: KMeansResult) -> list[str]:
    """Return what must be the same on every rank."""
    whole = (result.centroids_gkd, result.inertia_g, result.rounds_g)
    return [tensor.numpy().tobytes().hex() for tensor in whole]


def cluster(deal: str) -> list[tuple[list[str], dict[int, list[int]]]]:
    """Run the cases on this rank; return the bits, and the clusters of each point here."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["SETFORMER_RENDEZVOUS"], rank=rank, world_size=world)
    ids = ids_of(rank, world, deal)
    found = []
    for case in CASES:
        result = distributed_kmeans(points()[:, ids], ids, 7, across=TensorSums(), seed=5, **case)
        found.append((bits(result), dict(zip(ids.tolist(), result.assignment_gn.T.tolist(), strict=True))))
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize(("world", "deal"), [(1, "runs"), (2, "runs"), (2, "stripes"), (3, "stripes"), (3, "one")])
def test_same_bits_on_any_number_of_ranks(world: int, deal: str) -> None:
    by_rank = run_ranks(cluster, world, deal)
    for index, case in enumerate(CASES):
        alone = kmeans(points(), 7, seed=5, **case)
        assert (alone.rounds_g > 1).all()
        clusters: dict[str, list[int]] = {}
        for rank in by_rank:
            found, here = rank[index]
            assert found == bits(alone)
            clusters |= here
        assert [clusters[str(i)] for i in range(POINTS)] == alone.assignment_gn.T.tolist()
