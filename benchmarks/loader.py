"""How fast loaders deliver training images, by themselves: ours, FFCV, WebDataset, ImageFolder, MosaicML Streaming.

    python -m benchmarks.loader --images ../shared/data/imagenet_sample.tar.gz [--seconds 60] [--json OUT] [--plot OUT]

Three sets are made of the images: as they are, all at 500 x 400, and photographs of 1600 x 1200 (scaled up, with
noise like a sensor's, since a smooth picture would decode too fast). Each loader runs in a process of its own. Rates
are per second of the wall clock and per second of the processor; only the latter hold on a machine that others use.

MosaicML Streaming is for this benchmark alone, and it wants other versions than we do: install it with its
dependencies into a folder of its own (`pip install --target FOLDER "transformers<5" "numpy<2.2" xxhash zstd Brotli
python-snappy "catalogue<3" tqdm requests boto3` and `pip install --target FOLDER --no-deps mosaicml-streaming`) and
name it with --peers. What is missing is said and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.loader_peers import LOADERS
from benchmarks.machine import describe
from benchmarks.measure import write
from dataloaders.beton.reader import BetonSample, write_beton
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.pixels.decode import decode

BATCH, SIZE = 64, 224
_NEEDS = {"FFCV": "ffcv", "WebDataset": "webdataset", "MosaicML": "streaming"}

# Images of a set, by repeating those there are: enough that shuffling and shards mean something.
_SET = 1000
_LARGE_SET = 120

_WRITE_MDS = """
import sys
from pathlib import Path
from streaming import MDSWriter
with MDSWriter(out=sys.argv[2], columns={"jpg": "bytes", "label": "int"}) as out:
    for path in sorted(Path(sys.argv[1]).rglob("*.jpg")):
        out.write({"jpg": path.read_bytes(), "label": 0})
