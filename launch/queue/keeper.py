"""The process that starts a job's supervisor, outlives the scheduler, and writes down how it ended.

    attempt-0001/
      claim.json    who runs this attempt; made once (O_EXCL): whoever makes it decides. A scheduler that gives the
                    attempt up makes it first, with "revoked", and a keeper that comes later starts nothing
      alive         its time changes every second while the keeper lives
      stop          made by a scheduler: {"kill_after_s": S}. The job gets SIGTERM, and SIGKILL after so long
      end.json      {"code": exit code or minus a signal, "time": t, "killed": whether it did not end by itself}
      output.log    what the supervisor printed

It is run by itself, with the standard library alone: python -I -S keeper.py FOLDER DIRECTORY COMMAND...
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

CLAIM, ALIVE, STOP, END, OUTPUT = "claim.json", "alive", "stop", "end.json", "output.log"
_TICK_S = 0.2
_ALIVE_S = 1.0
_PR_SET_PDEATHSIG = 1


def claim(folder: Path, content: Mapping[str, object]) -> bool:
    """Make the claim of an attempt; return whether nobody had made it.

    It is written aside and linked, so that whoever finds it finds it whole.
    """
    aside = folder / f".{CLAIM}.{os.getpid()}"
    aside.write_text(json.dumps(content))
    try:
        os.link(aside, folder / CLAIM)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    return True


def write(path: Path, content: Mapping[str, object]) -> None:
    """Write a file, whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        file.write(json.dumps(content))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def boot_id() -> str:
    """Return the ids of this boot and of the namespace in which process ids count; "" where there are none.

    Containers of one kernel share the boot, and each has a process 1 of its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def started(pid: int) -> int | None:
    """Return a process's start in clock ticks since the boot; None for one that has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, IndexError, ValueError):
        return None


def _die_with_keeper() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(folder: Path, directory: str, command: list[str]) -> None:
    """Run a job."""
    me = os.getpid()
    if not claim(folder, {"pid": me, "started": started(me), "boot": boot_id(), "time": time.time()}):
        return
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, note)
    with (folder / OUTPUT).open("ab") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_die_with_keeper,
            )
        except OSError as error:
            output.write(f"error: the job cannot be started: {error}\n".encode())
            write(folder / END, {"code": 5, "time": time.time(), "killed": False})
            return
    killed = _stand_by(process, folder, asked)
    write(folder / END, {"code": process.returncode, "time": time.time(), "killed": killed})


def _stand_by(process: subprocess.Popen[bytes], folder: Path, asked: list[int]) -> bool:
    """Wait for the end of a job; return whether it had to be killed."""
    (folder / ALIVE).touch()
    shown = kill_at = 0.0
    stopping = killed = False
    while process.poll() is None:
        now = time.monotonic()
        if now - shown >= _ALIVE_S:
            shown = now
            with contextlib.suppress(OSError):
                os.utime(folder / ALIVE)
        if not stopping and (asked or (folder / STOP).exists()):
            stopping, kill_at = True, now + _patience(folder / STOP)
            process.terminate()
        if stopping and now >= kill_at and not killed:
            killed = True
            process.kill()  # its guardian kills the ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TICK_S)
    return killed


def _patience(path: Path) -> float:
    try:
        return float(json.loads(path.read_text())["kill_after_s"])
    except (OSError, ValueError, LookupError, TypeError):
        return 120.0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
