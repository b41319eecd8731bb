"""A keyed permutation of any size, position by position: no table, no sort; a position costs as much of 10 as of 10^10.

A Feistel network on pairs (l, r), 0 <= l < a, 0 <= r < b, with a b just above the size (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). Each round adds to one half, modulo its range, a hash of the other half, which
the other half can always take away again: so the network is a permutation of the a b pairs. What falls outside the
size is sent through again until it falls inside (cycle walking; less than one place in sqrt(size) does).

The hash is SplitMix64 (`core/splitmix.py`) on words of a keyed Philox stream, both in exact integer
arithmetic, so the numbers are the same on any machine and with any version of numpy.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from setformer_dist.core.seeding import Purpose, generator
from setformer_dist.core.splitmix import GOLDEN, mix64

# For large halves, four rounds of random functions look like a random permutation (Luby and Rackoff
# 1988). Halves of a few values need more; eight pass all tests of tests/unit/test_order.py from 8 samples on.
_ROUNDS = 8

_GOLDEN = np.uint64(GOLDEN)


class Permutation:
    """A permutation of 0 .. size - 1, a function of size and key.

    Args:
        size: at least 1.
        key: integers that say what is permuted; see `setformer_dist.core.seeding`.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        left = math.isqrt(size - 1) + 1  # the root, rounded up
        self._ranges = np.uint64(left), np.uint64(-(-size // left))
        self._words = generator(Purpose.ORDER, *key).bit_generator.random_raw(_ROUNDS)

    def __call__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return what is at places, (k,) int64 each."""
        found = self._network(places.astype(np.uint64))
        outside = np.flatnonzero(found >= self.size)
        while len(outside):
            found[outside] = self._network(found[outside])
            outside = outside[found[outside] >= self.size]
        return found.view(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        a, b = self._ranges
        left, right = values // b, values % b
        with np.errstate(over="ignore"):
            for even, odd in zip(self._words[0::2], self._words[1::2], strict=True):
                left = (left + mix64(even + right * _GOLDEN) % a) % a
                right = (right + mix64(odd + left * _GOLDEN) % b) % b
        return left * b + right
