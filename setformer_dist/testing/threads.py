"""Several ranks as threads of one process, with the collectives of `setformer_dist.core.comm`.

Enough for code that communicates by JSON alone (checkpoints, decisions of rank 0), and for models whose images are cut
by rows (`ThreadParts`); thousands of times quicker to start than processes. Values pass through JSON text, as they do
between processes, and a rank that gives up is noticed by all that wait for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from setformer_dist.core.ranks import RankInfo

T = TypeVar("T")


class PeerGoneError(RuntimeError):
    """A collective cannot complete, because a rank has ended."""


class _Shared:
    """Slots for values and a meeting point.

    Unlike `threading.Barrier`, a meeting that was complete stays so for those that wake up late, even if a rank
    has given up since: between processes a finished collective does not fail afterwards either.
    """

    def __init__(self, ranks: int, timeout_s: float) -> None:
        self.slots: list[Any] = [None] * ranks
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._arrived = 0
        self._meetings = 0
        self._given_up = False

    def meet(self) -> None:
        with self._changed:
            mine = self._meetings
            self._arrived += 1
            if self._arrived == len(self.slots):
                self._arrived = 0
                self._meetings += 1
                self._changed.notify_all()
            in_time = self._changed.wait_for(lambda: self._given_up or self._meetings > mine, self._timeout_s)
            if self._meetings == mine:
                raise PeerGoneError("another rank has given up" if in_time else "another rank did not come in time")

    def give_up(self) -> None:
        with self._changed:
            self._given_up = True
            self._changed.notify_all()


class ThreadCollectives:
    """One thread's end of the collectives."""

    def __init__(self, rank: int, shared: _Shared) -> None:
        world_size = len(shared.slots)
        self.ranks = RankInfo(rank, world_size, rank, world_size)
        self._shared = shared

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._shared.meet()

    def gather_json(self, value: T) -> list[T]:
        """Return every rank's value, by rank."""
        self._shared.slots[self.ranks.rank] = json.dumps(value)
        self.barrier()
        answers = [json.loads(text) for text in self._shared.slots]
        self.barrier()  # no rank may write the next value before all have read this one
        return answers

    def broadcast_json(self, value: T) -> T:
        """Return rank 0's value."""
        return self.gather_json(value)[0]


class ThreadParts:
    """`ops.parts.Parts` of one thread; sums are taken in the order of the ranks."""

    def __init__(self, comm: ThreadCollectives) -> None:
        """Take all ranks as one group."""
        self.index, self.count = comm.ranks.rank, comm.ranks.world_size
        self._shared = comm._shared

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over all ranks."""
        first, *others = self._all(values)
        total = first.clone()
        for other in others:
            total += other
        self._shared.meet()  # no rank may change its values before all have read them
        return total

    def shift(self, values: torch.Tensor, down: bool) -> torch.Tensor:
        """Return the neighbour's values, zeros at the edge."""
        every = self._all(values)
        neighbour = self.index - 1 if down else self.index + 1
        found = every[neighbour].clone() if 0 <= neighbour < self.count else torch.zeros_like(values)
        self._shared.meet()
        return found

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of all ranks."""
        found = torch.stack(self._all(values))
        self._shared.meet()
        return found

    def _all(self, values: torch.Tensor) -> list[torch.Tensor]:
        self._shared.slots[self.index] = values.detach()
        self._shared.meet()
        found = list(self._shared.slots)
        self._shared.meet()
        return found


def run_on_threads(ranks: int, work: Callable[[ThreadCollectives], T], timeout_s: float = 60) -> list[T]:
    """Run a function on each of several ranks and return their results by rank.

    Args:
        ranks: how many.
        work: called with the rank's collectives.
        timeout_s: longest wait for the other ranks.

    Raises:
        Exception: the first rank's error, after all ranks have ended.
    """
    shared = _Shared(ranks, timeout_s)

    def one(rank: int) -> T:
        try:
            return work(ThreadCollectives(rank, shared))
        except BaseException:
            shared.give_up()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(one, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    # A missing peer is the echo of another rank's error: show that one.
    errors.sort(key=lambda error: isinstance(error, PeerGoneError))
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
