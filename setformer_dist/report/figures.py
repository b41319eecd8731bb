"""The curves of a report as inline SVG that follows the page's colours.

matplotlib draws with stand-in colours; they are replaced by CSS variables and `currentColor` afterwards, so that
one drawing serves light and dark pages. Text stays text. The object API is used throughout: nothing global
is changed but for the length of a drawing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from setformer_dist.core.metric import AVERAGED, LOSS, Metric
from setformer_dist.core.phases import SECTIONS
from setformer_dist.report.rows import Row, finite, series

INK, _GRID = "#010101", "#020202"  # stand-ins, see `_to_page_colours`
SERIES = tuple(f"#0300{i:02x}" for i in range(1, len(SECTIONS) + 1))
_TRAINING, _WEIGHTS, _EMA = SERIES[:3]  # one colour for one thing on all figures
_MAX_POINTS = 400  # more than the pixels a curve is shown with only make the page heavy
SIZE_INCHES = (6.4, 3.0)
# Of every figure; matplotlib's own layouts measure all texts, which takes longer than to draw them.
_MARGINS = {"left": 0.11, "right": 0.98, "bottom": 0.17, "top": 0.89}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}

Line = tuple[str, str, list[int], list[float]]  # label, colour, steps, values


def loss_figure(train: Sequence[Row], evals: Sequence[Row]) -> str:
    """Draw training loss (means over intervals) and evaluation losses against the step; "" without data."""
    lines = [
        ("training", _TRAINING, *thin(*series(train, "loss"))),
        ("evaluation", _WEIGHTS, *series(evals, "loss")),
        ("evaluation, EMA", _EMA, *series(evals, "ema_loss")),
    ]
    return line_figure("loss", lines, "Loss")


def metric_figure(evals: Sequence[Row], metric: Metric) -> str:
    """Draw a metric of the weights and of their moving average, shares in percent; "" without data."""
    if metric.name == LOSS.name:
        return ""  # it is drawn with the training loss
    found = [("weights", _WEIGHTS, metric.name), ("EMA", _EMA, f"{AVERAGED}{metric.name}")]
    times, unit = (100, ", %") if metric.share else (1, "")
    lines = [
        (text, colour, (points := series(evals, key))[0], [times * v for v in points[1]]) for text, colour, key in found
    ]
    return line_figure(metric.name, lines, f"{metric.label[:1].upper()}{metric.label[1:]}{unit}")


def rate_figure(train: Sequence[Row]) -> str:
    """Draw the learning rate against the step; "" without data."""
    return line_figure("rate", [("learning rate", _TRAINING, *thin(*series(train, "lr")))], "Learning rate")


def speed_figure(train: Sequence[Row]) -> str:
    """Draw samples per second over all ranks against the step; "" without data."""
    line = ("samples per second", _TRAINING, *thin(*series(train, "images_per_s")))
    return line_figure("speed", [line], "Samples per second, all ranks", from_zero=True)


def split_figure(train: Sequence[Row]) -> str:
    """Draw how the seconds of a step divide into parts, stacked, against the step; "" without data."""
    steps, parts = split(train)
    if not steps:
        return ""
    with mpl.rc_context(STYLE):
        figure, axes = new_axes("Milliseconds per step")
        columns = [[1000 * value for value in thin(steps, parts[name])[1]] for name in SECTIONS]
        at = thin(steps, parts[SECTIONS[0]])[0]
        if len(at) == 1:  # an area over one step has no width
            at, columns = [at[0] - 1, at[0]], [column * 2 for column in columns]
        axes.stackplot(at, *columns, colors=SERIES, linewidth=0)
        axes.margins(x=0, y=0.02)
        return svg(figure, "split", "stacked area: how the time of a step divides into parts")


def split(train: Sequence[Row]) -> tuple[list[int], dict[str, list[float]]]:
    """Return steps, and seconds per step of each part, for the rows that hold them; a missing part is 0."""
    rows = [row for row in train if isinstance(row.get("seconds"), dict)]
    parts: dict[str, list[float]] = {
        name: [finite(row["seconds"].get(name)) or 0.0 for row in rows] for name in SECTIONS
    }
    return [row["step"] for row in rows], parts


def thin(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Return at most `_MAX_POINTS` points: means over equal runs of points, at the last step of each run."""
    width = -(-len(steps) // _MAX_POINTS) or 1
    starts = range(0, len(steps), width)
    means = [sum(chunk := values[i : i + width]) / len(chunk) for i in starts]
    return [steps[min(i + width, len(steps)) - 1] for i in starts], means


def line_figure(name: str, lines: Sequence[Line], label: str, from_zero: bool = False) -> str:
    """Draw lines against the step, with a legend where there are several; "" without data."""
    lines = [line for line in lines if line[2]]
    if not lines:
        return ""
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(label)
        for text, colour, steps, values in lines:
            axes.plot(steps, values, color=colour, label=text, marker="o" if len(steps) < 25 else None, ms=4)
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(loc="best")
        said = "; ".join(f"{text} from {v[0]:.4g} to {v[-1]:.4g}" for text, _, _, v in lines)
        return svg(figure, name, f"{label} against the step: {said}")


def new_axes(label: str) -> tuple[Figure, Axes]:
    """Return an empty figure over steps, and its axes."""
    figure = Figure(figsize=SIZE_INCHES)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    figure.subplots_adjust(**_MARGINS)
    axes.patch.set_alpha(0)
    axes.grid(axis="y", alpha=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")
    axes.set_title(label, loc="left", fontsize=11)
    return figure, axes


def svg(figure: Figure, name: str, description: str) -> str:
    """Return the drawing as one <svg> element whose ids do not meet those of its neighbours."""
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name, "svg.id": f"figure-{name}"}):
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|url\(#|href="#)(?!figure-)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family:[^;\"]*;?", "", text)
    said = description.replace("&", "and").replace("<", "").replace('"', "'")
    return _to_page_colours(text.replace("<svg", f'<svg role="img" aria-label="{said}"', 1))


def _to_page_colours(text: str) -> str:
    text = text.replace(INK, "currentColor").replace(_GRID, "var(--grid)")
    for i, colour in enumerate(SERIES, start=1):
        text = text.replace(colour, f"var(--series-{i})")
    return text