"""


class Run(NamedTuple):
    """One measurement to be made."""

    data: str
    loader: str
    threads: int


def originals(archive: Path) -> list[bytes]:
    """Return the JPEG files of a tar."""
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.lower().endswith((".jpg", ".jpeg"))]
        return [file.read() for file in files if file is not None]


def resized(data: bytes, width: int, height: int, noise: float) -> bytes:
    """Return a JPEG of quality 90 of another size, with noise of this deviation (of 255)."""
    image = Image.fromarray(decode(data)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32)
    pixels += np.random.default_rng(len(data)).normal(0, noise, pixels.shape).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make_set(folder: Path, images: list[bytes], count: int, peers: Path | None, raw: bool) -> dict[str, float]:
    """Write the same images in all forms; return what they are like."""
    for number in range(count):
        path = folder / "images" / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[number % len(images)])
    pack_image_folder(folder / "images", folder / "tar", PackOptions(samples_per_shard=250))
    sizes = [decode(data).shape[:2] for data in images]
    for mode in ("jpg", "raw") if raw else ("jpg",):
        samples = (BetonSample(images[i % len(images)], i % 10, *sizes[i % len(images)]) for i in range(count))
        write_beton(folder / f"{mode}.beton", samples, count, classes=tuple("0123456789"), mode=mode)  # type: ignore[arg-type]
    if _has("MosaicML Streaming", peers):
        command = [sys.executable, "-c", _WRITE_MDS, str(folder / "images"), str(folder / "mds")]
        subprocess.run(command, env=_environment("MosaicML Streaming", peers), check=True)
    return {
        "images": len(images),
        "kib": float(np.mean([len(data) for data in images])) / 1024,
        "megapixels": float(np.mean([h * w for h, w in sizes])) / 1e6,
    }


def _has(loader: str, peers: Path | None) -> bool:
    module = next((module for name, module in _NEEDS.items() if name in loader), None)
    if module == "streaming":
        return peers is not None and (peers / module).is_dir()
    return module is None or importlib.util.find_spec(module) is not None


def _environment(loader: str, peers: Path | None) -> dict[str, str]:
    """Return the environment of a loader's process: one thread per library call, as all loaders bring their own."""
    paths = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    if "MosaicML" in loader and peers is not None:
        paths.insert(0, str(peers))
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def measured(run: Run, folder: Path, seconds: float, peers: Path | None) -> dict[str, Any]:
    """Return a loader's figures, or why there are none."""
    asked = {
        "loader": run.loader,
        "data": str(folder),
        "threads": run.threads,
        "size": SIZE,
        "batch": BATCH,
        "seconds": seconds,
    }
    command = [sys.executable, "-m", "benchmarks.loader_peers", json.dumps(asked)]
    try:
        done = subprocess.run(
            command,
            env=_environment(run.loader, peers),
            capture_output=True,
            text=True,
            timeout=300 + 3 * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**run._asdict(), "failed": "gave nothing within its time"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {**run._asdict(), "failed": said[-1] if said else f"exit code {done.returncode}"}
    return {**run._asdict(), **json.loads(lines[-1])}


def runs(full: bool) -> Iterator[Run]:
    """Yield what is measured: all of it, or two threads on one set alone."""
    for data in ("as they are", "500x400", "1600x1200"):
        for threads in (1, 2) if full or data == "as they are" else (1,):
            for loader in LOADERS:
                if not (data == "1600x1200" and "raw" in loader):
                    yield Run(data, loader, threads)


def report(rows: list[dict[str, Any]], data: str, facts: dict[str, float]) -> Table:
    """Return the table of one set."""
    title = f"{data}: {facts['kib']:.0f} KiB, {facts['megapixels']:.2f} megapixels on average, {SIZE} x {SIZE} out"
    columns = (
        "loader",
        "threads",
        "img/s",
        "img/s per CPU second",
        "of the limit",
        "times FFCV",
        "first batch, s",
        "MiB",
    )
    table = Table(*columns, title=title)
    found = {(row["loader"], row["threads"]): row for row in rows if row["data"] == data and "failed" not in row}
    for row in (row for row in rows if row["data"] == data):
        threads = row["threads"]
        if "failed" in row:
            table.add_row(row["loader"], str(threads), row["failed"][:60])
            continue
        rate = row["images_per_cpu_second"]
        limit = found.get(("bare decoder + resize", threads))
        ffcv = found.get(("FFCV, raw" if "raw" in row["loader"] else "FFCV, JPEG", threads))
        table.add_row(
            row["loader"],
            str(threads),
            f"{row['images_per_second']:.0f}",
            f"{rate:.0f}",
            f"{rate / limit['images_per_cpu_second']:.2f}" if limit else "",
            f"{rate / ffcv['images_per_cpu_second']:.2f}" if ffcv else "",
            f"{row['first_batch_seconds']:.2f}",
            f"{row['memory_mib']:.0f}",
        )
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rates per CPU second, one panel per set."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    figure, panels = plt.subplots(1, len(sets), figsize=(6 * len(sets), 5), squeeze=False)
    for panel, data in zip(panels[0], sets, strict=True):
        mine = [row for row in rows if row["data"] == data and row["threads"] == 1 and "failed" not in row][::-1]
        colours = ["C0" if row["loader"].startswith("ours") else "0.6" for row in mine]
        bars = panel.barh(
            [row["loader"] for row in mine], [row["images_per_cpu_second"] for row in mine], color=colours
        )
        panel.bar_label(bars, fmt="%.0f", padding=2)
        panel.set_title(data)
        panel.set_xlabel("images per CPU second, one thread")
        panel.margins(x=0.15)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Make the sets, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, default=Path("../shared/data/imagenet_sample.tar.gz"))
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure each loader, after a second's warm-up")
    parser.add_argument("--full", action="store_true", help="two threads on all sets")
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help="loaders whose name has one of these")
    parser.add_argument("--sets", nargs="*", default=["as they are", "500x400", "1600x1200"])
    parser.add_argument("--peers", type=Path, help="folder with MosaicML Streaming (see above)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/loader.json"))
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/out/loader.svg"))
    arguments = parser.parse_args()
    console = Console()
    images = originals(arguments.images)
    asked = [
        run
        for run in runs(arguments.full)
        if run.data in arguments.sets and any(w in run.loader for w in arguments.only)
    ]
    for loader in dict.fromkeys(run.loader for run in asked if not _has(run.loader, arguments.peers)):
        console.print(f"{loader} is not installed here: left out")
    asked = [run for run in asked if _has(run.loader, arguments.peers)]
    rows: list[dict[str, Any]] = []
    facts: dict[str, dict[str, float]] = {}
    console.print(describe())
    with tempfile.TemporaryDirectory() as scratch:
        for data in dict.fromkeys(run.data for run in asked):
            folder = Path(scratch) / data.replace(" ", "-")
            large = data == "1600x1200"
            if large:
                files = [resized(one, 1600, 1200, 6.0) for one in images[: _LARGE_SET // 4]]
            else:
                files = images if data == "as they are" else [resized(one, 500, 400, 0.0) for one in images]
            facts[data] = make_set(folder, files, _LARGE_SET if large else _SET, arguments.peers, raw=not large)
            for run in (run for run in asked if run.data == data):
                rows.append(measured(run, folder, arguments.seconds, arguments.peers))
                write(
                    arguments.json,
                    {"machine": describe(), "batch": BATCH, "size": SIZE, "sets": facts, "rows": rows},
                )
                said = rows[-1].get("failed") or f"{rows[-1]['images_per_cpu_second']:.0f} images per CPU second"
                console.print(f"  {run.data}, {run.loader}, {run.threads} threads: {said}", style="dim")
            console.print(report(rows, data, facts[data]))
    plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
