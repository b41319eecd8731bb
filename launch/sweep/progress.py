"""What a run has written so far, as the driver of a sweep sees it: evaluations, step, speed, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from setformer_dist.core import live
from setformer_dist.report.rows import METRICS, Row, finite, read_metrics

_NO_METRIC = frozenset({"kind", "step", "time", "samples", "left_out"})


@dataclass(frozen=True)
class Progress:
    """A run at one moment.

    Attributes:
        evals: (step, value of the metric or None) of its evaluations, by step.
        names: figures that its newest evaluation has.
        step: optimizer step.
        images_per_s: of its newest logged line; None before there is one.
        share: of its whole length that is done, None where that is unknown.
    """

    evals: Sequence[tuple[int, float | None]] = ()
    names: Sequence[str] = ()
    step: int = 0
    images_per_s: float | None = None
    share: float | None = None

    def ends_at(self, step: int) -> bool:
        """Return whether a step is the last of the run, as far as is known."""
        return self.share is not None and self.share >= 1 and step >= self.step

    def reached(self, metric: str, mode: str, which: str) -> tuple[float | None, str]:
        """Return what a finished run has reached, or why that is not known.

        Args:
            metric: its name.
            mode: "max" or "min".
            which: "best" or "last".
        """
        if not self.evals:
            return None, f"the run has written no evaluation, so {metric!r} never appeared"
        values = [value for _, value in self.evals]
        if which == "last":
            values = values[-1:]
        found = [value for value in values if value is not None]
        if found:
            return (max(found) if mode == "max" else min(found)), ""
        if metric in self.names:
            return None, f"{metric!r} is no number in its evaluations"
        return None, f"{metric!r} never appeared in its evaluations, which have {', '.join(self.names)}"


class ProgressReader:
    """Reads a run's folder again and again; what has not changed is not read.

    Args:
        folder: of the run.
        metric: name of the figure that is compared.
        length: (epochs, steps) of the run's schedule, one of them None.
    """

    def __init__(self, folder: Path, metric: str, length: tuple[int | None, int | None]) -> None:
        self._folder, self._metric, self._length = folder, metric, length
        self._seen: tuple[int, int] | None = None
        self._last = Progress()

    def read(self) -> Progress:
        """Return how far the run is."""
        with contextlib.suppress(OSError):
            stat = (self._folder / METRICS).stat()
            if (stat.st_size, stat.st_mtime_ns) != self._seen:
                self._seen = stat.st_size, stat.st_mtime_ns
                self._last = self._of(read_metrics(self._folder / METRICS))
        seen = live.read(self._folder)
        step = max((rank.step for rank in seen.ranks), default=0) if seen is not None else 0
        if step > self._last.step:
            return Progress(self._last.evals, self._last.names, step, self._last.images_per_s, self._last.share)
        return self._last

    def _of(self, rows: Mapping[str, Sequence[Row]]) -> Progress:
        train, evals = rows["train"], rows["eval"]
        last: Row = train[-1] if train else {}
        epochs, steps = self._length
        step = max((int(row["step"]) for row in (*train[-1:], *evals[-1:])), default=0)
        epoch = finite(last.get("epoch"))
        share = step / steps if steps else epoch / epochs if epochs and epoch is not None else None
        return Progress(
            [(int(row["step"]), finite(row.get(self._metric))) for row in evals],
            [name for name in (evals[-1] if evals else {}) if name not in _NO_METRIC],
            step,
            finite(last.get("images_per_s")),
            share,
        )
