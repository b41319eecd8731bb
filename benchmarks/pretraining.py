"""What pretraining without labels is worth with few labels, on CIFAR-10: MAE of a SeTformer, SimMIM of softmax.

    python -m benchmarks.pretraining --data FOLDER [--out benchmarks/out/pretraining] [--seeds 0 1 2] [--labels 0.1]
                                     [--epochs 200] [--tuning-epochs 100] [--set KEY=VALUE ...]

FOLDER holds cifar10_train.tar.gz and cifar10_test.tar.gz. For each method and seed, a model is pretrained on all
training images without their labels, and then fine-tuned with a share of the labels (the same images of each class for
all); beside it the same model is trained from scratch by the same recipe. Both backbones have the same blocks, widths
and schedules; they differ in the attention, and by that a little in parameters. Each is an ordinary run of the command
line. A second start trains only what is missing, and resumes a run that was interrupted. Writes

    OUT/pretraining.json   an entry per method and seed: top-1 of both, and of a linear probe and nearest neighbours
    OUT/pretraining.md     the table, means and standard deviations over the seeds
"""

from __future__ import annotations

import argparse
import json
import statistics
import tarfile
from pathlib import Path

from benchmarks.cifar10 import finished, pack, setformer
from benchmarks.machine import describe
from launch.run.features import probe
from launch.run.trained import load_trained, open_named_split

# Method: what its pretraining is besides configs/runs/cifar10_mae.toml, and what its model is.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SeTformer, MAE": ((), ()),
    "softmax, SimMIM": (
        ("task.name=simmim", "~task.args.decoder_dim", "~task.args.decoder_depth"),
        ("model.args.attention=softmax",),
    ),
}
COLUMNS = ("from scratch", "fine-tuned", "linear probe", "nearest neighbours")


def few_labels(source: Path, out: Path, share: float) -> Path:
    """Pack a share of the training images of each class, the first by name, and all test images; return the folder."""
    packed = out / f"labels-{share}"
    folder = out / f"images-{share}"
    if not (packed / "train" / "index.json").exists():
        with tarfile.open(source / "cifar10_train.tar.gz") as tar:
            by_class: dict[str, list[tarfile.TarInfo]] = {}
            for member in sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name):
                by_class.setdefault(member.name.split("/")[-2], []).append(member)
            kept = [m for members in by_class.values() for m in members[: max(1, round(share * len(members)))]]
            tar.extractall(folder, kept, filter="data")
        setformer("data", "pack", str(folder / "train"), str(packed / "train"), "--shuffle", "0")
    if not (packed / "val" / "index.json").exists():
        words = ["--classes-from", str(packed / "train")]
        setformer("data", "pack", str(source / "cifar10_test.tar.gz"), str(packed / "val"), *words)
    return packed


def train(config: str, name: str, seed: int, data: Path, epochs: int, args: argparse.Namespace, *more: str) -> Path:
    """Train what is missing of a run; return its folder."""
    folder: Path = args.out / "runs" / f"{name}-{seed}"
    if not finished(folder):
        setformer(
            "train", config, f"data.root={data}", f"run.out={args.out / 'runs'}", f"run.name={folder.name}",
            f"run.seed={seed}", f"precision.dtype={args.dtype}", f"schedule.epochs={epochs}",
            f"schedule.warmup_epochs={epochs / 10}", f"eval.every_epochs={epochs}", "checkpoint.keep_last=1", *more,
            "--ranks", str(args.ranks),
        )  # fmt: skip
    return folder


def entry_of(method: str, seed: int, whole: Path, few: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return the top-1 accuracies of a method and a seed, in percent."""
    task, model = METHODS[method]
    model = (*model, *args.set)
    prefix = method.replace(", ", "-")
    pretrained = train("configs/runs/cifar10_mae.toml", prefix, seed, whole, args.epochs, args, *task, *model)
    scores = {}
    for name, weights in (("from scratch", ()), ("fine-tuned", (f"model.weights={pretrained}",))):
        run = f"{prefix}-{name.replace(' ', '-')}"
        folder = train("configs/runs/cifar10.toml", run, seed, few, args.tuning_epochs, args, *model, *weights)
        found = json.loads((folder / "summary.json").read_text())["evaluation"]
        scores[name] = 100 * max(found["top1"], found["ema_top1"])
    trained = load_trained(pretrained)
    splits = [open_named_split(trained, str(few), name) for name in ("train", "val")]
    probed = probe(trained, splits[0], splits[1], batch=250)
    return {**scores, "linear probe": 100 * probed.linear, "nearest neighbours": 100 * probed.neighbours}


def report(found: dict[str, dict[str, dict[str, float]]], setting: str) -> str:
    """Return the table."""
    lines = [setting, "", f"| method | seed | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for method, seeds in found.items():
        for seed, row in seeds.items():
            lines.append(f"| {method} | {seed} | {' | '.join(f'{row[c]:.2f}' for c in COLUMNS)} |")
        if len(seeds) > 1:
            columns = [[row[c] for row in seeds.values()] for c in COLUMNS]
            means = (f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" for values in columns)
            lines.append(f"| {method} | mean | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Pack, train, score, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two tar.gz files")
    parser.add_argument("--packed", type=Path, default=Path("data/cifar10"), help="where the shards go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/pretraining"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=float, default=0.1, help="share of the labels that is used")
    parser.add_argument("--epochs", type=int, default=200, help="of pretraining")
    parser.add_argument("--tuning-epochs", type=int, default=100, help="of training with labels")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of all runs, such as a smaller model"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pack(args.data, args.packed)
    few = few_labels(args.data, args.out, args.labels)
    setting = (
        f"CIFAR-10, top-1 in percent of the test images, {args.labels:.0%} of the labels, {args.epochs} epochs of "
        f"pretraining, {args.tuning_epochs} with labels{''.join(f', {word}' for word in args.set)}; {describe()}"
    )
    out = args.out / "pretraining.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    for seed in args.seeds:
        for method in args.methods:
            found.setdefault(method, {})[str(seed)] = entry_of(method, seed, args.packed, few, args)
            out.write_text(json.dumps(found, indent=1) + "\n")
            (args.out / "pretraining.md").write_text(report(found, setting))
    print(report(found, setting))


if __name__ == "__main__":
    main()
