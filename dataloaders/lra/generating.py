"""Samples from a seed: candidate number c is a function of (seed, c) alone, and the accepted ones stand in their order.

    candidates 0 … k-1 | k … 2k-1 | …     chunks, made by any process
    accepted ones, in order, each once, until there are enough

So the data do not depend on the number of processes, nor on the size of a chunk.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataloaders.helpers import begin_helper, helper_context, lean_start
from setformer_dist.core.errors import DataError


@dataclass(frozen=True)
class Chunk:
    """The accepted candidates of one chunk.

    Attributes:
        tokens: flat, raw values (before the shift by one that frees 0 for padding), uint8.
        lengths: (k,) tokens of each sample.
        labels: (k,) int64.
        candidates: (k,) numbers of the accepted candidates, rising.
    """

    tokens: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    candidates: npt.NDArray[np.int64]


MakeChunk = Callable[[int, int], Chunk]  # (first candidate, number of candidates) -> the accepted ones


@dataclass(frozen=True)
class Sample:
    """One accepted, new candidate."""

    tokens: npt.NDArray[np.uint8]
    label: int
    candidate: int


def accepted_samples(make: MakeChunk, chunk: int, workers: int) -> Generator[Sample]:
    """Yield accepted candidates in order, each token sequence once, endlessly.

    Args:
        make: makes a chunk; a picklable function of its arguments alone.
        chunk: candidates made at once.
        workers: processes; 0 works in this one. Does not change what is yielded.

    Raises:
        DataError: one of the processes died.
    """
    seen: set[bytes] = set()
    for made in _chunks(make, chunk, workers):
        ends = np.cumsum(made.lengths)
        for start, end, label, candidate in zip(ends - made.lengths, ends, made.labels, made.candidates, strict=True):
            tokens = made.tokens[start:end]
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield Sample(tokens, int(label), int(candidate))


def _chunks(make: MakeChunk, chunk: int, workers: int) -> Iterator[Chunk]:
    firsts = itertools.count(0, chunk)
    if not workers:
        for first in firsts:
            yield make(first, chunk)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=helper_context(), initializer=begin_helper, initargs=(os.getpid(),))

    def submit() -> Future[Chunk]:
        with lean_start():  # any submission may start a process
            return pool.submit(make, next(firsts), chunk)

    try:
        # Two chunks per process under way: enough that none waits, few enough to throw away at the end.
        pending = deque(submit() for _ in range(2 * workers))
        while True:
            made = pending.popleft().result()
            pending.append(submit())
            yield made
    except BrokenProcessPool:
        raise DataError(
            f"one of the {workers} processes that make samples was killed, most likely because memory ran out: use "
            "fewer --workers (0 works in one process; the data are the same)"
        ) from None
    except GeneratorExit:
        # The consumer has enough. Chunks that were begun are finished: a process killed between two of them may leave
        # the queue locked for the others.
        raise
    except BaseException:  # Ctrl-C too: nobody waits for what will be thrown away
        for helper in set(multiprocessing.active_children()) - others:
            helper.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
