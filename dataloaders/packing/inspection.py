"""What is in a data set, for people: counts, classes, sizes, bytes, formats, duplicates, and pictures to look at.

Counts, labels and sizes are those of the whole data set. What needs the samples' bytes (formats, and for a container
without an index bytes and duplicates; how often a mask or a box shows a class) is learnt of a few thousand samples,
spread evenly, and said to be so.
"""

from __future__ import annotations

import io
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw

from dataloaders.packing.overlap import UNKNOWN, checksums
from dataloaders.pixels.colours import colour
from dataloaders.pixels.decode import MASK_FORMATS, UndecodableError, class_numbers, is_jpeg, picture_of
from dataloaders.pixels.formats import FORMATS
from dataloaders.source import DamagedSampleError, Source, Stored, Tiled, bytes_of, spread_evenly
from dataloaders.sources.image_folder import ImageFolderDataset
from dataloaders.sources.scanning import shared_keys
from dataloaders.sources.shards import ShardDataset
from setformer_dist.core.batch import VOID
from setformer_dist.core.words import counted

# Samples whose bytes are looked at, unless all are wanted.
LOOKED_AT = 2000

_MASK_OPACITY = 0.55


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    smallest: float
    median: float
    largest: float


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        name: of the data.
        samples: how many.
        shards: files or pages.
        shard_kind: what these are: "shard", or "folder" of an image folder.
        classes: class names.
        counts: (C,) images, boxes or pixels of each class; of the samples looked at for boxes and pixels. Boxes of
            crowds are not counted.
        counted: what `counts` counts: "images", "boxes" or "pixels".
        parts: what samples have besides image and label.
        height: of the images, pixels.
        width: of the images, pixels.
        megapixels: of the images, million pixels.
        image_bytes: of all images, as stored.
        image_bytes_exact: whether that is counted and not estimated.
        formats: images of each format among those looked at.
        looked_at: samples whose bytes were looked at.
        damaged: samples among those that are damaged.
        duplicates: groups of samples with the same checksum, at most a few, each as keys.
        duplicate_samples: samples that another one equals, among `duplicates_of`.
        duplicates_of: samples whose checksums were compared.
        shared_keys: samples whose key one of another shard has too.
        first_shared_key: the first such key and its shards, in words; "" without any.
    """

    name: str
    samples: int
    shards: int
    shard_kind: str
    classes: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    counted: str
    parts: tuple[str, ...]
    height: Spread
    width: Spread
    megapixels: Spread
    image_bytes: int
    image_bytes_exact: bool
    formats: dict[str, int]
    looked_at: int
    damaged: int
    duplicates: list[list[str]]
    duplicate_samples: int
    duplicates_of: int
    shared_keys: int
    first_shared_key: str


def inspect(source: Source, look_at: int = LOOKED_AT) -> Inspection:
    """Describe a data set.

    Args:
        source: opened data.
        look_at: samples whose bytes are read; spread evenly.
    """
    chosen = spread_evenly(source.num_samples, look_at)
    seen = _look(source, chosen)
    sizes = source.sizes()
    columns = source.index.columns if isinstance(source, ShardDataset) else {}
    sizes_known = "size" in columns
    total = int(columns["size"].sum()) if sizes_known else round(seen.bytes / max(seen.whole, 1) * source.num_samples)
    if isinstance(source, ShardDataset) and source.index.options.get("tiles"):
        total = sum(shard.size for shard in source.index.shards)  # the index knows the tables of the tiles
    checks = checksums(source)
    numbers = np.flatnonzero(checks != UNKNOWN)
    checks = checks[numbers]
    if not len(numbers):
        checks, numbers = np.array(seen.checks, np.int64), np.array(seen.numbers, np.int64)
    groups, doubled = _duplicates(source, checks, numbers)
    shared = _shared_keys(source) or (0, "")
    exact = sizes_known or seen.whole == source.num_samples
    counts, counted = _counts(source, seen)
    return Inspection(
        name=source.name,
        samples=source.num_samples,
        shards=len(np.unique(source.shards)),
        shard_kind="folder" if isinstance(source, ImageFolderDataset) else "shard",
        classes=source.classes,
        counts=counts,
        counted=counted,
        parts=tuple(sorted(source.parts)),
        height=_spread(sizes[:, 0]),
        width=_spread(sizes[:, 1]),
        megapixels=_spread(sizes[:, 0].astype(np.int64) * sizes[:, 1] / 1e6),
        image_bytes=total,
        image_bytes_exact=exact,
        formats=dict(seen.formats.most_common()),
        looked_at=len(chosen),
        damaged=len(chosen) - seen.whole,
        duplicates=groups,
        duplicate_samples=doubled,
        duplicates_of=len(numbers),
        shared_keys=shared[0],
        first_shared_key=shared[1],
    )


class _Seen:
    """What the samples that were looked at held."""

    def __init__(self, classes: int) -> None:
        self.formats: Counter[str] = Counter()
        self.bytes = self.whole = 0
        self.numbers: list[int] = []
        self.checks: list[int] = []
        self.boxes = np.zeros(classes, np.int64)
        self.pixels = np.zeros(VOID + 1, np.int64)


def _look(source: Source, chosen: list[int]) -> _Seen:
    seen = _Seen(len(source.classes))
    for sample in chosen:
        try:
            stored = source.read(sample)
            if stored.mask is not None:
                seen.pixels += np.bincount(mask_values(stored.mask).reshape(-1), minlength=VOID + 1)
        except (DamagedSampleError, UndecodableError):
            continue
        image = stored.image
        seen.whole += 1
        seen.bytes += bytes_of(image)
        seen.formats[format_of(image)] += 1
        seen.numbers.append(sample)
        data = image if isinstance(image, bytes) else image.content if isinstance(image, Tiled) else image.tobytes()
        seen.checks.append(zlib.crc32(data) << 31 ^ len(data))
        if stored.boxes is not None:
            objects = stored.boxes.labels[~stored.boxes.crowds]
            seen.boxes += np.bincount(objects, minlength=len(source.classes))[: len(source.classes)]
    return seen


def _counts(source: Source, seen: _Seen) -> tuple[npt.NDArray[np.int64], str]:
    if "boxes" in source.parts:
        return seen.boxes, "boxes"
    if "mask" in source.parts:
        return seen.pixels[: len(source.classes)], "pixels"
    labels = source.labels(np.arange(source.num_samples)).numpy()
    return np.bincount(labels, minlength=len(source.classes)), "images"


def _spread(values: npt.NDArray[Any]) -> Spread:
    return Spread(float(np.min(values)), float(np.median(values)), float(np.max(values)))


def _duplicates(
    source: Source, checks: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64], shown: int = 5
) -> tuple[list[list[str]], int]:
    """Return some groups of equal samples by their keys, and how many samples equal an earlier one."""
    order = np.argsort(checks, kind="stable")
    same = checks[order][1:] == checks[order][:-1]
    starts = np.flatnonzero(same & ~np.concatenate([[False], same[:-1]])) if len(same) else np.empty(0, np.int64)
    groups = []
    for start in starts[:shown].tolist():
        end = start + 1
        while end < len(same) and same[end]:
            end += 1
        groups.append([source.key(int(numbers[at])) for at in order[start : end + 1]])
    return groups, int(same.sum())


def _shared_keys(source: Source) -> tuple[int, str] | None:
    """Return how many samples have a key that one of another shard has too, and the first of them in words."""
    if not isinstance(source, ShardDataset):
        return None
    return shared_keys([shard.name for shard in source.index.shards], source.index.columns["shard"], source.index.keys)


def format_of(image: bytes | npt.NDArray[Any] | Tiled) -> str:
    """Return the name of an image's format."""
    if isinstance(image, Tiled):
        bands, numbers = image.shape[2], image.numbers
        return "tiles" if (bands, numbers) == (3, "uint8") else f"tiles ({counted(bands, 'band')} of {numbers})"
    if not isinstance(image, bytes):
        return "raw pixels"
    if is_jpeg(image):
        return "JPEG"
    try:
        with PIL.Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            return opened.format or "unknown"
    except Exception:  # noqa: BLE001  (PIL's plugins raise nearly anything on damaged bytes)
        return "unknown"


