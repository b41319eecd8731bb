"""From a stored sample to what a model is shown of it, for training and for evaluation.

Every random choice is a number drawn from (seed, epoch, sample id) beforehand (`draw_choices`), so a sample's pixels
are a function of these: of no worker, thread, rank or micro batch. Pixels keep the numbers that they are stored with
(uint8, uint16); normalisation happens on the device (`dataloaders.reading.device`), at a quarter of the bytes to move.

H, W = height, width of what is shown, B = bands, k = boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.order.resolution import training_shapes
from dataloaders.pixels.augment import (
    DRAWS_OF_ERASING,
    DRAWS_OF_JITTER,
    DRAWS_OF_POLICY,
    DRAWS_PER_OPERATION,
    augment_by,
    color_jitter,
    erased_box,
    rand_augment,
    recolours,
)
from dataloaders.pixels.decode import check_shape, decode, decode_box, decode_mask, stored_shape, unfit
from dataloaders.pixels.depth import FULL_RANGE, PixelFormat
from dataloaders.pixels.draws import Lane, own_keys, sample_words, uniforms
from dataloaders.pixels.own import apply, own_augmentations
from dataloaders.pixels.view import (
    DRAWS_OF_CROP,
    View,
    centre_view,
    dtype_of,
    jittered_view,
    padded_view,
    random_view,
    scaled,
    see_boxes,
    see_image,
    see_mask,
    whole_shape,
    whole_view,
    window_view,
)
from dataloaders.source import UNLABELLED, Boxes, Fetching, Source, Stored, Tiled
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import ConfigError, DataError

Shape = tuple[int, int]

# libjpeg-turbo can decode at 1/2, 1/4 and 1/8 for less work. Taken only while the crop still has at least this
# many times the output's side, so that the antialiased resize has something left to average.
_DECODE_MARGIN = 2

# What a random window draws where it is the one in the middle.
_CENTRE = (0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample as a model is shown it.

    Attributes:
        image: (B, H, W) of the numbers that `data.pixels` names.
        mask: (H, W) uint8, for samples with masks.
        boxes: in pixels of the image, without crowds; as they are stored where evaluation shows whole images. None for
            samples without boxes.
        soft: as the sample has it.
        stored: (height, width) of its image as stored.
    """

    image: torch.Tensor
    mask: torch.Tensor | None
    boxes: Boxes | None
    soft: npt.NDArray[np.float32] | None
    stored: Shape


class Choices(NamedTuple):
    """The random numbers of one sample, each in [0, 1); of `own` the keys, integers."""

    crop: list[float]
    flip: float
    vflip: float
    randaugment: list[float]
    policy: list[float]
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
        Choices(crop, flip[0], vflip[0], *rest)
        for crop, flip, vflip, *rest in zip(
            drawn(Lane.CROP, DRAWS_OF_CROP),
            drawn(Lane.FLIP, 1),
            drawn(Lane.VFLIP, 1),
            drawn(Lane.RANDAUGMENT, DRAWS_PER_OPERATION * augment.randaugment_ops),
            drawn(Lane.POLICY, DRAWS_OF_POLICY if augment.policy != "none" else 0),
            drawn(Lane.JITTER, DRAWS_OF_JITTER if augment.color_jitter else 0),
            drawn(Lane.ERASING, DRAWS_OF_ERASING if augment.erasing else 0),
            own_keys(words, len(augment.own)).tolist(),
            strict=True,
        )
    ]


