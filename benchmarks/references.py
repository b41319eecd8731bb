"""What setting the reference sets by K-means is worth, and what it costs: an ablation on CIFAR-10, with seeds.

    python -m benchmarks.references --data FOLDER [--out benchmarks/out/references] [--seeds 0 1 2] [--steps 600]

FOLDER holds cifar10_train.tar.gz and cifar10_test.tar.gz. Each (variant, seed) is an ordinary run of the command line
with the two-stage model of docs/ablation.md, 600 steps of 100 images. A second start trains only what is missing, and
resumes a run that was interrupted. "By Ray": a service on a Ray cluster of this machine computes the sets while the run
trains on for a thirtieth of its steps. Writes

    OUT/references.json   one entry per finished run
    OUT/references.md     the table: top-1, dead references, perplexity of their use, share of time that refreshes took
    OUT/references.png    the same as a plot

Dead references and perplexity are of the final weights, on tokens of 500 test images. The standard error pools the
spread between seeds over all variants.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.cifar10 import finished, pack, rows_of, setformer
from benchmarks.machine import describe
from launch.ray.cluster import own_cluster
from launch.run.inputs import inputs_of
from launch.run.trained import Trained, load_trained, open_named_split
from setformer_dist.core.ranks import RankInfo
from setformer_dist.models.reference_sets import reference_layers, watched_tokens
from setformer_dist.ops.refit import Problem, figures
from setformer_dist.ops.reservoir import Sample, lowest, token_keys

MODEL = (
    "~model.args",
    "model.args={embed_dim = 72, depths = [3, 2], num_heads = [3, 6], mlp_ratio = 3.0, stem_strides = [2, 2]}",
)
BY_RAY = "refresh.by=ray"
# A refresh after a tenth of the run stands for "a short warm-up"; the others come every tenth.
VARIANTS: dict[str, tuple[str, ...]] = {
    "learned only": (),
    "K-means start, then learned": ("refresh.at_steps=[{tenth}]", "refresh.start=kmeans++"),
    "learned and refreshed": ("refresh.every={tenth}",),
    "learned and refreshed by Ray": ("refresh.every={tenth}", "refresh.delay={delay}", BY_RAY),
    "K-means instead of learning": ("refresh.every={tenth}", "refresh.learn=false"),
    "frozen random": ("refresh.learn=false",),
    "frozen K-means": ("refresh.at_steps=[{tenth}]", "refresh.start=kmeans++", "refresh.learn=false"),
}
IMAGES = 500
EVERY = 1000  # the interval whose cost is reported


def name_of(variant: str, seed: int) -> str:
    """Return the name of a run."""
    return f"{variant.replace(',', '').replace(' ', '-').lower()}-{seed}"


def train(variant: str, seed: int, packed: Path, args: argparse.Namespace) -> Path:
    """Train what is missing of a run; return its folder."""
    folder = args.out / "runs" / name_of(variant, seed)
    if not finished(folder):
        tenth = max(1, args.steps // 10)
        overrides = [word.format(tenth=tenth, delay=max(1, tenth // 3)) for word in VARIANTS[variant]]
        with cluster_for(overrides) as (address, environment):
            setformer(
                "train", "configs/runs/cifar10.toml", f"data.root={packed}", f"run.out={args.out / 'runs'}",
                f"run.name={folder.name}", f"run.seed={seed}", f"run.threads={args.threads}", *MODEL,
                "model.drop_path=0.0", "~schedule.epochs", "~schedule.warmup_epochs", f"schedule.steps={args.steps}",
                f"schedule.warmup_steps={args.steps // 5}", "batch.global_size=100", "batch.micro=100", "zero.stage=0",
                f"precision.dtype={args.dtype}", "ema.decay=0.0", "eval.every_epochs=0", "data.augment.smoothing=0.0",
                "checkpoint.every_steps=200", "checkpoint.keep_last=1", *overrides, *address, "--ranks", "1",
                environment=environment,
            )  # fmt: skip
    return folder


@contextlib.contextmanager
def cluster_for(overrides: list[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Start a Ray cluster if the run asks for one; yield how the run finds it, and its environment."""
    if BY_RAY not in overrides:
        yield [], dict(os.environ)
        return
    with own_cluster(cpus=1) as cluster:
        yield [f"refresh.address={cluster.address}"], {**os.environ, **cluster.environment}


@torch.no_grad()
def use_of(trained: Trained) -> dict[str, float]:
    """Return the share of dead references and the perplexity of their use, on tokens of test images."""
    layers = reference_layers(trained.model)
    samples: dict[str, Sample] = {layer.name: Sample.empty(layer.heads * layer.width) for layer in layers}

    def take(name: str, x_bhnd: torch.Tensor, mask_bn: torch.Tensor | None) -> None:
        keys = token_keys(0, torch.arange(len(x_bhnd)), len(x_bhnd), x_bhnd.shape[2])
        samples[name] = samples[name].joined(lowest(x_bhnd, keys, mask_bn, 2**62, 2048), 2048)

    images = images_of(trained)
    trained.model.eval()
    with watched_tokens(trained.model, take):
        trained.model(images)
    present = {name: p.detach().float() for name, p in trained.model.named_parameters() if "references" in name}
    problem = Problem(layers, samples, present, ("references", "return_references"), "references", 1, 0)
    found = figures(problem, {})
    return {what: statistics.mean(rows[f"{what}_after"] for rows in found.values()) for what in ("dead", "perplexity")}