def mask_values(mask: bytes) -> npt.NDArray[np.uint8]:
    """Return the (H, W) classes of a packed mask.

    Raises:
        UndecodableError: the bytes are not a whole image.
    """
    try:
        with PIL.Image.open(io.BytesIO(mask), formats=MASK_FORMATS) as image:
            return class_numbers(image).astype(np.uint8)
    except Exception as error:  # noqa: BLE001  (as above)
        raise UndecodableError(f"its mask is not a whole image: {error}") from None


# ------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Picture:
    """A sample to look at.

    Attributes:
        pixels: (h, w, 3) uint8, shrunk, with its mask laid over it and its boxes drawn.
        key: of the sample.
        caption: its class, or the classes marked in it.
        size: stored (height, width).
        damage: why it cannot be shown; "" where it can.
    """

    pixels: npt.NDArray[np.uint8]
    key: str
    caption: str
    size: tuple[int, int]
    damage: str = ""


def pictures(source: Source, count: int, side: int) -> list[Picture]:
    """Return samples to look at, spread evenly over the data set.

    Args:
        source: opened data.
        count: how many.
        side: longest side of a picture in pixels.
    """
    return [_picture(source, sample, side) for sample in spread_evenly(source.num_samples, count)]


def _picture(source: Source, sample: int, side: int) -> Picture:
    try:
        stored = source.read(sample)
        pixels, (top, left, height, width) = picture_of(stored.image)
        image = PIL.Image.fromarray(pixels)
        scale = min(1.0, side / max(image.size))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, PIL.Image.Resampling.LANCZOS)
        shown: set[int] = set()
        if stored.mask is not None:
            image = _with_mask(image, mask_values(stored.mask)[top : top + height, left : left + width], shown)
        if stored.boxes is not None:
            corners = (stored.boxes.corners - [left, top] * 2) * scale
            _draw_boxes(image, corners, stored.boxes.labels, shown)
    except (DamagedSampleError, UndecodableError) as error:
        blank = np.full((side, side, 3), 128, np.uint8)
        return Picture(blank, source.key(sample), "damaged", source.size(sample), str(error))
    caption = _caption(source, sample, stored, shown)
    return Picture(np.asarray(image), source.key(sample), caption, source.size(sample))


