"""Has requests answered ahead of time and in order: by threads of this process, or by processes with threads.

    threads = t    t threads share the spans of the requests that are under way, `prefetch` of them ahead of the one
                   that is wanted; both decoding and resizing let Python's lock go, so threads do run side by side
    threads = 0    one thread, which begins when an answer is asked for
    workers = w    w processes, each with such threads, each with `prefetch` requests of its own

What is ready first waits for what comes before it, so the order is that of the requests. A defect in a reader is
raised where the answer is asked for. Every wait has a limit, which begins again whenever a sample is done or bytes of a
shard come: storage may be slow, but not silent. A thread that hangs is left behind. Each thread computes alone (one
thread of torch's own), so that a mean over an image's pixels does not depend on how many cores shared it.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dataloaders.config import DataConfig
from dataloaders.helpers import begin_helper, helper_context, lean_start
from dataloaders.reading.loading import Loaded, Loading, Request, Work
from setformer_dist.core.errors import ConfigError, DataError, SetformerError, TransientError
from setformer_dist.core.shared_memory import NO_SHARED_MEMORY, is_no_room

_log = logging.getLogger(__name__)

# How torch's DataLoader reports the death of a worker, and its timeout, in a RuntimeError.
_DEATHS = ("exited unexpectedly", "killed by signal")
_TIMED_OUT = "timed out after"
# How it begins an error that was raised within a worker.
_RAISED = "Caught "

# Seconds that the wait for a reader is longer than a read may take: a read that fails says why, the wait cannot.
_GRACE_S = 30.0

# Seconds between looks at whether reader processes live. (It is torch's time-out: without one it would look by itself
# but wait for ever, with a long one it would not look before that has passed.)
_LOOK_S = 5.0

# Seconds between looks at whether anything moved, while an answer is waited for.
_TICK_S = 0.2

# Seconds that threads get to end the span that they are at, when their answers are not wanted any more.
_CLOSE_S = 10.0

# Where torch's constructor fails (no room for a semaphore) its `__del__` would look for this in vain, and say so.
_MultiProcessingDataLoaderIter._shutdown = True

Making = Callable[[], Iterator[Request]]


class ThreadPool:
    """Threads that fill spans. Each has torch's own parallelism switched off, which is a setting per thread.

    They are daemons, and not those of an executor, which the interpreter would wait for at its end, hang as they may.

    Args:
        threads: at least 1.
        wait_s: seconds that `end` waits while nothing moves.

    Raises:
        ConfigError: the system does not start so many threads.
    """

    def __init__(self, threads: int, wait_s: float) -> None:
        self._wait_s = wait_s
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        started = threading.Semaphore(0)
        try:
            for number in range(threads):
                thread = threading.Thread(
                    target=_work_through, args=(self._tasks, started), name=f"data-reader_{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise ConfigError(
                f"the system started {len(self._threads)} of data.threads = {threads} threads ({error}): lower it"
            ) from None
        for _ in range(threads):
            started.acquire(timeout=wait_s)
        # A new thread of anybody else would inherit the setting of ours.
        torch.set_num_threads(torch.get_num_threads())
        atexit.register(self.close)

    def begin(self, work: Work) -> list[Future[None]]:
        """Hand out a request's spans."""
        parts = []
        for span in work.spans:
            part: Future[None] = Future()
            self._tasks.put((part, work, span))
            parts.append(part)
        return parts

    def end(self, work: Work, parts: list[Future[None]], moved: Callable[[], int]) -> Loaded:
        """Wait for a request's spans and return its answer.

        Args:
            work: the request.
            parts: its spans, as `begin` returned them.
            moved: asked several times a second; the limit begins again where it changes.

        Raises:
            TransientError: nothing moved for so long.
        """
        seen, since = moved(), time.monotonic()
        for part in parts:
            while not concurrent.futures.wait((part,), min(_TICK_S, self._wait_s)).done:
                now = moved()
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since >= self._wait_s:
                    raise TransientError(
                        f"a data reader gave no sample for {self._wait_s:.0f} s: the storage hangs, or its threads get "
                        "no CPU time; check the storage, or raise data.read_timeout"
                    )
            part.result()
        return work.loaded()

    def close(self) -> None:
        """End the threads, after the span that each is at; one that hangs is left behind."""
        self.abandon()
        limit = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(limit - time.monotonic(), 0.0))
        hanging = sum(thread.is_alive() for thread in self._threads)
        if hanging:
            _log.warning(
                "%d data reader threads are left behind, as they hang in a read for more than %g s: check the storage",
                hanging,
                _CLOSE_S,
            )

    def abandon(self) -> None:
        """Let the threads end without waiting for them."""
        atexit.unregister(self.close)
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)


