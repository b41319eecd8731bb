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

import lzma
import multiprocessing
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.helpers import begin_helper, helper_context, lean_start
from dataloaders.packing.finding import FoundOrigin, Wanted, find_origin
from dataloaders.packing.intake import Intake
from dataloaders.packing.mask_table import MaskTable
from dataloaders.packing.origins import Origin, Raw
from dataloaders.packing.rows import PackedShard, ShardRows, finished, gathered, rows_of
from dataloaders.packing.shard_file import BLOCK, ShardFile
from dataloaders.pixels.depth import MAX_PIXELS, RGB, PixelFormat
from dataloaders.sources.files import LARGEST_SAMPLE
from dataloaders.sources.index import (
    ARRAYS_NAME,
    INDEX_NAME,
    Index,
    ShardFacts,
    durable_write,
    write_index,
)
from dataloaders.sources.tiles import LARGEST_SIDE
from dataloaders.storage.whole_folder import check_destination, commit_folder, work_folder, work_name
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.words import counted

REJECTS_NAME = "rejects.tsv"
SCRATCH, _RUN = ".scratch", ".run-"

# Rejected images named in the message of a failed packing.
_NAMED_REJECTS = 20

# Sides of tiles are multiples of what a JPEG with halved colours is made of, so that no tile splits such a block.
_TILE_STEP = 16

# Version of what a shard's bytes are made of: raised when the same plan gives other bytes.
_ROWS_FORMAT = 2


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
        mask_table: what values of masks stand for; it names the classes.
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
    mask_table: MaskTable | None = None
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
        if self.mask_table and (not self.masks or self.void is not None or self.classes_file):
            raise ConfigError(
                "--mask-values names classes and what does not count of the masks that --masks names: give --masks, "
                "and leave out --void and --classes FILE"
            )
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
            self.mask_table,
        )

    def intake(self, classes: int) -> Intake:
        """Return how samples are taken in."""
        return Intake(
            self.strict, self.max_side, self.quality, classes, self.void, self.form, self.tiles, self.mask_table
        )


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
class WrittenShards:
    """The shards of a split, in its work folder.

    Attributes:
        found: what was packed.
        options: how.
        work: the folder.
        plans: of the shards.
        shards: themselves, in the same order.
        before: shards of an earlier packing that were in the folder.
    """

    found: FoundOrigin
    options: PackOptions
    work: Path
    plans: list[_Plan]
    shards: list[PackedShard]
    before: int

    @property
    def rejected(self) -> list[tuple[str, str]]:
        """Return (path, reason) of what cannot be packed."""
        return [reject for shard in self.shards for reject in shard.rejected]

    @property
    def top_class(self) -> int:
        """Return the largest class of the masks, -1 without."""
        return max(shard.top_class for shard in self.shards)


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
    check_destination(destination, options.force, is_ours)
    with work_folder(destination, keep=is_work) as work, explained(destination):
        scratch = work / SCRATCH
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
    check_destination(destination, options.force, is_ours)
    with work_folder(destination, keep=is_work) as work, explained(destination):
        return _pack(FoundOrigin(origin, []), work, destination, options, on_start, on_progress)


def unfinished(*destinations: Path) -> str:
    """Return what a stopped packing left and how to continue it; "" if it left nothing."""
    works = [work_name(Path(os.path.abspath(destination))) for destination in destinations]  # noqa: PTH100
    left = {work: done for work in works if (done := len(list(work.glob("shard-*.rows"))))}
    if not left:
        return ""
    kept = counted(sum(left.values()), "finished shard is", "finished shards are")
    folders = "remove the folder" if len(left) == 1 else "remove the folders"
    return f"{kept} kept in {' and '.join(map(str, left))}: the same command resumes from there, or {folders}"


def _pack(
    found: FoundOrigin,
    work: Path,
    destination: Path,
    options: PackOptions,
    on_start: Callable[[int], None],
    on_progress: Callable[[int], None],
) -> PackResult:
    on_start(found.origin.num_samples)
    written = write_shards(found, work, options, on_progress)
    check_rejects(written.rejected, options, found.origin.num_samples)
    result = finish(written, written.top_class)
    commit_folder(work, destination)
    return result


def write_shards(
    found: FoundOrigin, work: Path, options: PackOptions, on_progress: Callable[[int], None]
) -> WrittenShards:
    """Write the shards of a split into its work folder, or find them finished there."""
    before = len(list(work.glob("shard-*.rows")))
    plans = _plan(found.origin, work, options)
    return WrittenShards(found, options, work, plans, _write_shards(found.origin, plans, options, on_progress), before)


