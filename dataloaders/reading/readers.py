"""Has requests answered ahead of time and in order: by threads of this process, or by processes with threads.

    threads = t    t threads share the spans of the requests that are under way, `prefetch` of them ahead of the one
                   that is wanted; both decoding and resizing let Python's lock go, so threads do run side by side
    threads = 0    one thread, which begins when an answer is asked for
    workers = w    w processes, each with such threads, each with `prefetch` requests of its own

What is ready first waits for what comes before it, so the order is that of the requests. A defect in a reader is
raised where the answer is asked for. Every wait has a limit. Each thread computes alone (one thread of torch's own),
so that a mean over an image's pixels does not depend on how many cores shared it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader

from dataloaders.config import DataConfig
from dataloaders.reading.loading import Loaded, Loading, Request, Work, answer
from dataloaders.reading.processes import begin_helper, helper_context, lean_start
from setformer_dist.core.errors import PassingError

# How torch's DataLoader words the death of a worker, and the end of its patience, in a RuntimeError.
_DEATHS = ("exited unexpectedly", "killed by signal")
_TIMED_OUT = "timed out after"

# Seconds that the wait for a reader is longer than a read may take: a read that fails says why, the wait cannot.
_GRACE_S = 30.0

# Seconds between looks at whether reader processes live. (It is torch's time-out: without one it would look by itself
# but wait for ever, with a long one it would not look before that has passed.)
_LOOK_S = 5.0

Making = Callable[[], Iterator[Request]]


class ThreadPool:
    """Threads that fill spans. Each has torch's own parallelism switched off, which is a setting per thread."""

    def __init__(self, threads: int, wait_s: float) -> None:
        self._wait_s = wait_s
        started = threading.Barrier(threads + 1)
        self._pool = ThreadPoolExecutor(threads, "data-reader", _begin_thread, (started,))
        # An executor starts a thread per task while none is idle, and none is before all have passed the barrier.
        for _ in range(threads):
            self._pool.submit(_nothing)
        started.wait()
        # A new thread of anybody else would inherit the setting of ours.
        torch.set_num_threads(torch.get_num_threads())

    def begin(self, work: Work) -> list[Future[None]]:
        """Hand out a request's spans."""
        return [self._pool.submit(work.fill, span) for span in work.spans]

    def end(self, work: Work, parts: list[Future[None]]) -> Loaded:
        """Wait for a request's spans and return its answer.

        Raises:
            PassingError: no span was done within the limit.
        """
        for part in parts:
            try:
                part.result(timeout=self._wait_s)
            except concurrent.futures.TimeoutError:
                if part.done():
                    raise  # the reader's own
                raise PassingError(
                    f"a data reader gave no sample for {self._wait_s:.0f} s: the storage hangs, or its threads get no "
                    "time; check it, or raise data.read_timeout"
                ) from None
        return work.loaded()

    def close(self) -> None:
        """End the threads, after the span that each is at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """Give up on threads that hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _begin_thread(started: threading.Barrier) -> None:
    torch.set_num_threads(1)
    started.wait()


def _nothing() -> None:
    """The task that starts a thread."""


class _InWorker:
    """Answers whole requests within a worker process, by its threads."""

    def __init__(self, loading: Loading, threads: int, wait_s: float) -> None:
        self._loading = loading
        self._threads = threads
        self._wait_s = wait_s
        self._pool: ThreadPool | None = None

    def __getitem__(self, request: Request) -> Loaded:
        if not self._threads:  # the process itself has one torch thread
            return answer(self._loading, request)
        if self._pool is None:
            self._pool = ThreadPool(self._threads, self._wait_s)
        work = self._loading.begin(request)
        return self._pool.end(work, self._pool.begin(work))


class Readers:
    """Has requests answered in order, ahead of time.

    Args:
        loading: answers them.
        config: gives workers, threads, prefetch and read_timeout.
    """

    def __init__(self, loading: Loading, config: DataConfig) -> None:
        self._loading = loading
        self._workers = config.workers
        self._threads = config.threads
        self._prefetch = config.prefetch
        self._wait_s = config.read_timeout + _GRACE_S
        self._running: Iterator[Loaded] | None = None
        self._end: Callable[[], None] = _nothing

    def answers(self, make_requests: Making) -> Iterator[Loaded]:
        """Yield the answers; the ones being made for an earlier call are given up.

        Raises:
            PassingError: a reader died or hung.
            DataError: it found what a user must repair.
        """
        self.close()
        running = self._by_processes(make_requests) if self._workers else self._by_threads(make_requests)
        self._running = running
        try:
            while self._running is running:  # not after close(), whose readers would never answer
                loaded = next(running, None)
                if loaded is None:
                    return
                if loaded.error is not None:
                    raise loaded.error
                yield loaded
        finally:
            if self._running is running:
                self.close()

    def _by_threads(self, make_requests: Making) -> Iterator[Loaded]:
        pool = ThreadPool(max(1, self._threads), self._wait_s)
        self._end = pool.close
        ahead = self._prefetch if self._threads else 0
        requests = make_requests()
        under_way: deque[tuple[Work, list[Future[None]]]] = deque()
        while True:
            while len(under_way) <= ahead and (request := next(requests, None)) is not None:
                work = self._loading.begin(request)
                under_way.append((work, pool.begin(work)))
            if not under_way:
                return
            try:
                loaded = pool.end(*under_way.popleft())
            except PassingError:
                self._end = pool.abandon
                raise
            yield loaded

    def _by_processes(self, make_requests: Making) -> Iterator[Loaded]:
        with lean_start():
            answers: Any = iter(self._loader(_Requests(make_requests)))
        self._end = answers._shutdown_workers
        while (loaded := self._next_of(answers)) is not None:
            yield loaded

    def _next_of(self, answers: Iterator[Loaded]) -> Loaded | None:
        """Wait for the next answer of torch's iterator; None at its end."""
        limit = time.monotonic() + self._wait_s + _GRACE_S  # the worker's own wait speaks first
        while True:
            try:
                return next(answers, None)
            except RuntimeError as error:
                if any(words in str(error) for words in _DEATHS):
                    raise PassingError(
                        f"a data reader process died ({error}): if memory or /dev/shm ran out, lower data.workers "
                        "or data.prefetch"
                    ) from None
                if _TIMED_OUT not in str(error):
                    raise  # a defect within a reader, with its traceback
            if time.monotonic() > limit:
                raise PassingError(
                    f"no data reader process gave a batch for {self._wait_s:.0f} s: the storage hangs, or they get no "
                    "time; check it, or raise data.read_timeout"
                )

    def _loader(self, requests: Iterable[Request]) -> DataLoader[Loaded]:
        return DataLoader(
            _InWorker(self._loading, self._threads, self._wait_s),  # type: ignore[arg-type]
            batch_size=None,  # a request is a whole micro batch already
            sampler=requests,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            timeout=_LOOK_S,
            multiprocessing_context=helper_context(),
            worker_init_fn=functools.partial(_begin_reader, os.getpid()),
            generator=torch.Generator(),  # else it draws a seed from the run's own generator
        )

    def close(self) -> None:
        """End the readers."""
        self._running = None
        end, self._end = self._end, _nothing
        end()


class _Requests:
    """An iterable that begins anew whenever it is iterated."""

    def __init__(self, make: Making) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Request]:
        return self._make()


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _begin_reader(starter: int, worker: int) -> None:
    begin_helper(starter)
