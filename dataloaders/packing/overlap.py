"""Samples that lie in two splits: what a model was trained on says nothing about how well it does on others.

Samples are compared by the checksums that packing keeps (crc32 and bytes of the image; of an image in tiles those of
its tiles). Equal by chance: one pair in 4 thousand million of those that have the same number of bytes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataloaders.order.mixture import MixtureSource
from dataloaders.source import DamagedSampleError, Source, Tiled
from dataloaders.sources.shards import ShardDataset
from dataloaders.sources.subset import SubsetSource
from setformer_dist.core.errors import DataError

UNKNOWN = -1


@dataclass(frozen=True)
class Overlap:
    """What two splits share.

    Attributes:
        samples: of the second split that lie in the first too.
        first: the keys of one such sample, in the first split and in the second; ("", "") where there is none.
    """

    samples: int
    first: tuple[str, str]


def overlap(one: Source, other: Source) -> Overlap | None:
    """Compare two splits; None where one of them has no checksums."""
    of_one, of_other = checksums(one), checksums(other)
    if (of_one == UNKNOWN).all() or (of_other == UNKNOWN).all():
        return None
    shared = np.flatnonzero(np.isin(of_other, of_one) & (of_other != UNKNOWN))
    if not len(shared):
        return Overlap(0, ("", ""))
    twin = int(np.flatnonzero(of_one == of_other[shared[0]])[0])
    return Overlap(len(shared), (one.key(twin), other.key(int(shared[0]))))


def checksums(source: Source) -> npt.NDArray[np.int64]:
    """Return a number for each sample, (N,), the same for the same image; -1 where nothing says it without reading it.

    Reads the tables of images in tiles, one read each.
    """
    if isinstance(source, SubsetSource):
        return checksums(source.source)[source.chosen]
    if isinstance(source, MixtureSource):
        return np.concatenate([checksums(part) for part in source.sources])
    if not isinstance(source, ShardDataset) or "crc32" not in source.index.columns:
        return np.full(source.num_samples, UNKNOWN, np.int64)
    if source.index.options.get("tiles"):
        return np.array([_of_tiles(source, sample) for sample in range(source.num_samples)], np.int64)
    columns = source.index.columns
    checks: npt.NDArray[np.int64] = columns["crc32"].astype(np.int64) << 31 ^ columns["size"]
    return checks


def _of_tiles(source: ShardDataset, sample: int) -> int:
    try:
        image = source.read(sample).image
    except (DamagedSampleError, DataError):
        return UNKNOWN  # reading it in training, or `verify`, says more
    return UNKNOWN if not isinstance(image, Tiled) else zlib.crc32(image.content) << 31 ^ image.num_bytes
