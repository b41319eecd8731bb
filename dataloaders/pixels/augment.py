"""What changes a training image's colours and content after crop and flip, by torchvision's kernels, keyed per sample.

torchvision's own transforms draw from one generator of the process, which threads would race for. Here every random
number comes in from outside (`dataloaders.pixels.draws`), and the kernels (`torchvision.transforms.v2.functional`) are
called with what they decide. Operations, ranges and their order are torchvision's; uint8 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # as torchvision's own docs name it

from dataloaders.config import AugmentConfig

# Numbers drawn per RandAugment operation (which, sign) and for colour jitter (three factors, the order of three).
DRAWS_PER_OPERATION = 2
DRAWS_OF_JITTER = 4
# For erasing: whether, then ten tries of (area, ratio, top, left).
ERASING_TRIES = 10
DRAWS_OF_ERASING = 1 + 4 * ERASING_TRIES

# Share of the image's area that erasing takes, and height / width of it (Zhong et al. 2020; torchvision's defaults).
_ERASED_SHARE = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)

_JITTER_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

Image = torch.Tensor
_Operation = Callable[[Image, float, list[float]], Image]


def _affine(
    image: Image,
    fill: list[float],
    *,
    shift: tuple[int, int] = (0, 0),
    shear: tuple[float, float] = (0, 0),
    center: list[float] | None = None,
) -> Image:
    moved: Image = F.affine(
        image, angle=0.0, translate=list(shift), scale=1.0, shear=[math.degrees(math.atan(s)) for s in shear],
        interpolation=v2.InterpolationMode.BILINEAR, fill=fill, center=center,
    )  # fmt: skip
    return moved


def _rotate(image: Image, angle: float, fill: list[float]) -> Image:
    turned: Image = F.rotate(image, angle, interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
    return turned


# Name -> (strength at the largest magnitude, whether its sign is drawn, what is done). Cubuk et al. 2019 by way of
# torchvision's v2.RandAugment; the strength grows in proportion to the magnitude, of 30 steps.
OPERATIONS: dict[str, tuple[float, bool, _Operation]] = {
    "Identity": (0.0, False, lambda image, by, fill: image),
    "ShearX": (0.3, True, lambda image, by, fill: _affine(image, fill, shear=(by, 0), center=[0, 0])),
    "ShearY": (0.3, True, lambda image, by, fill: _affine(image, fill, shear=(0, by), center=[0, 0])),
    "TranslateX": (150 / 331, True, lambda image, by, fill: _affine(image, fill, shift=(int(by * image.shape[-1]), 0))),
    "TranslateY": (150 / 331, True, lambda image, by, fill: _affine(image, fill, shift=(0, int(by * image.shape[-2])))),
    "Rotate": (30.0, True, lambda image, by, fill: _rotate(image, by, fill)),
    "Brightness": (0.9, True, lambda image, by, fill: F.adjust_brightness(image, 1.0 + by)),
    "Color": (0.9, True, lambda image, by, fill: F.adjust_saturation(image, 1.0 + by)),
    "Contrast": (0.9, True, lambda image, by, fill: F.adjust_contrast(image, 1.0 + by)),
    "Sharpness": (0.9, True, lambda image, by, fill: F.adjust_sharpness(image, 1.0 + by)),
    "Posterize": (4.0, False, lambda image, by, fill: F.posterize(image, 8 - round(by))),
    "Solarize": (1.0, False, lambda image, by, fill: F.solarize(image, 255 * (1.0 - by))),
    "AutoContrast": (0.0, False, lambda image, by, fill: F.autocontrast(image)),
    "Equalize": (0.0, False, lambda image, by, fill: F.equalize(image)),
}
_IN_TURN = tuple(OPERATIONS.values())


def rand_augment(image: Image, magnitude: int, draws: Sequence[float], fill: list[float]) -> Image:
    """Return an image after RandAugment's operations, one for each two draws.

    Args:
        image: (3, H, W) uint8.
        magnitude: 0 to 30.
        draws: (which, sign) of each operation, in [0, 1).
        fill: colour of what comes in from outside the image.
    """
    for which, sign in zip(draws[0::2], draws[1::2], strict=True):
        strongest, signed, operation = _IN_TURN[int(which * len(_IN_TURN))]
        strength = strongest * magnitude / 30
        image = operation(image, -strength if signed and sign < 0.5 else strength, fill)
    return image


def color_jitter(image: Image, amount: float, draws: Sequence[float]) -> Image:
    """Return an image with brightness, contrast and saturation changed, each by up to `amount`, in a random order."""
    kernels = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    least, most = max(0.0, 1.0 - amount), 1.0 + amount
    for kernel in _JITTER_ORDERS[int(draws[3] * len(_JITTER_ORDERS))]:
        image = kernels[kernel](image, least + (most - least) * draws[kernel])
    return image


def erased_box(height: int, width: int, probability: float, draws: Sequence[float]) -> tuple[int, int, int, int] | None:
    """Return (top, left, height, width) of the rectangle to be erased, or None."""
    if draws[0] >= probability:
        return None
    low, high = map(math.log, _ERASED_RATIO)
    for place in range(1, DRAWS_OF_ERASING, 4):
        area_draw, ratio_draw, top, left = draws[place : place + 4]
        area = height * width * (_ERASED_SHARE[0] + (_ERASED_SHARE[1] - _ERASED_SHARE[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            return int(top * (height - rows + 1)), int(left * (width - columns + 1)), rows, columns
    return None


def recolours(augment: AugmentConfig) -> bool:
    """Return whether anything in this file, or an augmentation of the user's own, is switched on."""
    return bool(augment.randaugment_ops or augment.color_jitter or augment.erasing or augment.own)
