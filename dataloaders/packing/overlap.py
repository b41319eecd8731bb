"""Samples that lie in two splits: what a model was trained on says nothing about how well it does on others.

Samples are compared by the checksums that packing keeps (crc32 and bytes of the image; of an image in tiles those of
its tiles). Equal by chance: one pair in 4 thousand million of those that have the same number of bytes.

Seconds for a hundred million samples: the index is enough. Of images in tiles a table is read each, so only of some
thousands in a local folder; elsewhere, shards would be fetched for it.
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
from dataloaders.storage.base import LocalFolder
from setformer_dist.core.errors import DataError

UNKNOWN = -1
TABLES = 10_000  # images in tiles of a source, at most, whose tables are read
_BLOCK = 1 << 20


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
    of_other = checksums(other)
    wanted = np.unique(of_other[of_other != UNKNOWN])
    of_one = checksums(one) if len(wanted) else of_other
    if not len(wanted) or (of_one == UNKNOWN).all():
        return None
    found = np.zeros(len(wanted), bool)
    for begin in range(0, len(of_one), _BLOCK):  # numpy.isin sorts both: 75 s for 20 million samples, this 3 s
        block = of_one[begin : begin + _BLOCK]
        places = _places(wanted, block)
        found[places[wanted[places] == block]] = True
    shared = np.flatnonzero(found[_places(wanted, of_other)] & (of_other != UNKNOWN))
    if not len(shared):
        return Overlap(0, ("", ""))
    twin = int(np.flatnonzero(of_one == of_other[shared[0]])[0])
    return Overlap(len(shared), (one.key(twin), other.key(int(shared[0]))))


def _places(rising: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Return where each value stands in a rising array, if it is there."""
    return np.minimum(np.searchsorted(rising, values), len(rising) - 1)


def checksums(source: Source) -> npt.NDArray[np.int64]:
    """Return a number for each sample, (N,), the same for the same image; -1 where nothing says it without reading it.

    Reads the tables of images in tiles, one read each, where they lie in a local folder and are `TABLES` at most.
    """
    if isinstance(source, SubsetSource):
        return checksums(source.source)[source.chosen]
    if isinstance(source, MixtureSource):
        return np.concatenate([checksums(part) for part in source.sources])
    if not isinstance(source, ShardDataset) or "crc32" not in source.index.columns:
        return np.full(source.num_samples, UNKNOWN, np.int64)
    if source.index.options.get("tiles"):
        if source.num_samples > TABLES or not isinstance(source.storage, LocalFolder):
            return np.full(source.num_samples, UNKNOWN, np.int64)
        return np.array([_of_tiles(source, sample) for sample in range(source.num_samples)], np.int64)
    columns = source.index.columns
    checks: npt.NDArray[np.int64] = columns["crc32"].astype(np.int64) << 31 ^ columns["size"]
    checks[columns["size"] == 0] = UNKNOWN  # no image
    return checks


def _of_tiles(source: ShardDataset, sample: int) -> int:
    try:
        image = source.read(sample).image
    except (DamagedSampleError, DataError):
        return UNKNOWN  # reading it in training, or `verify`, says more
    return UNKNOWN if not isinstance(image, Tiled) else zlib.crc32(image.content) << 31 ^ image.num_bytes