def finish(written: WrittenShards, top_class: int, said: Mapping[str, object] | None = None) -> PackResult:
    """Write the index next to the shards; what remains is to name the folder.

    Args:
        written: the shards.
        top_class: largest class of the masks, -1 without.
        said: what the index says of the packing besides its options.

    Raises:
        DataError: there is no class.
    """
    found, work, plans, shards = written.found, written.work, written.plans, written.shards
    rejected = [*found.left_out, *written.rejected]
    classes = found.origin.classes or tuple(f"class {number}" for number in range(top_class + 1))
    if not classes:
        raise DataError(
            f"no pixel of the masks has a class: all have the value {VOID}, or that of --void. Give other masks, or "
            "name the classes by --classes or --classes-from"
        )
    shutil.rmtree(work / SCRATCH, ignore_errors=True)
    shutil.rmtree(plans[0].aside)
    index = _write_index(written, classes, rejected, said or {})
    _tidy(work, {plan.path.name for plan in plans})
    notes = [*found.notes, *_notes(index, shards, written.before)]
    if not found.origin.classes:
        how_many = counted(top_class + 1, "class", "classes")
        notes.append(
            f"no classes were named: the largest value in the masks is {top_class}, so there are {how_many}; if that "
            "is wrong, name them by --classes"
        )
    return PackResult(index, rejected, notes)


@contextmanager
def explained(destination: Path, *others: Path) -> Iterator[None]:
    """Turn what a packing fails of into one sentence, which also says what is kept."""

    def failed() -> str:
        kept = unfinished(destination, *others).split(":")[0] or "nothing was kept"
        return f"packing into {' and '.join(map(str, (destination, *others)))} failed, {kept}"

    try:
        yield
    # A full disk, above all, also beneath the catalog; or a compressed source that is damaged.
    except (OSError, EOFError, sqlite3.Error, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{failed()}: {error}") from None
    except BrokenProcessPool:
        raise DataError(f"{failed()}: a process died, perhaps because memory ran out; use fewer --workers") from None


def is_ours(name: str) -> bool:
    """Return whether a file of a packed split has this name."""
    return name in (INDEX_NAME, ARRAYS_NAME, REJECTS_NAME) or re.fullmatch(r"shard-\d{6,}\.tar", name) is not None


def is_work(work: Path, name: str) -> bool:
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
) -> list[PackedShard]:
    how = options.intake(len(origin.classes))
    if not options.workers:
        return [_write_shard(origin, plan, how, on_progress) for plan in plans]
    packed: dict[int, PackedShard] = {}
    others = set(multiprocessing.active_children())
    with lean_start():
        pool = ProcessPoolExecutor(
            min(options.workers, len(plans)),
            mp_context=helper_context(),
            initializer=_begin,
            initargs=(os.getpid(), origin),
        )
        futures: dict[Future[PackedShard], int] = {
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


def _write_shard_here(plan: _Plan, how: Intake) -> PackedShard:
    return _write_shard(_origins[0], plan, how)


def _write_shard(
    origin: Origin, plan: _Plan, how: Intake, on_progress: Callable[[int], None] = lambda done: None
) -> PackedShard:
    """Write one shard and its rows, fsync'ed, or find them finished; in any process."""
    identity = f"{_ROWS_FORMAT} {how} {origin.identity(plan.first, plan.end)}"
    if (kept := finished(plan.path, identity)) is not None:
        on_progress(plan.end - plan.first)
        return kept
    rows_of(plan.path).unlink(missing_ok=True)
    rows = ShardRows()
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
    packed = PackedShard(facts, rows.rejected, rows.rewritten, rows.top_class)
    rows.write(rows_of(aside), packed, identity)
    aside.replace(plan.path)
    rows_of(aside).replace(rows_of(plan.path))
    return packed


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
    written: WrittenShards, classes: tuple[str, ...], rejected: list[tuple[str, str]], more: Mapping[str, object]
) -> Index:
    work, options, shards = written.work, written.options, tuple(shard.facts for shard in written.shards)
    rows = [rows_of(plan.path) for plan in written.plans]
    columns, keys = gathered(rows, [shard.samples for shard in shards], written.found.origin.parts)
    said: dict[str, object] = {
        "samples_per_shard": options.samples_per_shard,
        "mib_per_shard": options.mib_per_shard,
        "strict": options.strict,
        "shuffle_seed": options.shuffle_seed,
        "split": options.split,
        "max_side": options.max_side,
        "quality": options.quality,
        "rejected": [list(reject) for reject in rejected],
        **more,
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
    return write_index(work, classes, shards, columns, keys, said)


def _one_field(text: str) -> str:
    return re.sub(r"[\t\r\n]+", " ", text)


def _tidy(work: Path, wanted: set[str]) -> None:
    """Remove what the finished folder does not hold: rows, and shards of another plan."""
    for entry in work.iterdir():
        if entry.suffix == ".rows" or (entry.suffix == ".tar" and entry.name not in wanted):
            entry.unlink()


def _notes(index: Index, shards: list[PackedShard], before: int) -> list[str]:
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
    have = counted(len(empty), "class has", "classes have")
    return [f"{have} no images, the first {empty[0]!r}"] if empty else []
