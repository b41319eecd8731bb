"""SplitMix64 on tensors: the same words as `core/splitmix.py`, on any device.

int64 products wrap around on every device, and a logical shift is an arithmetic one with the sign bits masked.
"""

from __future__ import annotations

import torch

from setformer_dist.core import splitmix


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


GOLDEN = _signed(splitmix.GOLDEN)
_FIRST, _SECOND = _signed(splitmix.FIRST), _signed(splitmix.SECOND)


def mix64(words: torch.Tensor) -> torch.Tensor:
    """Return int64 words mixed."""
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * _FIRST
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * _SECOND
    return words ^ ((words >> 31) & ((1 << 33) - 1))
