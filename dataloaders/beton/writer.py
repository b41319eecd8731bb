"""Writing .beton files that any FFCV reads: JPEG bytes as they are, raw pixels, memory for the tables alone.

    .train.beton.partial            all work happens here
    train.beton                     the file above, fsync'ed and renamed
    train.beton.index.safetensors   checksums, class names and keys (`dataloaders.beton.sidecar`), before the rename

FFCV's own writer encodes every JPEG again and waits for ever if an image does not fit its page; this one keeps the
bytes and raises the page size. The same samples give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

from dataloaders.beton.format import (
    ALLOCATION,
    HEADER,
    JPEG,
    MAX_PAGE,
    MAX_SIDE,
    MIN_PAGE,
    RAW,
    VERSION,
    field_table,
    read_table,
    record_type,
)
from dataloaders.beton.sidecar import checksum, sidecar_path, write_sidecar
from dataloaders.pixels.decode import UndecodableError, decode, is_jpeg
from setformer_dist.core.errors import ConfigError, DataError

# What FFCV's decoder (libjpeg-turbo, to RGB) takes; the rest (CMYK, YCCK) is stored as pixels.
_COLOURSPACES = {"YCbCr", "RGB", "Gray"}


@dataclass(frozen=True)
class BetonSample:
    """A sample to be written.

    Attributes:
        image: a file's bytes, or (H, W, 3) uint8 pixels.
        label: a position in the class names.
        height: pixels.
        width: pixels.
        key: kept in the sidecar, ASCII; "" gets the sample's number.
    """

    image: bytes | npt.NDArray[np.uint8]
    label: int
    height: int
    width: int
    key: str = ""


def write_beton(
    path: Path,
    samples: Iterable[BetonSample],
    num_samples: int,
    *,
    classes: tuple[str, ...],
    page_size: int = 8 << 20,
    mode: Literal["jpg", "raw"] = "jpg",
) -> int:
    """Write a .beton file with the fields "image" and "label", and its sidecar; an older file there is replaced.

    Args:
        path: of the file; nothing is there until all is.
        samples: taken one by one, never held.
        num_samples: at most so many will come; sets aside 60 bytes of memory each.
        classes: class names, kept in the sidecar.
        page_size: bytes, a power of two from 2 MiB to 2 GiB; raised automatically for a sample that needs more.
        mode: "jpg" keeps JPEG bytes and stores as raw pixels what is no RGB or grey JPEG (PNG, CMYK: nothing is
            re-encoded); "raw" stores all as pixels.

    Returns:
        How many samples came.

    Raises:
        ConfigError: a page size that cannot be.
        DataError: none or more than `num_samples` came, one is too large for the format, has a label without a class
            or another size than it says, or the disk is full. Nothing is left behind.
        UndecodableError: an image that must be decoded is damaged.
    """
    if page_size & (page_size - 1) or not MIN_PAGE <= page_size <= MAX_PAGE:
        raise ConfigError(f"page size {page_size} must be a power of two from {MIN_PAGE} to {MAX_PAGE}")
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            writer = _Writer(file, num_samples, len(classes), page_size, raw=mode == "raw")
            for sample in samples:
                writer.add(sample)
            writer.finish()
        table = read_table(aside)
        sidecar_path(path).unlink(missing_ok=True)  # never an old sidecar next to a new file
        write_sidecar(sidecar_path(path), table, classes, writer.checks[: len(table)], writer.keys)
        aside.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): nothing was kept") from None
    finally:
        aside.unlink(missing_ok=True)
    return len(table)


class _Writer:
    """A file being written: images as they come, the tables at the end."""

    def __init__(self, file: BinaryIO, room: int, num_classes: int, page_size: int, raw: bool) -> None:
        self._file = file
        self._num_classes = num_classes
        self._page = page_size
        self._raw = raw
        self._count = 0
        self._records = np.zeros(room, record_type())
        self._allocations = np.zeros(room, ALLOCATION)
        self.checks = np.zeros(room, np.uint64)
        self.keys: list[str] = []
        tables = HEADER.itemsize + len(field_table()) + self._records.nbytes
        self._end = 0
        self._pad_to(-(-tables // page_size) * page_size)

    def add(self, sample: BetonSample) -> None:
        number = self._count
        if number >= len(self._records):
            raise DataError(f"more samples came than the {len(self._records)} that were announced")
        self._check(sample)
        image = self._stored(sample)
        place = self._append(image if isinstance(image, bytes) else image.data)
        size = self._end - place
        mode = JPEG if isinstance(image, bytes) else RAW
        self._records[number] = ((mode, sample.width, sample.height, place), sample.label)
        self._allocations[number] = (number, place, size)
        self.checks[number] = checksum(image)
        self.keys.append(sample.key or f"{number:09d}")
        self._count += 1

    def _check(self, sample: BetonSample) -> None:
        who = f"sample {self._count}" + (f" ({sample.key})" if sample.key else "")
        if not (0 < sample.height <= MAX_SIDE and 0 < sample.width <= MAX_SIDE):
            raise DataError(
                f"{who} is {sample.height} x {sample.width} pixels, a .beton file takes 1 to {MAX_SIDE} a side: shrink "
                "it, or pack WebDataset shards"
            )
        if not 0 <= sample.label < self._num_classes:
            raise DataError(f"{who} has label {sample.label}, but there are {self._num_classes} classes")

    def _stored(self, sample: BetonSample) -> bytes | npt.NDArray[np.uint8]:
        """Return what is stored: JPEG bytes, or contiguous pixels."""
        image = sample.image
        if isinstance(image, bytes) and not self._raw and is_jpeg(image):
            try:
                height, width, colourspace, _ = simplejpeg.decode_jpeg_header(image)
            except ValueError as error:
                raise UndecodableError(f"sample {self._count} is not a whole image: {error}") from None
            if colourspace in _COLOURSPACES:
                self._check_shape(sample, (height, width))
                return image
        pixels = np.ascontiguousarray(decode(image))
        self._check_shape(sample, pixels.shape[:2])
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
            raise DataError(f"sample {self._count} has pixels {pixels.dtype} {pixels.shape}, not uint8 (H, W, 3)")
        return pixels

    def _check_shape(self, sample: BetonSample, shape: tuple[int, ...]) -> None:
        if tuple(shape) != (sample.height, sample.width):
            raise DataError(
                f"sample {self._count} was said to be {sample.height} x {sample.width}, but is {shape[0]} x {shape[1]}"
            )

    def _append(self, data: bytes | memoryview) -> int:
        """Write an image where it crosses no page; return where."""
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        while size > self._page:
            # What crossed no page crosses none of twice the size, so what is written stays as it is.
            self._page *= 2
        if self._page > MAX_PAGE:
            raise DataError(f"sample {self._count} has {size} bytes, more than a page of {MAX_PAGE}: shrink it")
        if self._end // self._page != (self._end + size - 1) // self._page:
            self._pad_to(-(-self._end // self._page) * self._page)
        place = self._end
        self._file.write(data)
        self._end += size
        return place

    def _pad_to(self, end: int) -> None:
        self._file.truncate(end)  # reads as zeros, and takes no room where the file system can leave holes
        self._file.seek(end)
        self._end = end

    def finish(self) -> None:
        if not self._count:
            raise DataError("no samples came, and a .beton file without any cannot be read")
        self._file.write(self._allocations[: self._count].tobytes())
        self._file.seek(0)
        header = np.array((VERSION, 2, self._page, self._count, self._end), HEADER)
        self._file.write(header.tobytes() + field_table() + self._records[: self._count].tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
