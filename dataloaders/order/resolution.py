"""The size of training images: a pure function of the optimizer step and of the shape of its batch.

    progressive resizing    `data.resolutions`: from an epoch or a step on, another image size, a ramp of sizes, or a
                            size that is drawn for each step
    aspect buckets          `data.aspect_buckets`: each batch has one shape of about image_size x image_size pixels,
                            and holds images whose own shape is near to it

A request for a micro batch carries its size, so what was prepared ahead of a change has the old size and the first
batch after it the new one, on every rank and after every resumption. Evaluation keeps `data.image_size`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dataloaders.config import DataConfig, ResolutionStage
from dataloaders.order.mixture import Shares
from dataloaders.order.order import OF_BATCHES, ORDER_ID, FullOrder, Ints, walk
from dataloaders.order.permutation import Permutation
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.seeding import Purpose, generator

Shape = tuple[int, int]

_RARE = "data.aspect_buckets: {weight:g} samples are near to one of the shapes, {share}: leave that entry out"


class ImageSizes:
    """The (height, width) of every step's images.

    Args:
        config: gives the stages and the buckets.
        steps_per_epoch: by which stages that begin at an epoch begin at a step.
        seed: of the run; sizes that are drawn depend on it and on the step.

    Raises:
        ConfigError: two stages begin at the same step, or a ramp has no end or too few steps.
    """

    def __init__(self, config: DataConfig, steps_per_epoch: int, seed: int = 0) -> None:
        self._seed = seed
        self._multiple = config.bucket_multiple if config.aspect_buckets else 1
        self._shape = config.shape
        stages = {0: ResolutionStage(step=0, image_size=config.image_size)}
        begins: set[int] = set()
        for stage in config.resolutions:
            step = stage.step if stage.step is not None else (stage.epoch or 0) * steps_per_epoch
            if step in begins:
                raise ConfigError(f"data.resolutions: two stages begin at step {step}: leave one out")
            begins.add(step)
            stages[step] = stage
        self._steps = sorted(stages)
        self._stages = [stages[step] for step in self._steps]
        for place, stage in enumerate(self._stages):
            if stage.ramp_to:
                self._check_ramp(place)

    def _check_ramp(self, place: int) -> None:
        stage, first = self._stages[place], self._steps[place]
        if place + 1 == len(self._steps):
            raise ConfigError(
                f"data.resolutions: the ramp to {stage.ramp_to} that begins at step {first} has no end: add the stage "
                f"that follows it, such as {{step = ..., image_size = {stage.ramp_to}}}"
            )
        if (steps := self._steps[place + 1] - first) < len(stage.sides):
            raise ConfigError(
                f"data.resolutions: the ramp from {stage.image_size} to {stage.ramp_to} has {len(stage.sides)} sizes "
                f"and {steps} steps: give it more steps, or a larger multiple"
            )

    def side(self, step: int) -> int:
        """Return the image size that holds at a step: the height."""
        place = int(np.searchsorted(self._steps, step, side="right")) - 1
        stage, first = self._stages[place], self._steps[place]
        sides = stage.sides
        if stage.random_to:
            return sides[int(generator(Purpose.SIZE, self._seed, step).integers(len(sides)))]
        if stage.ramp_to:
            return sides[(step - first) * len(sides) // (self._steps[place + 1] - first)]
        return sides[0]

    def scale(self, step: int) -> tuple[float, float] | None:
        """Return the share of the area that the crops of a step take; None for that of the config."""
        return self._stages[int(np.searchsorted(self._steps, step, side="right")) - 1].scale

    def shape(self, step: int, aspect: float = 1.0) -> Shape:
        """Return (height, width) of a step's images, of width / height near `aspect`."""
        side = self.side(step)
        if self._multiple == 1:
            return proportional(side, self._shape)
        return bucket_shape(side, aspect, self._multiple)


def proportional(side: int, shape: Shape) -> Shape:
    """Return the (height, width) of height `side` that is as wide as a shape."""
    height, width = shape
    return side, max(1, round(side * width / height))


def bucket_shape(side: int, aspect: float, multiple: int) -> Shape:
    """Return the (height, width) of about side x side pixels and width / height `aspect`, in whole multiples."""
    height, width = (max(1, round(length / multiple)) * multiple for length in _sides(side, aspect))
    return height, width


def _sides(side: int, aspect: float) -> tuple[float, float]:
    return side / math.sqrt(aspect), side * math.sqrt(aspect)


