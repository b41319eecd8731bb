"""How the ranks of a run are put on the nodes of a Ray cluster."""

import re

import pytest

from launch.ray.room import Room, bundles, on_nodes
from setformer_dist.core.errors import LaunchError

TWO = [Room("a", 8, 3), Room("b", 8, 8)]


def test_the_emptiest_nodes_take_as_many_as_they_have_room_for() -> None:
    assert bundles(TWO, 8, None) == [8]
    assert bundles(TWO, 11, None) == [8, 3]
    assert bundles(TWO, 16, None, now=False) == [8, 8]
    assert bundles([Room("a", 0, 0), *TWO], 9, None) == [8, 1]


def test_ranks_per_node() -> None:
    assert bundles(TWO, 6, 3) == [3, 3]
    assert bundles(TWO, 8, 8) == [8]


@pytest.mark.parametrize(
    ("ranks", "per_node", "said"),
    [
        (12, None, "room for 11 (node a: 8, 3 free now; node b: 8): give --ranks 11"),
        (5, 2, "give --ranks a multiple of --ranks-per-node"),
        (8, 4, "take 2 nodes, and 1 of this Ray cluster has now room for 4"),
        (18, 9, "0 of this Ray cluster have now room for 9 (node a: 8, 3 free now; node b: 8): give fewer"),
    ],
)
def test_what_does_not_fit(ranks: int, per_node: int | None, said: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(said)):
        bundles(TWO, ranks, per_node)


def test_an_empty_cluster() -> None:
    with pytest.raises(LaunchError, match=r"room for 0 \(it has no nodes\): add nodes"):
        bundles([], 1, None)


def test_named_nodes_have_what_was_given_them() -> None:
    assert on_nodes(TWO, [("b", 5), ("a", 3)]) == [5, 3]
    assert on_nodes(TWO, [("a", 8)], now=False) == [8]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("b", 1), ("c", 1)], "has no node c (node a: 8, 3 free now; node b: 8): name one of its nodes"),
        ([("a", 4)], "node a of this Ray cluster has room for 3 of 4 ranks"),
    ],
)
def test_named_nodes_without_room(nodes: list[tuple[str, int]], said: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(said)):
        on_nodes(TWO, nodes)
