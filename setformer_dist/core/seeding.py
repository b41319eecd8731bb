"""Random numbers as a function of what they are for, never of who draws them.

Every draw is keyed by integers that mean something (seed, epoch, sample id, purpose); a counter-based
generator (Philox) turns the key into a stream. Two processes that draw for the same purpose draw the same.
"""

from __future__ import annotations

import enum
import hashlib
import struct

import numpy as np

from setformer_dist.core.splitmix import counted, mix64


class Purpose(enum.IntEnum):
    """What a random stream is for; part of every key, so that no two purposes share a stream.

    The numbers are part of the reproducibility contract: never renumber, only append.
    """

    ORDER = 1
    AUGMENT = 2
    MIX = 3
    SUBSTITUTE = 4
    DROP_PATH = 5
    INIT = 6
    PACK = 7
    KMEANS = 8
    LISTOPS = 9
    PATHFINDER = 10
    REFRESH = 11
    MASK = 12
    SIZE = 13
    SWEEP = 20
    POPULATION = 21


def derive_key(purpose: Purpose, *numbers: int) -> int:
    """Return a 128-bit key for (purpose, *numbers): BLAKE2b over their fixed-width encoding."""
    data = struct.pack(f"<{1 + len(numbers)}q", int(purpose), *numbers)
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "little")


def generator(purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Return a numpy generator (Philox) that depends on the purpose and the numbers alone."""
    return np.random.Generator(np.random.Philox(key=derive_key(purpose, *numbers)))


def torch_seed(purpose: Purpose, *numbers: int) -> int:
    """Return a 63-bit seed for a torch generator, a function of the purpose and the numbers alone."""
    return derive_key(purpose, *numbers) & (2**63 - 1)


def sample_keys(purpose: Purpose, seed: int, step: int, sample_ids: np.ndarray) -> np.ndarray:
    """Return one int64 key per sample, a function of (purpose, seed, step, sample id) alone.

    One vectorised pass of SplitMix64, since this runs at every micro batch.

    Args:
        purpose: what the keys are for.
        seed: the run's seed.
        step: the optimizer step.
        sample_ids: (m,) integers.
    """
    base = derive_key(purpose, seed, step) & (2**64 - 1)
    return mix64(counted(base, sample_ids)).view(np.int64)