def mirrored(view: View, augment: AugmentConfig, choices: Choices) -> View:
    """Return a view mirrored as drawn, left to right and top to bottom."""
    return view.mirror(augment.flip and choices.flip < 0.5, choices.vflip < augment.vflip)


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
        self._form = config.form
        self._classes = classes_in_masks(source)
        example = torch.zeros((config.bands, config.image_size, config.image_size), dtype=dtype_of(config.form))
        self._own = own_augmentations(config.augment.own, example, config.workers)
        # The mean colour is zero once normalised: what the network sees as "nothing there".
        full = FULL_RANGE[config.pixels]
        self._mean_colour = [float(round(full * value)) if full > 1 else value for value in config.mean]
        self._erased = torch.tensor(self._mean_colour).to(dtype_of(config.form)).view(-1, 1, 1)
        _check_sizes(config, source)
        check_windows(config, source, training_shapes(config))
        _check_parts(config.augment, source)

    def __call__(
        self,
        sample: Stored,
        stored: Shape,
        shape: Shape,
        choices: Choices,
        scale: tuple[float, float] | None = None,
    ) -> Shown:
        """Return what is shown of a sample stored as (height, width), in (H, W).

        Args:
            sample: as its source reads it.
            stored: its (height, width).
            shape: (H, W).
            choices: drawn for it.
            scale: share of the area of its crop; None for that of the config.

        Raises:
            UndecodableError: the bytes are not a whole image, or not one of the size the container says.
        """
        view = mirrored(self._view(stored, shape, choices.crop, scale), self._augment, choices)
        shrink = _decode_shrink(view) if self._augment.crop in ("resized", "scale_jitter") else 1
        outside = self._erased if self._augment.crop == "scale_jitter" else 0
        image = _seen(sample, view, stored, shrink, self._form, self._interpolation, outside)
        mask = (
            None if sample.mask is None else see_mask(view, decode_mask(sample.mask, stored, self._classes, self._form))
        )
        if self._recolours:
            image, mask = self._recoloured(image, mask, choices)
        boxes = None if sample.boxes is None else see_boxes(view, sample.boxes)
        return Shown(image, mask, boxes, sample.soft, stored)

    def _view(self, stored: Shape, shape: Shape, draws: list[float], scale: tuple[float, float] | None) -> View:
        if self._augment.crop == "resized":
            return random_view(stored, shape, scaled(self._augment, scale), draws)
        if self._augment.crop == "scale_jitter":
            return jittered_view(stored, shape, self._augment.scale_jitter, draws)
        if self._augment.crop == "pad":
            return padded_view(stored, self._augment.pad, draws)
        if self._augment.crop == "window":
            return window_view(stored, shape, draws)
        return centre_view(stored, shape, self._keep)

    def _recoloured(
        self, image: torch.Tensor, mask: torch.Tensor | None, choices: Choices
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        augment = self._augment
        if augment.randaugment_ops:
            image = rand_augment(image, augment.randaugment_magnitude, choices.randaugment, self._mean_colour)
        if augment.policy != "none":
            image = augment_by(augment.policy, image, choices.policy, self._mean_colour)
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
                    mask[rows, columns] = VOID
        for (name, function), key in zip(self._own, choices.own, strict=True):
            image = apply(name, function, image, key)
        return image, mask


def classes_in_masks(source: Source) -> int:
    """Return how many classes the masks of a source may have; all, where it names none."""
    return VOID if source.classes == (UNLABELLED,) else len(source.classes)


def evaluated_shape(stored: Shape, config: DataConfig) -> Shape:
    """Return (height, width) of an image as evaluation shows it, which was stored as (height, width)."""
    if config.eval_view == "centre":
        return config.shape
    if config.augment.crop == "window":
        return stored
    return whole_shape(stored, config.shape, config.bucket_multiple, config.eval_longest)


def show_for_eval(sample: Stored, config: DataConfig, classes: int = VOID) -> Shown:
    """Return a sample as evaluation sees it, in (H, W): resized so that it covers (H, W) / eval_crop, centre cut.

    With augment.crop = "window" the window at the image's centre is seen, at native scale. With eval_view = "whole"
    the image is in `evaluated_shape`, and its mask and boxes as they are stored.

    An image of H x W is taken as it is. The resize is antialiased; against timm's (PIL's) the mean difference
    is below 1 of 255.

    Args:
        sample: as its source reads it.
        config: of the data.
        classes: that its mask may have.

    Raises:
        UndecodableError: the bytes are not a whole image.
    """
    stored = stored_shape(sample.image, config.form)
    if config.eval_view == "whole":
        view = whole_view(stored, evaluated_shape(stored, config))
    elif config.augment.crop == "window":
        view = window_view(stored, config.shape, _CENTRE)
    else:
        view = centre_view(stored, config.shape, config.eval_crop)
    image = _seen(sample, view, stored, 1, config.form, config.interpolation)
    is_whole = config.eval_view == "whole"
    of_mask = whole_view(stored, stored) if is_whole else view
    mask = None if sample.mask is None else see_mask(of_mask, decode_mask(sample.mask, stored, classes, config.form))
    boxes = sample.boxes if sample.boxes is None or is_whole else see_boxes(view, sample.boxes)
    return Shown(image, mask, boxes, sample.soft, stored)


def _seen(
    sample: Stored,
    view: View,
    stored: Shape,
    shrink: int,
    form: PixelFormat,
    interpolation: str,
    outside: torch.Tensor | int = 0,
) -> torch.Tensor:
    """Return (B, H, W) of a sample stored as (height, width); where tiles hold it, only what is seen is read.

    Raises:
        UndecodableError: the bytes are not a whole image, or not one of the size the container says.
        DamagedSampleError: a tile is damaged.
    """
    if not isinstance(sample.image, bytes | np.ndarray) or view.box[2:] == view.shape:
        part = decode_box(sample.image, view.box, stored, form)
        height, width = view.box[2:]
        return see_image(view._replace(box=(0, 0, height, width)), part, (height, width), interpolation, outside)
    least = (-(-stored[0] // shrink), -(-stored[1] // shrink)) if shrink > 1 else (0, 0)
    pixels = decode(sample.image, *least, form=form)
    check_shape(pixels.shape[:2], stored, shrink)
    return see_image(view, pixels, stored, interpolation, outside)


def decode_for_eval(data: bytes | npt.NDArray[Any] | Tiled, config: DataConfig) -> torch.Tensor:
    """Return an image as evaluation sees it, (B, H, W); see `show_for_eval`.

    Raises:
        UndecodableError: the bytes are not a whole image.
    """
    return show_for_eval(Stored(data), config).image


def _decode_shrink(view: View) -> int:
    """Return 8, 4, 2 or 1: how much smaller a JPEG may be decoded for this view."""
    scale = min(view.box[2] / view.resized[0], view.box[3] / view.resized[1])
    return next((shrink for shrink in (8, 4, 2) if scale >= _DECODE_MARGIN * shrink), 1)


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


def check_windows(config: DataConfig, source: Source, shapes: Sequence[Shape]) -> None:
    """Refuse windows that are larger than an image, before the first step.

    Args:
        config: of the data.
        source: what the samples are of.
        shapes: (height, width) of the windows.

    Raises:
        ConfigError: naming both sizes.
    """
    if config.augment.crop != "window":
        return
    smallest, _ = source.extent()
    for height, width in sorted(shapes, reverse=True):
        if height > smallest[0] or width > smallest[1]:
            raise ConfigError(
                f'augment.crop = "window" shows {height} x {width} pixels at native scale (data.image_size, '
                f"data.resolutions), and images of {source.name} have only {smallest[0]} rows or {smallest[1]} "
                'columns: choose a smaller size, leave such images out, or set augment.crop = "resized"'
            )


def check_pixels(source: Source, form: PixelFormat) -> None:
    """Refuse images of other bands or numbers than the config says, by the first of them, before the first step.

    Raises:
        ConfigError: naming both.
    """
    if isinstance(source, Fetching) and source.fetches:  # it would fetch a whole file for it
        return
    try:
        image = source.read(0).image
    except DataError:  # a damaged sample, with which training knows what to do
        return
    if (why := unfit(image, form)) is not None:
        raise ConfigError(f"{source.place(0)} {why}")


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
    if augment.policy == "trivialaugment":
        raise ConfigError(
            f'augment.policy = "trivialaugment" shears, shifts and turns images, but {with_parts}, which would not '
            'follow: set it to "3augment" or "none"'
        )
    if augment.mixes:
        raise ConfigError(
            f"augment.mixup and augment.cutmix mix images with one label each, but {with_parts}: set both to 0"
        )
