"""What a run leaves on the machine when it is killed, processes, temporary files and semaphores, and who clears it up.

    supervisor --pipe--> guardian (this file, run by itself)
        |                    | waits for the end of the pipe, which comes however the supervisor ends
        ranks                then kills the ranks' sessions, removes their temporary folder and their semaphores

The supervisor clears up itself where it can. The guardian is for SIGKILL; and where it is killed too, the next start of
any run removes what has no owner: each folder holds a file that its owners lock. Only the standard library is imported:
the guardian starts without site-packages, in some twenty milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing.process
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

SCRATCH_VARIABLE = "SETFORMER_SCRATCH"
_PREFIX = "sf-"
_OWNED = "owned"
_OVER = "over"
_SHARED = Path("/dev/shm")


class Guardian:
    """Clears up after the ranks of one attempt, however this process ends.

    Attributes:
        folder: for the ranks' temporary files; its name begins the names of their semaphores too.
    """

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        remove_ownerless(base)
        self.folder = base / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        self._watches = False
        self._pipe = self._lock = -1
        # Without room for a folder, or a process, the ranks use the system's own.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.folder.mkdir(mode=0o700)
            self._lock = os.open(self.folder / _OWNED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._start()

    def _start(self) -> None:
        read, self._pipe = os.pipe()
        try:
            subprocess.run(  # it forks and ends: the guardian is no child of this process, whose children are the ranks
                [sys.executable, "-I", "-S", __file__, str(read), str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # no Ctrl-C, and no signal to the command's group, reaches it
                pass_fds=(read, self._lock),  # a lock of flock is its owner's as long as any copy is open
                cwd="/",
                timeout=30,
                check=True,
            )
            self._watches = True
        finally:
            os.close(read)

    @property
    def environment(self) -> Mapping[str, str]:
        """What the ranks must have in their environment."""
        return {SCRATCH_VARIABLE: str(self.folder)} if self._watches else {}

    def watch(self, session: int) -> None:
        """Have a session's processes killed where this process dies before it has called `__exit__`."""
        self._tell(str(session))

    def _tell(self, line: str) -> None:
        if self._watches:
            with contextlib.suppress(OSError):  # it was killed
                os.write(self._pipe, f"{line}\n".encode())

    def __enter__(self) -> Guardian:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell(_OVER)  # the sessions are over, and their numbers may be others' by now
        for descriptor in (self._pipe, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        clear(self.folder)


def use_scratch() -> None:
    """Have this rank's multiprocessing put its sockets and semaphores where the guardian finds them."""
    folder = os.environ.get(SCRATCH_VARIABLE)
    if folder is not None and Path(folder).is_dir():
        config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
        config["tempdir"] = folder
        config["semprefix"] = f"/{Path(folder).name}"


def clear(folder: Path) -> None:
    """Remove a scratch folder and the semaphores that are named after it."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in _SHARED.glob(f"sem.{folder.name}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def remove_ownerless(base: Path) -> None:
    """Remove the scratch folders of this user whose supervisor and guardian are both gone."""
    for folder in base.glob(f"{_PREFIX}[0-9]*-*"):
        try:
            lock = os.open(folder / _OWNED, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            _remove_remains(folder)
            continue
        except OSError:
            continue  # another user's
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear(folder)
        except OSError:
            continue  # its run continues
        finally:
            os.close(lock)


def _remove_remains(folder: Path) -> None:
    """Remove what a process has written into a scratch folder while that was removed; Ray's take their time to end."""
    owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
    with contextlib.suppress(OSError):
        if folder.lstat().st_uid == os.getuid() and owner.isdigit() and not Path("/proc", owner).exists():
            clear(folder)  # where its maker lives, it is being made


def _main(pipe: int, folder: Path) -> None:
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(pipe, "rb") as reader:
        lines = reader.read().decode().split()
    if _OVER in lines:
        return
    for session in map(int, lines):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(session, signal.SIGKILL)
    clear(folder)


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