def assign_buckets(sizes: npt.NDArray[np.int32], aspects: Sequence[float], global_batch: int) -> list[Ints]:
    """Return the samples of each bucket, rising: each sample is in the one nearest to it in width / height.

    Near is measured in the logarithm. A bucket that cannot fill one global batch is given up, the smallest first,
    and its samples go to the nearest of the others, so that no sample is left out for ever; such a bucket is empty
    in the answer.

    Args:
        sizes: (N, 2) stored heights and widths.
        aspects: width / height of the buckets.
        global_batch: B.
    """
    own = np.log(sizes[:, 1] / np.maximum(sizes[:, 0], 1))
    open_buckets = list(range(len(aspects)))
    while True:
        centres = np.log(np.array([aspects[bucket] for bucket in open_buckets]))
        nearest = np.abs(own[:, None] - centres).argmin(axis=1)
        counts = np.bincount(nearest, minlength=len(open_buckets))
        if len(open_buckets) == 1 or counts.min() >= global_batch:
            break
        del open_buckets[int(counts.argmin())]
    members = [np.empty(0, np.int64)] * len(aspects)
    for place, bucket in enumerate(open_buckets):
        members[bucket] = np.flatnonzero(nearest == place)
    return members


class BucketPlan:
    """Batches of one shape each (`Plan`): every bucket is permuted by itself, and so is the sequence of batches.

    Without wrap, epoch e holds floor(N_b / B) batches of each bucket b, and the N_b % B samples left are others in
    each epoch. With wrap, every bucket walks its own epochs, batches are dealt out to buckets in proportion to
    their samples, and nothing is left out.

    Args:
        members: samples of each bucket, empty for buckets given up.
        aspects: width / height of each.
        global_batch: B.
        seed: of the run.
        wrap: see above.

    Raises:
        ConfigError: without wrap, B is larger than N.
    """

    def __init__(
        self, members: Sequence[Ints], aspects: Sequence[float], global_batch: int, seed: int, wrap: bool = False
    ) -> None:
        filled = [(ids, aspect) for ids, aspect in zip(members, aspects, strict=True) if len(ids)]
        self._members = [ids for ids, _ in filled]
        self._aspects = [aspect for _, aspect in filled]
        counts = np.array([len(ids) for ids in self._members])
        self.num_samples = int(counts.sum())
        self.global_batch = global_batch
        self._orders = [FullOrder(len(ids), seed, place) for place, ids in enumerate(self._members)]
        self._seed, self._wrap = seed, wrap
        self._shares = Shares(counts.tolist(), seed, OF_BATCHES, rare=_RARE) if wrap else None
        self._ends = np.cumsum(counts // global_batch)
        self.steps_per_epoch = -(-self.num_samples // global_batch) if wrap else int(self._ends[-1])
        if not self.steps_per_epoch:
            raise ConfigError(
                f"global batch {global_batch} is larger than the data set of {self.num_samples} samples: set it to "
                f'{self.num_samples} or less, or data.epoch_end = "wrap"'
            )
        rule = hashlib.sha256(repr([*map(float, aspects), *counts.tolist()]).encode()).hexdigest()[:16]
        self.id = f"{ORDER_ID} buckets {rule} {'wrap' if wrap else 'drop'}"
        self._sequence: tuple[int, Permutation] | None = None

    def pick(self, step: int, places: Ints) -> tuple[Ints, Ints]:
        """Return samples and epochs at places of a step's batch."""
        bucket, batch, epoch = self._batch(step)
        order, wanted = self._orders[bucket], batch * self.global_batch + places
        if self._wrap:
            found, epochs = walk(order, wanted)
        else:
            found, epochs = order(epoch, wanted), np.full_like(places, epoch)
        return self._members[bucket][found], epochs

    def aspect(self, step: int) -> float:
        """Return width / height of the bucket that a step's batch is of."""
        return self._aspects[self._batch(step)[0]]

    def _batch(self, step: int) -> tuple[int, int, int]:
        """Return (bucket, number of the batch within it, epoch) of a step."""
        if self._shares is not None:
            member, before = self._shares.at(np.array([step]))
            return int(member[0]), int(before[0]), 0
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._sequence is None or self._sequence[0] != epoch:
            self._sequence = epoch, Permutation(self.steps_per_epoch, OF_BATCHES, self._seed, epoch)
        batch = int(self._sequence[1](np.array([within]))[0])
        bucket = int(np.searchsorted(self._ends, batch, side="right"))
        return bucket, batch - (int(self._ends[bucket - 1]) if bucket else 0), epoch


def training_shapes(config: DataConfig) -> list[tuple[int, int]]:
    """Return every height and width of the images that training will show."""
    return _shapes_of(config, {config.image_size, *(side for stage in config.resolutions for side in stage.sides)})


def telling_shapes(config: DataConfig) -> list[Shape]:
    """Return the shapes that tell whether a model takes all: of each ramp and range the first two and the last.

    Sizes of a ramp lie at one distance. So a model that needs multiples of a number refuses one of the first two, or
    none.
    """
    ends = (side for stage in config.resolutions for side in (*stage.sides[:2], stage.sides[-1]))
    return _shapes_of(config, {config.image_size, *ends})


def _shapes_of(config: DataConfig, sides: set[int]) -> list[Shape]:
    shapes = {proportional(side, config.shape) for side in sides}
    if config.aspect_buckets:
        shapes = {bucket_shape(side, a, config.bucket_multiple) for side in sides for a in config.aspect_buckets}
    return sorted(shapes)
