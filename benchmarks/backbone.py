"""Backbones side by side: images/s and memory in training and inference, SeTformer and its peers of timm.

    python -m benchmarks.backbone [--sizes 224 384 768] [--models setformer_tiny …] [--compile] [--picture FILE.png]

Training is forward, cross entropy, backward and a fused AdamW step; fp32 on a CPU, bf16 autocast-free weights on a GPU.
Peers are untrained; their windows stay as published. The batch holds --pixels of images, so that every size has the
same work for a convolution. A model that does not fit is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401  (registers the models)
from benchmarks.machine import describe
from benchmarks.measure import DEVICE, measured_apart, peak_bytes, seconds, write

MODELS = (
    "setformer_mini",
    "setformer_tiny",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "setformer_base",
    "swin_base_patch4_window7_224",
    "convnext_base",
)
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16


def work(name: str, size: int, batch: int, compiled: bool = False) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Return (inference, training step, parameters)."""
    torch.manual_seed(0)
    fixed = {"img_size": size} if name.startswith("swin") else {}
    model = timm.create_model(name, num_classes=1000, **fixed).to(DEVICE, DTYPE)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled:  # block by block: equal blocks share what was compiled, so a deep model takes as long as a short one
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # all blocks of a model are one piece of code, in many shapes
        for block in model.modules():
            if type(block).__name__.endswith("Block"):
                block.compile(fullgraph=True)
    images = torch.randn(batch, 3, size, size, device=DEVICE, dtype=DTYPE)
    labels = torch.arange(batch, device=DEVICE)

    def infer() -> None:
        model.eval()
        with torch.no_grad():
            model(images)

    def train() -> None:
        model.train()
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return infer, train, parameters


def row(name: str, size: int, batch: int, compiled: bool, threads: int, budget: float) -> dict[str, Any]:
    """Measure one model at one size."""
    infer, train, parameters = work(name, size, batch, compiled)
    times = {"inference": batch / seconds(infer, budget, 10), "training": batch / seconds(train, budget, 10)}
    if DEVICE == "cuda":
        memory = peak_bytes(train)
    else:
        memory = measured_apart("benchmarks.backbone", {"name": name, "size": size, "batch": batch, "threads": threads})
    return {"model": name, "size": size, "batch": batch, "parameters": parameters, **times, "peak_bytes": memory}


def memory_of(name: str, size: int, batch: int) -> int:
    """Return the rise of memory in a training step; in a process of its own."""
    train = work(name, size, batch)[1]
    train()
    return peak_bytes(train)


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table; ratios are to Swin of the like size at the same resolution."""
    base = {(r["size"], "base" in r["model"]): r for r in rows if r["model"].startswith("swin")}
    table = Table(
        "size", "model", "M params", "batch", "training images/s", "of Swin", "inference images/s", "of Swin",
        "step's memory MiB", title=describe(),
    )  # fmt: skip
    for r in rows:
        peer = base.get((r["size"], "base" in r["model"]))
        of = [f"{r[key] / peer[key]:.2f}×" if peer else "" for key in ("training", "inference")]
        table.add_row(
            str(r["size"]), r["model"], f"{r['parameters'] / 1e6:.1f}", str(r["batch"]), f"{r['training']:.2f}", of[0],
            f"{r['inference']:.2f}", of[1], f"{r['peak_bytes'] / 2**20:.0f}",
        )  # fmt: skip
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw training speed over the image size."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == name]
        style = "-" if name.startswith("setformer") else "--"
        axes.loglog([r["size"] for r in mine], [r["training"] for r in mine], style, marker="o", label=name)
    axes.set(xlabel="image side", ylabel="training images/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384, 768])
    parser.add_argument("--pixels", type=int, default=(4 if DEVICE == "cpu" else 256) * 224**2, help="per batch")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks; memory on a CPU is without")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each figure, beyond one call")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/backbone.json"))
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/out/backbone.png"))
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.apart:
        asked = json.loads(arguments.apart)
        torch.set_num_threads(asked.pop("threads"))
        print(memory_of(**asked))
        return
    console = Console(width=130)
    rows = []
    for size in arguments.sizes:
        batch = max(1, arguments.pixels // size**2)
        for name in arguments.models:
            try:
                rows.append(row(name, size, batch, arguments.compile, arguments.threads, arguments.budget))
            except (torch.OutOfMemoryError, subprocess.CalledProcessError) as error:
                # The process that measures memory may also have been ended by the system for want of it.
                console.print(f"{name} at {size} does not fit with a batch of {batch}: {error}", style="yellow")
                continue
            console.print(f"{size} {name}: {rows[-1]['training']:.2f} images/s", style="dim")
    report(rows, console)
    plot(rows, arguments.picture)
    write(
        arguments.out,
        {"machine": describe(), "compiled": arguments.compile, "threads": arguments.threads, "rows": rows},
    )
    console.print(f"written to {arguments.out} and {arguments.picture}")


if __name__ == "__main__":
    main()
