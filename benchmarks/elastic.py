"""Elastic resume: losses after a resume on other ranks, ZeRO stage and offload, against no interruption.

    python -m benchmarks.elastic [--ranks 1 2 3 4] [--stages 0 1 2 3] [--offload optimizer all] [--dtypes fp32 bf16]
                                 [--steps 20]

Every layout (ranks × stage × precision) trains 3 steps, saves in the background and continues; every layout of the same
precision resumes from every one of those checkpoints. On 1 and 2 ranks there are layouts with offload besides, as far
as the stage allows; `--offload` without a word leaves them out. The table shows, per reading layout, the largest
relative difference over all writers of the first loss and of any of the following ones, and in how many of the resumes
the losses were bit by bit the same; then whether samples were counted exactly once. Writes JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import write as write_json
from launch.testing import elastic
from launch.testing.elastic import Where, differences
from launch.testing.ranks import run_ranks

BEFORE = 3
_SAYS = Console(stderr=True)
# Offload is measured on these numbers of ranks: its memory is laid out as that of the same stage without it.
_OFFLOAD_RANKS = (1, 2)


def layouts_of(ranks: list[int], stages: list[int], offloads: list[str], dtype: str) -> list[Where]:
    """Return all layouts of a precision: first without offload, then what can be with it."""
    plain = [Where(r, s, dtype) for r in ranks for s in stages]
    offloaded = [
        Where(r, s, dtype, offload)
        for r in ranks
        for s in stages
        for offload in offloads
        if r in _OFFLOAD_RANKS and (s == 3 or (offload == "optimizer" and s > 0))
    ]
    return [*plain, *offloaded]


def measure(layouts: list[Where], steps: int) -> list[dict[str, Any]]:
    """Return one row per (writer, reader) of the same precision."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for where in track(layouts, "writing", console=_SAYS):
            root = str(Path(folder) / where.name)
            written[where] = run_ranks(
                elastic.write, where.ranks, root, where.stage, where.dtype, where.offload, BEFORE, steps, timeout=300
            )[0]
        for reader in track(layouts, "reading", console=_SAYS):
            writers = [where for where in layouts if where.dtype == reader.dtype]
            roots = [str(Path(folder) / where.name) for where in writers]
            found = run_ranks(
                elastic.resume, reader.ranks, roots, reader.stage, reader.dtype, reader.offload, steps, timeout=900
            )[0]
            rows += [
                compare(writer, reader, written[writer], again) for writer, again in zip(writers, found, strict=True)
            ]
    return rows


def compare(writer: Where, reader: Where, whole: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """Return how far a resumed run is from the uninterrupted one, and whether each sample was seen once."""
    first, largest = differences(again["losses"], whole["losses"])
    seen = whole["before"] + again["ids"]
    return {
        "written": vars(writer),
        "read": vars(reader),
        "first": first,
        "largest": largest,
        "bitwise": again["losses"] == whole["losses"],
        "same_samples": sorted(again["ids"]) == sorted(whole["ids"]),
        "once": len(seen) == len(set(seen)) == elastic.GLOBAL_BATCH * (BEFORE + len(again["losses"])),
    }


def holds(row: dict[str, Any]) -> bool:
    """Return whether a row is as the issue wants it."""
    right = row["same_samples"] and row["once"]
    if row["written"] == row["read"]:
        right = right and row["bitwise"]
    if row["read"]["dtype"] == "fp32":
        right = right and row["first"] <= 1e-6 and row["largest"] <= 1e-5
    return bool(right)


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the matrix, one line per reading layout."""
    shown = Table(
        "ranks", "ZeRO", "precision", "offload", "resumed from", "first step", "all steps", "bitwise", "samples once"
    )
    readers = {tuple(row["read"].values()): [] for row in rows}
    for row in rows:
        readers[tuple(row["read"].values())].append(row)
    for (ranks, stage, dtype, offload), mine in readers.items():
        shown.add_row(
            str(ranks), str(stage), dtype, offload, f"{len(mine)} layouts",
            f"{max(row['first'] for row in mine):.1e}", f"{max(row['largest'] for row in mine):.1e}",
            f"{sum(row['bitwise'] for row in mine)} of {len(mine)}",
            "yes" if all(row["same_samples"] and row["once"] for row in mine) else "NO",
        )  # fmt: skip
    return shown


def main() -> None:
    """Measure, print, write JSON; exit code 1 if a tolerance is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--offload", nargs="*", choices=["optimizer", "all"], default=["optimizer", "all"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/elastic.json"))
    arguments = parser.parse_args()
    a = arguments
    layouts = [where for dtype in a.dtypes for where in layouts_of(a.ranks, a.stages, a.offload, dtype)]
    rows = measure(layouts, arguments.steps)
    shown = table(rows)
    shown.title = describe()
    Console().print(shown)
    write_json(arguments.out, {"machine": describe(), "steps": arguments.steps, "rows": rows})
    sys.exit(0 if all(map(holds, rows)) else 1)


if __name__ == "__main__":
    main()
