"""Some samples of a source, as a source of their own."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.source import Source, Stored


class SubsetSource:
    """Some samples of a source, numbered from 0 in its order (`Source`).

    Args:
        source: holds all.
        chosen: (k,) numbers of the samples kept, rising, at least one.
    """

    def __init__(self, source: Source, chosen: npt.NDArray[np.int64]) -> None:
        self.source = source
        self.chosen = chosen

    @property
    def num_samples(self) -> int:
        """Samples that are kept."""
        return len(self.chosen)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the whole source."""
        return self.source.classes

    @property
    def fingerprint(self) -> str:
        """Identity of the source and of the choice."""
        return hashlib.sha256(self.source.fingerprint.encode() + self.chosen.tobytes()).hexdigest()

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.source.name

    @property
    def parts(self) -> frozenset[str]:
        """What each sample has besides image and label."""
        return self.source.parts

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(k,) number of the file that holds each sample."""
        return self.source.shards[self.chosen]

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        return self.source.labels(np.where(samples < 0, -1, self.chosen[samples]))

    def size(self, sample: int) -> tuple[int, int]:
        """Return a sample's stored (height, width) in pixels."""
        return self.source.size(int(self.chosen[sample]))

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width) of the whole source."""
        return self.source.extent()

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (k, 2) stored heights and widths."""
        return self.source.sizes()[self.chosen]

    def key(self, sample: int) -> str:
        """Return a sample's key within its shard."""
        return self.source.key(int(self.chosen[sample]))

    def place(self, sample: int) -> str:
        """Name a sample for a message."""
        return self.source.place(int(self.chosen[sample]))

    def read(self, sample: int) -> Stored:
        """Return a sample, as the source does."""
        return self.source.read(int(self.chosen[sample]))

    def close(self) -> None:
        """Close the source."""
        self.source.close()
