"""What part of a stored image is seen, and where: one value that image, mask and boxes all follow.

    stored image -> box cut out -> resized -> window cut out or padded -> mirrored -> (H, W)

Random crops, padded crops and evaluation's centre crop differ only in the numbers. Masks are resized to the nearest
pixel and are 255 ("does not count") outside the image; boxes are moved, clipped to what is seen, and left out if
less than a pixel is left, or less than a tenth both of them and of the window.

H, W = height, width seen; boxes of a view are (top, left, height, width) in stored pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from dataloaders.config import AugmentConfig
from dataloaders.pixels.depth import FULL_RANGE, MAX_PIXELS, PixelFormat, UndecodableError
from dataloaders.source import Boxes
from setformer_dist.core.batch import VOID

Box = tuple[int, int, int, int]
Shape = tuple[int, int]

# Tries of a random crop, each of four numbers (area, ratio, top, left).
_TRIES = 10
DRAWS_OF_CROP = 4 * _TRIES

# Of what a box must keep to be worth finding: share of its area, or of the window's, and pixels of its sides. What
# fills a window at native scale may be a small part of its object, and is no background.
_LEAST_SHARE = 0.1
_LEAST_SIDE = 1.0


class View(NamedTuple):
    """How an image is seen.

    Attributes:
        box: what is cut out of the stored image.
        resized: (height, width) to which that is resized.
        offset: (top, left) of the window within the resized; negative where the window begins outside it.
        shape: (H, W) of the window.
        mirrored: whether left and right change places.
        upside_down: whether top and bottom do.
    """

    box: Box
    resized: Shape
    offset: tuple[int, int]
    shape: Shape
    mirrored: bool = False
    upside_down: bool = False

    def mirror(self, mirrored: bool, upside_down: bool = False) -> View:
        """Return the same view, mirrored or not."""
        return self._replace(mirrored=mirrored, upside_down=upside_down)


def random_view(stored: Shape, shape: Shape, augment: AugmentConfig, draws: Sequence[float]) -> View:
    """Return a crop of random area and aspect ratio, resized to `shape`."""
    return View(random_box(stored, shape[1] / shape[0], augment, draws), shape, (0, 0), shape)


def scaled(augment: AugmentConfig, scale: tuple[float, float] | None) -> AugmentConfig:
    """Return augmentations whose crops take another share of the area; the same where `scale` is None."""
    return augment if scale is None else augment.model_copy(update={"scale": scale})


def random_box(stored: Shape, aspect: float, augment: AugmentConfig, draws: Sequence[float]) -> Box:
    """Return a crop of random area and aspect ratio (Szegedy et al. 2015, as in torchvision and timm).

    Ten tries, then the largest centred crop within the ratio limits.

    Args:
        stored: (height, width).
        aspect: width / height to which the ratios are relative: that of what the crop is resized to.
        augment: limits of area and ratio.
        draws: `DRAWS_OF_CROP` numbers in [0, 1).
    """
    height, width = stored
    low, high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for place in range(0, DRAWS_OF_CROP, 4):
        area = height * width * (augment.scale[0] + (augment.scale[1] - augment.scale[0]) * draws[place])
        ratio = aspect * math.exp(low + (high - low) * draws[place + 1])
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draws[place + 2] * (height - box_height + 1))
            return top, int(draws[place + 3] * (width - box_width + 1)), box_height, box_width
    box_height = min(height, max(1, round(width / (aspect * augment.ratio[0]))))
    box_width = min(width, max(1, round(height * aspect * augment.ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def jittered_view(stored: Shape, shape: Shape, limits: tuple[float, float], draws: Sequence[float]) -> View:
    """Return a random window of the image, resized by a random factor with its proportions kept.

    At factor 1 the image just covers the window. Where it is smaller than that, it lies anywhere in the window.

    Args:
        stored: (height, width) of the image.
        shape: (H, W) of the window.
        limits: smallest and largest factor.
        draws: three numbers: factor, top, left.
    """
    factor = limits[0] + draws[0] * (limits[1] - limits[0])
    scale = factor * max(side / whole for side, whole in zip(shape, stored, strict=True))
    starts, parts, places, offsets = [], [], [], []
    for draw, side, whole in zip(draws[1:], shape, stored, strict=False):
        resized = max(1, round(whole * scale))
        offset = int(draw * (abs(resized - side) + 1)) * (1 if resized >= side else -1)
        seen = min(resized, side)
        start = min(int(max(0, offset) * whole / resized), whole - 1)
        starts.append(start)
        parts.append(max(1, min(round(seen * whole / resized), whole - start)))
        places.append(seen)
        offsets.append(min(0, offset))
    return View((starts[0], starts[1], parts[0], parts[1]), (places[0], places[1]), (offsets[0], offsets[1]), shape)


def padded_view(stored: Shape, pad: int, draws: Sequence[float]) -> View:
    """Return a random window, of the image's own size, of the image with `pad` pixels of nothing on every side."""
    down, right = (int(draw * (2 * pad + 1)) - pad for draw in draws[:2])
    return View((0, 0, *stored), stored, (down, right), stored)


