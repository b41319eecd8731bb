"""How many ranks each bundle has: what the nodes of a cluster have room for. Ray is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from setformer_dist.core.errors import LaunchError
from setformer_dist.core.words import counted


@dataclass(frozen=True)
class Room:
    """What a node has room for.

    Attributes:
        node: its address.
        ranks: that it could have if nothing else ran there.
        free: ranks that it could have now.
    """

    node: str
    ranks: int
    free: int


def bundles(rooms: Sequence[Room], ranks: int, per_node: int | None, now: bool = True) -> list[int]:
    """Return how many ranks each bundle has, in order of rank.

    Args:
        rooms: of the nodes.
        ranks: in all.
        per_node: ranks of each node; by default the emptiest nodes take as many as they have room for.
        now: count what is free now, not what would be.

    Raises:
        LaunchError: they do not fit; the message says what would.
    """
    if per_node is not None:
        if ranks % per_node:
            raise LaunchError(
                f"{counted(ranks, 'rank')} cannot be shared out {per_node} to a node: give --ranks a multiple of "
                "--ranks-per-node"
            )
        wide = [room for room in rooms if _of(room, now) >= per_node]
        if len(wide) < ranks // per_node:
            raise LaunchError(
                f"{counted(ranks, 'rank')} at {per_node} to a node take {counted(ranks // per_node, 'node')}, and "
                f"{len(wide)} of this Ray cluster {_has(len(wide), now)} room for {per_node} ({_told(rooms, now)}): "
                + (f"give --ranks {len(wide) * per_node}, or add nodes" if wide else "give fewer --ranks-per-node")
            )
        return [per_node] * (ranks // per_node)
    left, found = ranks, []
    for room in sorted(rooms, key=lambda room: -_of(room, now)):
        taken = min(left, _of(room, now))
        left -= taken
        found += [taken] if taken else []
    if left:
        fit = ranks - left
        raise LaunchError(
            f"{counted(ranks, 'rank')} do not fit on this Ray cluster, which has room for {fit} ({_told(rooms, now)}): "
            + (f"give --ranks {fit}, or add nodes" if fit else "add nodes")
        )
    return found


def on_nodes(rooms: Sequence[Room], nodes: Sequence[tuple[str, int]], now: bool = True) -> list[int]:
    """Return how many ranks each bundle has, of nodes that are named.

    Args:
        rooms: of the cluster's nodes.
        nodes: addresses, and the ranks of each.
        now: count what is free now, not what would be.

    Raises:
        LaunchError: there is no such node, or it has no room for them.
    """
    known = {room.node: room for room in rooms}
    for name, ranks in nodes:
        if (room := known.get(name)) is None:
            raise LaunchError(f"this Ray cluster has no node {name} ({_told(rooms, now)}): name one of its nodes")
        if _of(room, now) < ranks:
            raise LaunchError(
                f"node {name} of this Ray cluster has room for {_of(room, now)} of {counted(ranks, 'rank')} "
                f"({_told(rooms, now)}): give it fewer, or name another"
            )
    return [ranks for _, ranks in nodes]


def _of(room: Room, now: bool) -> int:
    return room.free if now else room.ranks


def _has(count: int, now: bool) -> str:
    verb = "has" if count == 1 else "have"
    return f"{verb} now" if now else verb


def _told(rooms: Sequence[Room], now: bool) -> str:
    shown = [
        f"node {room.node}: {room.ranks}" + (f", {room.free} free now" if now and room.free != room.ranks else "")
        for room in rooms[:5]
    ]
    return "; ".join([*shown, *([f"{len(rooms) - 5} more"] if len(rooms) > 5 else [])]) or "it has no nodes"
