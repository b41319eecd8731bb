"""Ablation of the attention's open choices on CIFAR-10, one factor at a time from the default.

Trains a two-stage SeTformer of about 0.6 M parameters for a few epochs on a subset of CIFAR-10 once per variant
and seed, and reports top-1 on the whole test set as mean and standard error. Prints a table and writes

    OUT/ablation.json   one entry per finished (variant, seed): a second start runs only what is missing
    OUT/ablation.md     the table
    OUT/ablation.png    the same as a plot
    OUT/cifar10_*.npy   the decoded images

    python -m benchmarks.ablation --data DIR_WITH_cifar10_train.tar.gz --out benchmarks/out/ablation
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import statistics
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import simplejpeg
import timm
import torch
from torch import nn
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.models.setformer import Block, SeTformer

NET: dict[str, Any] = {
    "embed_dim": 72,
    "depths": (3, 2),
    "num_heads": (3, 6),
    "mlp_ratio": 3.0,
    "stem_strides": (2, 2),
    "num_classes": 10,
}
# Written out, so that a later change of the model's defaults does not change what was compared here.
START: dict[str, Any] = {
    "references": 16,
    "epsilon": 0.1,
    "iterations": 5,
    "kernel": "similarity",
    "sigma": 0.6,
    "position_filter": "separable",
    "tau": 0.25,
    "places": "edges",
    "reference_sets": 2,
    "renormalise": True,
}


class MeanAttention(nn.Module):
    """Every token receives the mean of all: the baseline below."""

    def __init__(self, dim: int) -> None:
        """Build for `dim` channels."""
        super().__init__()
        self.input = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(b, n, c) -> (b, n, c)."""
        return self.output(self.input(x).mean(1, keepdim=True)).expand_as(x)


@dataclass(frozen=True)
class Variant:
    """One row of the table: a change of the start, or another attention in its place."""

    attn: dict[str, Any] = field(default_factory=dict)
    attention: str = "set"
    replace: Callable[[int], nn.Module] | None = None


VARIANTS: dict[str, Variant] = {
    "start (two sets, filter 0.25)": Variant(),
    "one reference set": Variant({"reference_sets": 1}),
    "no filter": Variant({"position_filter": "none"}),
    "one reference set, no filter": Variant({"reference_sets": 1, "position_filter": "none"}),
    "softmax (q, k, v, o)": Variant(attention="softmax"),
    "mean of all tokens": Variant(replace=MeanAttention),
    "not renormalised": Variant({"renormalise": False}),
    "gaussian kernel": Variant({"kernel": "gaussian"}),
    "nystrom kernel": Variant({"kernel": "nystrom"}),
    "tau 0.1": Variant({"tau": 0.1}),
    "epsilon 0.5": Variant({"epsilon": 0.5}),
    "3 iterations": Variant({"iterations": 3}),
    "9 references": Variant({"references": 9}),
    "25 references": Variant({"references": 25}),
}


def build(variant: Variant) -> SeTformer:
    """Return the model of a variant, from torch's generator."""
    model = timm.create_model("setformer_nano", **NET, attn={**START, **variant.attn}, attention=variant.attention)
    assert isinstance(model, SeTformer)
    if variant.replace is not None:
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            attention = variant.replace(block.norm1.normalized_shape[0])
            for layer in attention.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    nn.init.zeros_(layer.bias)
            block.attn = attention
    return model


# --------------------------------------------------------------------------------------------------------- data


def read_split(data: Path, out: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images (N, 3, 32, 32) uint8 and labels (N,) of a split, decoded once and kept as .npy."""
    images_file, labels_file = out / f"cifar10_{split}_images.npy", out / f"cifar10_{split}_labels.npy"
    if not (images_file.is_file() and labels_file.is_file()):
        names, images = [], []
        with tarfile.open(data / f"cifar10_{split}.tar.gz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None:
                    names.append(Path(member.name).parent.name)
                    images.append(simplejpeg.decode_jpeg(file.read()))
        classes = sorted(set(names))
        np.save(images_file, np.stack(images).transpose(0, 3, 1, 2))
        np.save(labels_file, np.array([classes.index(name) for name in names]))
    return torch.from_numpy(np.load(images_file)), torch.from_numpy(np.load(labels_file))


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to 4 pixels (zeros move in) and mirror half of them: (B, 3, 32, 32) uint8."""
    b, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, b, 1), generator=generator)
    mirror = torch.rand(b, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirror, torch.arange(width - 1, -1, -1), torch.arange(width))
    picked = padded.permute(0, 2, 3, 1)[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Bring uint8 to about zero mean and unit deviation."""
    return (images.float() - 121.0) / 62.0


# ----------------------------------------------------------------------------------------------------- training


def parameter_groups(model: SeTformer, decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that must not."""
    exempt = model.no_weight_decay()
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name not in exempt], "weight_decay": decay},
        {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
    ]


