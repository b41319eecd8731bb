"""ZeRO stages side by side: the loss after 20 steps, uninterrupted, and killed with SIGKILL and resumed.

    python -m benchmarks.stages [--dtypes fp32 bf16] [--steps 20]

For each stage and precision the command line trains the demo's config on two ranks: once to the end, and once with
`kill -9` of all ranks after a checkpoint and a restart. Prints the final losses, whether every loss of the
resumed run is bit by bit that of the uninterrupted one, and the relative distance to stage 0; writes JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import write
from launch.examples.demo import prepare_data
from launch.testing.commands import DEMO, Ended, kill_ranks, losses, setformer, start, wait_for


def words(data: Path, out: Path, dtype: str, stage: int, steps: int, ranks: int, more: Sequence[str]) -> list[str]:
    """Return the command of one run; `more` overrides keys."""
    return [
        "train", DEMO, f"data.root={data}", f"run.out={out}", "--ranks", str(ranks), "run.log_every=1",
        "~schedule.epochs", "~schedule.warmup_epochs", f"schedule.steps={steps}", "schedule.warmup_steps=5",
        "eval.every_epochs=0", "checkpoint.every_steps=5", f"precision.dtype={dtype}", f"zero.stage={stage}",
        *more,
    ]  # fmt: skip


def must(ended: Ended) -> None:
    """Stop with a run's own words if it failed."""
    if ended.code:
        sys.exit(ended.err)


def measure(data: Path, dtype: str, stage: int, steps: int, ranks: int = 2, more: Sequence[str] = ()) -> dict[str, Any]:
    """Return the final losses of an uninterrupted and of a killed and resumed run."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        must(setformer(*words(data, whole, dtype, stage, steps, ranks, more)))
        process = start(*words(data, killed, dtype, stage, steps, ranks, more), "--restarts", "0")
        wait_for(killed / "demo" / "checkpoints" / "step-00000010" / "manifest.json", process)
        kill_ranks(process)
        _, err = process.communicate()
        if not process.returncode:
            sys.exit(f"the run ended before it could be killed: {err}")
        must(setformer(*words(data, killed, dtype, stage, steps, ranks, more)))
        first, second = losses(whole / "demo"), losses(killed / "demo")
    return {
        "dtype": dtype,
        "stage": stage,
        "loss": first["train", steps][0],
        "resumed_loss": second["train", steps][0],
        "bitwise": first == second,
        "losses": [first["train", step][0] for step in range(1, steps + 1)],
    }


def main() -> None:
    """Measure, print, write JSON; exit code 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, help="one GPU has room for one")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the demo's config")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/stages.json"))
    arguments = parser.parse_args()
    console = Console()
    data = Path("runs/demo-data").absolute()
    prepare_data(data, console)
    table = Table(
        "precision", "ZeRO", "loss", "killed and resumed", "bit by bit", "largest distance to the first stage"
    )
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        reference: list[float] = []
        for stage in arguments.stages:
            row = measure(data, dtype, stage, arguments.steps, arguments.ranks, arguments.set)
            reference = reference or row["losses"]
            distance = max(abs(a / b - 1) for a, b in zip(row["losses"], reference, strict=True))
            rows.append({**row, "distance": distance})
            write(arguments.out, {"machine": describe(), "rows": rows})
            same = "yes" if row["bitwise"] else "NO"
            table.add_row(
                dtype, str(stage), f"{row['loss']:.9f}", f"{row['resumed_loss']:.9f}", same, f"{distance:.1e}"
            )
    table.title = describe()
    console.print(table)
    console.print(f"written to {arguments.out}")
    sys.exit(0 if all(row["bitwise"] for row in rows) else 1)


if __name__ == "__main__":
    main()
