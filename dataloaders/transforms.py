"""From stored bytes to one (3, S, S) uint8 image, for training and for evaluation.

Every random choice comes from torch's default generator, seeded per sample by the caller (`seeded` below), so a
sample's pixels are a function of (seed, epoch, sample id): of no worker, rank or micro batch. Everything stays
uint8; normalisation happens on the device (`dataloaders.device`), at a quarter of the bytes to move.

S = image size, H, W = stored height and width; boxes are (top, left, height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # as torchvision's own docs name it

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.decode import decode
from setformer_dist.core.errors import ConfigError

Box = tuple[int, int, int, int]

_INTERPOLATION = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}

# libjpeg-turbo can decode at 1/2, 1/4 and 1/8 for less work. Taken only while the crop still has at least this
# many times the output's side, so that the antialiased resize has something left to average.
_DECODE_MARGIN = 2


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Give torch's default generator back as it was: drawing in the training process must leave no trace."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def decode_for_eval(data: bytes | npt.NDArray[np.uint8], config: DataConfig) -> torch.Tensor:
    """Return an image as evaluation sees it, (3, S, S) uint8: shorter side resized to S / eval_crop, centre cut.

    An image of S x S is taken as it is. The resize is antialiased; against timm's (PIL's) the mean difference
    is below 1 of 255.

    Raises:
        UndecodableError: the bytes are not a whole image.
    """
    return _centre(_to_tensor(decode(data)), config)


def _centre(image: torch.Tensor, config: DataConfig) -> torch.Tensor:
    size = config.image_size
    height, width = image.shape[-2:]
    if height == width == size:
        return image
    resized = math.floor(size / config.eval_crop)  # as timm rounds it
    if min(height, width) != resized:
        image = F.resize(image, [resized], interpolation=_INTERPOLATION[config.interpolation], antialias=True)
    cut: torch.Tensor = F.center_crop(image, [size, size])
    return cut


def _to_tensor(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return (H, W, 3) pixels as a (3, H, W) view: channels last in memory, which torch's uint8 resize likes."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


class TrainTransform:
    """Bytes to an augmented image. The caller seeds torch's default generator for each sample.

    Raises:
        ConfigError: crop = "pad" where the stored images (`smallest`, `largest`: (H, W)) are not all S x S.
    """

    def __init__(self, config: DataConfig, smallest: tuple[int, int], largest: tuple[int, int], where: str) -> None:
        self._config = config
        self._size = config.image_size
        self._later = _later_steps(config)
        square = (self._size, self._size)
        if config.augment.crop == "pad" and not smallest == largest == square:
            raise ConfigError(
                f'augment.crop = "pad" needs images of {self._size} x {self._size} (data.image_size), but those '
                f"of {where} go from {smallest[0]} x {smallest[1]} to {largest[0]} x {largest[1]}: set image_size "
                'to their size or augment.crop = "resized"'
            )

    def __call__(self, data: bytes | npt.NDArray[np.uint8], height: int, width: int) -> torch.Tensor:
        """Return (3, S, S) uint8 of an image stored as `height` x `width`.

        Raises:
            UndecodableError: the bytes are not a whole image.
        """
        augment = self._config.augment
        if augment.crop == "resized":
            image = self._resized_crop(data, height, width)
        elif augment.crop == "pad":
            image = _padded_window(_to_tensor(decode(data)), augment.pad)
        else:
            image = decode_for_eval(data, self._config)
        if augment.flip and torch.rand(()).item() < 0.5:
            image = image.flip(-1)
        for step in self._later:
            image = step(image)
        return image

    def _resized_crop(self, data: bytes | npt.NDArray[np.uint8], height: int, width: int) -> torch.Tensor:
        box = random_box(height, width, self._config.augment)
        shrink = _decode_shrink(box, self._size)
        pixels = decode(data, -(-height // shrink), -(-width // shrink)) if shrink > 1 else decode(data)
        # What is no JPEG comes whole, so the decoded size says by how much it was shrunk.
        top, left, box_height, box_width = _scaled(box, (height, width), pixels.shape[:2])
        window = _to_tensor(pixels[top : top + box_height, left : left + box_width])
        how = _INTERPOLATION[self._config.interpolation]
        image: torch.Tensor = F.resize(window, [self._size, self._size], interpolation=how, antialias=True)
        return image


def random_box(height: int, width: int, augment: AugmentConfig) -> Box:
    """Draw a crop of random area and aspect ratio (Szegedy et al. 2015, as in torchvision and timm).

    Ten tries, then the largest centred crop within the ratio limits. All draws are made at once, so that the
    number of draws, and with it every later choice of the sample, does not depend on the image's size.
    """
    draws = torch.rand(10, 4, dtype=torch.float64).tolist()
    low, high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (augment.scale[0] + (augment.scale[1] - augment.scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(top_draw * (height - box_height + 1)), int(left_draw * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / augment.ratio[0])))
    box_width = min(width, max(1, round(height * augment.ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _decode_shrink(box: Box, size: int) -> int:
    """Return 8, 4, 2 or 1: how much smaller a JPEG may be decoded for this crop."""
    side = min(box[2], box[3])
    return next((shrink for shrink in (8, 4, 2) if side >= _DECODE_MARGIN * shrink * size), 1)


def _scaled(box: Box, stored: tuple[int, int], decoded: tuple[int, ...]) -> Box:
    """Return a box drawn for the stored size as a box of the decoded image, at least one pixel a side."""
    if stored == decoded:
        return box
    top, left, box_height, box_width = box
    rows, columns = decoded[0] / stored[0], decoded[1] / stored[1]
    top, left = min(int(top * rows), decoded[0] - 1), min(int(left * columns), decoded[1] - 1)
    box_height = max(1, min(round(box_height * rows), decoded[0] - top))
    box_width = max(1, min(round(box_width * columns), decoded[1] - left))
    return top, left, box_height, box_width


def _padded_window(image: torch.Tensor, pad: int) -> torch.Tensor:
    """Return a random window, of the image's own size, of the image with `pad` zeros on every side."""
    draws = torch.rand(2, dtype=torch.float64).tolist()
    down, right = (int(draw * (2 * pad + 1)) - pad for draw in draws)
    height, width = image.shape[-2:]
    window = torch.zeros((3, height, width), dtype=torch.uint8)
    rows, columns = slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right))
    source_rows = slice(max(0, down), height - max(0, -down))
    source_columns = slice(max(0, right), width - max(0, -right))
    window[:, rows, columns] = image[:, source_rows, source_columns]
    return window


def _later_steps(config: DataConfig) -> list[v2.Transform]:
    """Return the torchvision transforms that follow crop and flip, in their order."""
    augment = config.augment
    mean_colour = [round(255 * value) for value in config.mean]
    steps: list[v2.Transform] = []
    if augment.randaugment_ops:
        steps.append(
            v2.RandAugment(
                num_ops=augment.randaugment_ops,
                magnitude=augment.randaugment_magnitude,
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=mean_colour,
            )
        )
    if augment.color_jitter:
        amount = augment.color_jitter
        steps.append(v2.ColorJitter(brightness=amount, contrast=amount, saturation=amount))
    if augment.erasing:
        # The mean colour is zero once normalised: what the network sees as "nothing there".
        steps.append(v2.RandomErasing(p=augment.erasing, value=mean_colour))
    return steps
