"""The layout of a .beton file (FFCV, format 2), and the checks that a file has to pass before a sample is read.

    header          24 bytes: version, number of fields, page size, number of samples, place of the allocation table
    fields          1041 bytes each: type, name, arguments
    samples         one record each: mode, width, height and place of the image; the label; further fields
    data            images, and what further fields point to; none of it across a multiple of the page size
    allocations     24 bytes each, to the end of the file: sample, place, size

Files with one image and one int field are ours to write. Others' may have more: of several ints the one named `label`
is the label, and further fields are skipped and named.

All little-endian. FFCV itself checks the version and nothing else: a file whose last 0.01 % is missing gives other
samples' pictures there. Here every number of the tables is held against the others and against the file's size, for
all samples at once.

Source: FFCV 1.0.2 (Leclerc et al. 2023), `ffcv.types` and `ffcv.writer`; read and written bit-identically.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataloaders.pixels.depth import MAX_PIXELS
from dataloaders.sources.files import LARGEST_SAMPLE, open_regular
from setformer_dist.core.errors import DataError

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations", "<u8")]
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
LABEL = np.dtype("<i8")
ALLOCATION = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])

JPEG, RAW = 0, 1
MAX_SIDE = 65535  # width and height have 16 bits
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31  # powers of two below 2^32, as FFCV's writer takes them

_TYPE_NAMES = {0: "float", 1: "int", 2: "image", 3: "bytes", 4: "array", 5: "json", 6: "tensor", 255: "custom"}
_IMAGE_TYPE, _INT_TYPE = 2, 1

# What a record holds of each type of field, by FFCV's numbers; a field of a custom type has no known size.
_POINTER = np.dtype([("place", "<u8"), ("size", "<u8")])
_RECORD_OF: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("<f8"),
    1: LABEL,
    2: IMAGE,
    3: _POINTER,
    4: np.dtype("<u8"),
    5: _POINTER,
    6: np.dtype("<u8"),
}
_WITHOUT_DATA = frozenset({0, 1})

# More fields than any file has.
_MOST_FIELDS = 1024


def record_type(image_first: bool = True) -> np.dtype[np.generic]:
    """Return the type of a sample's record: its fields with C's alignment, 24 bytes."""
    parts: list[object] = [("image", IMAGE), ("label", LABEL)]
    return np.dtype(parts if image_first else parts[::-1], align=True)


def field_table(names: tuple[str, str] = ("image", "label")) -> bytes:
    """Return the descriptions of an image and an int field."""
    fields = np.zeros(2, FIELD)
    for field, name, kind in zip(fields, names, (_IMAGE_TYPE, _INT_TYPE), strict=True):
        field["type"] = kind
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return fields.tobytes()


@dataclass(frozen=True)
class BetonTable:
    """What a .beton file says of its samples, one value per sample, all of them checked.

    Attributes:
        mode: (N,) uint8, `JPEG` or `RAW`.
        height: (N,) int32, pixels.
        width: (N,) int32, pixels.
        place: (N,) int64, first byte of the image in the file.
        size: (N,) int64, bytes of the image.
        label: (N,) int64.
        page_size: bytes.
        file_size: bytes.
        sha256: of header, fields, records and allocations: all of the file but the images.
        passed: further fields, which are not read: name and type of each, in words.
    """

    mode: npt.NDArray[np.uint8]
    height: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    place: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    page_size: int
    file_size: int
    sha256: str
    passed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.label)


def read_table(path: Path) -> BetonTable:
    """Read and check the tables of a .beton file; 1.28 M samples take well under a second.

    Raises:
        DataError: there is no such file, it is no .beton file of this version with an image and an int field, it is
            cut short, or its tables contradict each other.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _Parser(path, size, file.read(HEADER.itemsize)).table(file)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read ({error.strerror}): set data.root, or restore it") from None


