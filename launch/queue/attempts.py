"""Start, watch and stop jobs by the files of their keepers (launch.queue.keeper).

Nothing depends on which scheduler started an attempt: any that sees the folder can adopt it, whatever was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.queue import keeper

_CLAIM_S = 20.0  # how long a keeper may take to begin, on a busy machine
_SILENT_S = 30.0  # without a sign of life, after which a keeper of another host is taken for dead


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        code: exit code or minus a signal; None where nobody knows: it was killed with its keeper.
        time: Unix time.
        killed: it did not end when asked.
        began: its keeper came in time; otherwise nothing was started.
    """

    code: int | None
    time: float
    killed: bool = False
    began: bool = True


@dataclass
class Watcher:
    """Looks at attempts, again and again."""

    _alive: dict[Path, tuple[int, float]] = field(default_factory=dict)
    _first: dict[Path, float] = field(default_factory=dict)

    def look(self, folder: Path) -> Ended | None:
        """Return how an attempt ended, None while it runs or begins."""
        if (ended := _end_of(folder)) is not None:
            return self._forget(folder, ended)
        claimed = _read(folder / keeper.CLAIM)
        now = time.monotonic()
        first = self._first.setdefault(folder, now)
        if claimed is None:
            if now - first < _CLAIM_S:
                return None
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                keeper.claim(folder, {"revoked": True})
            claimed = _read(folder / keeper.CLAIM) or {}
        if claimed.get("revoked"):
            return self._forget(folder, Ended(None, time.time(), began=False))
        if not self._lives(folder, claimed, now):
            # It may have ended between the two looks.
            return self._forget(folder, _end_of(folder) or Ended(None, time.time()))
        return None

    def _lives(self, folder: Path, claimed: Mapping[str, object], now: float) -> bool:
        pid = claimed.get("pid")
        if claimed.get("boot") == keeper.boot_id() and isinstance(pid, int):
            return keeper.started(pid) == claimed.get("started")
        try:
            beat = (folder / keeper.ALIVE).stat().st_mtime_ns
        except OSError:
            beat = 0
        seen, since = self._alive.get(folder, (-1, now))
        if beat != seen:
            self._alive[folder] = (beat, now)
            return True
        return now - since < _SILENT_S

    def _forget(self, folder: Path, ended: Ended) -> Ended:
        self._alive.pop(folder, None)
        self._first.pop(folder, None)
        return ended


def start(folder: Path, directory: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Start a keeper, which starts the job; it belongs to nobody.

    Args:
        folder: of the attempt; made if missing.
        directory: working directory of the job.
        command: words.
        environment: added to this process's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(  # a shell-less double fork: the keeper is no child of the scheduler, and leaves no zombie
        [sys.executable, "-I", "-S", "-c", _DETACH, keeper.__file__, str(folder), directory, *command],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


_DETACH = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
os.execv(sys.executable, [sys.executable, "-I", "-S", *sys.argv[1:]])
"""


def stop(folder: Path, kill_after_s: float) -> None:
    """Have a job save and end; it is killed if it takes longer. Asking again changes nothing."""
    if not (folder / keeper.STOP).exists():
        folder.mkdir(parents=True, exist_ok=True)
        keeper.write(folder / keeper.STOP, {"kill_after_s": kill_after_s})


def kill(folder: Path) -> None:
    """Kill a keeper of this host, and with it the job: one that does not even end when it is killed is the kernel's."""
    claimed = _read(folder / keeper.CLAIM) or {}
    pid = claimed.get("pid")
    here = claimed.get("boot") == keeper.boot_id() and isinstance(pid, int)
    if here and isinstance(pid, int) and keeper.started(pid) == claimed.get("started"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _end_of(folder: Path) -> Ended | None:
    found = _read(folder / keeper.END)
    if found is None:
        return None
    code, at = found.get("code"), found.get("time")
    return Ended(
        code if isinstance(code, int) else None,
        float(at) if isinstance(at, int | float) else time.time(),
        bool(found.get("killed")),
    )


def _read(path: Path) -> dict[str, object] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