def optimizer_of(model: SeTformer, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return AdamW at the peak learning rate."""
    return torch.optim.AdamW(parameter_groups(model, 0.05), lr=args.lr, fused=True)


def update(model: SeTformer, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Take one optimizer step on normalised images."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()


def train(
    variant: Variant, seed: int, train_set: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace
) -> SeTformer:
    """Train once; the seed decides weights, order and augmentation, the subset of images is fixed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build(variant)
    images, labels = train_set
    subset = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: args.images]
    steps_per_epoch = args.images // args.batch
    optimizer = optimizer_of(model, args)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.epochs * steps_per_epoch, pct_start=0.2
    )
    for _ in range(args.epochs):
        order = subset[torch.randperm(args.images, generator=generator)]
        for index in order[: steps_per_epoch * args.batch].split(args.batch):
            update(model, optimizer, normalise(augment(images[index], generator)), labels[index])
            schedule.step()
    return model


@torch.no_grad()
def top1(model: SeTformer, test_set: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the share of test images classified right, in percent."""
    model.eval()
    correct = 0
    for images, labels in zip(*(tensor.split(500) for tensor in test_set), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            correct += int((model(normalise(images)).argmax(1) == labels).sum())
    return 100.0 * correct / len(test_set[1])


# ------------------------------------------------------------------------------------------------------- report


def machine() -> str:
    """Name the processor and the torch version."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    name = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__.split('+')[0]}, bf16 autocast"


def summarise(results: dict[str, dict[str, Any]]) -> list[tuple[str, int, float, float, list[float]]]:
    """Return (variant, parameters, mean, standard error, scores) in table order.

    Two or three seeds say little about the spread of their own variant, so the spread between seeds is pooled over
    all variants (one variance, each run's deviation from its variant's mean) and divided by sqrt(runs).
    """
    groups = {name: [run for key, run in results.items() if key.rsplit("/", 1)[0] == name] for name in VARIANTS}
    scores = {name: [run["top1"] for run in runs] for name, runs in groups.items() if runs}
    freedom = sum(len(values) - 1 for values in scores.values())
    squares = sum((x - statistics.mean(values)) ** 2 for values in scores.values() for x in values)
    deviation = math.sqrt(squares / freedom) if freedom else math.nan
    return [
        (name, groups[name][0]["parameters"], statistics.mean(values), deviation / math.sqrt(len(values)), values)
        for name, values in scores.items()
    ]


def write_report(results: dict[str, dict[str, Any]], setting: str, out: Path) -> str:
    """Write table and plot; return the table."""
    rows = summarise(results)
    text = io.StringIO()
    print(f"{setting}\n", file=text)
    print("| variant | parameters | runs | top-1, % | each |\n|---|---|---|---|---|", file=text)
    for name, parameters, mean, error, scores in rows:
        spread = "" if math.isnan(error) else f" ± {error:.1f}"
        each = ", ".join(f"{score:.1f}" for score in scores)
        print(f"| {name} | {parameters / 1e3:.0f}k | {len(scores)} | {mean:.1f}{spread} | {each} |", file=text)
    (out / "ablation.md").write_text(text.getvalue())
    figure = matplotlib.figure.Figure(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    names = [row[0] for row in rows][::-1]
    axes.errorbar([row[2] for row in rows][::-1], names, xerr=[row[3] for row in rows][::-1], fmt="o", capsize=3)
    axes.set_xlabel("CIFAR-10 top-1, %, mean ± standard error")
    axes.grid(axis="x", alpha=0.4)
    figure.savefig(out / "ablation.png", dpi=120)
    return text.getvalue()


def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10_{train,test}.tar.gz")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/ablation"), help="output folder")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--images", type=int, default=10_000, help="training images (the same for all)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train_set, test_set = (read_split(args.data, args.out, split) for split in ("train", "test"))
    file = args.out / "ablation.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    shape = f"{args.images} training images, {args.epochs} epochs, batch {args.batch}, peak lr {args.lr}"
    setting = f"{shape}; {machine()}"
    if record.get("shape", shape) != shape:
        parser.error(f"{file} holds runs of another setting ({record['shape']}): choose another --out")
    results = record.get("results", {})
    for seed in args.seeds:
        for name in args.variants:
            if f"{name}/{seed}" in results:
                continue
            start = time.perf_counter()
            model = train(VARIANTS[name], seed, train_set, args)
            score = top1(model, test_set)
            results[f"{name}/{seed}"] = {
                "top1": score,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps({"shape": shape, "machine": machine(), "results": results}, indent=1))
            partial.replace(file)
            print(f"{name}, seed {seed}: {score:.2f} %, {time.perf_counter() - start:.0f} s", flush=True)
    print(write_report(results, setting, args.out))


if __name__ == "__main__":
    main()
