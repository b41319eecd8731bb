"""Tables of a sweep: while it runs, afterwards, and as CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from launch.shown import cell
from launch.sweep.actors import Key
from launch.sweep.driver import Running
from launch.sweep.page import Sweep
from launch.sweep.space import label
from launch.sweep.state import Book, Trial
from setformer_dist.core.files import write_text
from setformer_dist.core.terminal import open_table
from setformer_dist.core.words import plain

RESULTS = "results.csv"


def live_table(sweep: Sweep, book: Book, running: Mapping[Key, Running]) -> Table:
    """Return the table of a sweep that runs."""
    table = open_table("trial", "state", "config", "step", sweep.metric, "samples/s", "time left", box=None)
    for trial in book.trials:
        keys = [key for key in running if key[0] == trial.number]
        if not keys:
            table.add_row(_name(trial), cell(trial.state), cell(_point(trial)), _step(trial), _value(trial), "", "")
        for key in keys:
            run = running[key]
            newest = next((v for _, v in reversed(run.progress.evals) if v is not None), None)
            speed = run.progress.images_per_s
            table.add_row(
                f"{_name(trial)}{f', seed {key[1]}' if key[1] else ''}",
                "stopping" if run.stopped_at is not None else "running",
                cell(_point(trial)),
                str(run.progress.step),
                f"{newest:.4f}" if newest is not None else "",
                f"{speed:,.0f}" if speed is not None else "",
                _left(run),
            )
    return table


def final_table(sweep: Sweep, book: Book) -> Table:
    """Return the table of a sweep, the best trial first."""
    table = open_table(
        "trial", "state", sweep.metric, "spread", "step", "seconds", *sweep.config.space, "note", box=None
    )
    for trial in book.in_order():
        values = [cell(label(trial.point[key])) if key in trial.point else "" for key in sweep.config.space]
        seconds = f"{sum(run.seconds for run in trial.runs):,.0f}"
        spread = f"±{trial.spread:.4f}" if trial.spread is not None else ""
        state = cell(book.state_of(trial))
        table.add_row(_name(trial), state, _value(trial), spread, _step(trial), seconds, *values, cell(_note(trial)))
    return table


def write_csv(sweep: Sweep, book: Book) -> Path:
    """Write results.csv, one line per trial, the best first; return the file."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        [
            "trial",
            "state",
            sweep.metric,
            "spread",
            "seeds",
            "step",
            "seconds",
            *sweep.config.space,
            "source",
            "folder",
            "note",
        ]
    )
    for trial in book.in_order():
        writer.writerow(
            [
                trial.number,
                book.state_of(trial),
                "" if trial.value is None else repr(trial.value),
                "" if trial.spread is None else repr(trial.spread),
                sum(run.value is not None for run in trial.runs),
                _step(trial),
                f"{sum(run.seconds for run in trial.runs):.1f}",
                *(label(trial.point[key]) if key in trial.point else "" for key in sweep.config.space),
                "" if trial.source is None else f"trial {trial.source[0]}, step {trial.source[1]}",
                sweep.run_folder(trial.number, 0),
                _as_text(_note(trial)),
            ]
        )
    path = sweep.folder / RESULTS
    write_text(path, text.getvalue())
    return path


def _name(trial: Trial) -> str:
    return f"{trial.number} (of {trial.source[0]})" if trial.source is not None else str(trial.number)


def _point(trial: Trial) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in trial.point.items())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else label(value)


def _value(trial: Trial) -> str:
    value = trial.value if trial.value is not None else trial.newest
    return f"{value:.4f}" if value is not None else ""


def _step(trial: Trial) -> str:
    step = max(max(run.step for run in trial.runs), trial.reports[-1][0] if trial.reports else 0)
    return str(step) if step else ""


def _note(trial: Trial) -> str:
    return next((run.why for run in trial.runs if run.why), "")


def _as_text(note: str) -> str:
    """Return a note as a spreadsheet and a terminal are to take it: as a text, not as a formula or an escape."""
    return f"'{plain(note)}" if note.lstrip().startswith(("=", "+", "-", "@")) else plain(note)


def _left(run: Running) -> str:
    share, first = run.progress.share, run.first_share
    if share is None or first is None or share <= first:
        return ""
    seconds = (time.monotonic() - run.since) * (1 - share) / (share - first)
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
