"""From one container to another: shards to .beton and back, and anything that can be packed straight to .beton.

Order, labels and class names stay; JPEG bytes go through untouched. A .beton file in raw mode holds pixels, and comes
back as PNG, without loss. A .beton file is written by one process in one go (threads decode), so unlike shards it is
started again after an interruption.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dataloaders.beton.reader import BetonSample, write_beton
from dataloaders.packing.finding import find_origin, open_container
from dataloaders.packing.intake import Intake, shrunk_pixels, take_in
from dataloaders.packing.origins import Origin, Raw, SourceOrigin
from dataloaders.packing.pack import PackOptions, PackResult, check_rejects, explained, pack_origin
from dataloaders.packing.rows import key_of
from dataloaders.pixels.decode import UndecodableError, decode
from dataloaders.storage.whole_folder import work_folder
from setformer_dist.core.errors import ConfigError, DataError

# Samples on their way per thread: enough to keep all busy while one is slow.
_AHEAD = 4


@dataclass(frozen=True)
class BetonResult:
    """What was written: samples and class names, the rejected images (path, reason), and what there is to say."""

    samples: int
    classes: tuple[str, ...]
    rejected: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: Path | str,
    destination: Path,
    raw: int | None = None,
    workers: int = 0,
    force: bool = False,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PackResult | BetonResult:
    """Write a container's samples as a .beton file or as shards, as the destination's name says.

    Args:
        source: packed split, pattern of external shards, or .beton file.
        destination: a file that ends in .beton, or a folder for shards.
        raw: store pixels, images shrunk to this longer side (0: as they are); .beton only.
        workers: processes (shards) or threads (.beton); 0 is none besides this one.
        force: replace what is at the destination.
        on_start: called with the number of samples, once.
        on_progress: called with the number of samples done since the last call.

    Raises:
        ConfigError: `raw` for shards, or masks and boxes for .beton.
        DataError: the source cannot be read or is damaged, or the destination is in use.
    """
    options = PackOptions(workers=workers, force=force)
    container = open_container(source)
    origin = SourceOrigin(container, None, container.classes)
    try:
        if destination.suffix == ".beton":
            with explained(destination):
                return _write_beton(origin, destination, options, raw, on_start, on_progress)
        if raw is not None:
            raise ConfigError("--raw stores pixels, which only a .beton file can hold: name a destination *.beton")
        return pack_origin(origin, destination, options, on_start, on_progress)
    finally:
        container.close()


def pack_beton(
    source: Path | str,
    destination: Path,
    options: PackOptions,
    raw: int | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> BetonResult:
    """Pack a source, as `dataloaders.packing.pack.pack_image_folder` does, straight into a .beton file.

    Raises:
        ConfigError: options that cannot be, or samples with masks or boxes.
        DataError: nothing to pack, damaged images, or a destination in use. Nothing is left behind.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100  (keep links as they are)
    _check_destination(destination, options.force)
    with work_folder(destination.with_name(destination.name + ".scratch")) as scratch, explained(destination):
        found = find_origin(source, options.wanted(), scratch)
        try:
            result = _write_beton(found.origin, destination, options, raw, on_start, on_progress)
        finally:
            found.origin.close()
    return BetonResult(result.samples, result.classes, [*found.left_out, *result.rejected], found.notes)


def _check_destination(destination: Path, force: bool) -> None:
    if destination.suffix != ".beton":
        raise ConfigError(f"destination {destination} must end in .beton: training detects containers by their names")
    if destination.is_dir():
        raise DataError(f"destination {destination} is a folder: name another file")
    if destination.exists() and not force:
        raise DataError(f"destination {destination} exists: name another file, or replace it with --force")


def _write_beton(
    origin: Origin,
    destination: Path,
    options: PackOptions,
    raw: int | None,
    on_start: Callable[[int], None],
    on_progress: Callable[[int], None],
) -> BetonResult:
    _check_destination(destination, options.force)
    if origin.parts:
        raise ConfigError(f"a .beton file holds no {' or '.join(sorted(origin.parts))}: pack into a folder of shards")
    rejected: list[tuple[str, str]] = []
    on_start(origin.num_samples)

    def samples() -> Iterator[BetonSample]:
        for sample, outcome in _in_order(origin, options.intake(len(origin.classes)), raw, options.workers):
            on_progress(1)
            if isinstance(outcome, BetonSample):
                yield outcome
            else:
                rejected.append((sample, str(outcome)))
        check_rejects(rejected, options, origin.num_samples)

    destination.parent.mkdir(parents=True, exist_ok=True)
    mode: Literal["jpg", "raw"] = "jpg" if raw is None else "raw"
    count = write_beton(destination, samples(), origin.num_samples, classes=origin.classes, mode=mode)
    return BetonResult(count, origin.classes, rejected)


def _in_order(
    origin: Origin, how: Intake, raw: int | None, threads: int
) -> Iterator[tuple[str, BetonSample | UndecodableError]]:
    """Yield each sample's name and what became of it, made by threads, in the order of the samples."""
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        ahead: deque[tuple[str, Future[BetonSample | UndecodableError]]] = deque()
        for sample in origin.samples(0, origin.num_samples):
            if isinstance(sample, Raw):
                ahead.append((sample.name, pool.submit(_made, sample, how, raw)))
            else:
                done: Future[BetonSample | UndecodableError] = Future()
                done.set_result(sample[1])
                ahead.append((sample[0], done))
            if len(ahead) > _AHEAD * max(threads, 1):
                name, future = ahead.popleft()
                yield name, future.result()
        for name, future in ahead:
            yield name, future.result()


def _made(sample: Raw, how: Intake, raw: int | None) -> BetonSample | UndecodableError:
    key = key_of(sample.number, sample.name)
    try:
        if raw is not None:
            pixels = shrunk_pixels(sample.stored.image, raw)
            return BetonSample(pixels, sample.label, pixels.shape[0], pixels.shape[1], key)
        image = sample.stored.image
        if not isinstance(image, bytes):  # pixels stay pixels
            pixels = decode(image)
            return BetonSample(pixels, sample.label, pixels.shape[0], pixels.shape[1], key)
        taken = take_in(sample.stored, how)
        return BetonSample(taken.image, sample.label, taken.height, taken.width, key)
    except UndecodableError as error:
        return error
