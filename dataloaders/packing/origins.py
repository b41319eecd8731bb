"""Where the samples of a packing come from: files of images, or another container of samples.

An origin is asked by the number that a sample will have, so the order is settled before any work, and any process
may ask for any part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dataloaders.packing.catalog import Catalog, Listed
from dataloaders.pixels.decode import UndecodableError, image_size
from dataloaders.pixels.depth import PixelFormat
from dataloaders.source import Boxes, DamagedSampleError, Source, Stored, box_areas, bytes_of
from dataloaders.sources.class_folders import Stretch, read_stretch
from dataloaders.sources.files import LARGEST_SAMPLE
from dataloaders.sources.shards import ShardDataset

# Samples whose bytes are looked at to learn how large those of a container without an index are.
_WEIGHED = 256

_OF_ANY_SIZE = PixelFormat(max_pixels=1 << 62)


@dataclass(frozen=True, slots=True)
class Raw:
    """A sample as its origin has it.

    Attributes:
        number: its place in the packed split.
        name: path or key, for keys and messages.
        label: of the image.
        stored: image, mask, boxes.
    """

    number: int
    name: str
    label: int
    stored: Stored


class Origin(Protocol):
    """Samples to be packed, 0 to num_samples - 1, in their final order; may be sent to our own processes."""

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty where only the masks know how many there are."""
        ...

    @property
    def parts(self) -> frozenset[str]:
        """What samples have besides image and label: "mask", "boxes", "soft"."""
        ...

    def weights(self) -> Iterable[int]:
        """Return the bytes of each sample, as far as they are known beforehand."""
        ...

    def identity(self, first: int, end: int) -> str:
        """Return a digest of all that decides samples first to end - 1: the same means the same bytes."""
        ...

    def name(self, number: int) -> str:
        """Return a sample's path or key."""
        ...

    def labelled_names(self) -> Iterator[tuple[int, str]]:
        """Yield the label and the name of each sample; the name does not depend on the other samples."""
        ...

    def samples(self, first: int, end: int) -> Iterator[Raw | tuple[str, UndecodableError]]:
        """Yield samples first to end - 1; (name, reason) for one that is damaged.

        Raises:
            DataError: the storage does not deliver.
        """
        ...

    def close(self) -> None:
        """Close files; a later call opens them again."""
        ...


