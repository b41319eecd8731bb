"""Standard output and error that may go away: a terminal that is closed, a pipe without a reader, a log on a full disk.

What a run says is a courtesy, and losing the listener must not cost the run. Both streams are wrapped once, at the
start of a process; whatever prints (progress bars, warnings, tracebacks) goes through the wrapper without knowing.

What a stream is also decides how wide the output is. A terminal has a width: it wraps messages by itself, and the cells
of tables fold. A pipe or a file has none, and another program may read it: no line is broken there and no cell cut.

What others wrote can steer no terminal: control characters are shown as escapes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.rule import Rule
from rich.segment import Segment
from rich.table import Table

from setformer_dist.core.words import plain_page

log = logging.getLogger(__name__)

_NO_WIDTH = 100_000  # columns of a stream that has none: wider than any row of a table
_RULE = 80  # columns of a line across, at most


class Tolerant:
    """A text stream that passes everything on to another one, and drops what that one does not accept.

    A full disk may have room later, and a terminal may be attached again, so every write is tried. Only the first that
    fails is logged: the log may end in the same stream.
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

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _borne(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if not self._failed:
                self._failed = True
                log.warning("%s is gone (%s): the run continues without it", getattr(self._stream, "name", "?"), error)


def open_closed_streams() -> None:
    """Open what a process was started without (`2>&-`) to nowhere, so that no file of ours gets its number."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        nowhere = os.open(os.devnull, os.O_RDWR)
        try:
            os.fstat(number)
        except OSError:
            os.dup2(nowhere, number)
            os.close(nowhere)
            nowhere = number
        if nowhere == number:
            os.set_inheritable(number, True)
        setattr(sys, name, open(nowhere, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 — as long as the process


def bear_lost_streams() -> None:
    """Wrap this process's standard output and error; calling it twice is fine."""
    open_closed_streams()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))


class PlainConsole(Console):
    """A console whose texts cannot steer the terminal; styles and rich's own control codes are no text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments, their texts as `plain_page` has them."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain_page(segment.text))


def open_console(stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that breaks no message and cuts nothing; all that this project prints by rich goes to one.

    Args:
        stderr: print there, not on standard output.
        quiet: print nothing.
    """
    console = PlainConsole(stderr=stderr, quiet=quiet, soft_wrap=True)
    stream = sys.stderr if stderr else sys.stdout
    # Not rich's own is_terminal, which FORCE_COLOR and the like change without giving a pipe a width.
    if not os.environ.get("COLUMNS", "").isdigit() and not (stream is not None and stream.isatty()):
        console.width = _NO_WIDTH
    return console


def open_table(*headers: str, **settings: Any) -> Table:
    """Return a rich table whose cells fold where the terminal is too narrow, instead of being cut.

    Args:
        headers: one per column.
        settings: of the table.
    """
    table = Table(**settings)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def print_heading(console: Console, text: str) -> None:
    """Print a line across the terminal that begins with a text; where there is no width, a short one."""
    console.print(Rule(text, align="left"), width=min(console.width, _RULE))
