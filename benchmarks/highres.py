"""What an image costs as it grows: time and memory of a forward and a backward pass, per pixel, beside peers.

    python -m benchmarks.highres                                        every model at 224 to 2048 pixels a side
    python -m benchmarks.highres --models setformer_base --sizes 4096 --recompute block --dtype bf16
                                                                        one 4096 x 4096 image of the base model

Every row runs in a process of its own: one image, random pixels, cross entropy, no optimizer. Time is the fastest
pass of two seconds or `--repeats` passes, after a first one that measures memory: the rise of the resident set, which
holds activations and the gradients of the weights. "predicted" is what `setformer train --dry-run` says of the same
pass. A peer that takes longer than `--limit` for a pass is not tried at larger sizes.

    OUT/highres.json    every row
    OUT/highres.png     time per pixel over the side
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import matplotlib.figure
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401  (registers the models)
from benchmarks.machine import describe
from benchmarks.measure import measured_apart, peak_bytes, write
from setformer_dist.models.measure import measure_activations
from setformer_dist.models.recompute import set_recompute

MODELS = (
    "setformer_mini",
    "setformer_tiny",
    "setformer_mini implicit",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "vit_small_patch16_224",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LEAST_S = 2.0  # of timing one row
WARM = 64  # side of the image that builds kernels and fills caches first


def model_of(name: str, size: int, recompute: str) -> nn.Module:
    """Return a model as a user would build it for this size; "implicit" is SeT's other gradient."""
    name, _, gradient = name.partition(" ")
    more: dict[str, Any] = {"attn": {"gradient": gradient}} if gradient else {}
    if name.startswith("swin"):
        more["img_size"] = size
    if name.startswith("vit"):
        more["dynamic_img_size"] = True
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000, **more)
    set_recompute(model, recompute, name)  # type: ignore[arg-type]
    return model.train()


def passes(name: str, size: int, recompute: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Measure one row in this process."""
    model = model_of(name, size, recompute).to(DTYPES[dtype])
    predicted = measure_activations(model, DTYPES[dtype], (1, 3, size, size)).peak

    def once(side: int) -> None:
        image = torch.randn(1, 3, side, side, dtype=DTYPES[dtype])
        F.cross_entropy(model(image).float(), torch.zeros(1, dtype=torch.int64)).backward()
        model.zero_grad(set_to_none=True)

    once(size if name.startswith("swin") else WARM)
    memory = peak_bytes(lambda: once(size))  # also the first pass of this size, so that it is not timed
    taken = []
    begun = time.perf_counter()
    while len(taken) < repeats or time.perf_counter() - begun < _LEAST_S:
        start = time.perf_counter()
        once(size)
        taken.append(time.perf_counter() - start)
    return {"seconds": min(taken), "peak_bytes": memory, "predicted_bytes": predicted}


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table("side", "model", "dtype", "recompute", "s a pass", "ns a pixel", "of its smallest", "peak MiB",
                  "predicted", "bytes a pixel", title=describe())  # fmt: skip
    for row in rows:
        pixels = row["size"] ** 2
        first = next(r for r in rows if r["model"] == row["model"])
        ratio = row["seconds"] / pixels / (first["seconds"] / first["size"] ** 2)
        table.add_row(
            str(row["size"]), row["model"], row["dtype"], row["recompute"], f"{row['seconds']:.2f}",
            f"{row['seconds'] / pixels * 1e9:.0f}", f"{ratio:.2f}", f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['predicted_bytes'] / row['peak_bytes']:.2f}", f"{row['peak_bytes'] / pixels:,.0f}",
        )  # fmt: skip
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time per pixel over the image side."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        style = "-" if name.startswith("setformer") else "--"
        values = [row["seconds"] / row["size"] ** 2 * 1e9 for row in mine]
        axes.loglog([row["size"] for row in mine], values, style, marker="o", label=name)
    axes.set(xlabel="image side, pixels", ylabel="forward and backward, ns a pixel")
    axes.grid(alpha=0.3, which="both")
    sides = sorted({row["size"] for row in rows})
    axes.set_xticks(sides, map(str, sides))
    axes.set_xticks([], minor=True)
    axes.yaxis.set_minor_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448, 1024, 2048])
    parser.add_argument("--recompute", default="none", help="none, cheap, mlp or block; peers know none and block")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a pass")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/highres"))
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.apart:
        asked = json.loads(arguments.apart)
        torch.set_num_threads(asked.pop("threads"))
        print(json.dumps(passes(**asked)))
        return
    rows: list[dict[str, Any]] = []
    slow: set[str] = set()
    for size in arguments.sizes:
        for name in arguments.models:
            if name in slow:
                continue
            asked = {"name": name, "size": size, "recompute": arguments.recompute, "dtype": arguments.dtype}
            more = {"repeats": arguments.repeats, "threads": arguments.threads}
            try:
                found = measured_apart("benchmarks.highres", {**asked, **more})
            except subprocess.CalledProcessError:
                print(f"{name} at {size}: did not end well, out of memory for example", flush=True)
                slow.add(name)
                continue
            rows.append({"model": name, **{key: value for key, value in asked.items() if key != "name"}, **found})
            print(json.dumps(rows[-1]), flush=True)
            if found["seconds"] > arguments.limit:
                slow.add(name)
    report(rows, Console(width=140))
    write(arguments.out / "highres.json", {"machine": describe(), "rows": rows})
    plot(rows, arguments.out / "highres.png")


if __name__ == "__main__":
    main()
