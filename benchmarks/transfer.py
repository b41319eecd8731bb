"""From the loader's memory to the device: how long a micro batch holds up the host, and how long it takes.

    python -m benchmarks.transfer [--batch 256] [--size 224] [--out FILE]

    pageable        `tensor.to(device, non_blocking=True)` of usual memory
    by way of       a run's way (`setformer_dist.core.transfer.on_device`): copied to pinned memory first
    pinned          a copy from memory that is pinned already: what reader threads could gain by writing there

"Host" is the time until the call returns while the device still has `--queued` ms of products to do, "alone" the time
until the batch is there on an idle device. A way whose host time is as long as the queue makes the host wait for it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import DEVICE, seconds, wait, write
from setformer_dist.core.transfer import on_device


def ways(images: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the ways to the device of a batch in usual memory, by name."""
    device = torch.device(DEVICE)
    pinned = images.pin_memory() if DEVICE == "cuda" else images
    return {
        "pageable": lambda: images.to(device, non_blocking=True),
        "by way of pinned": lambda: on_device(images, device),
        "pinned": lambda: pinned.to(device, non_blocking=True),
    }


def queue_of(milliseconds: float) -> Callable[[], None]:
    """Return work that keeps the device busy for about so long, and the host hardly."""
    size = 8192 if DEVICE == "cuda" else 64
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    count = max(1, round(milliseconds / 1000 / seconds(lambda: a @ a)))

    def work() -> None:
        for _ in range(count):
            a @ a

    return work


def measure(way: Callable[[], torch.Tensor], queued: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Return the median milliseconds of a way: of the host behind a queue, and of all of it on an idle device."""
    way()
    host, alone = [], []
    for _ in range(repeats):
        wait()
        queued()
        start = time.perf_counter()
        way()
        host.append(time.perf_counter() - start)
        wait()
        start = time.perf_counter()
        way()
        wait()
        alone.append(time.perf_counter() - start)
    return {"host_ms": 1e3 * statistics.median(host), "alone_ms": 1e3 * statistics.median(alone)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images of a micro batch")
    parser.add_argument("--size", type=int, default=224, help="their side in pixels")
    parser.add_argument("--queued", type=float, default=60.0, help="ms of work before it on the device")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    images = torch.randint(0, 256, (arguments.batch, 3, arguments.size, arguments.size), dtype=torch.uint8)
    queued = queue_of(arguments.queued if DEVICE == "cuda" else 0.0)
    rows = [{"way": name, **measure(way, queued, arguments.repeats)} for name, way in ways(images).items()]
    console, gigabytes = Console(), images.numel() / 1e9
    table = Table("way", "host, ms", "alone, ms", "GB/s", title=f"{images.numel() / 2**20:.1f} MiB")
    for row in rows:
        rate = gigabytes / row["alone_ms"] * 1e3
        table.add_row(row["way"], f"{row['host_ms']:.2f}", f"{row['alone_ms']:.2f}", f"{rate:.1f}")
    console.print(table, describe())
    if arguments.out is not None:
        write(arguments.out, {"machine": describe(), "bytes": images.numel(), "rows": rows})


if __name__ == "__main__":
    main()
