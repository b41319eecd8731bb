"""Several ranks as threads of one process, with the collectives of `setformer_dist.core.comm`.

Enough for whatever communicates by JSON alone (checkpoints, decisions of rank 0), and thousands of times
quicker to start than processes. Values pass through JSON text, as they do between processes, and a rank that
gives up breaks the barrier, so that the others fail instead of waiting.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from setformer_dist.core.ranks import RankInfo

T = TypeVar("T")


class _Shared:
    def __init__(self, ranks: int, timeout_s: float) -> None:
        self.barrier = threading.Barrier(ranks, timeout=timeout_s)
        self.slots: list[str] = ["null"] * ranks


class ThreadCollectives:
    """One thread's end of the collectives."""

    def __init__(self, rank: int, shared: _Shared) -> None:
        world_size = len(shared.slots)
        self.ranks = RankInfo(rank, world_size, rank, world_size)
        self._shared = shared

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._shared.barrier.wait()

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""
        self._shared.slots[self.ranks.rank] = json.dumps(value)
        self.barrier()
        answers = [json.loads(text) for text in self._shared.slots]
        self.barrier()  # nobody may write the next value before all have read this one
        return answers

    def broadcast_json(self, value: Any) -> Any:
        """Return rank 0's value."""
        return self.gather_json(value if self.ranks.is_main else None)[0]


def run_on_threads(ranks: int, work: Callable[[ThreadCollectives], T], timeout_s: float = 60) -> list[T]:
    """Run a function on each of several ranks and return their results by rank.

    Args:
        ranks: how many.
        work: called with the rank's collectives.
        timeout_s: longest wait at a barrier.

    Raises:
        Exception: the first rank's error, after all ranks have ended.
    """
    shared = _Shared(ranks, timeout_s)

    def one(rank: int) -> T:
        try:
            return work(ThreadCollectives(rank, shared))
        except BaseException:
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(one, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    # A broken barrier is the echo of somebody else's error: show that one.
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
