"""From a stored sample to what a model is shown of it, for training and for evaluation.

Every random choice is a number drawn from (seed, epoch, sample id) beforehand (`draw_choices`), so a sample's pixels
are a function of these: of no worker, thread, rank or micro batch. Everything stays uint8; normalisation happens on
the device (`dataloaders.reading.device`), at a quarter of the bytes to move.

H, W = height, width of what is shown, k = boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.pixels.augment import (
    DRAWS_OF_ERASING,
    DRAWS_OF_JITTER,
    DRAWS_PER_OPERATION,
    color_jitter,
    erased_box,
    rand_augment,
    recolours,
)
from dataloaders.pixels.decode import UndecodableError, decode, decode_mask
from dataloaders.pixels.draws import Lane, own_keys, sample_words, uniforms
from dataloaders.pixels.own import apply, own_augmentations
from dataloaders.pixels.view import (
    DRAWS_OF_CROP,
    NOT_COUNTED,
    View,
    centre_view,
    padded_view,
    random_view,
    see_boxes,
    see_image,
    see_mask,
)
from dataloaders.source import Source, Stored
from setformer_dist.core.errors import ConfigError

Shape = tuple[int, int]

# libjpeg-turbo can decode at 1/2, 1/4 and 1/8 for less work. Taken only while the crop still has at least this
# many times the output's side, so that the antialiased resize has something left to average.
_DECODE_MARGIN = 2


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample as a model is shown it.

    Attributes:
        image: (3, H, W) uint8.
        mask: (H, W) uint8, for samples with masks.
        boxes: (k, 4) float32 x0, y0, x1, y1 in pixels, and (k,) int64 classes, for samples with boxes.
        soft: as the sample has it.
    """

    image: torch.Tensor
    mask: torch.Tensor | None = None
    boxes: tuple[torch.Tensor, torch.Tensor] | None = None
    soft: npt.NDArray[np.float32] | None = None


class Choices(NamedTuple):
    """The random numbers of one sample, each in [0, 1); of `own` the keys, integers."""

    crop: list[float]
    flip: float
    randaugment: list[float]
    jitter: list[float]
    erasing: list[float]
    own: list[int]


def draw_choices(
    augment: AugmentConfig, seed: int, epochs: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]
) -> list[Choices]:
    """Draw the numbers of some samples, each from (seed, its epoch, its id) alone."""
    words = sample_words(seed, epochs, samples)

    def drawn(lane: Lane, count: int) -> list[list[float]]:
        return uniforms(words, lane, count).tolist()  # type: ignore[no-any-return]

    return [
        Choices(crop, flip[0], *rest)
        for crop, flip, *rest in zip(
            drawn(Lane.CROP, DRAWS_OF_CROP),
            drawn(Lane.FLIP, 1),
            drawn(Lane.RANDAUGMENT, DRAWS_PER_OPERATION * augment.randaugment_ops),
            drawn(Lane.JITTER, DRAWS_OF_JITTER if augment.color_jitter else 0),
            drawn(Lane.ERASING, DRAWS_OF_ERASING if augment.erasing else 0),
            own_keys(words, len(augment.own)).tolist(),
            strict=True,
        )
    ]