def images_of(trained: Trained) -> torch.Tensor:
    """Return the first test images as the model takes them."""
    split = open_named_split(trained, None, None)
    stream = inputs_of(trained.config.data).eval_stream(split, RankInfo(), IMAGES)
    try:
        inputs, _ = trained.prepare()(next(iter(stream.micro_batches())), train=False)
    finally:
        stream.close()
    return inputs


def entry_of(folder: Path) -> dict[str, Any]:
    """Return what is kept of a finished run."""
    rows = rows_of(folder)
    trained = [row for row in rows if row["kind"] == "train"]
    summary = json.loads((folder / "summary.json").read_text())
    spent = [row["seconds"] for row in trained]
    refreshes = [row for row in rows if row["kind"] == "refresh"]
    step_s = statistics.median(sum(parts.values()) - parts["refresh"] for parts in spent)
    refresh_s = 10 * sum(parts["refresh"] for parts in spent) / max(1, len(refreshes))  # run.log_every = 10
    return {
        "top1": 100 * summary["evaluation"]["top1"],
        "seconds": summary["seconds"],
        "step_s": step_s,
        "refresh_s": refresh_s if refreshes else 0.0,
        "share": refresh_s / (refresh_s + EVERY * step_s) if refreshes else 0.0,
        **use_of(load_trained(folder)),
    }


def spread_of(groups: dict[str, list[dict[str, Any]]]) -> float:
    """Return the standard deviation between seeds, pooled over the variants."""
    scores = [[entry["top1"] for entry in entries] for entries in groups.values()]
    freedom = sum(len(values) - 1 for values in scores)
    squares = sum((x - statistics.mean(values)) ** 2 for values in scores for x in values)
    return math.sqrt(squares / freedom) if freedom else math.nan


def report(found: dict[str, dict[str, Any]], out: Path, setting: str) -> str:
    """Write table and plot; return the table."""
    groups = {v: [e for name, e in found.items() if name.rsplit("/", 1)[0] == v] for v in VARIANTS}
    groups = {variant: entries for variant, entries in groups.items() if entries}
    spread = spread_of(groups)
    lines = [
        setting, "",
        "| variant | runs | top-1, % | each | dead, % | perplexity / m | seconds | "
        f"a refresh, s | its share every {EVERY} steps, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for variant, entries in groups.items():
        mean = {key: statistics.mean(entry[key] for entry in entries) for key in entries[0]}
        error = "" if math.isnan(spread) else f" ± {spread / math.sqrt(len(entries)):.2f}"
        each = ", ".join(f"{entry['top1']:.1f}" for entry in entries)
        lines.append(
            f"| {variant} | {len(entries)} | {mean['top1']:.2f}{error} | {each} | {100 * mean['dead']:.1f} | "
            f"{mean['perplexity']:.2f} | {mean['seconds']:.0f} | {mean['refresh_s']:.2f} | {100 * mean['share']:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    (out / "references.md").write_text(text)
    draw(groups, spread, out / "references.png")
    return text


def draw(groups: dict[str, list[dict[str, Any]]], spread: float, picture: Path) -> None:
    """Draw accuracy, dead references and perplexity of each variant."""
    figure = Figure(figsize=(10, 0.5 * len(groups) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(groups)[::-1]
    panels = (("top1", 1.0, "top-1, %"), ("dead", 100.0, "dead references, %"), ("perplexity", 1.0, "perplexity / m"))
    for axes, (key, times, label) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for place, name in enumerate(names):
            values = [times * entry[key] for entry in groups[name]]
            axes.plot(values, [place] * len(values), ".", color="tab:gray")
            error = spread / math.sqrt(len(values)) if key == "top1" and not math.isnan(spread) else 0.0
            axes.errorbar(statistics.mean(values), place, xerr=error, fmt="o", color="tab:blue", capsize=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.4)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Train what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10_{train,test}.tar.gz")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/references"), help="output folder")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    packed = args.out / "cifar10"
    pack(args.data, packed)
    path = args.out / "references.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in args.seeds:  # all variants of a seed before the next, so that what there is compares
        for variant in args.variants:
            if f"{variant}/{seed}" not in found:
                found[f"{variant}/{seed}"] = entry_of(train(variant, seed, packed, args))
                path.write_text(json.dumps(found, indent=1))
    setting = f"{args.steps} steps of 100 images, {args.dtype}, {args.threads} thread(s): {describe()}"
    print(report(found, args.out, setting))


if __name__ == "__main__":
    main()
