"""A command in a terminal of its own, which a test can read, type into, and take away.

    test <--- pseudo-terminal ---> python -m launch.testing.terminal MODULE ARGS

The terminal controls the command's session, so the kernel does what it does for a user: Ctrl-C typed there is SIGINT to
the command, and when the terminal goes away the command gets SIGHUP and can neither read nor write.
"""

from __future__ import annotations

import fcntl
import os
import pty
import runpy
import select
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from launch.testing.warm import Warm

_MODULE = "launch.testing.terminal"
_NOHUP = "--nohup"
_ROWS, _COLUMNS = 24, 80


class InTerminal:
    """A running command and its terminal; a context manager that ends both.

    Attributes:
        process: the command.
        text: all that it, its children and the terminal's echo have written so far, control sequences included.
    """

    def __init__(self, args: list[str], env: Mapping[str, str], cwd: Path, obeys_hangup: bool = True) -> None:
        """Start `python -m args`; with `obeys_hangup` false as under nohup, SIGHUP ignored."""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
        self.text = ""
        words = [_MODULE, *([] if obeys_hangup else [_NOHUP]), *args]
        environment = {name: value for name, value in env.items() if name != "COLUMNS"} | {"TERM": "xterm-256color"}
        with os.fdopen(slave, "wb") as side:
            self.process = Warm(words, environment, cwd, side)
        self._taken_away = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._taken_away.is_set():
            if not select.select([self._master], [], [], 0.02)[0]:
                continue
            try:
                self.text += os.read(self._master, 1 << 16).decode(errors="replace")
            except OSError:  # all have closed the other side
                return

    def press(self, keys: bytes) -> None:
        """Type these keys."""
        os.write(self._master, keys)

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Wait until the terminal has shown a text, while the command runs."""
        self.wait_until(lambda: text in self.text, timeout)

    def wait_until(self, true: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until something is true, while the command runs."""
        limit = time.monotonic() + timeout
        while not true():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < limit, self.text
            time.sleep(0.02)

    def ended(self, timeout: float = 120) -> int:
        """Return the exit code once it has ended and all it wrote is in `text`."""
        code = self.process.wait(timeout)
        self._reader.join(5.0)
        return code

    def take_away(self) -> None:
        """Close the terminal, as a window that is closed or a connection that is cut."""
        if not self._taken_away.is_set():
            self._taken_away.set()
            self._reader.join()
            os.close(self._master)

    def __enter__(self) -> InTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait(30)
        self.take_away()


def main(words: list[str]) -> None:
    """Take standard error for the terminal of a new session, and become `python -m words`."""
    os.setsid()
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)
    if words[0] == _NOHUP:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        words = words[1:]
    sys.argv = words
    sys.modules.pop(words[0], None)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
