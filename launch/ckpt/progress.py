"""A bar over the bytes of checkpoints that are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from setformer_dist.core.terminal import open_console


@contextmanager
def progress(console: Console, what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar; what it yields is told the number of bytes after each piece read."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=open_console(stderr=True, quiet=quiet or console.quiet), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