def centre_view(stored: Shape, shape: Shape, keep: float) -> View:
    """Return the centre of the image, resized so that `shape` takes the share `keep` of its sides.

    An image that already has the shape is taken as it is. Sizes are rounded as timm and torchvision round them.
    """
    if stored == shape:
        return View((0, 0, *stored), stored, (0, 0), shape)
    (height, width), (rows, columns) = stored, (math.floor(side / keep) for side in shape)
    if height * columns <= width * rows:  # the height decides
        resized = rows, max(columns, int(rows * width / height))
    else:
        resized = max(rows, int(columns * height / width)), columns
    offset = round((resized[0] - shape[0]) / 2.0), round((resized[1] - shape[1]) / 2.0)
    return View((0, 0, *stored), resized, offset, shape)


def whole_shape(stored: Shape, shape: Shape, multiple: int, longest: int = 0) -> Shape:
    """Return (height, width) to which a whole image is resized: so that `shape` fits into it, in multiples.

    An image of the shape's proportions gets the shape, whatever it is a multiple of.

    Args:
        stored: (height, width) of the image.
        shape: (H, W).
        multiple: of which both sides are one.
        longest: most pixels of the longer side, before it is made a multiple; 0 for any number.
    """
    scale = max(side / whole for side, whole in zip(shape, stored, strict=True))
    scale = min(scale, longest / max(stored)) if longest else scale
    if tuple(round(side * scale) for side in stored) == shape:
        return shape
    height, width = (max(multiple, round(side * scale / multiple) * multiple) for side in stored)
    return height, width


def whole_view(stored: Shape, resized: Shape) -> View:
    """Return the whole image, resized."""
    return View((0, 0, *stored), resized, (0, 0), resized)


def window_view(stored: Shape, shape: Shape, draws: Sequence[float]) -> View:
    """Return a window of the image at native scale; (0.5, 0.5) is its centre.

    Raises:
        UndecodableError: the image is smaller.
    """
    if stored[0] < shape[0] or stored[1] < shape[1]:
        raise UndecodableError(
            f"it is {stored[0]} x {stored[1]} pixels, smaller than the window of {shape[0]} x {shape[1]} "
            '(augment.crop = "window")'
        )
    top, left = (int(draw * (side - part + 1)) for draw, side, part in zip(draws, stored, shape, strict=False))
    return View((top, left, *shape), shape, (0, 0), shape)


def dtype_of(form: PixelFormat) -> torch.dtype:
    """Return the dtype of decoded images."""
    found = getattr(torch, form.numbers)
    assert isinstance(found, torch.dtype)
    return found


def see_image(
    view: View, pixels: npt.NDArray[Any], stored: Shape, interpolation: str, outside: torch.Tensor | int = 0
) -> torch.Tensor:
    """Return (C, H, W) of (height, width, C) pixels, of their numbers.

    Args:
        view: what is seen.
        pixels: the image, or a smaller version of it.
        stored: (height, width) that the view was made for.
        interpolation: "bilinear" or "bicubic", antialiased.
        outside: what is seen beyond the image, (C, 1, 1) or one number.

    Raises:
        UndecodableError: the image is so long that resized it would be of more than `MAX_PIXELS`.
    """
    _refuse_elongated(view, stored)
    top, left, height, width = _scaled(view.box, stored, pixels.shape[:2])
    # Channels last in memory, which torch's uint8 resize likes.
    image = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)
    if (height, width) != view.resized:
        image = _resized(image, view.resized, interpolation)
    return _mirrored(_window(image, view, outside), view)


def _resized(image: torch.Tensor, shape: Shape, interpolation: str) -> torch.Tensor:
    """Return (C, *shape) of an image, of its numbers; 16 bits are resized as floats, which torch's kernel takes."""
    whole = image.float() if image.dtype == torch.uint16 else image
    small = interpolate(whole[None], shape, mode=interpolation, antialias=True)[0]
    if image.dtype != torch.uint16:
        return small
    return small.round_().clamp_(0, FULL_RANGE["uint16"]).to(torch.uint16)  # cubic weights go beyond the range


