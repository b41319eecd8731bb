"""The layout of a .beton file (FFCV, format 2), and the checks that a file has to pass before a sample is read.

    header          24 bytes: version, number of fields, page size, number of samples, place of the allocation table
    fields          1041 bytes each: type, name, arguments
    samples         one record each: mode, width, height and place of the image; the label
    data            images, none of them across a multiple of the page size
    allocations     24 bytes each, to the end of the file: sample, place, size

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


def record_type(image_first: bool = True) -> np.dtype[Any]:
    """Return the type of a sample's record: its fields with C's alignment, 24 bytes."""
    parts: list[Any] = [("image", IMAGE), ("label", LABEL)]
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

    def __len__(self) -> int:
        return len(self.label)


def read_table(path: Path) -> BetonTable:
    """Read and check the tables of a .beton file; 1.28 M samples take well under a second.

    Raises:
        DataError: there is no such file, it is no .beton file of this version with an image and an int field, it is
            cut short, or its tables contradict each other.
    """
    try:
        with path.open("rb") as file:
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
        if records_at > self._size:
            raise self.refuse("is damaged or cut short: it ends within its header")
        fields = file.read(records_at - HEADER.itemsize)
        record = record_type(self._image_first(np.frombuffer(fields, FIELD)))
        data_at = records_at + self._samples * record.itemsize
        self._check_frame(data_at)
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
        return BetonTable(mode, height, width, place, size, label, self._page, self._size, digest.hexdigest())

    def _check_frame(self, data_at: int) -> None:
        """Hold the header against the file's size, before anything is allocated by its word."""
        if not self._samples:
            raise self.refuse("has no samples")
        if self._page & (self._page - 1) or not self._page:
            raise self.refuse(f"is damaged: its page size {self._page} is no power of two")
        expected = self._allocations + self._samples * ALLOCATION.itemsize
        if self._size != expected:
            raise self.refuse(
                f"has {self._size} bytes, its header speaks of {expected} for {self._samples} samples of an image and "
                "an int each, so it was cut short, damaged or left unfinished"
            )
        if data_at > self._allocations:
            raise self.refuse("is damaged: its header places tables outside the file")

    def _image_first(self, fields: npt.NDArray[Any]) -> bool:
        kinds = fields["type"].tolist()
        if sorted(kinds) != [_INT_TYPE, _IMAGE_TYPE]:
            names = [field["name"].tobytes().split(b"\0")[0].decode("ascii", "replace") for field in fields]
            said = ", ".join(f"{n!r} ({_TYPE_NAMES.get(k, k)})" for n, k in zip(names, kinds, strict=True))
            raise self.refuse(
                f"has the fields {said or 'none'}, but one image and one int (its label) are needed",
                "write it again with these two alone",
            )
        return bool(kinds[0] == _IMAGE_TYPE)

    def _places(
        self, allocations: npt.NDArray[Any], stated: npt.NDArray[Any], data_at: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (place, size) by sample, after holding the allocation table against the records."""
        samples, places, sizes = (np.ascontiguousarray(allocations[name]) for name in ("sample", "place", "size"))
        # As unsigned numbers: a flipped top bit must look large, not negative.
        count, end = np.uint64(self._samples), np.uint64(self._allocations)
        if (samples >= count).any() or (np.bincount(samples.astype(np.int64), minlength=self._samples) != 1).any():
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
        self._refuse_first((mode == RAW) & (size != pixels), numbers, "has not as many bytes as its height and width")

    def _refuse_first(self, wrong: npt.NDArray[np.bool_], samples: npt.NDArray[Any], what: str) -> None:
        if wrong.any():
            raise self.refuse(f"is damaged: sample {int(samples[np.argmax(wrong)])} {what}")
