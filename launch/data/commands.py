"""What `setformer data index`, `verify` and `bench` do and print."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dataloaders.beton.reader import index_beton, open_beton
from dataloaders.config import LARGEST_SIDE, AugmentConfig, DataConfig
from dataloaders.packing.finding import open_container, parted
from dataloaders.packing.throughput import Throughput
from dataloaders.packing.throughput import measure as measure_source
from dataloaders.packing.verify import Verified
from dataloaders.sources.class_folders import read_class_map
from dataloaders.sources.foreign import index_shards
from dataloaders.storage.homes import user_cache
from dataloaders.storage.remote import is_url, shown_url
from launch.data.sheet import size_text
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.terminal import open_table
from setformer_dist.core.words import counted

# Damaged things named in the terminal; --json names all.
_NAMED = 50


def index(
    path: str,
    classes: Path | None,
    checksums: bool,
    workers: int,
    on_start: Callable[[int], None],
    on_progress: Callable[[int], None],
) -> str:
    """Index shards or a .beton file that others made; return what to say of it.

    Raises:
        ConfigError: a class map for shards, whose labels are numbers or names of their own; a .beton file of a URL.
        DataError: there are none, or they are damaged.
    """
    names = None if classes is None else read_class_map(classes)
    if Path(path.partition("?")[0] if is_url(path) else path).suffix == ".beton":
        if is_url(path):
            raise ConfigError(f"the index of {shown_url(path)} is next to it: make it on a copy, and upload both")
        on_start(open_beton(Path(path)).num_samples)
        index_beton(Path(path), names, on_progress)
        beton = open_beton(Path(path))
        return f"indexed {counted(beton.num_samples, 'sample')} of {_classes(beton.classes)} in {path}"
    if names is not None:
        raise ConfigError("--classes is for .beton files: shards are repacked with another class map")
    root, pattern = parted(path)
    made = index_shards(
        root,
        pattern,
        cache=user_cache(),
        checksums=checksums,
        workers=workers,
        on_start=on_start,
        on_progress=on_progress,
    )
    shards = counted(len(made.shards), "shard")
    return f"indexed {counted(len(made), 'sample')} of {_classes(made.classes)} in {shards} of {path}"


def show_verified(results: list[Verified], as_json: bool, console: Console) -> bool:
    """Print what was verified; return whether anything is damaged."""
    if as_json:
        print(json.dumps([asdict(found) for found in results]))
        return any(found.damaged for found in results)
    for found in results:
        for damage in found.damaged[:_NAMED]:
            key = f" {damage.key}" if damage.key else ""
            _say(console, f"damaged: {damage.shard}{key}: {damage.kind}: {damage.detail}")
        if len(found.damaged) > _NAMED:
            _say(console, f"and {len(found.damaged) - _NAMED} more (all of them with --json)")
        looked = counted(found.samples, "sample") + (" decoded" if found.decoded and not found.damaged else "")
        looked += f", {counted(found.shards, 'shard')} compared with their sha256" if found.shards else ""
        state = f"{len(found.damaged)} damaged" if found.damaged else "all whole"
        _say(console, f"{found.path}: {state} ({looked})")
    return any(found.damaged for found in results)


def measure(
    path: str,
    image_size: int,
    randaugment: int,
    policy: str,
    threads: int,
    seconds: float,
    on_progress: Callable[[str], None],
) -> Throughput:
    """Measure how fast data loads.

    Raises:
        ConfigError: a number or a policy that cannot be.
        DataError: the data cannot be opened.
    """
    if not 1 <= image_size <= LARGEST_SIDE or not 0 <= randaugment <= 14 or threads < 1 or seconds <= 0:
        raise ConfigError(
            f"--image-size must be from 1 to {LARGEST_SIDE}, --threads and --seconds above 0, and --randaugment from 0 "
            "to 14 operations"
        )
    augment = build(AugmentConfig, {"randaugment_ops": randaugment, "policy": policy}, "augment")
    config = DataConfig(root=path, image_size=image_size, augment=augment)
    source = open_container(path)
    tried = (*(count for count in (1, 2, 4, 8, 16, 32, 64) if count < threads), threads)
    try:
        return measure_source(source, config, tried, seconds, on_progress)
    finally:
        source.close()


def show_throughput(found: Throughput, as_json: bool, console: Console) -> None:
    """Print what was measured."""
    if as_json:
        print(json.dumps(asdict(found)))
        return
    _say(
        console,
        f"{found.name}: {counted(found.images, 'image')} of {size_text(found.image_bytes)} and "
        f"{found.megapixels:.3g} megapixels "
        f"on average, to {found.image_size} x {found.image_size}",
    )
    total = sum(part.seconds for part in found.parts)
    table = open_table(box=None, pad_edge=False)
    for name in ("part", "ms per image", "share"):
        table.add_column(name, justify="left" if name == "part" else "right", overflow="fold")
    for part in found.parts:
        table.add_row(part.name, f"{1000 * part.seconds:.3f}", f"{part.seconds / total:.1%}")
        if part.name == "read":
            table.add_row("  of it checksum", f"{1000 * found.checksum:.3f}", f"{found.checksum / total:.1%}")
    table.add_row("all", f"{1000 * total:.3f}", "")
    console.print(table)
    bare = (
        f", {found.rate / found.bare_rate:.2f} of the bare decoder's {found.bare_rate:,.0f}" if found.bare_rate else ""
    )
    megabytes = found.rate * found.image_bytes / 1e6
    _say(console, f"one core: {found.rate:,.0f} images/s ({megabytes:,.0f} MB/s){bare}")
    one = found.threads[0][1]
    for count, rate in found.threads:
        _say(console, f"{counted(count, 'thread')}: {rate:,.0f} images/s by the clock, {rate / one:.2f} times one")
    for line in found.advice:
        _say(console, line)


def _classes(names: Sequence[str]) -> str:
    return counted(len(names), "class", "classes")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