# What to set once it is done; the request; the part of it to fill.
_Task = tuple[Future[None], Work, range]


def _work_through(tasks: queue.SimpleQueue[_Task | None], started: threading.Semaphore) -> None:
    torch.set_num_threads(1)
    started.release()
    while (task := tasks.get()) is not None:
        part, work, span = task
        if part.set_running_or_notify_cancel():
            try:
                work.fill(span)
            except BaseException as error:  # noqa: BLE001  (raised where the answer is asked for)
                part.set_exception(error)
            else:
                part.set_result(None)
        del task, part, work  # else the last batch would live until the next comes


def _nothing() -> None:
    """The end of readers that have not begun."""


class _InWorker:
    """Answers whole requests within a worker process, by its threads.

    Args:
        loading: answers them.
        threads: of each worker.
        wait_s: seconds that nothing may move.
        moved: a place for each worker, in shared memory, where it shows that something does.
    """

    def __init__(self, loading: Loading, threads: int, wait_s: float, moved: Any) -> None:
        self._loading = loading
        self._threads = threads
        self._wait_s = wait_s
        self._moved = moved
        self._pool: ThreadPool | None = None

    def __getitem__(self, request: Request) -> Loaded:
        if self._pool is None:
            self._pool = ThreadPool(max(1, self._threads), self._wait_s)
        work = self._loading.begin(request)
        return _shared(self._pool.end(work, self._pool.begin(work), self._show))

    def _show(self) -> int:
        moved = self._loading.moved()
        worker = get_worker_info()
        if worker is not None:
            self._moved[worker.id] = moved
        return moved


def _shared(loaded: Loaded) -> Loaded:
    """Put an answer's pixels where the training process sees them; where there is no room, answer that.

    torch would do so in a thread whose errors go nowhere: the answer would never come.
    """
    try:
        for pixels in (loaded.images, loaded.masks):
            if pixels is not None:
                pixels.share_memory_()  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        if not is_no_room(error):
            raise
        return Loaded(loaded.request, torch.empty(0), loaded.samples, error=TransientError(NO_SHARED_MEMORY))
    return loaded


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
            TransientError: a reader died or hung.
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
                loaded = pool.end(*under_way.popleft(), self._loading.moved)
            except TransientError:
                self._end = pool.abandon
                raise
            yield loaded

    def _by_processes(self, make_requests: Making) -> Iterator[Loaded]:
        moved = helper_context().RawArray("Q", self._workers)
        with lean_start():
            try:
                answers: Any = iter(self._loader(_Requests(make_requests), moved))
            except (OSError, SetformerError):
                raise
            except Exception as error:  # noqa: BLE001 - a lambda, a lock, an open file each have another
                raise DataError(
                    f"the data cannot be sent to the processes of data.workers ({error}): leave lambdas, locks and "
                    "open files out of your data set, or set data.workers = 0 and data.threads"
                ) from None
        self._end = answers._shutdown_workers
        while (loaded := self._next_of(answers, moved)) is not None:
            yield loaded

    def _next_of(self, answers: Iterator[Loaded], moved: Any) -> Loaded | None:
        """Wait for the next answer of torch's iterator; None at its end."""
        wait_s = self._wait_s + _GRACE_S  # the worker's own wait speaks first
        seen, since = list(moved), time.monotonic()
        while True:
            try:
                return next(answers, None)
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                if str(error).startswith(_RAISED):
                    raise
                raise _died(error) from None  # while it handed a tensor over
            except RuntimeError as error:
                if any(words in str(error) for words in _DEATHS):
                    raise _died(error) from None
                if _TIMED_OUT not in str(error):
                    raise  # a defect within a reader, with its traceback
            now = list(moved)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since >= wait_s:
                raise TransientError(
                    f"no data reader process gave a sample for {wait_s:.0f} s: the storage hangs, or they get no CPU "
                    "time; check the storage, or raise data.read_timeout"
                )

    def _loader(self, requests: Iterable[Request], moved: Any) -> DataLoader[Loaded]:
        return DataLoader(
            _InWorker(self._loading, self._threads, self._wait_s, moved),  # type: ignore[arg-type]
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


def _died(error: Exception) -> TransientError:
    return TransientError(
        f"a data reader process died ({error}): if memory or /dev/shm ran out, lower data.workers or data.prefetch"
    )


class _Requests:
    """An iterable that begins again whenever it is iterated."""

    def __init__(self, make: Making) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Request]:
        return self._make()


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _begin_reader(starter: int, worker: int) -> None:
    begin_helper(starter)
