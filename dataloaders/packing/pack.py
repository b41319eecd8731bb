"""Packing: samples become plain WebDataset shards and an index; what a killed packing finished is not done again.

    .train.partial/          all work happens here, next to the destination
      shard-000000.tar       by one process each; the same bytes on every run; written in .run-*/, then renamed
      shard-000000.rows      written when its shard is on the disk: what the index will say of it, and a digest of
                             all that decided it
      .scratch/              the table of what is to be packed (`dataloaders.packing.catalog`)
      index.safetensors
      index.json             last
    train/                   the folder above, renamed: it appears whole
      rejects.tsv            what was left out, and why, where anything was

Which sample goes into which shard is planned before any work, from names and sizes alone, so the result does not
depend on the number of processes. Every image is decoded once, strictly; by default one that does not decode
fails the packing with a list of all such, so that damage is found by the one who packs and not by a training run.

The same command continues a stopped packing (Ctrl-C, kill -9, a full disk, damaged images): a shard
is taken over if the samples planned for it are those it was made of, by name, size, time of change, label and options,
and if it has its sha256. So the outcome is that of an uninterrupted packing, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import multiprocessing
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from dataloaders.helpers import begin_helper, helper_context, lean_start
from dataloaders.packing.finding import FoundOrigin, Wanted, find_origin
from dataloaders.packing.intake import Intake, Taken, encode_boxes, encode_soft, take_in, tiles_of
from dataloaders.packing.origins import Origin, Raw
from dataloaders.packing.shard_file import BLOCK, ShardFile
from dataloaders.pixels.decode import UndecodableError, suffix_for
from dataloaders.pixels.depth import MAX_PIXELS, RGB, PixelFormat
from dataloaders.source import DamagedSampleError
from dataloaders.sources.files import LARGEST_SAMPLE
from dataloaders.sources.index import (
    ARRAYS_NAME,
    COLUMNS,
    INDEX_NAME,
    PART_COLUMNS,
    PARTS,
    Index,
    ShardFacts,
    durable_write,
    key_matrix_of,
    write_index,
)
from dataloaders.sources.tiles import LARGEST_SIDE, TABLE_SUFFIX, encode_table
from dataloaders.storage.whole_folder import check_destination, commit_folder, work_folder, work_name
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.words import counted

REJECTS_NAME = "rejects.tsv"
_SCRATCH, _RUN = ".scratch", ".run-"

# Rejected images named in the message of a failed packing.
_NAMED_REJECTS = 20

# Sides of tiles are multiples of what a JPEG with halved colours is made of, so that no tile splits such a block.
_TILE_STEP = 16

# Version of what a shard's bytes are made of: raised when the same plan gives other bytes.
_ROWS_FORMAT = 2

_ROW_NAMES = [*list(COLUMNS)[1:], *PART_COLUMNS]
_PART_NAMES = ("offset", "size", "crc32")


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes:
        samples_per_shard: at most so many samples go into one shard.
        mib_per_shard: at most so many MiB of images go into one shard (one image always fits); as the source has
            them, before any shrinking.
        workers: processes; 0 packs in this one. Does not change the result.
        strict: decode every image; else only headers are read.
        skip_bad: leave damaged images out and list them, instead of failing; of shards of others also what is no
            whole sample.
        allow_empty_classes: class folders may hold no image that is read; they become no class.
        force: replace a packed split at the destination.
        shuffle_seed: mix the samples by this seed before packing; None keeps them sorted by path.
        split: sub-folder of the source to take.
        classes_file: class map to use, in place of the sorted names of the class folders.
        classes_from: packed split whose class map to use.
        max_side: see `dataloaders.packing.intake.Intake`.
        quality: likewise.
        masks: name of the folder of masks that is next to `images` in the source.
        void: mask value that stands for "does not count"; becomes 255.
        coco: COCO annotations with the boxes of the images: a file, or the name of one within the source.
        tiles: side in pixels of the tiles that images are cut into; 0 keeps them whole.
        labels: whether images lie in class folders; without, all at any depth are of one class.
        slides: level that is read of whole-slide images; None packs other images.
        form: what pixels of the images are, and how many an image may have.

    Raises:
        ConfigError: a number is out of range, or options exclude each other.
    """

    samples_per_shard: int = 2000
    mib_per_shard: int = 512
    workers: int = 0
    strict: bool = True
    skip_bad: bool = False
    allow_empty_classes: bool = False
    force: bool = False
    shuffle_seed: int | None = None
    split: str | None = None
    classes_file: Path | None = None
    classes_from: Path | None = None
    max_side: int = 0
    quality: int | None = None
    masks: str | None = None
    void: int | None = None
    coco: str | None = None
    tiles: int = 0
    labels: bool = True
    slides: int | None = None
    form: PixelFormat = RGB

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.mib_per_shard < 1 or self.workers < 0:
            raise ConfigError("samples and MiB per shard must be at least 1, and workers at least 0")
        if self.classes_file and self.classes_from:
            raise ConfigError("give a class map by classes_file or by classes_from, not both")
        if self.max_side < 0 or not (self.quality is None or 1 <= self.quality <= 100):
            raise ConfigError("--max-side must be at least 0 and --quality from 1 to 100")
        if self.masks and self.coco:
            raise ConfigError("give masks by --masks or boxes by --coco, not both")
        if self.void is not None and not (self.masks and 0 <= self.void <= 255):
            raise ConfigError("--void is a value from 0 to 255 of the masks that --masks names")
        if self.tiles and (self.tiles % _TILE_STEP or not _TILE_STEP <= self.tiles <= LARGEST_SIDE):
            raise ConfigError(f"--tiles is a multiple of {_TILE_STEP} up to {LARGEST_SIDE} (0 keeps images whole)")
        if not self.labels and (self.masks or self.coco or self.classes_file or self.classes_from):
            raise ConfigError("--no-labels packs images alone: leave out --masks, --coco and --classes")
        if self.slides is not None and not self.tiles:
            raise ConfigError("--slides reads images that are too large to be kept whole: give --tiles, such as 1024")
        if self.slides is not None and (self.masks or self.coco):
            raise ConfigError("--slides does not go with --masks or --coco")
        if self.tiles and self.max_side:
            raise ConfigError("--tiles keeps images in their size, and --max-side shrinks them: give one of the two")

    def wanted(self) -> Wanted:
        """Return what is taken of the source."""
        return Wanted(
            self.split,
            self.masks,
            self.coco,
            self.classes_file,
            self.classes_from,
            self.shuffle_seed,
            self.skip_bad,
            self.allow_empty_classes,
            int(self.form.room * LARGEST_SAMPLE),
            self.labels,
            self.slides,
        )

    def intake(self, classes: int) -> Intake:
        """Return how samples are taken in."""
        return Intake(self.strict, self.max_side, self.quality, classes, self.void, self.form, self.tiles)


