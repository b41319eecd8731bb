"""Packing: an ImageFolder becomes plain WebDataset shards and an index, or nothing at all.

    .train.partial/          all work happens here, beside the destination
      shard-000000.tar       by one process each; original image bytes; the same bytes on every run
      index.safetensors
      index.json             last
    train/                   the folder above, renamed: it appears whole

Which sample goes into which shard is planned before any work, from names and sizes alone, so the result does not
depend on the number of processes. Every image is decoded once, strictly; by default one that does not decode
fails the packing with a list of all such, so that damage is found by the one who packs and not by a training run.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dataloaders.decode import UndecodableError, decode, image_size, suffix_for
from dataloaders.folders import check_destination, commit_folder, work_folder
from dataloaders.index import ARRAYS_NAME, COLUMNS, INDEX_NAME, Index, ShardFacts, read_table, write_index
from dataloaders.processes import begin_helper, helper_context, lean_start
from dataloaders.sources import LabelledImage, find_images, read_class_map
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.seeding import Purpose, generator

_BLOCK = tarfile.BLOCKSIZE

# Rejected images named in the message of a failed packing.
_NAMED_REJECTS = 20


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes:
        samples_per_shard: at most so many samples go into one shard.
        mib_per_shard: at most so many MiB of images go into one shard (one image always fits).
        workers: processes; 0 packs in this one. Does not change the result.
        strict: decode every image; else only headers are read.
        skip_bad: leave damaged images out and list them in the index, instead of failing.
        force: replace a packed split at the destination.
        shuffle_seed: mix the samples by this seed before packing; None keeps them sorted by path.
        split: sub-folder of the source to take.
        classes_file: class map to use, in place of the sorted names of the class folders.
        classes_from: packed split whose class map to use.

    Raises:
        ConfigError: a number is out of range, or both class maps are given.
    """

    samples_per_shard: int = 2000
    mib_per_shard: int = 512
    workers: int = 0
    strict: bool = True
    skip_bad: bool = False
    force: bool = False
    shuffle_seed: int | None = None
    split: str | None = None
    classes_file: Path | None = None
    classes_from: Path | None = None

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.mib_per_shard < 1 or self.workers < 0:
            raise ConfigError("samples and MiB per shard must be at least 1, and workers at least 0")
        if self.classes_file and self.classes_from:
            raise ConfigError("give a class map by --classes or by --classes-from, not both")


@dataclass(frozen=True)
class PackResult:
    """What was packed: the index, the rejected images (path, reason), and what there is to say."""

    index: Index
    rejected: list[tuple[str, str]]
    notes: list[str]


@dataclass(frozen=True)
class _Plan:
    """One shard to be written. `images` are (image, label, number in the split)."""

    path: Path
    images: list[tuple[LabelledImage, int, int]]
    strict: bool


@dataclass(frozen=True)
class _Packed:
    """A written shard: rows are values in the order of `COLUMNS` without `shard`."""

    facts: ShardFacts
    rows: list[tuple[int, ...]]
    keys: list[str]
    rejected: list[tuple[str, str]]


