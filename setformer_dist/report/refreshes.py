"""What K-means did to the reference sets, drawn and in a table: the rows of kind "refresh" of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from setformer_dist.report.figures import SERIES, Line, line_figure
from setformer_dist.report.rows import Row, finite

_KINDS = {"references": "gathering", "return_references": "scattering", "anchors": "anchors"}
_SHOWN = {
    "dead": "Dead references, share",
    "perplexity": "Perplexity of their use, share of m",
    "fit": "Mean cosine of a token and its nearest reference",
    "marginal_error": "Marginal error of the plan of sampled tokens",
}
_MOVEMENT = "movement_degrees"


def drawings(rows: Sequence[Row]) -> list[str]:
    """Return one drawing for each figure, before and after each refresh; none without refreshes."""
    kinds = [kind for kind in _KINDS if any(kind in row for row in rows)]
    found = []
    for name, label in _SHOWN.items():
        pairs = [(kind, when) for kind in kinds for when in ("before", "after")]
        lines = [
            _line(rows, kind, f"{name}_{when}", f"{_KINDS[kind]}, {when}", i) for i, (kind, when) in enumerate(pairs)
        ]
        found.append(line_figure(f"refresh-{name}", lines, label))
    lines = [_line(rows, kind, _MOVEMENT, _KINDS[kind], 2 * i) for i, kind in enumerate(kinds)]
    found.append(line_figure("refresh-movement", lines, "Mean movement, degrees"))
    return [drawing for drawing in found if drawing]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line for each set of each refresh: step, set, tokens, then figures before and after, movement."""
    lines = []
    for row in rows:
        step, tokens = f"{row['step']:,}", f"{int(finite(row.get('samples')) or 0):,}"
        if row.get("skipped"):
            lines.append([step, f"skipped: {row['skipped']}", tokens, *[""] * (len(_SHOWN) + 1)])
        elif row.get("late"):
            lines.append([step, f"computed by the ranks: {row['late']}", tokens, *[""] * (len(_SHOWN) + 1)])
        for kind, label in _KINDS.items():
            values = row.get(kind)
            if isinstance(values, Mapping):
                pairs = [" → ".join(_number(values.get(f"{n}_{w}")) for w in ("before", "after")) for n in _SHOWN]
                lines.append([step, label, tokens, *pairs, _number(values.get(_MOVEMENT))])
    return lines


def header() -> list[str]:
    """Return the names of the table's columns."""
    return ["step", "set", "tokens", *(name.replace("_", " ") for name in _SHOWN), "movement, degrees"]


def _number(value: object) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:.3g}"


def _line(rows: Sequence[Row], kind: str, key: str, label: str, colour: int) -> Line:
    found = [(row["step"], row[kind].get(key)) for row in rows if isinstance(row.get(kind), Mapping)]
    points = [(step, number) for step, value in found if (number := finite(value)) is not None]
    return label, SERIES[colour], [step for step, _ in points], [value for _, value in points]
