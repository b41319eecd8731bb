"""Random numbers of a sample, as plain numbers: a function of (seed, epoch, sample, what for), drawn for many at once.

A generator object per sample would cost as much as reading the sample. Here a micro batch's numbers come from one
vectorised pass of SplitMix64 (`core/splitmix.py`): the key of a sample is the state its stream begins at.
Integer arithmetic throughout, so the numbers are the same on any machine.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from setformer_dist.core.seeding import Purpose, derive_key
from setformer_dist.core.splitmix import GOLDEN, counted, mix64

_TO_UNIT = 2.0**-53


class Lane(enum.IntEnum):
    """What numbers are for: each has a stream of its own, so switching one augmentation leaves all others as they are.

    Part of what a run is: never renumber, only append.
    """

    CROP = 0
    FLIP = 1
    RANDAUGMENT = 2
    JITTER = 3
    ERASING = 4
    OWN = 5
    VFLIP = 6
    POLICY = 7


def sample_words(seed: int, epochs: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return the key of each sample's streams, (k,) uint64."""
    by_epoch = mix64(counted(derive_key(Purpose.AUGMENT, seed) & (2**64 - 1), epochs))
    return mix64(counted(by_epoch, samples))


def own_keys(words: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.uint64]:
    """Return `count` keys below 2^63 for each sample's key, (k, count): one for each augmentation of a user's own."""
    return _drawn(words, Lane.OWN, count) >> np.uint64(1)


def uniforms(words: npt.NDArray[np.uint64], lane: Lane, count: int) -> npt.NDArray[np.float64]:
    """Return `count` numbers in [0, 1) for each key, (k, count) float64."""
    return (_drawn(words, lane, count) >> np.uint64(11)).astype(np.float64) * _TO_UNIT


def _drawn(words: npt.NDArray[np.uint64], lane: Lane, count: int) -> npt.NDArray[np.uint64]:
    # Lanes are 2^32 numbers apart in a sample's stream, far more than any of them draws.
    counters = (np.uint64(int(lane) << 32) + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(GOLDEN)
    with np.errstate(over="ignore"):
        return mix64(words[:, None] + counters)
