"""A progress bar for commands that work through many samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from setformer_dist.core.terminal import open_console


class Steps:
    """A progress bar that takes what a library passes to `on_start` and `on_progress`."""

    def __init__(self, progress: Progress, first: str, later: str) -> None:
        self._progress, self._later = progress, later
        self._task = progress.add_task(first, total=None)

    def start(self, total: int) -> None:
        """Begin with so many things to do."""
        self._progress.update(self._task, total=total, description=self._later)

    def advance(self, done: int) -> None:
        """Count so many as done."""
        self._progress.advance(self._task, done)

    def say(self, what: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=what)


@contextmanager
def progress_bar(first: str, later: str) -> Iterator[Steps]:
    """Show a progress bar on stderr, so that what is printed can be piped on; nothing where that is no terminal."""
    console = open_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Steps(progress, first, later)