class TrainTransform:
    """A stored sample to an augmented one.

    Args:
        config: of the data.
        source: what the samples are of.

    Raises:
        ConfigError: an augmentation that images of this size, or samples with masks or boxes, cannot have; or one of
            the user's own that is not registered or not keyed.
    """

    def __init__(self, config: DataConfig, source: Source) -> None:
        self._augment = config.augment
        self._interpolation = config.interpolation
        self._keep = config.eval_crop
        self._recolours = recolours(config.augment)
        self._own = own_augmentations(config.augment.own, config.image_size, config.workers)
        # The mean colour is zero once normalised: what the network sees as "nothing there".
        self._mean_colour = [float(round(255 * value)) for value in config.mean]
        self._erased = torch.tensor(self._mean_colour, dtype=torch.uint8).view(3, 1, 1)
        _check_sizes(config, source)
        _check_parts(config.augment, source)

    def __call__(self, sample: Stored, stored: Shape, shape: Shape, choices: Choices) -> Shown:
        """Return what is shown of a sample stored as (height, width), in (H, W).

        Raises:
            UndecodableError: the bytes are not a whole image, or not one of the size the container says.
        """
        view = self._view(stored, shape, choices.crop).mirror(self._augment.flip and choices.flip < 0.5)
        shrink = _decode_shrink(view) if self._augment.crop == "resized" else 1
        least = (-(-stored[0] // shrink), -(-stored[1] // shrink)) if shrink > 1 else (0, 0)
        pixels = decode(sample.image, *least)
        _check_shape(pixels.shape[:2], stored, shrink)
        image = see_image(view, pixels, stored, self._interpolation)
        mask = None if sample.mask is None else see_mask(view, decode_mask(sample.mask, stored))
        if self._recolours:
            image, mask = self._recoloured(image, mask, choices)
        return Shown(image, mask, None if sample.boxes is None else see_boxes(view, sample.boxes), sample.soft)

    def _view(self, stored: Shape, shape: Shape, draws: list[float]) -> View:
        if self._augment.crop == "resized":
            return random_view(stored, shape, self._augment, draws)
        if self._augment.crop == "pad":
            return padded_view(stored, self._augment.pad, draws)
        return centre_view(stored, shape, self._keep)

    def _recoloured(
        self, image: torch.Tensor, mask: torch.Tensor | None, choices: Choices
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        augment = self._augment
        if augment.randaugment_ops:
            image = rand_augment(image, augment.randaugment_magnitude, choices.randaugment, self._mean_colour)
        if augment.color_jitter:
            image = color_jitter(image, augment.color_jitter, choices.jitter)
        if augment.erasing:
            height, width = image.shape[-2:]
            box = erased_box(height, width, augment.erasing, choices.erasing)
            if box is not None:
                rows, columns = slice(box[0], box[0] + box[2]), slice(box[1], box[1] + box[3])
                image = image.clone()
                image[:, rows, columns] = self._erased
                if mask is not None:
                    mask = mask.clone()
                    mask[rows, columns] = NOT_COUNTED
        for (name, function), key in zip(self._own, choices.own, strict=True):
            image = apply(name, function, image, key)
        return image, mask


def show_for_eval(sample: Stored, config: DataConfig) -> Shown:
    """Return a sample as evaluation sees it, in (H, W): resized so that it covers (H, W) / eval_crop, centre cut.

    An image of H x W is taken as it is. The resize is antialiased; against timm's (PIL's) the mean difference
    is below 1 of 255.

    Raises:
        UndecodableError: the bytes are not a whole image.
    """
    pixels = decode(sample.image)
    stored = pixels.shape[0], pixels.shape[1]
    view = centre_view(stored, config.shape, config.eval_crop)
    mask = None if sample.mask is None else see_mask(view, decode_mask(sample.mask, stored))
    image = see_image(view, pixels, stored, config.interpolation)
    return Shown(image, mask, None if sample.boxes is None else see_boxes(view, sample.boxes), sample.soft)


def decode_for_eval(data: bytes | npt.NDArray[np.uint8], config: DataConfig) -> torch.Tensor:
    """Return an image as evaluation sees it, (3, H, W) uint8; see `show_for_eval`.

    Raises:
        UndecodableError: the bytes are not a whole image.
    """
    return show_for_eval(Stored(data), config).image


def _decode_shrink(view: View) -> int:
    """Return 8, 4, 2 or 1: how much smaller a JPEG may be decoded for this view."""
    scale = min(view.box[2] / view.resized[0], view.box[3] / view.resized[1])
    return next((shrink for shrink in (8, 4, 2) if scale >= _DECODE_MARGIN * shrink), 1)


def _check_shape(decoded: tuple[int, ...], stored: Shape, shrink: int) -> None:
    """Refuse an image of another size than its container says: the crop was chosen for that size.

    Raises:
        UndecodableError: it is.
    """
    if decoded != stored and (shrink == 1 or decoded != tuple(-(-side // shrink) for side in stored)):
        raise UndecodableError(
            f"it is {decoded[0]} x {decoded[1]} pixels, its container says {stored[0]} x {stored[1]}"
        )


def _check_sizes(config: DataConfig, source: Source) -> None:
    if config.augment.crop != "pad":
        return
    smallest, largest = source.extent()
    wanted = config.shape
    if not smallest == largest == wanted:
        raise ConfigError(
            f'augment.crop = "pad" needs images of {wanted[0]} x {wanted[1]} (data.image_size), but those '
            f"of {source.name} go from {smallest[0]} x {smallest[1]} to {largest[0]} x {largest[1]}: set image_size "
            'to their size or augment.crop = "resized"'
        )


def _check_parts(augment: AugmentConfig, source: Source) -> None:
    """Refuse what masks and boxes cannot follow."""
    placed = source.parts - {"soft"}  # which is mixed as labels are
    if not placed:
        return
    with_parts = f"samples of {source.name} come with {' and '.join(sorted(placed))}"
    if augment.randaugment_ops:
        raise ConfigError(
            f"augment.randaugment_ops = {augment.randaugment_ops} shears, shifts and turns images, but {with_parts}, "
            "which would not follow: set it to 0"
        )
    if augment.mixes:
        raise ConfigError(
            f"augment.mixup and augment.cutmix mix images with one label each, but {with_parts}: set both to 0"
        )
