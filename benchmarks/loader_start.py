"""How soon loaders start, and start again in the middle: 1.28 million samples, and 100 million simulated.

    python -m benchmarks.loader_start --images ../shared/data/imagenet_sample.tar.gz [--json OUT]

The 1.28 million samples of one shard, or one .beton file, are the same few images again and again, so that opening,
ordering and reading are real and nothing fills the disk. Each figure is taken in a process of its own.

    ours       opens the index, goes to sample 1,000,000 of the epoch, gives the first batch decoded
    FFCV       makes its Loader and gives the first batch of the epoch; it cannot go to the middle
    WebDataset skips what was seen by reading it; extrapolated from two seconds of skipping
    order      100 million samples: the first batch of a rank, and one in the middle; no files
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.loader import originals
from benchmarks.machine import describe
from benchmarks.measure import write
from dataloaders.beton.format import ALLOCATION, HEADER, field_table, read_table, record_type
from dataloaders.beton.reader import BetonSample, write_beton
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.pixels.decode import decode
from dataloaders.sources.index import ShardFacts, read_index, write_index

COUNT, MIDDLE, HUGE = 1_280_000, 1_000_000, 100_000_000
BATCH, SIZE = 64, 224
_SKIP_S = 2.0

Facts = dict[str, Any]


def make_index(folder: Path, images: list[bytes]) -> None:
    """Write a packed split whose index names the samples of its one shard again and again."""
    for number, data in enumerate(images):
        path = folder / "images" / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    pack_image_folder(folder / "images", folder / "tar", PackOptions())
    index = read_index(folder / "tar")
    columns = {name: np.resize(column, COUNT) for name, column in index.columns.items()}
    shards = tuple(ShardFacts(**{**vars(shard), "samples": COUNT}) for shard in index.shards)
    keys = np.frombuffer(b"".join(b"%09d" % number for number in range(COUNT)), np.uint8).reshape(COUNT, 9)
    write_index(folder / "tar", index.classes, shards, columns, keys, {})


def make_beton(path: Path, images: list[bytes]) -> None:
    """Write a .beton file whose records name the same images again and again (ours would refuse it, FFCV does not)."""
    few = path.with_name("few.beton")
    sizes = [decode(data).shape[:2] for data in images]
    samples = (BetonSample(data, 0, *size) for data, size in zip(images, sizes, strict=True))
    write_beton(few, samples, len(images), classes=("a",))
    table = read_table(few)
    start = int(table.place.min())
    tables = HEADER.itemsize + len(field_table()) + COUNT * record_type().itemsize
    moved = -(-tables // table.page_size) * table.page_size - start
    data = few.read_bytes()[start : int((table.place + table.size).max())]
    records, allocations = np.zeros(COUNT, record_type()), np.zeros(COUNT, ALLOCATION)
    for name in ("height", "width", "place"):
        records["image"][name] = np.resize(getattr(table, name), COUNT)
    records["image"]["place"] += moved
    allocations["sample"], allocations["place"] = np.arange(COUNT), records["image"]["place"]
    allocations["size"] = np.resize(table.size, COUNT)
    with path.open("wb") as file:
        header = np.array((2, 2, table.page_size, COUNT, start + moved + len(data)), HEADER)
        file.write(header.tobytes() + field_table() + records.tobytes())
        file.seek(start + moved)
        file.write(data + allocations.tobytes())


def ours(folder: str) -> Facts:
    """Open, go to the middle of an epoch, and give a batch."""
    config_module = importlib.import_module("dataloaders.config")
    opening = importlib.import_module("dataloaders.opening")
    streams = importlib.import_module("dataloaders.reading.streams")
    ranks = importlib.import_module("setformer_dist.core.ranks").RankInfo()
    before, start = _resident_mib(), time.perf_counter()
    config = config_module.DataConfig(root=folder, train="tar", image_size=SIZE)
    source = opening.open_source(config.root, config.train, config)
    stream = streams.ShardTrainStream(source, config, 0, ranks, BATCH, BATCH)
    state = stream.state(MIDDLE // BATCH)
    next(stream.micro_batches(stream.check_state(state)))
    seconds = time.perf_counter() - start
    stream.close()
    return {"seconds": seconds, "mib": _resident_mib(peak=True) - before, "state_bytes": len(json.dumps(state))}


def ffcv(folder: str) -> Facts:
    """Make a Loader and give the first batch."""
    loading = importlib.import_module("ffcv.loader")
    images = importlib.import_module("ffcv.fields.rgb_image")
    before, start = _resident_mib(), time.perf_counter()
    pipelines = {"image": [images.RandomResizedCropRGBImageDecoder((SIZE, SIZE))], "label": None}
    loader = loading.Loader(
        f"{folder}/many.beton", BATCH, num_workers=1, order=loading.OrderOption.RANDOM, pipelines=pipelines
    )
    batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return {
        "seconds": seconds,
        "mib": _resident_mib(peak=True) - before,
        "note": "from the start: it cannot go to the middle",
    }


def webdataset(folder: str) -> Facts:
    """Skip for two seconds; how long 1,000,000 samples would take."""
    wds = importlib.import_module("webdataset")
    before = _resident_mib()
    (tar,) = Path(folder, "tar").glob("*.tar")
    data = wds.WebDataset(str(tar), shardshuffle=False, empty_check=False).repeat()
    start, skipped = time.perf_counter(), 0
    for _ in data:
        skipped += 1
        if time.perf_counter() > start + _SKIP_S:
            break
    seconds = (time.perf_counter() - start) * MIDDLE / skipped
    return {
        "seconds": seconds,
        "mib": _resident_mib(peak=True) - before,
        "note": "extrapolated; the order is then another one",
    }


def order(folder: str) -> Facts:
    """Order 100 million samples, on one of eight ranks: first batch, one in the middle, the state."""
    rules, streams = (
        importlib.import_module("dataloaders.order.order"),
        importlib.import_module("dataloaders.reading.streams"),
    )
    before, start = _resident_mib(), time.perf_counter()
    plan = rules.SetPlan(rules.FullOrder(HUGE, 0), 8 * BATCH)
    cut = rules.Cut(8 * BATCH, BATCH, 3, 8)
    for step in (0, plan.steps_per_epoch // 2, plan.steps_per_epoch + 1):
        for request in itertools.islice(streams.train_requests(plan, cut, step), 2):
            assert len(np.unique(request.samples)) == BATCH
    seconds = time.perf_counter() - start
    state = rules.cursor_at(plan, 0, "0" * 64, 12345).to_json()
    return {"seconds": seconds, "mib": _resident_mib(peak=True) - before, "state_bytes": len(json.dumps(state))}


MEASURED: dict[str, tuple[Callable[[str], Facts], str]] = {
    "ours: sample 1,000,000 of 1,280,000": (ours, ""),
    "FFCV: 1,280,000 samples": (ffcv, "ffcv"),
    "WebDataset: to sample 1,000,000": (webdataset, "webdataset"),
    "our order: 100,000,000 samples": (order, ""),
}


def _resident_mib(peak: bool = False) -> float:
    """Return the memory of this process: now, which also lets its peak begin again, or at its peak since then."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Make, measure, print; with --apart, one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, default=Path("../shared/data/imagenet_sample.tar.gz"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/loader_start.json"))
    parser.add_argument("--apart", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.apart:
        print(json.dumps(MEASURED[arguments.apart[0]][0](arguments.apart[1])))
        return
    rows: list[Facts] = []
    table = Table("loader", "seconds to the first batch", "MiB more", "state, bytes", "note", title=describe())
    with tempfile.TemporaryDirectory() as folder:
        images = originals(arguments.images)[:100]
        make_index(Path(folder), images)
        make_beton(Path(folder) / "many.beton", images)
        for name, (_, module) in MEASURED.items():
            if module and importlib.util.find_spec(module) is None:
                continue
            command = [sys.executable, "-m", "benchmarks.loader_start", "--apart", name, folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = {"loader": name, **json.loads(done.stdout.splitlines()[-1])}
            rows.append(row)
            state = str(row.get("state_bytes", ""))
            table.add_row(name, f"{row['seconds']:.2f}", f"{row['mib']:.0f}", state, row.get("note", ""))
    Console().print(table)
    write(arguments.json, {"machine": describe(), "rows": rows})


if __name__ == "__main__":
    main()
