"""An image as independent tiles in a shard: what is seen of it is all that is read, each tile checked on its own.

    <key>.0000-0000.jpg    row and column of the tile; a JPEG or PNG file, or (.raw) its numbers as they are
    <key>.0000-0001.jpg    tiles at the right and at the bottom are as large as what is left of the image
    <key>.tiles            the table: how large image and tiles are, and of each tile offset, size and crc32
    <key>.cls

The index knows the table as the image: its offset, size and crc32 are those of `<key>.tiles`. So the checksum of the
table covers those of all tiles, and a window costs one read for the table and one for each tile that it touches. All
tiles are one sample with one key: a split by samples is a split by images, and windows never cross it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from dataloaders.pixels.decode import decode
from dataloaders.pixels.depth import MOST_BANDS, Numbers, PixelFormat, UndecodableError
from dataloaders.source import DamagedSampleError, OwnRows
from dataloaders.sources.files import LARGEST_SAMPLE
from setformer_dist.core.errors import DataError

Box = tuple[int, int, int, int]

TABLE_SUFFIX, RAW_SUFFIX = "tiles", "raw"
LARGEST_SIDE = 1 << 13  # of a tile, in pixels

_MAGIC = b"SFTILES1"
_HEADER = struct.Struct("<8s6I")  # magic, side, height, width, bands, numbers, whether raw
_ROW = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
_NUMBERS: tuple[Numbers, ...] = ("uint8", "uint16", "float32")  # by their code in the header: only append


@dataclass(frozen=True)
class Grid:
    """How an image is cut.

    Attributes:
        side: of a tile, in pixels.
        height: of the image.
        width: likewise.
        bands: of each pixel.
        numbers: of each band.
        is_raw: whether tiles hold numbers, and no image files.
    """

    side: int
    height: int
    width: int
    bands: int
    numbers: Numbers
    is_raw: bool

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return -(-self.height // self.side)

    @property
    def columns(self) -> int:
        """Columns of tiles."""
        return -(-self.width // self.side)

    def shape(self, row: int, column: int) -> tuple[int, int, int]:
        """Return (height, width, bands) of a tile."""
        height = min(self.side, self.height - row * self.side)
        return height, min(self.side, self.width - column * self.side), self.bands

    def touched(self, box: Box) -> Iterator[tuple[int, int]]:
        """Yield (row, column) of the tiles that a box of pixels touches."""
        top, left, height, width = box
        for row in range(top // self.side, -(-(top + height) // self.side)):
            for column in range(left // self.side, -(-(left + width) // self.side)):
                yield row, column


def encode_table(grid: Grid, tiles: list[tuple[int, int, int]]) -> bytes:
    """Return the table of an image whose tiles are at (offset, size) in the shard and have these checksums."""
    header = _HEADER.pack(
        _MAGIC, grid.side, grid.height, grid.width, grid.bands, _NUMBERS.index(grid.numbers), grid.is_raw
    )
    return header + np.array(tiles, _ROW).tobytes()


def _parsed(table: bytes, shard_size: int) -> tuple[Grid, npt.NDArray[Any]]:
    """Return what a table says; raises ValueError where nothing that we write says it."""
    if len(table) < _HEADER.size:
        raise ValueError("it is cut short")
    magic, side, height, width, bands, numbers, is_raw = _HEADER.unpack_from(table)
    if magic != _MAGIC or is_raw > 1 or numbers >= len(_NUMBERS):
        raise ValueError("it is of another kind")
    if not (1 <= side <= LARGEST_SIDE and min(height, width) >= 1 and 1 <= bands <= MOST_BANDS):
        raise ValueError("its sizes cannot be")
    grid = Grid(side, height, width, bands, _NUMBERS[numbers], bool(is_raw))
    if len(table) != _HEADER.size + grid.rows * grid.columns * _ROW.itemsize:
        raise ValueError("it has another number of tiles than its sizes mean")
    tiles = np.frombuffer(table, _ROW, offset=_HEADER.size)
    offset, size = tiles["offset"], tiles["size"]
    if offset.min() < 0 or size.min() < 1 or size.max() > LARGEST_SAMPLE or (offset > shard_size - size).any():
        raise ValueError("a tile lies outside the shard")
    return grid, tiles


class TiledImage:
    """An image in tiles (`dataloaders.source.Tiled`).

    Args:
        table: the table's bytes.
        shard_size: bytes of the shard that the tiles are in.
        read: returns bytes by (offset, size, crc32), checked.
        place: names the image in messages.
        own_rows: what of windows is looked at.

    Attributes:
        grid: how the image is cut.

    Raises:
        DamagedSampleError: the table is none.
    """

    def __init__(
        self,
        table: bytes,
        shard_size: int,
        read: Callable[[int, int, int], bytes],
        place: str,
        own_rows: OwnRows = MappingProxyType({}),
    ) -> None:
        try:
            self.grid, self._tiles = _parsed(table, shard_size)
        except ValueError as error:
            raise DamagedSampleError(f"{place}: its table of tiles is none ({error})") from None
        self._header = table[: _HEADER.size]
        self._read = read
        self._place = place
        self._own_rows = own_rows

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, bands)."""
        return self.grid.height, self.grid.width, self.grid.bands

    @property
    def numbers(self) -> str:
        """The dtype of its bands, as numpy names it."""
        return self.grid.numbers

    @property
    def content(self) -> bytes:
        """What says which image it is, wherever its tiles are."""
        return self._header + self._tiles["size"].tobytes() + self._tiles["crc32"].tobytes()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tiles as they are stored."""
        return int(self._tiles["size"].sum())

    def window(self, box: Box) -> npt.NDArray[Any]:
        """Return the pixels of (top, left, height, width), (h, w, C); reads the tiles that it touches.

        Raises:
            DamagedSampleError: one of these is damaged.
            DataError: the storage does not deliver; or where parts are decoded, a tile of this part does not decode,
                which ranks with other parts cannot know.
        """
        top, left, height, width = box
        side = self.grid.side
        first, end = self._own_rows.get(height, (0, height))
        is_part = (first, end) != (0, height)
        pixels = (np.zeros if is_part else np.empty)((height, width, self.grid.bands), self.grid.numbers)
        for row, column in self.grid.touched(box):
            data = self._bytes(row, column)
            y, x = row * side, column * side
            if y >= top + end or y + side <= top + first:
                continue
            y0, y1, x0, x1 = max(y, top), min(y + side, top + height), max(x, left), min(x + side, left + width)
            try:
                tile = self._decoded(data, row, column)
            except DamagedSampleError as error:
                if is_part:
                    raise DataError(
                        f"{error}; its checksum is right, so it was packed so: pack the split again"
                    ) from None
                raise
            pixels[y0 - top : y1 - top, x0 - left : x1 - left] = tile[y0 - y : y1 - y, x0 - x : x1 - x]
        return pixels

    def _bytes(self, row: int, column: int) -> bytes:
        found = self._tiles[row * self.grid.columns + column]
        return self._read(int(found["offset"]), int(found["size"]), int(found["crc32"]))

    def _decoded(self, data: bytes, row: int, column: int) -> npt.NDArray[Any]:
        shape = self.grid.shape(row, column)
        try:
            if self.grid.is_raw:
                return np.frombuffer(data, np.dtype(self.grid.numbers).newbyteorder("<")).reshape(shape)
            tile = decode(data, form=PixelFormat(self.grid.bands, self.grid.numbers, self.grid.side**2))
            if tile.shape != shape:
                raise ValueError(f"it is {tile.shape[0]} x {tile.shape[1]} pixels and not {shape[0]} x {shape[1]}")
        except (UndecodableError, ValueError) as error:
            raise DamagedSampleError(
                f"{self._place} is damaged (tile in row {row}, column {column}: {error})"
            ) from None
        return tile
