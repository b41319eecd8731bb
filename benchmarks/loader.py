"""How many images per second the loader delivers, by itself: no model, no device.

    python -m benchmarks.loader PACKED --image-size 224 --crop resized --workers 0 1 2 --json out.json

Each row warms up for a second, then runs for `--seconds` of wall clock. "per core" divides by the CPU seconds of
this process and its readers together, so it holds on a machine that others use too; wall-clock figures do not.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from dataloaders import AugmentConfig, DataConfig, ShardTrainStream, open_split
from setformer_dist.core.ranks import RankInfo


@dataclass(frozen=True)
class Row:
    """One measurement: images per second of wall clock and per second of CPU, seconds to the first batch."""

    workers: int
    images_per_second: float
    images_per_core_second: float
    first_batch_seconds: float
    mib_per_core_second: float


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and all below it that live."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(folder: Path, config: DataConfig, micro_batch: int, seconds: float) -> Row:
    """Run one stream for a while."""
    dataset = open_split(folder)
    sizes = dataset.index.columns["size"]
    stream = ShardTrainStream(dataset, config, 0, RankInfo(), micro_batch, micro_batch)
    start = time.perf_counter()
    batches = stream.micro_batches(0)
    next(batches)
    first = time.perf_counter() - start
    warm = time.perf_counter() + 1.0
    while time.perf_counter() < warm:
        next(batches)
    images, size, start, cpu = 0, 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() < start + seconds:
        ids = next(batches).sample_ids.numpy()
        images += len(ids)
        size += int(sizes[ids].sum())
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    stream.close()
    return Row(config.workers, images / wall, images / cpu, first, size / cpu / (1 << 20))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a packed split")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--crop", choices=("resized", "pad", "none"), default="resized")
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    parser.add_argument("--randaugment", type=int, default=0, metavar="OPS")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for workers in arguments.workers:
        config = DataConfig(
            root=str(arguments.folder.parent),
            image_size=arguments.image_size,
            interpolation=arguments.interpolation,
            workers=workers,
            augment=AugmentConfig(crop=arguments.crop, randaugment_ops=arguments.randaugment),
        )
        rows.append(measure(arguments.folder, config, arguments.micro_batch, arguments.seconds))
    table = Table("workers", "img/s", "img/s per core", "MiB/s per core", "first batch, s")
    for row in rows:
        table.add_row(
            str(row.workers),
            f"{row.images_per_second:.0f}",
            f"{row.images_per_core_second:.0f}",
            f"{row.mib_per_core_second:.1f}",
            f"{row.first_batch_seconds:.2f}",
        )
    Console().print(table)
    if arguments.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
        machine = {"cpus": os.cpu_count(), "torch": torch.__version__}
        result = {"settings": settings, "machine": machine, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
