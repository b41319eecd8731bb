"""One run, one set of ranks: locks on the run's folder, held by the supervisor and by rank 0 while they run.

Two that train in one folder would sweep each other's unfinished checkpoints and mix their metrics. The locks are the
kernel's (POSIX record locks): they are gone the moment the process is, however it ends, over NFS too; and the file
stays. Who does not hold its lock writes nothing else into the folder.

    run.lock  byte 0   rank 0, whatever launcher started it
              byte 1   the supervisor; or rank 0, where it has none
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from setformer_dist.core.comm import Collectives
from setformer_dist.core.errors import LaunchError, TransientError
from setformer_dist.core.ledger import LEDGER, LOCK_FILE, last_seen

log = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 15.0  # for a predecessor that is about to end
_LOOK_EVERY_S = 0.2
_RANK = 0


@contextlib.contextmanager
def held(
    folder: Path, comm: Collectives, timeout_s: float = LOCK_TIMEOUT_S, supervised: bool = False
) -> Iterator[None]:
    """Hold rank 0's lock of a run's folder; make the folder if need be. Collective at its beginning.

    Where the storage knows no locks, rank 0 warns, and the run continues without.

    Args:
        folder: of the run.
        comm: all ranks.
        timeout_s: how long to wait for a predecessor.
        supervised: a supervisor holds its own lock; otherwise rank 0 holds that as well.

    Raises:
        LaunchError: on all ranks: another process holds it, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        fault: str | None = None
        if comm.ranks.is_main and (fault := odd_file(folder)) is None:
            try:
                descriptor = stack.enter_context(_opened(folder))
                fault = _wait_for(descriptor, _RANK, 1 if supervised else 2, folder, timeout_s)
            except OSError as error:
                fault = f"run folder {folder} cannot be written: {error}"
        fault = comm.broadcast_json(fault)
        if fault is not None:
            raise LaunchError(fault)
        yield


class Supervised:
    """A run's folder whose supervisor's lock this process holds. Made by `supervising`.

    Attributes:
        seen: when the supervisor before this one gave its last sign of life, None where there was none.
    """

    def __init__(self, folder: Path, descriptor: int, seen: float | None) -> None:
        self.seen = seen
        self._folder = folder
        self._descriptor = descriptor
        self._known: dict[Path, int] = {}
        self._gone_since: float | None = None

    def show_life(self) -> None:
        """Set the lock file's time, by which a killed supervisor's last moment is known."""
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)

    def fault(self) -> str | None:
        """Return what happened to the run's folder, None where nothing did: it, or its checkpoints, may be gone.

        Two looks must agree, half a second apart: over a network a name may be missing for a moment.
        """
        lost = self._lost()
        if lost is None:
            self._gone_since = None
            return None
        now = time.monotonic()
        self._gone_since = self._gone_since or now
        if now - self._gone_since < _GONE_S:
            return None
        return (
            f"{lost} was moved or removed while the run was at work in it, so nothing can be saved there: put it back, "
            "and start the run again to resume from its newest checkpoint"
        )

    def _lost(self) -> Path | None:
        for path in (self._folder / LOCK_FILE, self._folder / "checkpoints"):
            try:
                inode = path.stat().st_ino
            except (FileNotFoundError, NotADirectoryError):
                if path in self._known:
                    return path.parent if path.name == LOCK_FILE else path
                continue
            except OSError:
                continue  # the storage does not answer: nothing is known
            if self._known.setdefault(path, inode) != inode:
                return path.parent if path.name == LOCK_FILE else path
        return None


_GONE_S = 0.5


@contextlib.contextmanager
def supervising(folder: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[Supervised]:
    """Hold the supervisor's lock of a run's folder; make the folder if need be.

    Raises:
        LaunchError: another supervisor holds it, or rank 0 of another launcher.
        TransientError: the folder cannot be written.
    """
    if (odd := odd_file(folder)) is not None:
        raise LaunchError(odd)
    with contextlib.ExitStack() as stack:
        try:
            seen = last_seen(folder)
            descriptor = stack.enter_context(_opened(folder))
            fault = _wait_for(descriptor, _RANK, 2, folder, timeout_s)
            if fault is None:  # rank 0 takes its own byte
                with contextlib.suppress(OSError):
                    fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _RANK)
        except OSError as error:
            raise TransientError(f"run folder {folder} cannot be written: {error}") from None
        if fault is not None:
            raise LaunchError(fault)
        supervised = Supervised(folder, descriptor, last_seen(folder) if seen is not None else None)
        yield supervised


def odd_file(folder: Path) -> str | None:
    """Return a sentence where something else lies in the place of a file that the run appends to, None otherwise.

    The open of a pipe waits for ever, a link leads to another user's file, and a device keeps nothing.

    Args:
        folder: of the run; it need not be there.
    """
    logs = folder / "logs"
    if os.path.lexists(logs) and not logs.is_dir():
        return f"{logs} is no folder, and the logs of the ranks belong there: move it away"
    names = (LOCK_FILE, LEDGER, "metrics.jsonl", "samples.jsonl")
    for path in (*(folder / name for name in names), *sorted(logs.glob("rank-*.log"))):
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(path.lstat().st_mode):
                return f"{path} is not a plain file, and the run writes to it: move it away"
    return None


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / LOCK_FILE, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, first: int, count: int, folder: Path, timeout_s: float) -> str | None:
    """Take the lock of some bytes; return why that was not possible."""
    limit = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("run folder %s is not locked against a second run: %s", folder, error)
                return None
            if time.monotonic() > limit:
                return (
                    f"another process trains in run folder {folder}: wait for it or stop it, or give this run another "
                    "run.name"
                )
            time.sleep(_LOOK_EVERY_S)
        else:
            return None
