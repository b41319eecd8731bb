"""One run, one set of ranks: locks on the run's folder, held by the supervisor and by rank 0 while they run.

Two that train in one folder would sweep each other's unfinished checkpoints and mix their metrics. The locks are the
kernel's (POSIX record locks): they are gone the moment the process is, however it ends, over NFS too; and the file
stays. Where they do not reach another host, the file says who holds it, and gives signs of life
(`launch.ranks.holder`). Who does not hold its lock writes nothing else into the folder.

    run.lock  byte 0   rank 0, whoever started it
              byte 1   the supervisor; or rank 0, where it has none. Its holder writes the note
              time     set by both, as a sign of life
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.ranks.holder import STALE_S, Holder, clear_note, note_in, this_process, why_held, write_note
from setformer_dist.core.comm import Alone, Collectives
from setformer_dist.core.errors import LaunchError, TransientError
from setformer_dist.core.ledger import LEDGER, LOCK_FILE, last_seen

log = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 15.0  # for a predecessor that is about to end
_LOOK_EVERY_S = 0.2
_SIGN_EVERY_S = 1.0
_RANK = 0


@contextlib.contextmanager
def held(
    folder: Path,
    comm: Collectives,
    timeout_s: float = LOCK_TIMEOUT_S,
    supervised: bool = False,
    stale_s: float = STALE_S,
) -> Iterator[None]:
    """Hold rank 0's lock of a run's folder; make the folder if need be. Collective at its beginning.

    Args:
        folder: of the run.
        comm: all ranks.
        timeout_s: how long to wait for a predecessor.
        supervised: a supervisor holds its own lock; otherwise rank 0 holds that as well.
        stale_s: how long to wait for a sign of life of a holder that is seen on the storage alone.

    Raises:
        LaunchError: on all ranks: another process holds it, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        fault: str | None = None
        if comm.ranks.is_main and (fault := odd_file(folder)) is None:
            try:
                if supervised:
                    descriptor = stack.enter_context(_opened(folder))
                    fault = _wait_for(descriptor, _RANK, 1, folder, timeout_s)
                    mine = None
                else:
                    taken = _take(folder, stack, timeout_s, stale_s)
                    descriptor, mine = taken.descriptor, taken.note
                if fault is None:
                    stack.enter_context(_signs_of_life(descriptor, mine, folder))
            except LaunchError as error:
                fault = str(error)
            except OSError as error:
                fault = f"run folder {folder} cannot be written: {error}"
        fault = comm.broadcast_json(fault)
        if fault is not None:
            raise LaunchError(fault)
        yield


@contextlib.contextmanager
def _signs_of_life(descriptor: int, mine: Holder | None, folder: Path) -> Iterator[None]:
    """Set the lock file's time again and again, and end this process where another has taken the folder.

    Args:
        descriptor: of the lock file.
        mine: the note; None where it is a supervisor's, who looks after it.
        folder: of the run.
    """
    over = threading.Event()

    def show() -> None:
        while not over.wait(_SIGN_EVERY_S):
            with contextlib.suppress(OSError):
                os.utime(descriptor)
            if mine is not None and (fault := _taken_over(descriptor, mine, folder)) is not None:
                log.critical("%s", fault)
                os._exit(TransientError.exit_code)  # at once: what it would save is not its own any more

    thread = threading.Thread(target=show, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * _SIGN_EVERY_S)  # storage that hangs must not hold up the end


def _taken_over(descriptor: int, mine: Holder, folder: Path) -> str | None:
    """Return who has taken the folder from its holder, None while it has not been taken."""
    holder = note_in(descriptor)
    if holder is None or holder == mine:
        return None
    return (
        f"run folder {folder} was taken over by {holder.told()}, which saw no sign of life of this run: this run ends, "
        "and saves nothing there"
    )


@contextlib.contextmanager
def held_by_tool(checkpoints: Path) -> Iterator[None]:
    """Hold the lock of the run whose checkpoints a command changes; no run, no lock.

    The time of the lock file is put back: it says when a killed supervisor gave its last sign of life.

    Args:
        checkpoints: the folder of checkpoints, by any path.

    Raises:
        LaunchError: a run trains there, or its folder cannot be written.
    """
    root = checkpoints.resolve()
    if root.name != "checkpoints":
        yield
        return
    before = last_seen(root.parent)
    try:
        with held(root.parent, Alone(), timeout_s=0):
            yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError):
                os.utime(root.parent / LOCK_FILE, (before, before))


def gone(folder: Path) -> str:
    """Return the sentence about a run's folder, or one in it, that is not where it was."""
    return (
        f"{folder} was moved or removed while the run was at work in it, so nothing can be saved there: put it back, "
        "and start the run again to resume from its newest checkpoint"
    )


