"""What every container of samples looks like to the loaders: samples by number, nothing else.

`dataloaders.opening.open_source` returns one: packed WebDataset shards, external shards, a .beton file, an
image folder, local or behind a URL. Streams, augmentation, damage and benchmarks know this protocol alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from setformer_dist.core.errors import DataError

# The one class of data without labels (data.labels = false).
UNLABELLED = "unlabelled"


class DamagedSampleError(DataError):
    """One sample whose bytes are not what they were packed as, or do not decode."""


@dataclass(frozen=True, init=False)
class Boxes:
    """Boxes of an image.

    Attributes:
        corners: (k, 4) float32, x0, y0, x1, y1 in stored pixels.
        labels: (k,) int64, classes.
        crowds: (k,) bool, whether it is of a region with several objects, which must not be counted as one.
        areas: (k,) float32, of the object in stored pixels: of its outline, where the annotation has one.
    """

    corners: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    crowds: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float32]

    def __init__(
        self,
        corners: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int64],
        crowds: npt.NDArray[np.bool_] | None = None,
        areas: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Without `crowds` none is of a crowd; without `areas` each is that of its box."""
        corners = np.asarray(corners, np.float32).reshape(-1, 4)
        fields = {
            "corners": corners,
            "labels": np.asarray(labels, np.int64),
            "crowds": np.zeros(len(corners), np.bool_) if crowds is None else np.asarray(crowds, np.bool_),
            "areas": box_areas(corners) if areas is None else np.asarray(areas, np.float32),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # the class is frozen


def box_areas(corners: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return (k,) float32, the area of each of (k, 4) boxes."""
    with np.errstate(over="ignore", invalid="ignore"):  # corners that are not checked yet
        return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


NO_BOXES = Boxes(np.empty((0, 4), np.float32), np.empty(0, np.int64))


@runtime_checkable
class Tiled(Protocol):
    """An image stored as tiles, which are read when it is known what of it is seen."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, bands)."""
        ...

    @property
    def numbers(self) -> str:
        """The dtype of its bands, as numpy names it."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of all tiles as they are stored."""
        ...

    @property
    def content(self) -> bytes:
        """What says which image it is, wherever it is stored: its sizes, and bytes and checksum of each tile."""
        ...

    def window(self, box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        """Return the pixels of (top, left, height, width), (h, w, C); reads the tiles that it touches.

        Raises:
            DamagedSampleError: one of these is damaged.
            DataError: the storage does not deliver.
        """
        ...


# By the height of a window, the first and the end of the rows in it that this rank looks at (parallel.sequence).
OwnRows = Mapping[int, tuple[int, int]]


@runtime_checkable
class PartlyDecoded(Protocol):
    """What a source has besides whose images may be in tiles."""

    def decode_only(self, rows: OwnRows) -> None:
        """Decode of the windows of these heights only the tiles that their rows touch; other pixels are 0.

        All tiles of a window are still read and compared with their checksums: the ranks that share an image must find
        the same images damaged. Images without tiles are decoded whole.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A sample as stored.

    Attributes:
        image: an image file's bytes (JPEG, PNG, ...), (H, W, C) pixels where the container holds raw ones, or tiles.
        mask: a PNG file's bytes, one byte per pixel: its class, 255 where it does not count; None without.
        boxes: None without.
        soft: (classes,) float32, how probable each class is, summing to 1; None without.
    """

    image: bytes | npt.NDArray[Any] | Tiled
    mask: bytes | None = None
    boxes: Boxes | None = None
    soft: npt.NDArray[np.float32] | None = None


def spread_evenly(total: int, count: int) -> list[int]:
    """Return `count` numbers below `total`, or all of them, at equal distances."""
    if count >= total:
        return list(range(total))
    chosen: list[int] = (np.arange(count) * total // count).tolist()
    return chosen


def bytes_of(image: bytes | npt.NDArray[Any] | Tiled) -> int:
    """Return the bytes that an image takes where it is stored."""
    if isinstance(image, bytes):
        return len(image)
    return image.nbytes if isinstance(image, np.ndarray) else image.num_bytes


class Source(Protocol):
    """A split's samples by number, 0 to num_samples - 1.

    May be pickled between our own processes (it reopens its files there) and read by several threads at once.
    """

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the split: changes when its samples, their labels, sizes or places change.

        Their bytes are covered as far as the container keeps digests that belong to it: a packed split's and a .beton
        file's with a sidecar are; of shards of others and of a .beton file without one it is the headers and tables,
        of class folders the first bytes of each image.
        """
        ...

    @property
    def name(self) -> str:
        """The folder, file or URL, for messages."""
        ...

    @property
    def parts(self) -> frozenset[str]:
        """What each sample has besides image and label: "mask", "boxes", "soft"."""
        ...

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(N,) number of the file that holds each sample, never falling: reads within one are near each other."""
        ...

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        ...

    def size(self, sample: int) -> tuple[int, int]:
        """Return a sample's stored (height, width) in pixels."""
        ...

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width), each number over all samples independently."""
        ...

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (N, 2) stored heights and widths."""
        ...

    def key(self, sample: int) -> str:
        """Return a sample's key within its shard."""
        ...

    def place(self, sample: int) -> str:
        """Name a sample for a message: number, key, file."""
        ...

    def read(self, sample: int) -> Stored:
        """Return a sample, its bytes checked against the checksum where the container has one.

        Raises:
            DamagedSampleError: the bytes are not what they were packed as.
            DataError: the storage does not deliver, after retries.
        """
        ...

    def close(self) -> None:
        """Close files and connections; a later read opens them again."""
        ...

    def __getstate__(self) -> object:
        """Return what another process needs to open the same."""
        ...


@runtime_checkable
class Fetching(Protocol):
    """What a source has besides whose storage may fetch whole files: one read can then take as long as a file does."""

    @property
    def fetches(self) -> bool:
        """Whether it does."""
        ...

    def expect(self, shards: npt.NDArray[np.integer], share: float = 1.0) -> None:
        """Say which files are being read, and which will be after them; they are fetched in the background.

        Args:
            shards: their numbers, by first need.
            share: of the storage's room that they may take together.
        """
        ...

    def moved(self) -> int:
        """Return a number that changes as long as bytes of a file that a read waits for do come."""
        ...
