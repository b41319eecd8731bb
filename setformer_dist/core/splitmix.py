"""SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit words whose values look random.

Exact integer arithmetic, so the numbers are the same on any machine, in numpy here and in torch in `ops/splitmix.py`.
A stream that begins at word w has its k-th number at mix64(w + k * GOLDEN).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB


def mix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the mixed words; the argument stays as it is."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(FIRST)
        words ^= words >> np.uint64(27)
        words *= np.uint64(SECOND)
        words ^= words >> np.uint64(31)
    return words


def counted(base: int | npt.NDArray[np.uint64], numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return what mix64 makes the numbers' draws of, numbers counted from 0: base + (n + 1) GOLDEN.

    Args:
        base: of one stream, or of one for each number.
        numbers: which draws, (k,).
    """
    with np.errstate(over="ignore"):
        return np.asarray(base, np.uint64) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
