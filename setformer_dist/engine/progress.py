"""What rank 0 shows while a run is under way: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from setformer_dist.core.terminal import open_console

LINE_EVERY_S = 15.0


class _Figures(ProgressColumn):
    """The task's text in one line, cut where the terminal is narrow: the other columns keep their width."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=False))  # the one that the table narrows

    def render(self, task: Task) -> Text:
        return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


class RunProgress:
    """Steps, loss, images/s and time left; silent on all ranks but 0."""

    def __init__(self, total_steps: int, first_step: int, visible: bool) -> None:
        self._console = open_console(stderr=True, quiet=not visible)
        self._total = total_steps
        self._step = first_step
        self._text = ""
        self._damaged = 0
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if visible and self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                _Figures(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=self._console,
                transient=False,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, text="")

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Say that `step` optimizer steps are done."""
        self._step = step
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def figures(
        self, loss: float, images_per_s: float, damaged: int, epoch: float, lr: float, samples: str = "images"
    ) -> None:
        """Show the latest loss and speed, and how many damaged samples were replaced so far; news of those at once.

        Args:
            loss: mean of the steps since the last figures.
            images_per_s: of all ranks.
            damaged: samples replaced so far.
            epoch: passes over the training data so far.
            lr: learning rate of the last step.
            samples: what they are, in the plural.
        """
        news, self._damaged = damaged > self._damaged, damaged
        self._text = f"epoch {epoch:.1f} · loss {loss:.4f} · lr {lr:.1e} · {images_per_s:,.0f} {samples}/s"
        if damaged:
            self._text += f" · {damaged} damaged sample{'s' if damaged > 1 else ''} replaced (see the log)"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=self._text)
        elif news or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(f"step {self._step}/{self._total} · {self._text}", highlight=False, markup=False)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show on the bar what else the run does for a while, in which no step is taken."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=f"{text} · {self._text}" if self._text else text, refresh=True)
        yield
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=self._text, refresh=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False)
