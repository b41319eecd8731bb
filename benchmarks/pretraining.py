"""What pretraining without labels is worth with few labels: masked autoencoding on CIFAR-10, with seeds.

    python -m benchmarks.pretraining --data FOLDER [--out benchmarks/out/pretraining] [--seeds 0 1 2] [--labels 0.1]
                                     [--epochs 200] [--tuning-epochs 100]

FOLDER holds cifar10_train.tar.gz and cifar10_test.tar.gz. For each seed, a SeTformer is pretrained on all training
images without their labels, and then fine-tuned with a share of the labels (the same images of each class for both
variants); beside it the same model is trained from scratch by the same recipe. Each is an ordinary run of the command
line. A second start trains only what is missing, and resumes a run that was interrupted. Writes

    OUT/pretraining.json   one entry per seed: top-1 of both, and of a linear probe and nearest neighbours
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


def entry_of(seed: int, whole: Path, few: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return the top-1 accuracies of a seed, in percent."""
    pretrained = train("configs/runs/cifar10_mae.toml", "pretrained", seed, whole, args.epochs, args)
    scores = {}
    for name, weights in (("from scratch", ()), ("fine-tuned", (f"model.weights={pretrained}",))):
        folder = train(
            "configs/runs/cifar10.toml", name.replace(" ", "-"), seed, few, args.tuning_epochs, args, *weights
        )
        found = json.loads((folder / "summary.json").read_text())["evaluation"]
        scores[name] = 100 * max(found["top1"], found["ema_top1"])
    trained = load_trained(pretrained)
    splits = [open_named_split(trained, str(few), name) for name in ("train", "val")]
    probed = probe(trained, splits[0], splits[1], batch=250)
    return {**scores, "linear probe": 100 * probed.linear, "nearest neighbours": 100 * probed.neighbours}


def report(found: dict[str, dict[str, float]], setting: str) -> str:
    """Return the table."""
    lines = [setting, "", f"| seed | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    lines += [f"| {seed} | {' | '.join(f'{row[c]:.2f}' for c in COLUMNS)} |" for seed, row in found.items()]
    if len(found) > 1:
        columns = [[row[c] for row in found.values()] for c in COLUMNS]
        means = (f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" for values in columns)
        lines.append(f"| mean | {' | '.join(means)} |")
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
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pack(args.data, args.packed)
    few = few_labels(args.data, args.out, args.labels)
    setting = (
        f"CIFAR-10, top-1 in percent of the test images, {args.labels:.0%} of the labels, {args.epochs} epochs of "
        f"pretraining, {args.tuning_epochs} with labels; {describe()}"
    )
    found: dict[str, dict[str, float]] = {}
    for seed in args.seeds:
        found[str(seed)] = entry_of(seed, args.packed, few, args)
        (args.out / "pretraining.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "pretraining.md").write_text(report(found, setting))
    print(report(found, setting))


if __name__ == "__main__":
    main()
