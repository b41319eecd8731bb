"""What reaches an agent: a command with pipes to it, as ssh."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Protocol

from launch.ranks.processes import die_with_parent
from setformer_dist.core.errors import LaunchError

_ERROR_BYTES = 4096


class Channel(Protocol):
    """A way to an agent, open as long as the agent lives.

    Attributes:
        reads: descriptor of what the agent says.
        writes: descriptor of what it hears.
        unanswered: why an agent may say nothing, in words.
    """

    unanswered: str

    @property
    def reads(self) -> int:
        """See the class."""

    @property
    def writes(self) -> int:
        """See the class."""

    def listen(self) -> None:
        """Keep what was said beside the messages, without waiting."""

    def said(self) -> str:
        """Return the last line that was said beside the messages."""

    def end(self) -> tuple[str, str]:
        """Say how it has ended, and the last line that was said beside the messages; called once nothing comes."""

    def close(self) -> None:
        """Close both directions. Never waits; may be called twice."""

    def wait(self, seconds: float) -> None:
        """Wait for its end, and force it after some seconds."""


# Opens a channel to a host.
Opener = Callable[[str], Channel]


class Command:
    """An agent that is reached by a command's pipes."""

    unanswered = "its command may be waiting for a password, which nobody can type here; let ssh log in with a key"

    def __init__(self, host: str, words: Sequence[str]) -> None:
        """Start the command.

        Raises:
            LaunchError: there is no such command.
        """
        self._errors = b""
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            raise LaunchError(
                f"{words[0]} is needed to reach host {host} and cannot be run: {error.strerror}"
            ) from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._streams = (self._process.stdin, self._process.stdout, self._process.stderr)
        self.writes, self.reads, self._stderr = (stream.fileno() for stream in self._streams)
        os.set_blocking(self._stderr, False)

    def listen(self) -> None:
        """Keep the end of what the command says on standard error."""
        with contextlib.suppress(OSError):
            self._errors = (self._errors + os.read(self._stderr, 1 << 16))[-_ERROR_BYTES:]

    def end(self) -> tuple[str, str]:
        """Say how the command has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self.listen()
        code = self._process.returncode
        how = "its command closed the pipe" if code is None else f"its command ended with exit code {code}"
        return how, self.said()

    def said(self) -> str:
        """Return the last line on standard error."""
        lines = [line.strip() for line in self._errors.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def close(self) -> None:
        """Close the pipes."""
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.close()

    def wait(self, seconds: float) -> None:
        """Wait for the command, and kill it after some seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