class _Parser:
    """Reads one file's tables; `refuse` is the one way in which it says no."""

    def __init__(self, path: Path, size: int, header: bytes) -> None:
        self._path = path
        self._size = size
        if len(header) < HEADER.itemsize:
            raise self.refuse(f"has {size} bytes, less than the header of a .beton file")
        self._header = header
        head = np.frombuffer(header, HEADER)[0]
        self._samples, self._fields = int(head["samples"]), int(head["fields"])
        self._page, self._allocations = int(head["page_size"]), int(head["allocations"])
        if head["version"] != VERSION:
            raise self.refuse(f"is no .beton file of format {VERSION} (its first bytes say {head['version']})", "")

    def refuse(self, what: str, repair: str = "restore the file or write it again") -> DataError:
        return DataError(f"data file {self._path} {what}" + (f": {repair}" if repair else ""))

    def table(self, file: Any) -> BetonTable:
        records_at = HEADER.itemsize + self._fields * FIELD.itemsize
        if self._fields > _MOST_FIELDS:
            raise self.refuse(f"is damaged: its header states {self._fields} fields")
        if records_at > self._size:
            raise self.refuse("is damaged or cut short: it ends within its header")
        fields = file.read(records_at - HEADER.itemsize)
        record, passed, points = self._record(np.frombuffer(fields, FIELD))
        data_at = records_at + self._samples * record.itemsize
        self._check_frame(data_at, points)
        records = file.read(data_at - records_at)
        file.seek(self._allocations)
        allocations = file.read()
        digest = hashlib.sha256()
        for part in (self._header, fields, records, allocations):
            digest.update(part)
        found = np.frombuffer(records, record)
        image, label = found["image"], found["label"].astype(np.int64)
        place, size = self._places(np.frombuffer(allocations, ALLOCATION), image["place"], data_at)
        mode, height, width = image["mode"].copy(), image["height"].astype(np.int32), image["width"].astype(np.int32)
        self._check_images(mode, height, width, size)
        return BetonTable(mode, height, width, place, size, label, self._page, self._size, digest.hexdigest(), passed)

    def _check_frame(self, data_at: int, points: bool) -> None:
        """Hold the header against the file's size, before anything is allocated by its word."""
        if not self._samples:
            raise self.refuse("has no samples")
        if self._page & (self._page - 1) or not self._page:
            raise self.refuse(f"is damaged: its page size {self._page} is no power of two")
        expected = self._allocations + self._samples * ALLOCATION.itemsize
        more = self._size - expected
        if more if not points else (more < 0 or more % ALLOCATION.itemsize):
            raise self.refuse(
                f"has {self._size} bytes, its header states {expected} for {self._samples} samples of an image and "
                "an int each, so it was cut short, damaged or left unfinished"
            )
        if data_at > self._allocations:
            raise self.refuse("is damaged: its header places tables outside the file")
        if self._samples > self._allocations - data_at:
            raise self.refuse(f"is damaged: it has no room for {self._samples} images")

    def _record(self, fields: npt.NDArray[Any]) -> tuple[np.dtype[Any], tuple[str, ...], bool]:
        """Return a record's type with `image` and `label`, what else it holds in words, and whether that has data."""
        kinds = fields["type"].tolist()
        names = [field["name"].tobytes().split(b"\0")[0].decode("ascii", "replace") for field in fields]
        images = [at for at, kind in enumerate(kinds) if kind == _IMAGE_TYPE]
        ints = [at for at, kind in enumerate(kinds) if kind == _INT_TYPE]
        labels = ints if len(ints) == 1 else [at for at in ints if names[at] == "label"]
        said = [f"{name!r} ({_TYPE_NAMES.get(kind, kind)})" for name, kind in zip(names, kinds, strict=True)]
        if len(images) != 1 or len(labels) != 1 or not set(kinds) <= set(_RECORD_OF):
            raise self.refuse(
                f"has the fields {', '.join(said) or 'none'}, but one image and one int (its label, or the one named "
                "'label') are needed, and others only of FFCV's own types",
                "write it again with these alone",
            )
        ours = {images[0]: "image", labels[0]: "label"}
        parts = [(ours.get(at, f"further {at}"), _RECORD_OF[kind]) for at, kind in enumerate(kinds)]
        further = [at for at in range(len(kinds)) if at not in ours]
        points = any(kinds[at] not in _WITHOUT_DATA for at in further)
        return np.dtype(parts, align=True), tuple(said[at] for at in further), points

    def _places(
        self, allocations: npt.NDArray[Any], stated: npt.NDArray[Any], data_at: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (place, size) by sample, after holding the allocation table against the records."""
        samples, places, sizes = (np.ascontiguousarray(allocations[name]) for name in ("sample", "place", "size"))
        # As unsigned numbers: a flipped top bit must look large, not negative.
        count, end = np.uint64(self._samples), np.uint64(self._allocations)
        if (samples >= count).any():
            raise self.refuse("is damaged: its allocation table names samples that do not exist")
        if len(samples) > self._samples:  # further fields have data too: those of the images are where records say
            of_image = places == np.ascontiguousarray(stated)[samples]
            samples, places, sizes = samples[of_image], places[of_image], sizes[of_image]
        if (np.bincount(samples.astype(np.int64), minlength=self._samples) != 1).any():
            raise self.refuse("is damaged: its allocation table does not name each sample once")
        outside = (places < np.uint64(data_at)) | (places > end) | (sizes > end) | (sizes == 0)
        outside |= places + sizes > end  # cannot overflow where the line above is false
        self._refuse_first(outside, samples, "lies outside the data")
        page = np.uint64(self._page)
        self._refuse_first(places // page != (places + sizes - np.uint64(1)) // page, samples, "crosses a page")
        order = np.argsort(places, kind="stable")
        ends = (places + sizes)[order]
        self._refuse_first(ends[:-1] > places[order][1:], samples[order][1:], "overlaps another sample")
        by_sample = np.empty(self._samples, np.int64), np.empty(self._samples, np.int64)
        for column, values in zip(by_sample, (places, sizes), strict=True):
            column[samples] = values
        differs = by_sample[0].astype(np.uint64) != stated
        self._refuse_first(differs, np.arange(self._samples), "is elsewhere by its record than by the allocation table")
        return by_sample

    def _check_images(
        self,
        mode: npt.NDArray[np.uint8],
        height: npt.NDArray[np.int32],
        width: npt.NDArray[np.int32],
        size: npt.NDArray[np.int64],
    ) -> None:
        numbers = np.arange(self._samples)
        self._refuse_first(mode > RAW, numbers, "is stored in a mode that is neither JPEG nor raw")
        self._refuse_first((height == 0) | (width == 0), numbers, "has no pixels")
        pixels = height.astype(np.int64) * width * 3
        self._refuse_first((mode == RAW) & (pixels > 3 * MAX_PIXELS), numbers, f"claims more than {MAX_PIXELS} pixels")
        self._refuse_first(size > LARGEST_SAMPLE, numbers, "has more bytes than any image")
        self._refuse_first((mode == RAW) & (size != pixels), numbers, "has not as many bytes as its height and width")

    def _refuse_first(self, wrong: npt.NDArray[np.bool_], samples: npt.NDArray[np.generic], what: str) -> None:
        if wrong.any():
            raise self.refuse(f"is damaged: sample {int(samples[np.argmax(wrong)])} {what}")
