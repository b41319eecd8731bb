"""Reading what a run left: metrics.jsonl, config.json, summary.json.

A run that was interrupted has written some steps twice and perhaps a torn line: the last line for a step wins,
and what is not JSON is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setformer_dist.core import strictjson
from setformer_dist.core.errors import DataError
from setformer_dist.core.files import lines_of, read_state

METRICS = "metrics.jsonl"
CONFIG = "config.json"
SUMMARY = "summary.json"

_DRAWABLE = 1e30  # beyond it the ticks of an axis overflow

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """All that a report shows of a run besides its images.

    Attributes:
        name: the run folder's name.
        train: one row per logged step, by step; see `launch` for the keys.
        evals: one row per evaluation, by step; accuracies are shares between 0 and 1.
        refreshes: one row per refresh of the reference sets, by step; `ops.refit.figures` has its tables.
        config: resolved config, or {}.
        summary: headline figures, or {}.
    """

    name: str
    train: Sequence[Row]
    evals: Sequence[Row]
    config: Mapping[str, object]
    summary: Mapping[str, object]
    refreshes: Sequence[Row] = ()


def read_run(run_folder: Path) -> RunRecord:
    """Read a run folder; a file that is missing counts as empty.

    Raises:
        DataError: the folder does not exist, or config or summary is not a JSON object.
    """
    if not run_folder.is_dir():
        raise DataError(f"run folder {run_folder} does not exist: name the folder of a run, such as runs/<name>")
    rows = read_metrics(run_folder / METRICS)
    return RunRecord(
        name=run_folder.resolve().name,
        train=rows["train"],
        evals=rows["eval"],
        config=_read_object(run_folder / CONFIG),
        summary=_read_object(run_folder / SUMMARY),
        refreshes=rows["refresh"],
    )


def read_metrics(path: Path) -> dict[str, list[Row]]:
    """Return the rows of kind "train", "eval" and "refresh", each sorted by step and with one row per step."""
    by_kind: dict[str, dict[int, Row]] = {"train": {}, "eval": {}, "refresh": {}}
    for line in lines_of(path):
        try:
            row = strictjson.parse(line)
        except ValueError:
            continue
        if not isinstance(row, dict):
            continue
        kind, step = row.get("kind"), finite(row.get("step"))
        if isinstance(kind, str) and kind in by_kind and step is not None and step == row["step"] and step < _DRAWABLE:
            by_kind[kind][int(step)] = row
    return {kind: [rows[step] for step in sorted(rows)] for kind, rows in by_kind.items()}


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the rows that have a number under a key that an axis can show."""
    numbers = ((row["step"], finite(row.get(key))) for row in rows)
    pairs = [(step, number) for step, number in numbers if number is not None and abs(number) < _DRAWABLE]
    return [step for step, _ in pairs], [value for _, value in pairs]


def finite(value: object) -> float | None:
    """Return the value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON has integers beyond any float
        return None
    return number if math.isfinite(number) else None


def _read_object(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        value, _ = read_state(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it or write it again") from None
    return value
