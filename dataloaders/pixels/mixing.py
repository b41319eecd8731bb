"""Which samples are mixed: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) within fixed groups.

Position p of the run (step x global batch + place in the batch) belongs to group p // g. A group's choice (mix at
all, which of the two, how much, with which neighbour, which rectangle) is drawn from (seed, group), and g divides the
micro batch, so a group is never cut apart and the choice depends on neither ranks nor micro batch.

m = micro batch, g = group, H, W = height, width of the images.
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
    augment: AugmentConfig, shape: tuple[int, int], seed: int, first_position: int, count: int
) -> MixArrays | None:
    """Draw the mixing of the `count` positions from `first_position` on, images (H, W); None if nothing ever mixes."""
    if not augment.mixes:
        return None
    group = augment.mix_group
    partner = np.arange(count, dtype=np.int64)
    lam = np.ones(count, dtype=np.float32)
    box = np.zeros((count, 4), dtype=np.int64)
    for start in range(0, count, group):
        members = np.arange(group)
        shift, share, rectangle = _draw_group(augment, shape, seed, (first_position + start) // group)
        partner[start : start + group] = start + (members + shift) % group
        lam[start : start + group] = share
        box[start : start + group] = rectangle
    return partner, lam, box


def _draw_group(
    augment: AugmentConfig, shape: tuple[int, int], seed: int, group: int
) -> tuple[int, float, tuple[int, int, int, int]]:
    """Return (how far on in the group the partner is, own share, rectangle)."""
    random = generator(Purpose.MIX, seed, group)
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
    rectangle = _rectangle(shape, share, *random.random(2).tolist())
    y0, y1, x0, x1 = rectangle
    # At the border the rectangle loses area, and on whole pixels too: the label follows what is really pasted.
    return shift, 1.0 - (y1 - y0) * (x1 - x0) / (shape[0] * shape[1]), rectangle


def _rectangle(shape: tuple[int, int], share: float, y_draw: float, x_draw: float) -> tuple[int, int, int, int]:
    """Return y0, y1, x0, x1 of a rectangle of area (1 - share) H W about a random centre, cut at the border."""
    y0, y1 = _stretch(shape[0], share, y_draw)
    return y0, y1, *_stretch(shape[1], share, x_draw)


def _stretch(length: int, share: float, draw: float) -> tuple[int, int]:
    half, centre = int(length * math.sqrt(1.0 - share)) / 2, int(draw * length)
    return max(0, math.ceil(centre - half)), min(length, math.ceil(centre + half))
