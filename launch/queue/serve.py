"""`setformer queue serve`, and the server that `submit` starts where none runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from launch.queue import token as tokens
from launch.queue.config import VARIABLE, QueueConfig, database_of
from launch.queue.scheduler import Scheduler
from launch.queue.store import Store
from launch.ranks.signals import stop_signals
from setformer_dist.core.errors import LaunchError

_HOME = Path(__file__).resolve().parents[2]
LOG = "server.log"
_IDLE_S = 600.0
_LOOK_S = 3.0
_START_S = 30.0


class Child(Protocol):
    """What runs beside the scheduler."""

    def look(self) -> None:
        """Start it where it does not run; never waits."""

    def close(self) -> None:
        """End it."""


def serve(folder: Path, config: QueueConfig, idle_s: float | None, page: Child | None = None) -> int:
    """Be a scheduler until a stop signal comes; jobs go on without it.

    Args:
        folder: of the queue.
        config: queue.toml.
        idle_s: seconds without a job after which it ends.
        page: runs beside the scheduler, and ends with it.

    Returns:
        0, or 128 + the signal.
    """
    store = open_store(folder, config)
    with stop_signals() as received:

        def over() -> bool:
            if page is not None:
                page.look()
            return bool(received.stop)

        try:
            Scheduler(store, folder, config).serve(over, idle_s, received.wait_for_stop)
        finally:
            if page is not None:
                page.close()
    store.close()
    return 128 + received.stop[0] if received.stop else 0


def open_store(folder: Path, config: QueueConfig) -> Store:
    """Open a queue's database; make the folder if need be.

    Raises:
        LaunchError: it cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"the queue's folder {folder} cannot be made ({error.strerror}): name another with --queue"
        ) from None
    return Store(database_of(folder, config))


def ensure_server(folder: Path, store: Store) -> str | None:
    """Start a server on this machine where none gives a sign of life; return a line about one that was started.

    Raises:
        LaunchError: it does not start.
    """
    before = _beat(store)
    limit = time.monotonic() + _LOOK_S
    while before[0] and time.monotonic() < limit:
        if _beat(store) != before:
            return None
        time.sleep(0.1)
    path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
    with (folder / LOG).open("ab") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "launch.cli",
                "queue",
                "serve",
                "--queue",
                str(folder),
                "--until-idle",
                f"{_IDLE_S:g}",
            ],
            env={**tokens.without(os.environ), "PYTHONPATH": path, VARIABLE: str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
        )
    limit = time.monotonic() + _START_S
    while _beat(store) == before:
        if process.poll() is not None or time.monotonic() > limit:
            raise LaunchError(f"the queue's server did not start: see {folder / LOG}")
        time.sleep(0.1)
    return f"started a server for the queue in {folder} (process {process.pid}; it ends when nothing is left to do)"


def _beat(store: Store) -> tuple[str, int, int]:
    row = store.lease()
    return row["holder"], int(row["term"]), int(row["beat"])