def pack_image_folder(
    source: Path,
    destination: Path,
    options: PackOptions | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PackResult:
    """Pack an ImageFolder.

    Args:
        source: directory, tar, or compressed tar of class folders.
        destination: folder that will hold the shards; must not exist, or be empty, unless `options.force`.
        options: how.
        on_start: told the number of images, once.
        on_progress: told the number of images done since the last call.

    Raises:
        ConfigError: options that cannot be.
        DataError: nothing to pack, damaged images, or a destination in use. Nothing is left behind.
    """
    options = options or PackOptions()
    source, destination = Path(source), Path(os.path.abspath(destination))  # noqa: PTH100  (keep links as they are)
    check_destination(destination, options.force, _is_ours)
    with work_folder(destination) as work, _explained(destination):
        scratch = work / ".scratch"
        scratch.mkdir()
        found = find_images(source, options.split, scratch)
        classes = _class_map(found.images, options)
        plans = _plan(found.images, classes, work, options)
        on_start(len(found.images))
        shards = _write_shards(plans, options.workers, on_progress)
        rejected = [reject for shard in shards for reject in shard.rejected]
        _check_rejects(rejected, options, len(found.images))
        shutil.rmtree(scratch)
        index = _write_index(work, classes, shards, rejected, options)
        commit_folder(work, destination, INDEX_NAME)
    return PackResult(index, rejected, found.notes + _empty_classes(index))


@contextmanager
def _explained(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a full disk, above all
        raise DataError(f"packing into {destination} failed, nothing was kept: {error}") from None
    except BrokenProcessPool:
        raise DataError(
            f"packing into {destination} failed, nothing was kept: a process died, perhaps for want of memory; "
            "take fewer --workers"
        ) from None


def _is_ours(name: str) -> bool:
    return name in (INDEX_NAME, ARRAYS_NAME) or re.fullmatch(r"shard-\d{6}\.tar", name) is not None


def _class_map(images: list[LabelledImage], options: PackOptions) -> tuple[str, ...]:
    present = sorted({image.class_name for image in images})
    if options.classes_from is not None:
        classes, origin = tuple(read_table(options.classes_from)["classes"]), options.classes_from
    elif options.classes_file is not None:
        classes, origin = read_class_map(options.classes_file), options.classes_file
    else:
        return tuple(present)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise DataError(
            f"class folder {unknown[0]!r} is not in the class map of {origin}"
            + (f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else "")
        )
    return classes


def _plan(images: list[LabelledImage], classes: tuple[str, ...], work: Path, options: PackOptions) -> list[_Plan]:
    """Deal the images out to shards by number and size."""
    labels = {name: label for label, name in enumerate(classes)}
    order: npt.NDArray[np.int64] = np.arange(len(images))
    if options.shuffle_seed is not None:
        words = generator(Purpose.PACK, options.shuffle_seed).bit_generator.random_raw(len(images))
        order = np.argsort(words, kind="stable")
    limit = options.mib_per_shard << 20
    plans: list[_Plan] = []
    room, bytes_left = 0, 0
    for number, place in enumerate(order.tolist()):
        image = images[place]
        if not room or image.stretch.size > bytes_left:
            plans.append(_Plan(work / f"shard-{len(plans):06d}.tar", [], options.strict))
            room, bytes_left = options.samples_per_shard, limit
        plans[-1].images.append((image, labels[image.class_name], number))
        room, bytes_left = room - 1, bytes_left - image.stretch.size
    return plans


def _write_shards(plans: list[_Plan], workers: int, on_progress: Callable[[int], None]) -> list[_Packed]:
    if not workers:
        return [_write_shard(plan, on_progress) for plan in plans]
    packed: dict[int, _Packed] = {}
    others = set(multiprocessing.active_children())
    with lean_start():
        pool = ProcessPoolExecutor(
            min(workers, len(plans)),
            mp_context=helper_context(),
            initializer=begin_helper,
            initargs=(os.getpid(),),
        )
        futures: dict[Future[_Packed], int] = {pool.submit(_write_shard, p): i for i, p in enumerate(plans)}
    helpers = set(multiprocessing.active_children()) - others
    try:
        for future in as_completed(futures):
            number = futures[future]
            packed[number] = future.result()
            on_progress(len(plans[number].images))
    except BaseException:  # Ctrl-C too: nobody waits for shards that will be thrown away
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [packed[number] for number in range(len(plans))]


def _write_shard(plan: _Plan, on_progress: Callable[[int], None] = lambda done: None) -> _Packed:
    """Write one shard, fsync'ed; in any process."""
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    rejected: list[tuple[str, str]] = []
    with plan.path.open("w+b") as raw:
        shard = _HashedFile(raw)
        for image, label, number in plan.images:
            on_progress(1)
            try:
                data = _read_stretch(image)
                height, width = _check_image(data, plan.strict)
            except UndecodableError as error:
                rejected.append((image.stretch.name, str(error)))
                continue
            key = _key(number, image.stretch.name)
            suffix = suffix_for(data, PurePosixPath(image.stretch.name).suffix)
            offset = shard.add_member(f"{key}.{suffix}", data)
            shard.add_member(f"{key}.cls", b"%d" % label)
            rows.append((offset, len(data), label, width, height, zlib.crc32(data)))
            keys.append(key)
        shard.write(b"\0" * 2 * _BLOCK)  # a tar ends with two empty blocks
        raw.flush()
        os.fsync(raw.fileno())
    facts = ShardFacts(plan.path.name, shard.size, shard.sha256.hexdigest(), len(rows))
    return _Packed(facts, rows, keys, rejected)


class _HashedFile:
    """A file being written: its size and sha256 so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def add_member(self, name: str, data: bytes) -> int:
        """Append a tar member whose header holds nothing of this machine or moment; return its data's offset."""
        info = tarfile.TarInfo(name)  # mtime, uid, gid are 0, owner names empty
        info.size, info.mode = len(data), 0o644
        self.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self.write(data)
        self.write(b"\0" * (-len(data) % _BLOCK))
        return offset


def _read_stretch(image: LabelledImage) -> bytes:
    stretch = image.stretch
    try:
        with Path(stretch.file).open("rb") as file:
            file.seek(stretch.offset)
            data = file.read(stretch.size)
    except OSError as error:
        raise DataError(f"image {stretch.name} cannot be read: {error}") from None
    if len(data) != stretch.size:
        raise DataError(f"image {stretch.name} has {len(data)} bytes, {stretch.size} when it was found: pack again")
    return data


def _check_image(data: bytes, strict: bool) -> tuple[int, int]:
    """Return (height, width)."""
    if strict:
        height, width, _ = decode(data).shape
        return height, width
    return image_size(data)


def _key(number: int, name: str) -> str:
    """Return a sample's key: unique by its number, short and without dots (WebDataset cuts names at the first)."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(name).stem)
    return f"{number:09d}-{stem[:40]}"


def _check_rejects(rejected: list[tuple[str, str]], options: PackOptions, total: int) -> None:
    if rejected and not options.skip_bad:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in rejected[:_NAMED_REJECTS])
        more = f"\n  and {len(rejected) - _NAMED_REJECTS} more" if len(rejected) > _NAMED_REJECTS else ""
        raise DataError(
            f"{len(rejected)} of {total} images do not decode: restore them, or leave them out with --skip-bad"
            f"{lines}{more}"
        )
    if len(rejected) == total:
        raise DataError(f"none of {total} images decodes, the first: {rejected[0][0]}: {rejected[0][1]}")


def _write_index(
    work: Path,
    classes: tuple[str, ...],
    packed: list[_Packed],
    rejected: list[tuple[str, str]],
    options: PackOptions,
) -> Index:
    numbers = [number for number, shard in enumerate(packed) for _ in shard.rows]
    table = np.array([row for shard in packed for row in shard.rows], dtype=np.int64)
    columns: dict[str, npt.NDArray[Any]] = {"shard": np.array(numbers)}
    columns.update({name: table[:, at].astype(COLUMNS[name]) for at, name in enumerate(list(COLUMNS)[1:])})
    said: dict[str, Any] = {
        "samples_per_shard": options.samples_per_shard,
        "mib_per_shard": options.mib_per_shard,
        "strict": options.strict,
        "shuffle_seed": options.shuffle_seed,
        "split": options.split,
        "rejected": [list(reject) for reject in rejected],
    }
    keys = [key for shard in packed for key in shard.keys]
    return write_index(work, classes, tuple(shard.facts for shard in packed), columns, keys, said)


def _empty_classes(index: Index) -> list[str]:
    counts = np.bincount(index.columns["label"], minlength=len(index.classes))
    empty = [name for name, count in zip(index.classes, counts.tolist(), strict=True) if not count]
    return [f"{len(empty)} classes of the class map have no images, the first {empty[0]!r}"] if empty else []
