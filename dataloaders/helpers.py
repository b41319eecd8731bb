"""How helper processes (readers, packers) are started: quickly, safely despite threads, and never left behind.

They are forked from a fork server: a clean process that has imported what they need and has no threads, so
neither CUDA, gloo nor OpenMP of the training process is forked. Compared with a fork of the training process it
cannot deadlock; compared with `spawn` the imports are paid once and not once per worker.

    Ctrl-C (SIGINT)    ignored: the training process decides when to stop
    SIGTERM            ignored unless the starter sends it: launchers and schedulers send it to every process of
                       a job, and a trainer that wants to finish its step still needs its readers
    kill -9 of starter the fork server ends, and with it, within seconds, its children
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext

import torch

_HELD_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def helper_context() -> ForkServerContext:
    """Return the multiprocessing context of helper processes; its server imports our readers beforehand."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dataloaders.reading.readers", "dataloaders.packing.pack", "dataloaders.packing.verify"]
    )
    return context


@contextmanager
def lean_start() -> Iterator[None]:
    """Start helper processes within: they do not import the main program again, and hold back signals.

    multiprocessing would import `__main__` (all of the trainer, DeepSpeed included: seconds) in each of them,
    because the work might be defined there; ours never is.
    """
    # First, as it would lift the signal mask when it starts by itself.
    resource_tracker.ensure_running()
    main = sys.modules["__main__"]
    hidden: dict[str, object] = {
        name: main.__dict__.pop(name) for name in ("__spec__", "__file__") if name in main.__dict__
    }
    main.__spec__ = None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)  # inherited by server and helpers
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        main.__dict__.update(hidden)


def begin_helper(starter: int) -> None:
    """First call in a helper process: one torch thread; ends when the process `starter` asks or is gone."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_on_request, args=(starter,), daemon=True).start()
    threading.Thread(target=_end_with_starter, daemon=True).start()


def _end_on_request(starter: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == starter:
            os._exit(0)


def _end_with_starter() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
