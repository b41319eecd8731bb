"""The determinism matrix of the data: what was varied, what was compared, whether it came out the same.

    python -m benchmarks.determinism [--json FILE] [--interruptions 200]

Samples are compared by id over whole epochs, without data; pixels, labels and mixing bit by bit on images made here,
with every augmentation on, read as an image folder, as shards and as a .beton file.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from dataloaders.opening import open_source
from dataloaders.packing.convert import convert
from dataloaders.source import Source
from dataloaders.testing.determinism import (
    Checked,
    check_containers,
    check_cuts,
    check_interruptions,
    check_pixel_cuts,
    check_readers,
    check_resumed_pixels,
    make_images,
    pack_images,
    pixel_config,
)

READERS = [(workers, threads) for workers in (0, 1, 2) for threads in (0, 1, 2, 4)]


def check_all(folder: Path, interruptions: int) -> list[Checked]:
    """Make images in a folder and run every check."""
    images = make_images(folder / "images")
    shards = pack_images(images, folder / "shards")
    beton = folder / "images.beton"
    convert(shards, beton)

    def opener(path: Path) -> Callable[[], Source]:
        return functools.partial(open_source, str(path.parent), path.name, pixel_config())

    return [
        *check_cuts(),
        *check_interruptions(interruptions),
        check_readers(opener(shards), READERS),
        check_pixel_cuts(opener(shards)),
        check_resumed_pixels(opener(shards)),
        check_containers({"shards": opener(shards), ".beton": opener(beton), "folder": opener(images)}),
    ]


def main() -> int:
    """Run, print, write; return 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="where to write the rows")
    parser.add_argument("--interruptions", type=int, default=200, help="at least so many of each plan")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = check_all(Path(folder), arguments.interruptions)
    table = Table("varied", "over", "compared", "cases", "identical", title="Determinism of the data")
    for row in rows:
        table.add_row(row.what, row.over, row.compared, str(row.cases), "yes" if row.identical else "[red]NO[/]")
    Console().print(table)
    if arguments.json is not None:
        result = {"machine": describe(), "seconds": time.perf_counter() - begin, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row.identical for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