def see_mask(view: View, mask: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return (H, W) uint8 of a (height, width) mask, 255 outside of it.

    Raises:
        UndecodableError: as `see_image`.
    """
    _refuse_elongated(view, (mask.shape[0], mask.shape[1]))
    top, left, height, width = view.box
    seen = torch.from_numpy(mask[top : top + height, left : left + width])[None]
    if (height, width) != view.resized:
        seen = interpolate(seen[None], view.resized, mode="nearest-exact")[0]
    return _mirrored(_window(seen, view, VOID)[0], view)


def see_boxes(view: View, boxes: Boxes) -> Boxes:
    """Return what is left of boxes, in pixels of the view, without crowds; areas stay those of the stored image."""
    top, left, height, width = view.box
    rows, columns = view.resized[0] / height, view.resized[1] / width
    corners = boxes.corners.astype(np.float64)
    corners = (corners - [left, top, left, top]) * [columns, rows, columns, rows]
    corners -= [view.offset[1], view.offset[0]] * 2
    clipped = corners.clip(0, [view.shape[1], view.shape[0]] * 2)
    sides, whole = clipped[:, 2:] - clipped[:, :2], corners[:, 2:] - corners[:, :2]
    least = _LEAST_SHARE * np.minimum(whole.prod(axis=1), math.prod(view.shape))
    kept = (sides >= _LEAST_SIDE).all(axis=1) & (sides.prod(axis=1) >= least)
    kept &= ~boxes.crowds  # no objects, so nothing to learn from
    if view.mirrored:
        clipped[:, [0, 2]] = view.shape[1] - clipped[:, [2, 0]]
    if view.upside_down:
        clipped[:, [1, 3]] = view.shape[0] - clipped[:, [3, 1]]
    return Boxes(clipped[kept], boxes.labels[kept], boxes.crowds[kept], boxes.areas[kept])


def _refuse_elongated(view: View, stored: Shape) -> None:
    """Refuse, before anything is allocated, what a resize would blow up: 60000 x 1 pixels to 256 wide, say.

    Raises:
        UndecodableError: with its sizes.
    """
    if view.resized != view.box[2:] and math.prod(view.resized) > MAX_PIXELS:
        raise UndecodableError(
            f"its {stored[0]} x {stored[1]} pixels would be resized to {view.resized[0]} x {view.resized[1]}, which "
            f"are more than {MAX_PIXELS}: it is too long for a centre crop"
        )


def _scaled(box: Box, stored: Shape, decoded: tuple[int, ...]) -> Box:
    """Return a box of the stored image as a box of the decoded one, at least one pixel a side."""
    if stored == decoded:
        return box
    top, left, height, width = box
    rows, columns = decoded[0] / stored[0], decoded[1] / stored[1]
    top, left = min(int(top * rows), decoded[0] - 1), min(int(left * columns), decoded[1] - 1)
    height = max(1, min(round(height * rows), decoded[0] - top))
    return top, left, height, max(1, min(round(width * columns), decoded[1] - left))


def _window(image: torch.Tensor, view: View, outside: torch.Tensor | int) -> torch.Tensor:
    """Return the view's window of a (C, height, width) image, `outside` where it leaves the image."""
    (top, left), (rows, columns), (height, width) = view.offset, view.shape, image.shape[-2:]
    if (top, left) == (0, 0) and (rows, columns) == (height, width):
        return image
    bottom, right = top + rows, left + columns
    inside = image[:, max(0, top) : bottom, max(0, left) : right]
    if top >= 0 and left >= 0 and bottom <= height and right <= width:
        return inside
    window = image.new_zeros((image.shape[0], rows, columns))
    window[:] = outside
    y, x = max(0, -top), max(0, -left)
    window[:, y : y + inside.shape[1], x : x + inside.shape[2]] = inside
    return window


def _mirrored(image: torch.Tensor, view: View) -> torch.Tensor:
    """Return an image (..., height, width) mirrored as the view is; PyTorch 2.11 cannot flip uint16."""
    axes = [axis for axis, wanted in ((-1, view.mirrored), (-2, view.upside_down)) if wanted]
    if not axes:
        return image
    if image.dtype == torch.uint16:
        return image.view(torch.int16).flip(axes).view(torch.uint16)
    return image.flip(axes)
