"""Standard output and error that may go away: a terminal that is closed, a pipe nobody reads, a log on a full disk.

What a run says is a courtesy, and losing the listener must not cost the run. Both streams are wrapped once, at the
start of a process; whatever prints (progress bars, warnings, tracebacks) goes through the wrapper without knowing.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

log = logging.getLogger(__name__)


class Tolerant:
    """A text stream that passes everything on to another one, and passes over what that one does not take.

    A disk that is full may have room again and a terminal may be attached anew, so every write is tried. Only the first
    that fails is logged: the log may end in the same stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failed = False

    def write(self, text: str) -> int:
        """Write as much as can be written; return the length of all."""
        with self._borne():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with self._borne():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _borne(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if not self._failed:
                self._failed = True
                log.warning("%s is gone (%s): the run goes on without it", getattr(self._stream, "name", "?"), error)


def bear_lost_streams() -> None:
    """Wrap this process's standard output and error; calling it twice is fine."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))
