"""What changes a training image's colours and content after crop and flip, by torchvision's kernels, keyed per sample.

torchvision's own transforms draw from one generator of the process, which threads would race for. Here every random
number comes in from outside (`dataloaders.pixels.draws`), and the kernels (`torchvision.transforms.v2.functional`) are
called with what they decide. Operations, ranges and their order are torchvision's, those of 3-Augment PIL's, as DeiT
III and timm have them. uint8 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image as Pictures
from PIL import ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # as torchvision's own docs name it

from dataloaders.config import AugmentConfig

# Numbers drawn per RandAugment operation (which, sign) and for colour jitter (three factors, the order of three).
DRAWS_PER_OPERATION = 2
# Of a policy (which, strength, sign).
DRAWS_OF_POLICY = 3
DRAWS_OF_JITTER = 4
# For erasing: whether, then ten tries of (area, ratio, top, left).
ERASING_TRIES = 10
DRAWS_OF_ERASING = 1 + 4 * ERASING_TRIES

# Magnitudes are steps of 30, as torchvision's and timm's.
_STEPS = 30

# 3-Augment: from this value on solarizing inverts, and the radius of the blur in pixels. The authors' numbers (DeiT's
# augment.py), and timm's of "3a".
_SOLARIZE_FROM = 128
_BLUR_RADIUS = (0.1, 2.0)
# Luma of ITU-R 601 in shares of 2^16, rounded: PIL's "L".
_LUMA = (19595, 38470, 7471)

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
# TrivialAugment Wide (Müller & Hutter 2021), by way of torchvision's v2.TrivialAugmentWide: these operations are
# stronger, and shifts are in pixels. Its strengths are single precision, these are double: at a few of the 31 steps a
# shift of 16 pixels is 15 there, and values at the threshold of solarizing invert or do not.
_WIDEST = {
    "ShearX": 0.99, "ShearY": 0.99, "Rotate": 135.0, "Brightness": 0.99, "Color": 0.99, "Contrast": 0.99,
    "Sharpness": 0.99, "Posterize": 6.0,
}  # fmt: skip
WIDE_OPERATIONS: dict[str, tuple[float, bool, _Operation]] = {
    **OPERATIONS,
    **{name: (strongest, *OPERATIONS[name][1:]) for name, strongest in _WIDEST.items()},
    "TranslateX": (32.0, True, lambda image, by, fill: _affine(image, fill, shift=(int(by), 0))),
    "TranslateY": (32.0, True, lambda image, by, fill: _affine(image, fill, shift=(0, int(by)))),
}
_IN_TURN, _WIDE_IN_TURN = tuple(OPERATIONS.values()), tuple(WIDE_OPERATIONS.values())


def _operate(
    operations: Sequence[tuple[float, bool, _Operation]],
    image: Image,
    magnitude: int,
    which: float,
    sign: float,
    fill: list[float],
) -> Image:
    strongest, signed, operation = operations[int(which * len(operations))]
    strength = strongest * magnitude / _STEPS
    return operation(image, -strength if signed and sign < 0.5 else strength, fill)


def rand_augment(image: Image, magnitude: int, draws: Sequence[float], fill: list[float]) -> Image:
    """Return an image after RandAugment's operations, one for each two draws.

    Args:
        image: (3, H, W) uint8.
        magnitude: 0 to 30.
        draws: (which, sign) of each operation, in [0, 1).
        fill: colour of what comes in from outside the image.
    """
    for which, sign in zip(draws[0::2], draws[1::2], strict=True):
        image = _operate(_IN_TURN, image, magnitude, which, sign, fill)
    return image


def augment_by(policy: str, image: Image, draws: Sequence[float], fill: list[float]) -> Image:
    """Return an image after the one operation of a policy.

    Args:
        policy: "trivialaugment" or "3augment" (`AugmentConfig.policy`).
        image: (3, H, W) uint8.
        draws: (which, strength, sign), in [0, 1).
        fill: colour of what comes in from outside the image.
    """
    which, strength, sign = draws
    if policy == "trivialaugment":
        return _operate(_WIDE_IN_TURN, image, int(strength * (_STEPS + 1)), which, sign, fill)
    low, high = _BLUR_RADIUS
    operation = int(which * 3)
    if operation == 0:
        return _grey(image)
    if operation == 1:
        solarized: Image = F.solarize(image, _SOLARIZE_FROM)
        return solarized
    return _blurred(image, low + (high - low) * strength)


def _grey(image: Image) -> Image:
    """Return an image without colours, as PIL's mode "L" to the last bit; torchvision rounds otherwise."""
    red, green, blue = image.int()
    luma: Image = (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + (1 << 15)) >> 16
    return luma.to(torch.uint8).repeat(3, 1, 1)


def _blurred(image: Image, radius: float) -> Image:
    """Return an image blurred by PIL, which computes in integers: the same bits on any machine."""
    picture = Pictures.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    blurred = np.array(picture.filter(ImageFilter.GaussianBlur(radius)))
    return torch.from_numpy(blurred).permute(2, 0, 1).contiguous()


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
    return bool(
        augment.randaugment_ops or augment.policy != "none" or augment.color_jitter or augment.erasing or augment.own
    )
