"""Who mixes with whom: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) within fixed groups.

Position p of an epoch's order belongs to group p // g. A group's choice (mix at all, which of the two, how much,
with which neighbour, which rectangle) is drawn from (seed, epoch, group), and g divides the micro batch, so a
group is never cut apart and the choice depends on neither ranks nor micro batch.

m = micro batch, g = group, S = image size.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dataloaders.config import AugmentConfig
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.seeding import Purpose, generator

# (partner within the micro batch, share of the sample itself, y0 y1 x0 x1)
MixArrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]


def check_groups(augment: AugmentConfig, micro_batch: int) -> None:
    """Check that micro batches are made of whole groups.

    Raises:
        ConfigError: they are not.
    """
    if augment.mixes and micro_batch % augment.mix_group:
        raise ConfigError(
            f"augment.mix_group = {augment.mix_group} does not divide the micro batch {micro_batch}, so a group "
            "would be cut apart: set a divisor of the micro batch"
        )


def draw_mix(
    augment: AugmentConfig, size: int, seed: int, epoch: int, first_position: int, count: int
) -> MixArrays | None:
    """Draw the mixing of the `count` positions from `first_position` on; None if nothing ever mixes."""
    if not augment.mixes:
        return None
    group = augment.mix_group
    partner = np.arange(count, dtype=np.int64)
    lam = np.ones(count, dtype=np.float32)
    box = np.zeros((count, 4), dtype=np.int64)
    for start in range(0, count, group):
        members = np.arange(group)
        shift, share, rectangle = _draw_group(augment, size, seed, epoch, (first_position + start) // group)
        partner[start : start + group] = start + (members + shift) % group
        lam[start : start + group] = share
        box[start : start + group] = rectangle
    return partner, lam, box


def _draw_group(
    augment: AugmentConfig, size: int, seed: int, epoch: int, group: int
) -> tuple[int, float, tuple[int, int, int, int]]:
    """Return (how far on in the group the partner is, own share, rectangle)."""
    random = generator(Purpose.MIX, seed, epoch, group)
    nothing = (0, 0, 0, 0)
    whether, which = random.random(2).tolist()
    if whether >= augment.mix_prob:
        return 0, 1.0, nothing
    shift = 1 + int(random.random() * (augment.mix_group - 1))
    cut = augment.cutmix > 0 and (augment.mixup == 0 or which < 0.5)
    alpha = augment.cutmix if cut else augment.mixup
    share = float(random.beta(alpha, alpha))
    if not cut:
        return shift, share, nothing
    rectangle = _rectangle(size, share, *random.random(2).tolist())
    y0, y1, x0, x1 = rectangle
    # At the border the rectangle loses area, and on whole pixels too: the label follows what is really pasted.
    return shift, 1.0 - (y1 - y0) * (x1 - x0) / size**2, rectangle


def _rectangle(size: int, share: float, y_draw: float, x_draw: float) -> tuple[int, int, int, int]:
    """Return y0, y1, x0, x1 of a square of area (1 - share) S^2 about a random centre, cut at the border."""
    half = int(size * math.sqrt(1.0 - share)) / 2
    y, x = int(y_draw * size), int(x_draw * size)
    return (
        max(0, math.ceil(y - half)),
        min(size, math.ceil(y + half)),
        max(0, math.ceil(x - half)),
        min(size, math.ceil(x + half)),
    )
