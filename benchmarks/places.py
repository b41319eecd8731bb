"""What places at cell centres are worth when a model sees images of another size than it was trained on.

Trains the model of `benchmarks.ablation` on CIFAR-10 at 32 x 32 with `attn.places` "edges" and "centres", once a seed,
and scores each at larger sizes without fine-tuning (test images enlarged bicubically). Then, of every registered
SeTformer as it is initialised, how far the pooled features of photographs at 448 x 448 are from those at 224 x 224.

    OUT/places.json     every run; a second start runs only what is missing
    OUT/places.md       both tables

    python -m benchmarks.places --data DIR_WITH_cifar10_train.tar.gz --out benchmarks/out/places
"""

from __future__ import annotations

import argparse
import json
import statistics
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import timm
import torch
from torch.nn import functional as F

from benchmarks.ablation import Variant, machine, normalise, read_split, top1, train

PLACES = ("edges", "centres")
SIZES = (32, 48, 64, 96, 128)
MODELS = ("setformer_nano", "setformer_mini", "setformer_tiny")


def enlarged(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return uint8 images at another size, bicubic."""
    if images.shape[-1] == size:
        return images
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255).byte()
        for part in images.split(500)
    ]
    return torch.cat(parts)


@torch.no_grad()
def drift(name: str, places: str, photographs: torch.Tensor) -> float:
    """Return |features at 448 - features at 224| / |features at 224| of an initialised model, over all photographs."""
    torch.manual_seed(0)
    model = timm.create_model(name, attn={"places": places}, num_classes=0).eval()
    small, large = (
        torch.cat([model(normalise(part)) for part in enlarged(photographs, size).split(4)]) for size in (224, 448)
    )
    return float((large - small).norm() / small.norm())


def photographs_of(data: Path, count: int) -> torch.Tensor:
    """Return the middle of some photographs, (count, 3, 448, 448) uint8."""
    found: list[torch.Tensor] = []
    with tarfile.open(data / "imagenet_sample.tar.gz") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.lower().endswith(".jpeg") else None
            pixels = None if file is None else torch.from_numpy(np.array(simplejpeg.decode_jpeg(file.read())))
            if pixels is None or min(pixels.shape[:2]) < 300:
                continue
            side = min(pixels.shape[:2])
            top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
            square = pixels[top : top + side, left : left + side].permute(2, 0, 1).unsqueeze(0)
            found.append(enlarged(square, 448))
            if len(found) == count:
                break
    return torch.cat(found)


def report(record: dict[str, Any]) -> str:
    """Return both tables."""
    lines = [record["shape"], "", f"| places | {' | '.join(f'{size}²' for size in SIZES)} |", "|---" * 6 + "|"]
    for places in PLACES:
        runs = [run for key, run in record["top1"].items() if key.startswith(f"{places}/")]
        cells = []
        for size in map(str, SIZES):
            scores = [run[size] for run in runs]
            cells.append(f"{statistics.mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})")
        lines.append(f"| {places} | {' | '.join(cells)} |")
    lines += ["", "| model, as initialised | edges | centres |", "|---|---|---|"]
    for name in MODELS:
        cells = [f"{record['drift'][f'{name}/{places}']:.4f}" for places in PLACES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="of cifar10_*.tar.gz, imagenet_sample.tar.gz")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/places"), help="output folder")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--tested", type=int, default=4000, help="test images")
    parser.add_argument("--photographs", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.batch, args.lr = 100, 2e-3

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train_set, (images, labels) = (read_split(args.data, args.out, split) for split in ("train", "test"))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: args.tested]
    images, labels = images[chosen], labels[chosen]
    file = args.out / "places.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"top1": {}, "drift": {}}
    record["shape"] = f"{args.images} training images, {args.epochs} epochs, {args.tested} test images; {machine()}"
    for seed in args.seeds:
        for places in PLACES:
            key = f"{places}/{seed}"
            if key not in record["top1"]:
                model = train(Variant({"places": places}), seed, train_set, args)
                record["top1"][key] = {str(size): top1(model, (enlarged(images, size), labels)) for size in SIZES}
                file.write_text(json.dumps(record, indent=1))
                print(key, record["top1"][key], flush=True)
    photographs = photographs_of(args.data, args.photographs)
    for name in MODELS:
        for places in PLACES:
            if f"{name}/{places}" not in record["drift"]:
                record["drift"][f"{name}/{places}"] = drift(name, places, photographs)
                file.write_text(json.dumps(record, indent=1))
    (args.out / "places.md").write_text(report(record))
    print(report(record))


if __name__ == "__main__":
    main()
