"""Who holds a run's folder: a note in `run.lock`, and whether the process that wrote it still lives.

    {"host": "a", "boot": "…", "space": "pid:[…]", "pid": 4711, "started": 123456, "since": 1795874400.0, "token": "…"}

The kernel's locks may not reach other hosts (NFS mounted with nolock, FUSE, some cluster file systems), so the note
says who it is. On its own host a holder is known by process id and start time: ids are given again. From another host,
or out of another container, it lives as long as the file's time changes, which the run sets twice a second. Changes are
observed: no clock is compared with another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic

from setformer_dist.core.files import open_plain
from setformer_dist.core.ledger import LOCK_FILE
from setformer_dist.core.words import plain

log = logging.getLogger(__name__)

STALE_S = 30.0  # without a sign of life, after which a holder of another host is taken for dead
_LOOK_EVERY_S = 0.2
_SIZE = 1024  # bytes of a note, filled up with spaces: one write replaces another


@dataclass(frozen=True)
class Holder:
    """A process that holds a run's folder.

    Attributes:
        host: as it calls itself.
        boot: the kernel's id of this boot; "" where there is none.
        space: its space of process ids: a container has its own.
        pid: in that space.
        started: clock ticks from the boot to its start.
        since: when it took the folder, of its host's clock.
        token: its own, and of nobody else.
    """

    host: str
    boot: str
    space: str
    pid: int
    started: int
    since: Annotated[float, pydantic.Field(ge=0, lt=2**37, allow_inf_nan=False)]
    token: str

    def lives(self) -> bool | None:
        """Return whether it lives, None where that cannot be told from here."""
        if not self.boot or (self.boot, self.space) != _here():
            return None
        return _started(self.pid) == self.started

    def told(self, changed: float | None = None) -> str:
        """Return who it is in words.

        Args:
            changed: Unix time of the lock file, by the clock of the storage.
        """
        age = f", running for {_words(changed - self.since)}" if changed is not None and changed >= self.since else ""
        return f"host {plain(self.host)}, process {self.pid}{age}"


_TYPE: pydantic.TypeAdapter[Holder] = pydantic.TypeAdapter(Holder)


def this_process() -> Holder:
    """Return this process as a holder."""
    boot, space = _here()
    pid = os.getpid()
    return Holder(socket.gethostname(), boot, space, pid, _started(pid) or 0, time.time(), secrets.token_hex(8))


def write_note(descriptor: int, holder: Holder) -> None:
    """Put a note into the lock file."""
    os.pwrite(descriptor, json.dumps(dataclasses.asdict(holder)).encode().ljust(_SIZE - 1)[: _SIZE - 1] + b"\n", 0)
    os.ftruncate(descriptor, _SIZE)


def clear_note(descriptor: int, holder: Holder) -> None:
    """Take a note out of the lock file, if it is still that of a holder."""
    with contextlib.suppress(OSError):
        if note_in(descriptor) == holder:
            os.ftruncate(descriptor, 0)


def note_in(descriptor: int) -> Holder | None:
    """Return who holds the folder, None where nobody does or the note cannot be read."""
    try:
        return _TYPE.validate_json(os.pread(descriptor, _SIZE, 0))
    except (OSError, ValueError):
        return None


def look(folder: Path) -> tuple[Holder | None, int]:
    """Return who holds a folder, and the time of its lock file in ns; a process that holds its locks must not ask.

    The file is opened anew, so that storage of the network tells the truth; to close it lets go of a process's locks.
    """
    try:
        descriptor = open_plain(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None, 0
    try:
        return note_in(descriptor), os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def why_held(folder: Path, patience_s: float, stale_s: float = STALE_S) -> str | None:
    """Wait for whoever holds a folder; return who it is if it lives on, None where nobody holds it any more.

    Args:
        folder: of the run.
        patience_s: how long to wait for one that lives.
        stale_s: how long to look for a sign of life of one whose process cannot be seen from here.
    """
    begun = time.monotonic()
    last: tuple[Holder | None, int] = (None, 0)
    changed_at, beaten, told = begun, False, False
    while True:
        seen = look(folder)
        holder, changed = seen
        lives = holder is not None and holder.lives()
        if holder is None or lives is False:
            return None
        now = time.monotonic()
        if seen != last:
            beaten = beaten or last[0] is not None  # also where another has taken it meanwhile
            last, changed_at = seen, now
        silent = now - changed_at
        if lives is None and silent >= stale_s:
            return None
        if lives is None and not told:
            told = True
            log.warning("run folder %s: waiting %.0f s for a sign of life of %s", folder, stale_s, holder.told())
        if (lives or beaten) and now - begun >= patience_s:
            return f"{holder.told(changed / 1e9)}, last sign of life {_words(silent)} ago"
        time.sleep(_LOOK_EVERY_S)


@functools.cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _here() -> tuple[str, str]:
    with contextlib.suppress(OSError):
        return _boot(), str(Path("/proc/self/ns/pid").readlink())
    return _boot(), ""


def _started(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since the boot; None for one that has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, IndexError, ValueError):
        return None


def _words(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(0.0, seconds):.1f} s"