def _caption(source: Source, sample: int, stored: Stored, shown: set[int]) -> str:
    if stored.boxes is not None:
        marked = zip(stored.boxes.labels.tolist(), stored.boxes.crowds.tolist(), strict=True)
        kinds = Counter(
            f"crowd of {source.classes[label]}" if is_crowd else source.classes[label]
            for label, is_crowd in marked
            if label < len(source.classes)
        )
        return ", ".join(f"{count} × {name}" for name, count in kinds.most_common()) or "no objects"
    if stored.mask is not None:
        return f"{len(shown)} of {len(source.classes)} classes"
    return source.classes[int(source.labels(np.array([sample], np.int64)))]


def _with_mask(image: PIL.Image.Image, mask: npt.NDArray[np.uint8], shown: set[int]) -> PIL.Image.Image:
    small = np.asarray(PIL.Image.fromarray(mask).resize(image.size, PIL.Image.Resampling.NEAREST))
    shown.update(np.unique(small[small != VOID]).tolist())
    colours = np.array([colour(label) for label in range(VOID + 1)], np.float32)[small]
    opacity = np.where(small == VOID, 0.0, _MASK_OPACITY)[..., None]
    mixed = np.asarray(image) * (1 - opacity) + colours * opacity
    return PIL.Image.fromarray(mixed.round().astype(np.uint8))


def _draw_boxes(
    image: PIL.Image.Image, corners: npt.NDArray[Any], labels: npt.NDArray[np.int64], shown: set[int]
) -> None:
    drawing = PIL.ImageDraw.Draw(image)
    for (left, top, right, lower), label in zip(corners.tolist(), labels.tolist(), strict=True):
        shown.add(label)
        drawing.rectangle([left, top, right, lower], outline=(0, 0, 0), width=4)
        if min(right - left, lower - top) >= 2:  # else nothing of it is inside the black line
            drawing.rectangle([left + 1, top + 1, right - 1, lower - 1], None, colour(label), 2)
