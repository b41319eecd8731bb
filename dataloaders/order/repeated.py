"""Repeated augmentation (Hoffer et al. 2020): each image several times in a global batch, every time augmented anew.

    places of a batch    0 .. B/R - 1    B/R .. 2B/R - 1    ...    B - B/R .. B - 1
    images of a plan       copy 0            copy 1                  copy R - 1        B = global batch, R = repeats

So neighbours, which mixup and cutmix put together, are different images, and ranks share the copies of an image.

What random choices of a sample are drawn by is its epoch: copy c of an epoch e counts as epoch e R + c. No (epoch,
sample) comes twice, and R epochs of the run show each sample R times, as they do without repeats.
"""

from __future__ import annotations

import numpy as np

from dataloaders.order.order import Ints, Plan
from setformer_dist.core.errors import ConfigError


class RepeatedPlan:
    """The batches of another plan, each in R copies (`Plan`).

    Args:
        plan: with B / R samples a batch.
        repeats: R.
        steps_per_epoch: optimizer steps that count as an epoch: those of the plan with B samples a batch.
    """

    def __init__(self, plan: Plan, repeats: int, steps_per_epoch: int) -> None:
        self.num_samples = plan.num_samples
        self.global_batch = plan.global_batch * repeats
        self.steps_per_epoch = steps_per_epoch
        self.id = f"{plan.id} repeats {repeats}"
        self._plan, self._repeats = plan, repeats

    def pick(self, step: int, places: Ints) -> tuple[Ints, Ints]:
        """Return samples and epochs at places of a step's batch."""
        copies, within = np.divmod(places, self._plan.global_batch)
        samples, epochs = self._plan.pick(step, within)
        return samples, epochs * self._repeats + copies

    def aspect(self, step: int) -> float:
        """Return width / height of the images of a step's batch."""
        return self._plan.aspect(step)


def copies_of(epochs: Ints, repeats: int) -> Ints:
    """Return which copy of its sample each is, by the epochs that `RepeatedPlan.pick` returned."""
    return epochs % repeats


def check_repeats(repeats: int, group: int, global_batch: int) -> None:
    """Check that a global batch is whole copies of whole groups.

    Raises:
        ConfigError: it is not.
    """
    unit = repeats * group
    if global_batch % unit:
        groups = f", in groups of mix_group = {group} that mix" if group > 1 else ""
        below = global_batch // unit * unit
        sizes = " or ".join(str(size) for size in (below, below + unit) if size)
        raise ConfigError(
            f"augment.repeats = {repeats} has each image {repeats} times in a global batch{groups}, and {global_batch} "
            f"is no multiple of {unit}: set batch.global_size = {sizes}, or other repeats"
        )