@dataclass(frozen=True)
class PackResult:
    """What was packed: the index, the rejected images (path, reason), and what there is to say."""

    index: Index
    rejected: list[tuple[str, str]]
    notes: list[str]


@dataclass(frozen=True)
class _Plan:
    """One shard to be written: samples first to end - 1 of the origin.

    It is written in `aside`, a folder of this packing alone, and renamed to `path`: the helpers of a packing that was
    killed live on for a second, and find their own folder gone when another packing has begun.
    """

    path: Path
    aside: Path
    first: int
    end: int


@dataclass(frozen=True)
class _Packed:
    """A shard on the disk; its rows are in a file next to it.

    Attributes:
        facts: of the shard.
        rejected: (path, reason) of what was left out.
        rewritten: images whose bytes are not those of the source.
        top_class: largest class of the masks, -1 without.
        kept: it was there already.
    """

    facts: ShardFacts
    rejected: list[tuple[str, str]] = field(default_factory=list)
    rewritten: int = 0
    top_class: int = -1
    kept: bool = False


def pack_image_folder(
    source: Path | str,
    destination: Path,
    options: PackOptions | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PackResult:
    """Pack a source: class folders, images with masks or boxes (directory, tar or compressed tar), or a container.

    Args:
        source: what to pack; anything that `dataloaders.opening.open_source` opens is repacked.
        destination: folder that will hold the shards; must not exist, or be empty, unless `options.force`.
        options: how.
        on_start: called with the number of images, once.
        on_progress: called with the number of images done since the last call.

    Raises:
        ConfigError: options that cannot be.
        DataError: nothing to pack, damaged images, or a destination in use. Finished shards, if there are any, are
            kept for the next try in `work_name(destination)`, and the message says so.
    """
    options = options or PackOptions()
    destination = Path(os.path.abspath(destination))  # noqa: PTH100  (keep links as they are)
    check_destination(destination, options.force, _is_ours)
    with work_folder(destination, keep=_is_work) as work, explained(destination):
        scratch = work / _SCRATCH
        scratch.mkdir()
        found = find_origin(source, options.wanted(), scratch)
        try:
            return _pack(found, work, destination, options, on_start, on_progress)
        finally:
            found.origin.close()


def pack_origin(
    origin: Origin,
    destination: Path,
    options: PackOptions,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PackResult:
    """Pack samples that are there already, as `pack_image_folder`."""
    destination = Path(os.path.abspath(destination))  # noqa: PTH100
    check_destination(destination, options.force, _is_ours)
    with work_folder(destination, keep=_is_work) as work, explained(destination):
        return _pack(FoundOrigin(origin, []), work, destination, options, on_start, on_progress)


def unfinished(destination: Path) -> str:
    """Return what a stopped packing left and how to continue it; "" if it left nothing."""
    work = work_name(Path(os.path.abspath(destination)))  # noqa: PTH100
    done = len(list(work.glob("shard-*.rows"))) if work.is_dir() else 0
    if not done:
        return ""
    kept = counted(done, "finished shard is", "finished shards are")
    return f"{kept} kept in {work}: the same command resumes from there, or remove the folder"


def _pack(
    found: FoundOrigin,
    work: Path,
    destination: Path,
    options: PackOptions,
    on_start: Callable[[int], None],
    on_progress: Callable[[int], None],
) -> PackResult:
    origin = found.origin
    before = len(list(work.glob("shard-*.rows")))
    plans = _plan(origin, work, options)
    on_start(origin.num_samples)
    shards = _write_shards(origin, plans, options, on_progress)
    rejected = [reject for shard in shards for reject in shard.rejected]
    check_rejects(rejected, options, origin.num_samples)
    rejected = [*found.left_out, *rejected]
    shutil.rmtree(work / _SCRATCH, ignore_errors=True)
    shutil.rmtree(plans[0].aside)
    index = _write_index(work, origin, plans, shards, rejected, options)
    _tidy(work, {plan.path.name for plan in plans})
    commit_folder(work, destination)
    return PackResult(index, rejected, [*found.notes, *_notes(index, shards, before)])


@contextmanager
def explained(destination: Path) -> Iterator[None]:
    """Turn what a packing fails of into one sentence, which also says what is kept."""
    try:
        yield
    # A full disk, above all, also beneath the catalog; or a compressed source that is damaged.
    except (OSError, EOFError, sqlite3.Error, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"packing into {destination} failed, {_kept(destination)}: {error}") from None
    except BrokenProcessPool:
        raise DataError(
            f"packing into {destination} failed, {_kept(destination)}: a process died, perhaps because memory ran out; "
            "use fewer --workers"
        ) from None


def _kept(destination: Path) -> str:
    return unfinished(destination).split(":")[0] or "nothing was kept"


def _is_ours(name: str) -> bool:
    return name in (INDEX_NAME, ARRAYS_NAME, REJECTS_NAME) or re.fullmatch(r"shard-\d{6,}\.tar", name) is not None


def _is_work(work: Path, name: str) -> bool:
    """Return whether a file of a stopped packing is of use to the next one: shards whose rows were written too."""
    stem, _, suffix = name.partition(".")
    return (
        suffix in ("tar", "rows")
        and re.fullmatch(r"shard-\d{6,}", stem) is not None
        and all((work / f"{stem}.{other}").is_file() for other in ("tar", "rows"))
    )


def _plan(origin: Origin, work: Path, options: PackOptions) -> list[_Plan]:
    """Deal the samples out to shards by number and size."""
    limit = options.mib_per_shard << 20
    aside = Path(tempfile.mkdtemp(dir=work, prefix=_RUN))
    plans: list[_Plan] = []
    first, filled, end = 0, 0, 0
    for end, weight in enumerate(origin.weights()):
        if end > first and (end - first >= options.samples_per_shard or filled + weight > limit):
            plans.append(_Plan(work / f"shard-{len(plans):06d}.tar", aside, first, end))
            first, filled = end, 0
        filled += weight
    plans.append(_Plan(work / f"shard-{len(plans):06d}.tar", aside, first, end + 1))
    return plans


def _write_shards(
    origin: Origin, plans: list[_Plan], options: PackOptions, on_progress: Callable[[int], None]
) -> list[_Packed]:
    how = options.intake(len(origin.classes))
    if not options.workers:
        return [_write_shard(origin, plan, how, on_progress) for plan in plans]
    packed: dict[int, _Packed] = {}
    others = set(multiprocessing.active_children())
    with lean_start():
        pool = ProcessPoolExecutor(
            min(options.workers, len(plans)),
            mp_context=helper_context(),
            initializer=_begin,
            initargs=(os.getpid(), origin),
        )
        futures: dict[Future[_Packed], int] = {
            pool.submit(_write_shard_here, plan, how): number for number, plan in enumerate(plans)
        }
    helpers = set(multiprocessing.active_children()) - others
    try:
        for future in as_completed(futures):
            number = futures[future]
            packed[number] = future.result()
            on_progress(plans[number].end - plans[number].first)
    except BaseException:  # Ctrl-C too: nobody waits for shards that are not finished
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [packed[number] for number in range(len(plans))]


# What a helper process packs from: sent once, as an origin may hold an order of a million samples.
_origins: list[Origin] = []


def _begin(starter: int, origin: Origin) -> None:
    begin_helper(starter)
    _origins.append(origin)


def _write_shard_here(plan: _Plan, how: Intake) -> _Packed:
    return _write_shard(_origins[0], plan, how)


def _write_shard(
    origin: Origin, plan: _Plan, how: Intake, on_progress: Callable[[int], None] = lambda done: None
) -> _Packed:
    """Write one shard and its rows, fsync'ed, or find them finished; in any process."""
    identity = f"{_ROWS_FORMAT} {how} {origin.identity(plan.first, plan.end)}"
    if (kept := _finished(plan.path, identity)) is not None:
        on_progress(plan.end - plan.first)
        return kept
    rows_of(plan.path).unlink(missing_ok=True)
    rows = _Rows()
    aside = plan.aside / plan.path.name
    with aside.open("w+b") as raw:
        shard = ShardFile(raw)
        for sample in origin.samples(plan.first, plan.end):
            on_progress(1)
            if isinstance(sample, Raw):
                rows.add(shard, sample, how)
            else:
                rows.rejected.append((sample[0], str(sample[1])))
        shard.write(b"\0" * 2 * BLOCK)  # a tar ends with two empty blocks
        raw.flush()
        os.fsync(raw.fileno())
    facts = ShardFacts(plan.path.name, shard.size, shard.sha256.hexdigest(), len(rows.keys))
    packed = _Packed(facts, rows.rejected, rows.rewritten, rows.top_class)
    rows.write(rows_of(aside), packed, identity)
    aside.replace(plan.path)
    rows_of(aside).replace(rows_of(plan.path))
    return packed


def rows_of(shard: Path) -> Path:
    """Return the file that holds a finished shard's rows."""
    return shard.with_suffix(".rows")


def _finished(shard: Path, identity: str) -> _Packed | None:
    """Return a shard that an earlier packing finished, if it is what this one wants and whole."""
    try:
        with safetensors.safe_open(rows_of(shard), "numpy") as file:
            said = file.metadata() or {}
        if said.get("identity") != identity:
            return None
        facts = ShardFacts(**json.loads(said["facts"]))
        with shard.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                return None
        rejected = [(name, reason) for name, reason in json.loads(said["rejected"])]
        return _Packed(facts, rejected, int(said["rewritten"]), int(said["top_class"]), kept=True)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None  # nothing there, or not whole: the shard is written again


class _Rows:
    """What the index will say of a shard being written."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.rejected: list[tuple[str, str]] = []
        self.rewritten = 0
        self.top_class = -1
        self._rows: list[tuple[int, ...]] = []

    def add(self, shard: ShardFile, sample: Raw, how: Intake) -> None:
        """Append a sample to the shard, or reject it."""
        key, before = key_of(sample.number, sample.name), shard.mark()
        try:
            taken = take_in(sample.stored, how)
            row = _add_sample(shard, key, sample, taken, how)
        except (UndecodableError, DamagedSampleError) as error:
            shard.back_to(before)  # tiles that were written before one could not be
            self.rejected.append((sample.name, str(error)))
            return
        self._rows.append(row)
        self.keys.append(key)
        self.rewritten += taken.rewritten
        self.top_class = max(self.top_class, taken.top_class)

    def write(self, path: Path, packed: _Packed, identity: str) -> None:
        """Write the rows, durably; once they are next to the shard it is finished."""
        said = {
            "identity": identity,
            "facts": json.dumps(vars(packed.facts)),
            "rejected": json.dumps(packed.rejected),
            "rewritten": str(packed.rewritten),
            "top_class": str(packed.top_class),
        }
        table = np.array(self._rows, np.int64).reshape(len(self._rows), len(_ROW_NAMES))
        keys = key_matrix_of(self.keys) if self.keys else np.empty((0, 0), np.uint8)
        durable_write(path, safetensors.numpy.save({"rows": table, "key": keys}, said))


def _add_sample(shard: ShardFile, key: str, sample: Raw, taken: Taken, how: Intake) -> tuple[int, ...]:
    """Append a sample's members; return its row, values in the order of `_ROW_NAMES`."""
    image = taken.image
    if taken.grid is None:
        offset = shard.add_member(f"{key}.{suffix_for(image, PurePosixPath(sample.name).suffix)}", image)
    else:
        tiles = [
            (shard.add_member(f"{key}.{name}", data), len(data), zlib.crc32(data))
            for name, data in tiles_of(sample.stored, taken.grid, how)
        ]
        image = encode_table(taken.grid, tiles)
        offset = shard.add_member(f"{key}.{TABLE_SUFFIX}", image)
    shard.add_member(f"{key}.cls", b"%d" % sample.label)
    row = [offset, len(image), sample.label, taken.width, taken.height, zlib.crc32(image)]
    boxes = None if taken.boxes is None else encode_boxes(taken.boxes)
    soft = None if taken.soft is None else encode_soft(taken.soft)
    for name, data in (("mask.png", taken.mask), ("boxes.json", boxes), ("soft.json", soft)):
        if data is None:
            row += [0, 0, 0]
        else:
            row += [shard.add_member(f"{key}.{name}", data), len(data), zlib.crc32(data)]
    return tuple(row)


def key_of(number: int, name: str) -> str:
    """Return a sample's key: unique by its number, short and without dots (WebDataset cuts names at the first).

    The number that an earlier packing put before a key is left out, so that repacking keeps keys.
    """
    stem = re.sub(r"^\d{9}-", "", PurePosixPath(name).stem)
    return f"{number:09d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:40]}"


def check_rejects(rejected: list[tuple[str, str]], options: PackOptions, total: int) -> None:
    """Refuse a packing that leaves images out, unless that was asked for.

    Raises:
        DataError: naming them, or none is left.
    """
    if rejected and not options.skip_bad:
        named = [f"{name}: {reason}".replace("\n", "\\n") for name, reason in rejected[:_NAMED_REJECTS]]
        lines = "".join(f"\n  {line}" for line in named)
        more = f"\n  and {len(rejected) - _NAMED_REJECTS} more" if len(rejected) > _NAMED_REJECTS else ""
        raise DataError(
            f"{len(rejected)} of {total} images cannot be packed: restore them, or leave them out with --skip-bad "
            f"(finished shards are kept for the next run)"
            f"{lines}{more}"
        )
    if len(rejected) == total:
        raise DataError(f"none of the {total} images can be decoded; the first is {rejected[0][0]}: {rejected[0][1]}")


def _write_index(
    work: Path,
    origin: Origin,
    plans: list[_Plan],
    packed: list[_Packed],
    rejected: list[tuple[str, str]],
    options: PackOptions,
) -> Index:
    counts = [shard.facts.samples for shard in packed]
    columns, keys = _gathered([rows_of(plan.path) for plan in plans], counts, origin.parts)
    top = max(shard.top_class for shard in packed)
    classes = origin.classes or tuple(f"class {number}" for number in range(top + 1))
    said: dict[str, object] = {
        "samples_per_shard": options.samples_per_shard,
        "mib_per_shard": options.mib_per_shard,
        "strict": options.strict,
        "shuffle_seed": options.shuffle_seed,
        "split": options.split,
        "max_side": options.max_side,
        "quality": options.quality,
        "rejected": [list(reject) for reject in rejected],
    }
    if options.tiles:
        said["tiles"] = options.tiles
    if not options.form.is_rgb:
        said["pixels"], said["bands"] = options.form.numbers, options.form.bands
    if options.form.max_pixels != MAX_PIXELS:
        said["max_pixels"] = options.form.max_pixels  # `verify` allows what packing did
    if rejected:
        lines = ["name\treason", *("\t".join(map(_one_field, reject)) for reject in rejected)]
        durable_write(work / REJECTS_NAME, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))
    return write_index(work, classes, tuple(shard.facts for shard in packed), columns, keys, said)


def _gathered(
    files: list[Path], counts: list[int], parts: frozenset[str]
) -> tuple[dict[str, npt.NDArray[np.generic]], npt.NDArray[np.uint8]]:
    """Return the columns and keys of all shards, in arrays set aside once: some 100 bytes per sample."""
    wanted = [*list(COLUMNS)[1:], *(f"{part}_{name}" for part in PARTS if part in parts for name in _PART_NAMES)]
    total, widest = sum(counts), max(map(_key_width, files))
    columns = {name: np.empty(total, {**COLUMNS, **PART_COLUMNS}[name]) for name in wanted}
    columns["shard"] = np.repeat(np.arange(len(counts), dtype=COLUMNS["shard"]), counts)
    keys = np.zeros((total, widest), np.uint8)
    start = 0
    for path, count in zip(files, counts, strict=True):
        arrays = safetensors.numpy.load_file(path)
        for at, name in enumerate(_ROW_NAMES):
            if name in wanted:
                columns[name][start : start + count] = arrays["rows"][:, at]
        keys[start : start + count, : arrays["key"].shape[1]] = arrays["key"]
        start += count
    return columns, keys


def _key_width(path: Path) -> int:
    with safetensors.safe_open(path, "numpy") as file:
        return int(file.get_slice("key").get_shape()[1])


def _one_field(text: str) -> str:
    return re.sub(r"[\t\r\n]+", " ", text)


def _tidy(work: Path, wanted: set[str]) -> None:
    """Remove what the finished folder does not hold: rows, and shards of another plan."""
    for entry in work.iterdir():
        if entry.suffix == ".rows" or (entry.suffix == ".tar" and entry.name not in wanted):
            entry.unlink()


def _notes(index: Index, shards: list[_Packed], before: int) -> list[str]:
    notes = []
    kept = sum(shard.kept for shard in shards)
    if kept:
        notes.append(f"{kept} of {len(shards)} shards were finished by an earlier packing and taken over")
    elif before:
        notes.append("an unfinished packing of another source or other options was there: all was repacked")
    if rewritten := sum(shard.rewritten for shard in shards):
        images = counted(rewritten, "image was", "images were")
        notes.append(f"{images} rewritten (shrunk, or CMYK or 16 bits a channel before)")
    return notes + ([] if index.parts else _empty_classes(index))


def _empty_classes(index: Index) -> list[str]:
    counts = np.bincount(index.columns["label"], minlength=len(index.classes))
    empty = [name for name, count in zip(index.classes, counts.tolist(), strict=True) if not count]
    have = "class of the class map has" if len(empty) == 1 else "classes of the class map have"
    return [f"{len(empty):,} {have} no images, the first {empty[0]!r}"] if empty else []
