"""One packed split, opened: `read(i)` is one `pread`, checked against the index.

Opening compares every shard's size with the index, so a shard cut short is found before the first step and not
hours later. Reading checks byte count and crc32, so flipped bits in a shard are found even where they would
still decode.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.index import INDEX_NAME, Index, ShardFacts, read_index
from dataloaders.source import DamagedSampleError, Stored
from setformer_dist.core.errors import DataError

# Open files kept per process; the usual limit of a process is 1024, and ImageNet has more shards than that.
_MAX_OPEN = 128

# Waits in seconds before each further try of a read that failed (network storage hiccups), about 8 s in all.
_RETRY_WAITS = (0.1, 0.5, 2.0, 5.0)


class ShardDataset:
    """A split's samples by number (`Source`). Cheap to send to another process: it reopens the folder there.

    Attributes:
        folder: of the shards.
        index: what the index says.
    """

    def __init__(self, folder: Path, index: Index, sleep: Callable[[float], None] = time.sleep) -> None:
        self.folder = folder
        self.index = index
        self._sleep = sleep
        self._files: OrderedDict[int, int] = OrderedDict()
        # Plain columns in locals of this object: attribute and dict look-ups cost as much as the read itself.
        columns = index.columns
        self._shard, self._offset, self._size = columns["shard"], columns["offset"], columns["size"]
        self._label, self._crc32 = columns["label"], columns["crc32"]
        self._height, self._width = columns["height"], columns["width"]

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
        """Identity of the split: changes when any sample's bytes, label or place change."""
        return self.index.fingerprint

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def parts(self) -> frozenset[str]:
        """Nothing besides image and label."""
        return frozenset()

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(N,) number of the shard that holds each sample."""
        return self._shard

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (N, 2) stored heights and widths."""
        return np.stack([self._height, self._width], axis=1)

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width), each number over all samples by itself."""
        small = int(self._height.min()), int(self._width.min())
        return small, (int(self._height.max()), int(self._width.max()))

    def key(self, sample: int) -> str:
        """Return a sample's key, as it is in the shard."""
        return self.index.key(sample)

    def size(self, sample: int) -> tuple[int, int]:
        """Return a sample's stored (height, width) in pixels."""
        return int(self._height[sample]), int(self._width[sample])

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        return torch.from_numpy(np.where(samples >= 0, self._label[samples], 0))

    def place(self, sample: int) -> str:
        """Name a sample for a message: number, key, shard."""
        shard = self.folder / self.index.shards[int(self._shard[sample])].name
        return f"sample {sample} ({self.index.key(sample)}) of {shard}"

    def read(self, sample: int) -> Stored:
        """Return a sample.

        Raises:
            DamagedSampleError: its bytes do not have the checksum of the index.
            DataError: the shard cannot be read, or is shorter than when it was opened.
        """
        data = self._pread(int(self._shard[sample]), int(self._size[sample]), int(self._offset[sample]), sample)
        if zlib.crc32(data) != int(self._crc32[sample]):
            raise DamagedSampleError(f"{self.place(sample)}: its bytes do not have the checksum of the index")
        return Stored(data)

    def _pread(self, shard: int, size: int, offset: int, sample: int) -> bytes:
        """Read with retries: a failing disk or network is not the sample's fault, so it never substitutes."""
        trouble = ""
        for wait in (*_RETRY_WAITS, None):
            try:
                data = os.pread(self._file(shard), size, offset)
                if len(data) == size:
                    return data
                trouble = f"{len(data)} of {size} bytes at offset {offset}"
            except OSError as error:
                trouble = str(error)
            self._forget(shard)
            if wait is not None:
                self._sleep(wait)
        raise DataError(
            f"{self.place(sample)} cannot be read after {len(_RETRY_WAITS) + 1} tries ({trouble}): check the "
            "storage, or restore the shard"
        )

    def _file(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            file = os.open(self.folder / self.index.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
            self._files[shard] = file
        else:
            self._files.move_to_end(shard)
        return file

    def _forget(self, shard: int) -> None:
        file = self._files.pop(shard, None)
        if file is not None:
            os.close(file)

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._files = OrderedDict()
        index = read_index(state["folder"])
        if index.fingerprint != state["fingerprint"]:
            raise DataError(f"data folder {state['folder']} was packed anew while it was in use: start again")
        self.__init__(state["folder"], index)  # type: ignore[misc]


def open_split(folder: Path) -> ShardDataset:
    """Open a packed split.

    Raises:
        DataError: the folder is missing, empty, not packed, of another version, or a shard is missing or does
            not have the size the index says.
    """
    folder = Path(folder)
    index = read_index(folder)
    for shard in index.shards:
        _check_size(folder, shard)
    return ShardDataset(folder, index)


def _check_size(folder: Path, shard: ShardFacts) -> None:
    path = folder / shard.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {path} that {INDEX_NAME} names cannot be opened ({error.strerror}): restore the file or pack "
            "the split again"
        ) from None
    if size != shard.size:
        raise DataError(
            f"shard {path} has {size} bytes, {INDEX_NAME} says {shard.size}: restore the file or pack the split again"
        )


def check_same_classes(train: ShardDataset, val: ShardDataset) -> None:
    """Check that a label means the same class in both splits.

    Raises:
        DataError: naming the first label that differs.
    """
    for label, (ours, theirs) in enumerate(zip_longest(train.classes, val.classes)):
        if ours != theirs:
            raise DataError(
                f"label {label} is {_named(ours)} in {train.folder} but {_named(theirs)} in {val.folder}: pack "
                f"the latter with `--classes-from {train.folder}`"
            )


def _named(name: str | None) -> str:
    return "no class" if name is None else repr(name)
