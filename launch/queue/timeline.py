"""Slots of each node over time: what is free now, what running jobs give back, what is reserved for jobs ahead.

A running job gives its slots back at its limit at the latest. A reservation is a placement and a span of time. A job
fits at a time if its slots are free then, and stay free whenever a reservation begins in its own span: between two
beginnings, slots only come free.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from launch.queue.state import Node, Placement

Slots = NDArray[np.int64]


class Timeline:
    """Free slots over time.

    Attributes:
        nodes: all, by index.
    """

    def __init__(self, nodes: Sequence[Node], now: float) -> None:
        self.nodes = nodes
        self._now = now
        self._at = {node.name: index for index, node in enumerate(nodes)}
        self._usable = np.array([node.usable for node in nodes], dtype=bool)
        self._free: Slots = np.array([node.slots if node.usable else 0 for node in nodes], dtype=np.int64)
        # Nodes that failed less come first, a whole failure at a time.
        self._failures = np.array([int(node.failures) for node in nodes], dtype=np.int64)
        self._times: list[float] = []
        self._gives: list[tuple[int, int]] = []
        self._spans: list[tuple[float, float]] = []
        self._reserved: Slots = np.zeros((0, len(nodes)), dtype=np.int64)
        self._left: list[Slots] = []  # by reservation: what is free when it begins, it and others taken away
        self._soon: Slots = np.zeros(len(nodes), dtype=np.int64)

    def slots_of(self, placement: Placement) -> Slots:
        """Return a placement as slots by node; a node that is gone is left out."""
        slots = np.zeros(len(self.nodes), dtype=np.int64)
        for name, count in placement:
            if (index := self._at.get(name)) is not None:
                slots[index] += count
        return slots

    def take(self, placement: Placement, until: float) -> None:
        """Let a job have slots from now on, until a time at the latest."""
        for name, count in placement:
            index = self._at.get(name)
            if index is not None and self._usable[index]:
                self._free[index] -= count
                place = bisect.bisect_right(self._times, until)
                self._times.insert(place, until)
                self._gives.insert(place, (index, count))
                for (start, _), left in zip(self._spans, self._left, strict=True):
                    if start < until:
                        left[index] -= count

    def give_soon(self, slots: Slots) -> None:
        """Note slots that jobs which are stopping give back."""
        self._soon += np.where(self._usable, slots, 0)

    def reserve(self, start: float, length: float, placement: Placement) -> None:
        """Keep slots for a job that is ahead."""
        end, slots = start + length, self.slots_of(placement)
        for (other, _), left in zip(self._spans, self._left, strict=True):
            if start <= other < end:
                left -= slots
        self._spans.append((start, end))
        self._reserved = np.vstack([self._reserved, slots])
        self._left.append(self._free_at(start) - self._reserved_in(start, start))

    @property
    def total_free(self) -> int:
        """Slots that are free now, reserved or not."""
        return int(self._free.sum())

    def free(self, at: float, length: float) -> Slots:
        """Return slots by node that are free for a whole span from a time on; less than 0 where there are too few."""
        free = self._free_at(at) - self._reserved_in(at, at)
        for (start, _), left in zip(self._spans, self._left, strict=True):
            if at < start < at + length:
                np.minimum(free, left, out=free)
        return free

    def _free_at(self, at: float) -> Slots:
        return self._free + self._given(bisect.bisect_right(self._times, at)) if at > self._now else self._free.copy()

    @property
    def any_soon(self) -> bool:
        """Whether a job that is stopping gives slots back."""
        return bool(self._soon.any())

    def free_soon(self, at: float, length: float) -> Slots:
        """Return what is free for a span that begins when the jobs that are stopping have ended.

        Every reservation in the span counts in full: what stopping jobs give may be what it waits for.
        """
        return self._free + self._soon - self._reserved_in(at, at + length)

    def _given(self, count: int) -> Slots:
        if not count:
            return np.zeros(len(self.nodes), dtype=np.int64)
        gives = np.array(self._gives[:count], dtype=np.int64)
        return np.bincount(gives[:, 0], weights=gives[:, 1], minlength=len(self.nodes)).astype(np.int64)

    def _reserved_in(self, begin: float, end: float) -> Slots:
        """Return the sum of the reservations of a span, or of an instant where it ends when it begins."""
        last = begin == end
        wanted = [(start <= begin if last else start < end) and until > begin for start, until in self._spans]
        return np.asarray(self._reserved[np.array(wanted, dtype=bool)].sum(axis=0), dtype=np.int64)

    def earliest(self, ranks: int, per_node: int | None, length: float) -> tuple[float, Placement] | None:
        """Return when and where a job fits at the earliest; None where it never does.

        It fits once all running jobs and reservations have ended, if it fits the cluster at all. Among the times at
        which something ends, halving finds one at which it fits and at the one before it does not.
        """
        ends = sorted({self._now, *self._times, *(end for _, end in self._spans)})
        low, high, found = 0, len(ends) - 1, None
        while low <= high:
            middle = (low + high) // 2
            placement = self.place(self.free(ends[middle], length), ranks, per_node)
            if placement is not None:
                found, high = (ends[middle], placement), middle - 1
            else:
                low = middle + 1
        return found

    def place(self, free: Slots, ranks: int, per_node: int | None) -> Placement | None:
        """Choose nodes: as few as can be, and the tightest of those, so that large gaps stay whole.

        Args:
            free: slots by node.
            ranks: in all.
            per_node: ranks of each node; None for any.

        Returns:
            The placement; None where it does not fit.
        """
        free = np.maximum(free, 0)
        if per_node is not None:
            order = self._tightest(free, per_node)[: ranks // per_node]
            if len(order) * per_node < ranks:
                return None
            return tuple((self.nodes[index].name, per_node) for index in order)
        if int(free.sum()) < ranks:
            return None
        chosen: list[tuple[str, int]] = []
        left = ranks
        while left:
            wide = self._tightest(free, left)
            index = int(wide[0]) if len(wide) else int(np.lexsort((self._failures, -free))[0])
            taken = min(left, int(free[index]))
            chosen.append((self.nodes[index].name, taken))
            left -= taken
            free[index] = 0
        return tuple(chosen)

    def _tightest(self, free: Slots, at_least: int) -> Slots:
        """Return the nodes with so many free slots, those that failed least and are tightest first."""
        wide = np.flatnonzero(free >= at_least)
        order = np.lexsort((free[wide], self._failures[wide]))
        return wide[order]