@dataclass
class FileOrigin:
    """Images in files, listed by a `Catalog`.

    Attributes:
        table: the catalog's file.
        base: what its names are relative to.
        num_samples: samples in it.
        classes: as `Origin.classes`.
        parts: as `Origin.parts`.
        largest: bytes that a file may have.
        above: folders above those of the classes, which are no part of `labelled_names`.
    """

    table: Path
    base: Path
    num_samples: int
    classes: tuple[str, ...]
    parts: frozenset[str] = frozenset()
    largest: int = LARGEST_SAMPLE
    above: int = 0
    _opened: Catalog | None = field(default=None, repr=False)

    def weights(self) -> Iterator[int]:
        """Yield the bytes of each image and its mask."""
        return self._catalog().sizes()

    def identity(self, first: int, end: int) -> str:
        """Return a digest of names, sizes, times of change, labels and boxes."""
        digest = hashlib.sha256()
        for listed in self._catalog().samples(first, end):
            digest.update(json.dumps([listed.number, listed.label, *_facts(listed)]).encode())
        return digest.hexdigest()

    def name(self, number: int) -> str:
        """Return an image's path within the source."""
        return next(self._catalog().samples(number, number + 1)).image.name

    def labelled_names(self) -> Iterator[tuple[int, str]]:
        """Yield label and path from the class folder on, the same for a directory and for a tar of it."""
        for listed in self._catalog().samples(0, self.num_samples):
            yield listed.label, listed.image.name.split("/", self.above)[-1]

    def samples(self, first: int, end: int) -> Iterator[Raw | tuple[str, UndecodableError]]:
        """Yield samples first to end - 1."""
        for listed in self._catalog().samples(first, end):
            image = read_stretch(listed.image, self.largest)
            if "mask" in self.parts and listed.mask is None:
                yield listed.image.name, UndecodableError("it has no mask")
                continue
            mask = None if listed.mask is None else read_stretch(listed.mask)
            shape, rows = (None, None) if listed.boxes is None else json.loads(listed.boxes)
            if (why := _of_another_size(image, shape)) is not None:
                yield listed.image.name, UndecodableError(why)
                continue
            boxes = None if rows is None else _boxes(rows)
            yield Raw(listed.number, listed.image.name, listed.label, Stored(image, mask, boxes))

    def _catalog(self) -> Catalog:
        if self._opened is None:
            self._opened = Catalog(self.table, self.base)
        return self._opened

    def close(self) -> None:
        """Close the catalog."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}


def _facts(listed: Listed) -> list[object]:
    def of(stretch: Stretch) -> list[object]:
        return [stretch.name.encode(errors="surrogateescape").hex(), stretch.offset, stretch.size, stretch.stamp]

    return [of(listed.image), listed.mask and of(listed.mask), listed.boxes]


def _of_another_size(image: bytes, shape: list[int] | None) -> str | None:
    """Return why boxes of an image of [height, width] are not of this one; None where they are, or nobody can say."""
    try:
        found = shape and list(image_size(image, _OF_ANY_SIZE))
    except UndecodableError:  # the packer says why
        return None
    if not shape or not found or found == shape:
        return None
    turned = " (they are of the image as EXIF turns it, which nothing here does)" if found == shape[::-1] else ""
    return f"it is of {found[1]}x{found[0]} pixels, but its annotations are of {shape[1]}x{shape[0]}{turned}"


def _boxes(rows: list[list[float | None]]) -> Boxes:
    table = np.array(rows, np.float64).reshape(-1, 7)  # None becomes NaN
    corners, areas = table[:, :4].astype(np.float32), table[:, 6].astype(np.float32)
    areas = np.where(np.isnan(areas), box_areas(corners), areas)
    return Boxes(corners, table[:, 4].astype(np.int64), table[:, 5].astype(np.bool_), areas)


@dataclass
class SourceOrigin:
    """The samples of another container.

    Attributes:
        source: it.
        order: (N,) numbers of its samples in their new order, or None to keep theirs.
        classes: class names to be packed with.
        labels: (C,) the label that each of its own becomes, or None to keep them.
    """

    source: Source
    order: npt.NDArray[np.int64] | None
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None = None

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        return self.source.num_samples

    @property
    def parts(self) -> frozenset[str]:
        """The container's own."""
        return self.source.parts

    def weights(self) -> Iterable[int]:
        """Return the index's sizes; without an index, the mean of some samples for each."""
        if isinstance(self.source, ShardDataset):
            sizes = self.source.index.columns["size"]
            return map(int, sizes if self.order is None else sizes[self.order])
        return repeat(mean_bytes(self.source), self.num_samples)

    def identity(self, first: int, end: int) -> str:
        """Return a digest of the container's fingerprint and of the order."""
        parts = [None if array is None else array.tolist() for array in (self._part(first, end), self.labels)]
        text = json.dumps([self.source.fingerprint, first, end, *parts]).encode()
        return hashlib.sha256(text).hexdigest()

    def name(self, number: int) -> str:
        """Return a sample's key."""
        return self.source.key(self._place(number))

    def labelled_names(self) -> Iterator[tuple[int, str]]:
        """Yield the container's own labels and keys."""
        for number in range(self.num_samples):
            place = self._place(number)
            yield int(self.source.labels(np.array([place], np.int64))), self.source.key(place)

    def samples(self, first: int, end: int) -> Iterator[Raw | tuple[str, UndecodableError]]:
        """Yield samples first to end - 1."""
        for number in range(first, end):
            place = self._place(number)
            label = int(self.source.labels(np.array([place], np.int64)))
            label = label if self.labels is None else int(self.labels[label])
            try:
                yield Raw(number, self.source.key(place), label, self._with_our_classes(self.source.read(place)))
            except DamagedSampleError as error:
                yield self.source.key(place), UndecodableError(str(error))

    def _with_our_classes(self, stored: Stored) -> Stored:
        """Return a sample whose soft label is over the classes to be packed with."""
        if stored.soft is None or self.labels is None:
            return stored
        soft = np.zeros(len(self.classes), np.float32)
        np.add.at(soft, self.labels, stored.soft)
        return replace(stored, soft=soft)

    def _part(self, first: int, end: int) -> npt.NDArray[np.int64] | None:
        return None if self.order is None else self.order[first:end]

    def _place(self, number: int) -> int:
        return number if self.order is None else int(self.order[number])

    def close(self) -> None:
        """Close the container."""
        self.source.close()


def mean_bytes(source: Source) -> int:
    """Return the mean bytes of some images, spread evenly over a container; damaged ones do not count."""
    total = count = 0
    for sample in np.unique(np.linspace(0, source.num_samples - 1, _WEIGHED).astype(np.int64)).tolist():
        try:
            image = source.read(sample).image
        except DamagedSampleError:
            continue
        total, count = total + bytes_of(image), count + 1
    return total // max(count, 1)
