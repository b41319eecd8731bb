"""The curves of a run while it grows: metrics.jsonl is read on from where the last look ended, and kept thinned.

A drawing is inline SVG without styles of its own: the page's style sheet colours its classes, for light and dark.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import markupsafe

from setformer_dist.core import strictjson
from setformer_dist.core.files import LONGEST_LINE, open_plain
from setformer_dist.core.metric import LOSS, METRICS_OF, PROBE_METRICS, Metric
from setformer_dist.report.rows import METRICS, finite

Points = list[tuple[int, float]]  # (step, value), by step

_MOST_POINTS = 400
_MOST_BYTES = 8 << 20  # of one look; the next one goes on there
_MOST_RUNS = 64
# The first figure of each task besides its loss, by name: of a run, the first that it has is drawn.
SCORES: dict[str, Metric] = {}
for _task in (*METRICS_OF.values(), PROBE_METRICS):
    for _metric in [metric for metric in _task if metric.name != LOSS.name][:1]:
        SCORES.setdefault(_metric.name, _metric)
_KINDS = {
    "train": {"loss": "loss", "images_per_s": "images_per_s", "lr": "lr"},
    "eval": {"loss": "eval_loss", **{name: name for name in SCORES}},
}
_DRAWABLE = 1e30
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 400, 190, 46, 24, 10, 8


@dataclass
class _Run:
    """What has been read of one run."""

    at: int = 0
    inode: int = 0
    series: dict[str, dict[int, float]] = field(default_factory=dict)


class Curves:
    """Reads runs; may be asked by several threads."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Path, _Run] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, folder: Path) -> dict[str, Points]:
        """Return the curves of a run's folder by name; none where it has recorded none yet."""
        with self._lock:
            run = self._runs.setdefault(folder, _Run())
            self._runs.move_to_end(folder)
            while len(self._runs) > _MOST_RUNS:
                self._runs.popitem(last=False)
            _read_on(folder / METRICS, run)
            return {name: sorted(points.items()) for name, points in run.series.items() if points}


def _read_on(path: Path, run: _Run) -> None:
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != run.inode or status.st_size < run.at:  # another file, or a shorter one
                run.at, run.inode, run.series = 0, status.st_ino, {}
            file.seek(run.at)
            data = file.read(_MOST_BYTES)
    except OSError:
        return
    whole, _, rest = data.rpartition(b"\n")
    if not whole and len(rest) <= LONGEST_LINE:
        return  # the first line is not whole yet
    run.at += len(data) if not whole else len(whole) + 1
    for line in whole.split(b"\n"):
        _add(line, run.series)
    for name, points in run.series.items():
        if len(points) > 2 * _MOST_POINTS:
            run.series[name] = dict(_thinned(sorted(points.items()), _MOST_POINTS))


def _add(line: bytes, series: dict[str, dict[int, float]]) -> None:
    try:
        row = strictjson.parse(line)
    except ValueError:
        return
    step = finite(row.get("step")) if isinstance(row, dict) else None
    if step is None or not 0 <= step < 2**53:
        return
    for key, name in _KINDS.get(str(row.get("kind")), {}).items():
        value = finite(row.get(key))
        if value is not None and abs(value) < _DRAWABLE:
            series.setdefault(name, {})[int(step)] = value


def _thinned(points: Points, most: int) -> Points:
    """Return every k-th point and the last one."""
    every = math.ceil(len(points) / most)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def spark(points: Points) -> markupsafe.Markup:
    """Return a small drawing of one curve, without axes; "" for fewer than two points."""
    if len(points) < 2:
        return markupsafe.Markup("")
    line = _line(_thinned(points, 120), _span([points]), (0, 3, 240, 38))
    return markupsafe.Markup(
        '<svg class="spark" viewBox="0 0 240 44" preserveAspectRatio="none" aria-hidden="true">'
        '<polyline class="line s1" points="{}"/></svg>'
    ).format(line)


def chart(title: str, lines: Sequence[tuple[str, Points]], from_zero: bool = False) -> markupsafe.Markup:
    """Return a drawing with axes; "" where no curve has a point.

    Args:
        title: of the drawing.
        lines: label and points of each curve.
        from_zero: the values' axis begins at 0.
    """
    shown = [(label, _thinned(points, 300)) for label, points in lines if points]
    if not shown:
        return markupsafe.Markup("")
    span = _span([points for _, points in shown])
    if from_zero:
        span = (span[0], span[1], min(0.0, span[2]), max(1e-9, 1.06 * span[3]))
    box = (_LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)
    parts = [*_axes(span, box)]
    for number, (_, points) in enumerate(shown, 1):
        if len(points) == 1:
            x, y = _line(points, span, box).split(",")
            parts.append(f'<circle class="dot s{number}" cx="{x}" cy="{y}" r="3"/>')
        else:
            parts.append(f'<polyline class="line s{number}" points="{_line(points, span, box)}"/>')
    latest = ", ".join(f"{label} {_short(points[-1][1])}" for label, points in shown)
    said = f"{title} against the step; at step {shown[0][1][-1][0]:,}: {latest}"
    return markupsafe.Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, said, markupsafe.Markup("".join(parts))
    )


Box = tuple[float, float, float, float]  # left, top, width, height
Span = tuple[float, float, float, float]  # steps from and to, values from and to


def _span(lines: Sequence[Points]) -> Span:
    steps = [step for points in lines for step, _ in points]
    values = [value for points in lines for _, value in points]
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(high), abs(low), 1e-30):
        low, high = low - max(abs(low), 1e-30) * 0.05, high + max(abs(high), 1e-30) * 0.05
    first, last = min(steps), max(steps)
    return (first, max(last, first + 1), low, high)


def _line(points: Points, span: Span, box: Box) -> str:
    first, last, low, high = span
    left, top, width, height = box
    return " ".join(
        f"{left + width * (step - first) / (last - first):.1f},{top + height * (high - value) / (high - low):.1f}"
        for step, value in points
    )


def _axes(span: Span, box: Box) -> list[str]:
    first, last, low, high = span
    left, top, width, height = box
    parts = []
    for value in _ticks(low, high, 4):
        y = top + height * (high - value) / (high - low)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{left - 6}" y="{y + 4:.1f}">{_short(value)}</text>')
    for value in _ticks(first, last, 4):
        if value == int(value):
            x = left + width * (value - first) / (last - first)
            anchor = " end" if x > left + width - 16 else " middle"
            parts.append(f'<text class="tick{anchor}" x="{x:.1f}" y="{top + height + 17}">{_short(value)}</text>')
    return parts


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers from low to high."""
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    """Return a number as an axis shows it."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "")):
        if size >= unit:
            return f"{value / unit:.3g} {name}" if name else f"{value / 1e3:.4g} k"
    return f"{value:.4g}" if size >= 1e-3 or size == 0 else f"{value:.1e}"
