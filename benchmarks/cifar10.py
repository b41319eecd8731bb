"""SeTformer against a peer of timm on CIFAR-10: same recipe, same samples in the same order, same number of steps.

    python -m benchmarks.cifar10 --data FOLDER [--out runs]

FOLDER holds cifar10_train.tar.gz and cifar10_test.tar.gz (ImageFolders of JPEG files). The script packs them, trains
configs/runs/cifar10.toml and cifar10_peer.toml by the command line on two ranks, one after the other, measures the
speed of both in turns, and writes a table, JSON and the curves. Each part that is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from launch.ranks.processes import die_with_parent

CONFIGS = {"SeTformer": "configs/runs/cifar10.toml", "Swin (timm)": "configs/runs/cifar10_peer.toml"}
NAMES = {"SeTformer": "cifar10", "Swin (timm)": "cifar10-peer"}


def setformer(*words: str, environment: Mapping[str, str] = os.environ) -> None:
    """Run the command line, which ends with this program; stop with its exit code if it fails."""
    command = [sys.executable, "-m", "launch.cli.main", *words]
    code = subprocess.run(command, check=False, env=environment, preexec_fn=die_with_parent()).returncode
    if code:
        sys.exit(code)


def pack(source: Path, packed: Path) -> None:
    """Pack both splits unless they are there."""
    if not (packed / "train" / "index.json").exists():
        setformer("data", "pack", str(source / "cifar10_train.tar.gz"), str(packed / "train"), "--shuffle", "0")
    if not (packed / "val" / "index.json").exists():
        words = ["--classes-from", str(packed / "train")]
        setformer("data", "pack", str(source / "cifar10_test.tar.gz"), str(packed / "val"), *words)


def finished(folder: Path) -> bool:
    """Return whether a run came to its end."""
    path = folder / "summary.json"
    return path.exists() and bool(json.loads(path.read_text())["finished"])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return a run's records, the last one of each kind and step."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["kind"], row["step"]] = row
    return list(found.values())


def measure_speed(packed: Path, out: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Train both for 60 steps in turns; return median images/s of the last 40 steps and peak memory."""
    speeds: dict[str, list[float]] = {name: [] for name in CONFIGS}
    memory: dict[str, float] = {}
    for turn in range(rounds):
        for name, config in CONFIGS.items():
            folder = out / f"{NAMES[name]}-speed-{turn}"
            if not finished(folder):
                setformer(
                    "train", config, f"data.root={packed}", f"run.out={out}", f"run.name={folder.name}", "--ranks", "2",
                    "~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=60", "eval.every_epochs=0",
                )  # fmt: skip
            train = [row for row in rows_of(folder) if row["kind"] == "train" and row["step"] > 20]
            speeds[name].append(statistics.median(row["images_per_s"] for row in train))
            memory[name] = max(row["memory_mib"] for row in train)
    return {name: {"images_per_s": statistics.median(speeds[name]), "memory_mib": memory[name]} for name in CONFIGS}


def plot(out: Path, picture: Path) -> None:
    """Draw loss and validation accuracy of both."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, folder), colour in zip(NAMES.items(), ("tab:blue", "tab:orange"), strict=True):
        rows = rows_of(out / folder)
        train = [row for row in rows if row["kind"] == "train"]
        left.plot([r["epoch"] for r in train], [r["loss"] for r in train], color=colour, lw=0.8, label=name)
        steps_per_epoch = train[-1]["step"] / train[-1]["epoch"]
        scored = [row for row in rows if row["kind"] == "eval"]
        epochs = [r["step"] / steps_per_epoch for r in scored]
        right.plot(epochs, [100 * r["top1"] for r in scored], "o-", color=colour, label=name)
        right.plot(epochs, [100 * r["ema_top1"] for r in scored], "o--", color=colour, label=f"{name}, averaged")
    left.set(xlabel="epoch", ylabel="training loss (smoothed labels)")
    right.set(xlabel="epoch", ylabel="top-1 on 10,000 test images, %")
    right.axhline(70, color="grey", lw=0.8, ls=":")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Pack, train, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two tar.gz files")
    parser.add_argument("--packed", type=Path, default=Path("data/cifar10"), help="where the shards go")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the speed measurement")
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/out/cifar10.png"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/cifar10.json"))
    arguments = parser.parse_args()
    pack(arguments.data, arguments.packed)
    results: dict[str, Any] = {"machine": describe(), "models": {}}
    for name, config in CONFIGS.items():
        if not finished(arguments.out / NAMES[name]):
            setformer("train", config, f"data.root={arguments.packed}", f"run.out={arguments.out}", "--ranks", "2")
        results["models"][name] = json.loads((arguments.out / NAMES[name] / "summary.json").read_text())
    for name, figures in measure_speed(arguments.packed, arguments.out, arguments.rounds).items():
        results["models"][name]["speed"] = figures
    report(results, arguments)


def report(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the table, write JSON and picture."""
    console = Console()
    table = Table(
        "model", "parameters", "top-1", "averaged weights", "images/s", "peak MiB per rank", "minutes", title=describe()
    )
    for name, row in results["models"].items():
        scores, speed = row["evaluation"], row["speed"]
        table.add_row(
            name, f"{row['parameters']:,}", f"{scores['top1']:.2%}", f"{scores['ema_top1']:.2%}",
            f"{speed['images_per_s']:.0f}", f"{speed['memory_mib']:.0f}", f"{row['seconds'] / 60:.1f}",
        )  # fmt: skip
    console.print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    plot(arguments.out, arguments.picture)
    console.print(f"written: {arguments.json}, {arguments.picture}")


if __name__ == "__main__":
    main()