class Supervised:
    """A run's folder whose supervisor's lock this process holds. Made by `supervising`.

    Attributes:
        seen: when the supervisor before this one gave its last sign of life, None where there was none.
    """

    def __init__(self, folder: Path, taken: _Taken) -> None:
        self.seen = taken.seen
        self._mine = taken.note
        self._folder = folder
        self._descriptor = taken.descriptor
        self._known: dict[Path, int] = {}
        self._gone_since: float | None = None

    def show_life(self) -> None:
        """Set the lock file's time, by which a killed supervisor's last moment is known."""
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)

    def fault(self) -> str | None:
        """Return what happened to the run's folder, None where nothing did: it, or its checkpoints, may be gone.

        Two looks must agree, half a second apart: over a network a name may be missing for a moment. Another host may
        also have taken the folder over, where this one has given no sign of life for too long.
        """
        if (taken := _taken_over(self._descriptor, self._mine, self._folder)) is not None:
            return taken
        lost = self._lost()
        if lost is None:
            self._gone_since = None
            return None
        now = time.monotonic()
        self._gone_since = self._gone_since or now
        if now - self._gone_since < _GONE_S:
            return None
        return gone(lost)

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
def supervising(folder: Path, timeout_s: float = LOCK_TIMEOUT_S, stale_s: float = STALE_S) -> Iterator[Supervised]:
    """Hold the supervisor's lock of a run's folder; make the folder if need be. Arguments as `held`.

    Raises:
        LaunchError: another supervisor holds it, or rank 0 of another launcher.
        TransientError: the folder cannot be written.
    """
    if (odd := odd_file(folder)) is not None:
        raise LaunchError(odd)
    with contextlib.ExitStack() as stack:
        try:
            taken = _take(folder, stack, timeout_s, stale_s)
            with contextlib.suppress(OSError):  # rank 0 takes its own byte
                fcntl.lockf(taken.descriptor, fcntl.LOCK_UN, 1, _RANK)
        except OSError as error:
            raise TransientError(f"run folder {folder} cannot be written: {error}") from None
        yield Supervised(folder, taken)


@dataclass(frozen=True)
class _Taken:
    """A folder that this process has taken.

    Attributes:
        descriptor: of the lock file.
        note: this process's.
        seen: when its holder before gave its last sign of life, None where there was none.
    """

    descriptor: int
    note: Holder
    seen: float | None


def _take(folder: Path, stack: contextlib.ExitStack, timeout_s: float, stale_s: float) -> _Taken:
    """Take both locks of a folder until the stack ends, and write the note.

    The note is looked at before the file is locked: whoever looks opens and closes the file, which lets go of a lock.

    Raises:
        LaunchError: another process holds the folder.
        OSError: it cannot be written.
    """
    had_one = last_seen(folder) is not None
    if (who := why_held(folder, timeout_s, stale_s)) is not None:
        raise LaunchError(_in_use(folder, who))
    descriptor = stack.enter_context(_opened(folder))
    if (fault := _wait_for(descriptor, _RANK, 2, folder, timeout_s)) is not None:
        raise LaunchError(fault)
    taken = _Taken(descriptor, this_process(), os.fstat(descriptor).st_mtime if had_one else None)
    try:
        write_note(descriptor, taken.note)
    except OSError as error:  # a full disk: what it cannot say, the lock still holds
        log.warning("%s cannot be written, so other hosts do not see who holds it: %s", folder / LOCK_FILE, error)
    stack.callback(clear_note, descriptor, taken.note)
    return taken


def check_free(folder: Path) -> None:
    """Refuse a folder in which a run could not begin now, with the run's own error; change nothing.

    Raises:
        LaunchError: another process trains there, or something else lies in the place of a file.
        TransientError: it cannot be written.
    """
    if (odd := odd_file(folder)) is not None:
        raise LaunchError(odd)
    if (who := why_held(folder, 0.0)) is not None:
        raise LaunchError(_in_use(folder, who))
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise TransientError(f"run folder {folder} cannot be written: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise TransientError(f"run folder {folder} cannot be written: {place} is read-only, or another user's")


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
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
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
                holder = note_in(descriptor)
                return _in_use(folder, holder.told(os.fstat(descriptor).st_mtime) if holder is not None else None)
            time.sleep(_LOOK_EVERY_S)
        else:
            return None


def _in_use(folder: Path, who: str | None) -> str:
    told = f" ({who})" if who is not None else ""
    return (
        f"another process trains in run folder {folder}{told}: wait for it or stop it, or give this run another "
        "run.name"
    )
