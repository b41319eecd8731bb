"""What a window of a large image costs: read from tiles, against decoding the whole image.

    python -m benchmarks.windows --images FOLDER [--sides 2048 4096 8192 16384] [--windows 512 1024] [--json FILE]

FOLDER holds photographs at any depth. For each side a mosaic of them is made, and stored in three ways: as one JPEG
file, as tiles in a packed shard (`setformer data pack --tiles 1024`), and as a tiled TIFF with JPEG tiles in a shard.
A window is what a training step with `augment.crop = "window"` reads of one sample: its bytes from the shard,
checksums, pixels. Windows are drawn at random, the same for all. "PIL" is the habit of others: open, convert, crop.
Times are medians of one thread; the shards are in the page cache.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import seconds, write
from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.pixels.decode import decode_box
from dataloaders.pixels.depth import PixelFormat
from dataloaders.source import Stored

TILE = 1024
MOST_PIXELS = 1 << 29
QUALITY = 90
FORM = PixelFormat(max_pixels=MOST_PIXELS)


def mosaic(folder: Path, side: int) -> npt.NDArray[np.uint8]:
    """Return (side, side, 3) pixels of photographs, row by row as they come."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    whole = np.zeros((side, side, 3), np.uint8)
    top, place = 0, 0
    while top < side:
        left, row = 0, side
        while left < side:
            pixels = np.asarray(Image.open(paths[place % len(paths)]).convert("RGB"))[: side - top, : side - left]
            whole[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
            left, row, place = left + pixels.shape[1], min(row, pixels.shape[0]), place + 1
        top += row
    return whole


def stored_ways(pixels: npt.NDArray[np.uint8], folder: Path) -> dict[str, Path]:
    """Store an image in three ways; return the folders of the splits."""
    image = Image.fromarray(pixels)
    for name in ("jpeg", "tiff"):
        (folder / name / "all").mkdir(parents=True)
    image.save(folder / "jpeg" / "all" / "image.jpg", quality=QUALITY)
    tifffile.imwrite(
        folder / "tiff" / "all" / "image.tif", pixels, tile=(TILE, TILE), compression="jpeg",
        compressionargs={"level": QUALITY}, photometric="rgb",
    )  # fmt: skip
    packed = {"whole": ("jpeg", 0), "tiles": ("jpeg", TILE), "TIFF": ("tiff", 0)}
    for name, (source, tiles) in packed.items():
        pack_image_folder(folder / source, folder / name / "train", PackOptions(tiles=tiles, form=FORM))
    return {name: folder / name for name in packed}


def reader(root: Path) -> Callable[[tuple[int, int, int, int]], npt.NDArray[Any]]:
    """Return what reads a window of the one sample of a split, as training does."""
    source = open_source(str(root), "train", DataConfig(root=str(root), max_pixels=MOST_PIXELS))

    def read(box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        stored: Stored = source.read(0)
        return decode_box(stored.image, box, source.size(0), FORM)

    return read


def by_pil(path: Path) -> Callable[[tuple[int, int, int, int]], npt.NDArray[Any]]:
    """Return what reads a window by PIL."""

    def read(box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        top, left, height, width = box
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        return np.asarray(image.crop((left, top, left + width, top + height)))

    return read


def rows_of(pixels: npt.NDArray[np.uint8], windows: list[int], folder: Path) -> list[dict[str, Any]]:
    """Measure one image."""
    roots = stored_ways(pixels, folder)
    ways = {"JPEG, PIL": by_pil(folder / "jpeg" / "all" / "image.jpg"), "JPEG, whole": reader(roots["whole"]),
            "TIFF, its tiles": reader(roots["TIFF"]), f"tiles of {TILE}": reader(roots["tiles"])}  # fmt: skip
    found = []
    for window in windows:
        for name, read in ways.items():
            draws = np.random.default_rng(0)

            def once(
                read: Callable[[tuple[int, int, int, int]], npt.NDArray[Any]] = read,
                draws: np.random.Generator = draws,
                window: int = window,
            ) -> None:
                top, left = (int(draws.integers(extent - window + 1)) for extent in pixels.shape[:2])
                assert read((top, left, window, window)).shape == (window, window, 3)

            spent = seconds(once, budget_s=3.0, repeats=60)
            found.append({"side": len(pixels), "window": window, "way": name, "ms": 1e3 * spent})
    return found


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    table = Table("image side", "window", *(f"{way}, ms" for way in ways), "whole / tiles", title=describe())
    for side, window in dict.fromkeys((row["side"], row["window"]) for row in rows):
        ms = {row["way"]: row["ms"] for row in rows if (row["side"], row["window"]) == (side, window)}
        ratio = ms["JPEG, whole"] / ms[f"tiles of {TILE}"]
        table.add_row(str(side), str(window), *(f"{ms[way]:,.1f}" for way in ways), f"{ratio:.1f}")
    console.print(table)


def main() -> None:
    """Make mosaics, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--windows", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    rows: list[dict[str, Any]] = []
    for side in args.sides:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(mosaic(args.images, side), args.windows, Path(folder))
        print(f"side {side}: {time.perf_counter() - begun:.0f} s", flush=True)
    report(rows, Console(width=140))
    if args.json:
        write(args.json, {"machine": describe(), "rows": rows})


if __name__ == "__main__":
    main()
