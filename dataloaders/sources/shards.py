"""Tar shards with an index, opened: `read(i)` is one read at a known place, checked against the index.

Opening compares every shard's size with the index, so a shard cut short is found before the first step and not
hours later. Reading checks byte count and, where the index has it, crc32, so flipped bits in a shard are found even
where they would still decode.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.source import NO_BOXES, Boxes, DamagedSampleError, OwnRows, Source, Stored, Tiled
from dataloaders.sources.arrays import CHUNK_SHIFT, num_chunks
from dataloaders.sources.boxes import boxes_of
from dataloaders.sources.classes import soft_label
from dataloaders.sources.files import LARGEST_SAMPLE, parse_json
from dataloaders.sources.index import INDEX_NAME, Index, ShardFacts, read_index
from dataloaders.sources.tiles import TiledImage
from dataloaders.storage.base import (
    LocalFolder,
    MissingError,
    Storage,
    UnreadableError,
    WholeStorage,
    all_facts,
)
from setformer_dist.core.errors import DataError

# (offset, size, crc32 or None) of one part of each sample.
_Place = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]


class ShardDataset:
    """A split's samples by number (`Source`). Cheap to send to another process: it reopens the index there.

    Args:
        storage: of the shards, or their folder.
        index: what the index says.
        sleep: waits so many seconds between tries of a read, where `storage` is a folder.

    Attributes:
        storage: where the shards are.
        index: what the index says.
    """

    def __init__(self, storage: Path | Storage, index: Index, sleep: Callable[[float], None] = time.sleep) -> None:
        self.storage: Storage = LocalFolder(storage, sleep) if isinstance(storage, Path) else storage
        self.index = index
        # Plain columns in locals of this object: attribute and dict look-ups cost as much as the read itself.
        columns = index.columns
        self._shard, self._label = columns["shard"], columns["label"]
        self._image: _Place = columns["offset"], columns["size"], columns.get("crc32")
        self._further: dict[str, _Place] = {
            part: (columns[f"{part}_offset"], columns[f"{part}_size"], columns.get(f"{part}_crc32"))
            for part in index.parts
        }
        self._height, self._width = columns["height"], columns["width"]
        self._names = [shard.name for shard in index.shards]
        self._tiled = bool(index.options.get("tiles"))
        self._own_rows: OwnRows = {}
        self._sure = bytearray(num_chunks(len(index))) if index.chunks else bytearray(b"\1" * num_chunks(len(index)))

    def decode_only(self, rows: OwnRows) -> None:
        """Decode of windows of tiled images only what these rows touch (`dataloaders.source.PartlyDecoded`)."""
        self._own_rows = dict(rows)

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return len(self.index)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in it."""
        return self.index.classes

    @property
    def fingerprint(self) -> str:
        """Identity of the split: of all bytes for a packed one; of headers, labels and places for shards of others."""
        return self.index.fingerprint

    @property
    def name(self) -> str:
        """The folder or URL."""
        return self.storage.name

    @property
    def parts(self) -> frozenset[str]:
        """What samples have besides image and label."""
        return self.index.parts

    def without(self, part: str) -> int:
        """Return how many samples have no such part, where others have."""
        self._make_sure(range(len(self._sure)))
        return int((np.asarray(self.index.columns[f"{part}_size"]) == 0).sum())

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(N,) number of the shard that holds each sample, never falling."""
        return self._shard

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (N, 2) stored heights and widths."""
        self._make_sure(range(len(self._sure)))
        return np.stack([self._height, self._width], axis=1)

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width), each number over all samples independently."""
        return self.index.extent

    def key(self, sample: int) -> str:
        """Return a sample's key, as it is in the shard."""
        return self.index.key(sample)

    def size(self, sample: int) -> tuple[int, int]:
        """Return a sample's stored (height, width) in pixels."""
        self._make_sure((sample >> CHUNK_SHIFT,))
        return int(self._height[sample]), int(self._width[sample])

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        self._make_sure(np.unique(samples[samples >= 0] >> CHUNK_SHIFT).tolist())
        return torch.from_numpy(np.where(samples >= 0, self._label[samples], 0))

    def place(self, sample: int) -> str:
        """Name a sample for a message: number, key, shard."""
        return f"sample {sample} ({self.index.key(sample)}) of {self.storage.shown(self._names[self._shard[sample]])}"

    def read(self, sample: int) -> Stored:
        """Return a sample.

        Raises:
            DamagedSampleError: its bytes do not have the checksum of the index, its image has none, or its boxes
                or soft label are not such as its classes allow.
            DataError: the shard cannot be read, or is shorter than when it was opened.
        """
        if not self._sure[sample >> CHUNK_SHIFT]:
            self._make_sure((sample >> CHUNK_SHIFT,))
        image = self._bytes(sample, self._image)
        if not image:
            raise DamagedSampleError(f"{self.place(sample)}: its image has no bytes")
        shown = self._tiles(sample, image) if self._tiled else image
        if not self._further:
            return Stored(shown)
        mask = self._bytes(sample, self._further["mask"]) if "mask" in self._further else b""
        boxes = self._boxes(sample, self._further["boxes"]) if "boxes" in self._further else None
        soft = self._soft(sample, self._further["soft"]) if "soft" in self._further else None
        return Stored(shown, mask or None, boxes, soft)

    def _tiles(self, sample: int, table: bytes) -> Tiled:
        """Return an image whose tiles are read when it is known what of it is seen."""

        def read(offset: int, size: int, checksum: int) -> bytes:
            return self._checked(sample, offset, size, checksum, "a tile's")

        size = self.index.shards[self._shard[sample]].size
        return TiledImage(table, size, read, self.place(sample), self._own_rows)

    def _bytes(self, sample: int, place: _Place) -> bytes:
        offsets, sizes, checksums = place
        size = int(sizes[sample])
        if not size:
            return b""
        if size > LARGEST_SAMPLE:  # where the index was not checked whole when it was opened
            raise DamagedSampleError(f"{self.place(sample)}: it has {size} bytes, more than any sample")
        checksum = None if checksums is None else int(checksums[sample])
        return self._checked(sample, int(offsets[sample]), size, checksum, "its")

    def _checked(self, sample: int, offset: int, size: int, checksum: int | None, whose: str) -> bytes:
        """Return bytes of the shard that a sample is in, compared with their checksum if there is one."""
        name = self._names[self._shard[sample]]
        try:
            data = self.storage.read(name, offset, size)
            if checksum is None or zlib.crc32(data) == checksum:
                return data
            # It may be our copy of the shard that is damaged, and not the shard.
            if isinstance(self.storage, WholeStorage):
                data = self.storage.read_again(name, offset, size)
        except UnreadableError as error:
            raise DataError(f"{self.place(sample)} {error.what}") from None
        if zlib.crc32(data) != checksum:
            raise DamagedSampleError(f"{self.place(sample)}: {whose} bytes do not have the checksum of the index")
        return data

    def _boxes(self, sample: int, place: _Place) -> Boxes:
        data = self._bytes(sample, place)
        if not data:
            return NO_BOXES
        try:
            boxes = boxes_of(parse_json(data))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DamagedSampleError(f"{self.place(sample)}: its boxes are no table of boxes ({error})") from None
        outside = boxes.labels[(boxes.labels < 0) | (boxes.labels >= len(self.classes))]
        if len(outside):
            raise DamagedSampleError(
                f"{self.place(sample)}: a box is of class {outside[0]}, but the data has classes 0 to "
                f"{len(self.classes) - 1}"
            )
        return boxes

    def _soft(self, sample: int, place: _Place) -> npt.NDArray[np.float32] | None:
        data = self._bytes(sample, place)
        if not data:
            return None
        try:
            return soft_label(parse_json(data), self.classes)
        except (ValueError, TypeError, OverflowError) as error:
            raise DamagedSampleError(f"{self.place(sample)}: its soft label is none ({error})") from None

    def _make_sure(self, chunks: Any) -> None:
        """Check the rows of chunks of the index that were not touched before."""
        for chunk in chunks:
            if not self._sure[chunk]:
                self.index.check_chunk(chunk)
                self._sure[chunk] = 1

    @property
    def fetches(self) -> bool:
        """Whether the storage fetches whole shards."""
        return isinstance(self.storage, WholeStorage)

    def expect(self, shards: npt.NDArray[np.integer], share: float = 1.0) -> None:
        """Say which shards are being read, and which will be; storage that fetches whole shards does so ahead."""
        if isinstance(self.storage, WholeStorage):
            self.storage.expect([self._names[shard] for shard in shards.tolist()], share)

    def moved(self) -> int:
        """Return a number that changes as long as bytes of shards come."""
        return self.storage.moved if isinstance(self.storage, WholeStorage) else 0

    def close(self) -> None:
        """Close files and connections; a later read opens them again."""
        self.storage.close()

    def __getstate__(self) -> dict[str, object]:
        return {
            "storage": self.storage,
            "index": self.index.place,
            "fingerprint": self.fingerprint,
            "names": tuple(self._names),
            "own_rows": self._own_rows,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        index = read_index(Path(state["index"]), named=frozenset(state["names"]))
        if index.fingerprint != state["fingerprint"]:
            raise DataError(f"data folder {state['storage'].name} was repacked while it was in use: start again")
        self.__init__(state["storage"], index)  # type: ignore[misc]
        self._own_rows = state["own_rows"]


def open_split(folder: Path) -> ShardDataset:
    """Open a packed split in a local folder.

    Raises:
        DataError: the folder is missing, empty, not packed, of another version, or a shard is missing or does
            not have the size the index says.
    """
    folder = Path(folder)
    index = read_index(folder)
    storage = LocalFolder(folder)
    check_shards(storage, index.shards)
    return ShardDataset(storage, index)


def check_shards(storage: Storage, shards: tuple[ShardFacts, ...]) -> None:
    """Check that every shard is there with the size the index says.

    Raises:
        DataError: naming the first that is not.
    """
    try:
        sizes = [facts.size for facts in all_facts(storage, [shard.name for shard in shards])]
    except MissingError as error:
        raise DataError(
            f"shard {error.shown} that {INDEX_NAME} names {error.what}: restore the file or pack the split again"
        ) from None
    for shard, size in zip(shards, sizes, strict=True):
        if size not in (shard.size, -1):
            raise DataError(
                f"shard {storage.shown(shard.name)} has {size} bytes, {INDEX_NAME} says {shard.size}: restore the file "
                "or pack the split again"
            )


def check_same_classes(train: Source, val: Source) -> None:
    """Check that a label means the same class in both splits.

    Raises:
        DataError: naming the first label that differs.
    """
    for label, (ours, theirs) in enumerate(zip_longest(train.classes, val.classes)):
        if ours != theirs:
            found = f"label {label} is {_named(ours)} in {train.name} but {_named(theirs)} in {val.name}"
            if _is_foreign(train) or _is_foreign(val):
                raise DataError(f"{found}: lay a classes.txt with the names of all classes in order next to the shards")
            raise DataError(f"{found}: pack the latter with `--classes-from {train.name}`")


def _is_foreign(source: Source) -> bool:
    """Return whether the classes of a source are those of external shards."""
    return isinstance(source, ShardDataset) and "headers" in source.index.options


def _named(name: str | None) -> str:
    return "no class" if name is None else repr(name)
