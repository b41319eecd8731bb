"""The demo: scikit-learn's 1,797 handwritten digits as PNG files, packed, trained, summed up for a newcomer."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.panel import Panel

from dataloaders.packing.pack import pack_image_folder
from launch.ranks.local import LocalCrew
from launch.ranks.restarts import RestartConfig
from launch.ranks.supervise import run_supervised
from launch.record.attempts import Recorder
from launch.run.config import load_run
from setformer_dist.core.errors import ConfigError, LaunchError
from setformer_dist.core.seeding import Purpose, generator

try:
    from sklearn.datasets import load_digits
except ImportError:  # it ships with the dev extra only
    load_digits = None

CONFIG = Path(__file__).parent.parent.parent / "configs" / "runs" / "demo.toml"
SIZE = 16  # pixels; the originals are 8×8 with 17 grey levels
HELD_OUT = 360
OURS = ("images", "train", "val")


def write_digits(folder: Path) -> None:
    """Write the digits as an ImageFolder with train/ and val/, split by a fixed draw.

    Raises:
        LaunchError: scikit-learn, which ships the digits, is not installed.
    """
    if load_digits is None:
        raise LaunchError("the demo's digits ship with scikit-learn: pip install scikit-learn")
    digits = load_digits()
    order = generator(Purpose.PACK, 0).permutation(len(digits.target))
    for place, index in enumerate(order):
        split = "val" if place < HELD_OUT else "train"
        grey = Image.fromarray(np.round(digits.images[index] * 15.9375).astype(np.uint8))
        target = folder / split / str(digits.target[index]) / f"{index:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(target)


def prepare_data(data: Path, console: Console) -> None:
    """Make and pack the digits unless they are there."""
    if (data / "val" / "index.json").exists() and (data / "train" / "index.json").exists():
        return
    source = data / "images"
    foreign = [path.name for path in data.iterdir() if path.name not in OURS] if data.is_dir() else []
    if foreign:
        raise ConfigError(f"--data {data} holds {foreign[0]!r}, which is not the demo's: name an empty or a new folder")
    for name in OURS:
        shutil.rmtree(data / name, ignore_errors=True)
    console.print("writing 1,797 handwritten digits as PNG files and packing them into shards …")
    write_digits(source)
    pack_image_folder(source / "train", data / "train")
    pack_image_folder(source / "val", data / "val")


def run_demo(ranks: int, data: Path, console: Console, overrides: Sequence[str] = ()) -> int:
    """Prepare, train, print the summary; return the exit code."""
    words = [f"data.root={data}", *overrides]
    folder = load_run(CONFIG, words).folder
    prepare_data(data, console)
    crew = LocalCrew([str(CONFIG), *words], ranks)
    code = run_supervised(crew, folder, RestartConfig(), recorder=Recorder(folder))
    if code:
        return code
    figures = json.loads((folder / "summary.json").read_text())
    console.print(Panel.fit(_text(figures, folder), title="what happened", border_style="green"), soft_wrap=False)
    console.print("what to type next:")
    for command in _next(data, folder):  # outside the box and unbroken, so that they can be copied
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _next(data: Path, folder: Path) -> list[str]:
    setformer = Path(sys.executable).parent / "setformer"
    return [
        f"{setformer} predict {folder} {data}/images/val/3/*.png",
        f"{setformer} eval {folder}",
        f"{setformer} ckpt ls {folder} --verify",
        f"{setformer} train demo data.root={data} run.name=mine optim.lr=1e-3 --ranks 2",
    ]


def _text(figures: dict[str, object], folder: Path) -> str:
    scores = figures["evaluation"]
    assert isinstance(scores, dict)
    top1 = max(scores["top1"], scores.get("ema_top1", 0.0))
    return "\n".join(
        (
            f"[bold]{top1:.2%}[/] of {HELD_OUT} held-out digits are read right.",
            f"{figures['model']}, {figures['parameters']:,} parameters, trained by DeepSpeed "
            f"ZeRO-{figures['zero_stage']} in {figures['dtype']} on {figures['ranks']} ranks",
            f"at {figures['images_per_s']} images/s, {figures['seconds']} s in all.",
            "",
            f"run folder   {folder}",
            f"checkpoint   {figures['checkpoint']}",
            f"curves       {figures['report']}  (open it in a browser)",
        )
    )
