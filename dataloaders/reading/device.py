"""From a micro batch of bytes on the CPU to what a model and a loss take, on the device.

    uint8, uint16, float -> device -> float, normalised -> mixup or cutmix -> model
    labels -> device -> one-hot or soft, smoothed -> the same mixing -> loss

m = micro batch, B = bands, C = classes, H, W = height, width of the images.
"""

from __future__ import annotations

import torch

from dataloaders.config import DataConfig
from dataloaders.pixels.depth import FULL_RANGE
from setformer_dist.core.batch import MicroBatch, MixSpec
from setformer_dist.core.transfer import on_device


class Prepare:
    """Makes images and soft targets of a micro batch.

    Args:
        config: gives mean, std, label smoothing and the layout of images in memory.
        num_classes: C.
        device: where to.
        dtype: of the images; normalisation and mixing are computed in float32 all the same.
    """

    def __init__(
        self, config: DataConfig, num_classes: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        self._num_classes = num_classes
        self._device = torch.device(device)
        self._dtype = dtype
        self._smoothing = config.augment.smoothing
        # Weights keep their layout, as ZeRO cuts them flat; a convolution follows either of its two operands.
        self._layout = torch.channels_last if config.channels_last else torch.preserve_format
        mean, std = _statistics(config)
        # (x / 255 - mean) / std as one multiply-add
        self._scale = (1 / (FULL_RANGE[config.pixels] * std)).to(self._device)
        self._shift = (-mean / std).to(self._device)

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (m, B, H, W) of the dtype and targets (m, C) float32, rows summing to 1.

        Smoothing and mixing are for training alone; evaluation gets one-hot targets, or the data's soft labels.
        """
        images = on_device(batch.inputs, self._device).float() * self._scale + self._shift
        targets = self._targets(batch, self._smoothing if train else 0.0)
        if train and batch.mix is not None:
            images, targets = _mix(images, targets, batch.mix)
        return images.to(self._dtype, memory_format=self._layout), targets

    def _targets(self, batch: MicroBatch, smoothing: float) -> torch.Tensor:
        hard = self._one_hot(batch.labels, smoothing)
        if batch.soft is None:
            return hard
        soft = on_device(batch.soft, self._device)
        smooth = soft * (1.0 - smoothing) + smoothing / self._num_classes
        return torch.where(soft.any(dim=1, keepdim=True), smooth, hard)

    def _one_hot(self, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        rest = smoothing / self._num_classes
        targets = torch.full((len(labels), self._num_classes), rest, device=self._device)
        return targets.scatter_(1, on_device(labels, self._device).view(-1, 1), 1.0 - smoothing + rest)


def _mix(images: torch.Tensor, targets: torch.Tensor, mix: MixSpec) -> tuple[torch.Tensor, torch.Tensor]:
    partner, lam, box = (on_device(part, images.device) for part in (mix.partner, mix.lam, mix.box))
    y0, y1, x0, x1 = box.view(-1, 4, 1, 1, 1).unbind(1)
    rows = torch.arange(images.shape[-2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[-1], device=images.device).view(1, 1, 1, -1)
    inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
    # A group that mixes has either a rectangle (cutmix: pixels are the one's or the other's) or none (mixup).
    is_cut = y1 > y0
    own = torch.where(is_cut, (~inside).float(), lam.view(-1, 1, 1, 1))
    mixed = images * own + images[partner] * (1 - own)
    share = lam.view(-1, 1)
    return mixed, targets * share + targets[partner] * (1 - share)


def pictures_of(images: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """Return decoded images (m, B, H, W) as pictures for people, (m, 3, H, W) uint8; RGB of 8 bits as it is."""
    if config.form.is_rgb:
        return images
    mean, std = _statistics(config)
    return denormalised_picture((images.float() / FULL_RANGE[config.pixels] - mean) / std, config)


def denormalised_picture(images: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """Return normalised images (m, B, H, W) as pictures for people, (m, 3, H, W) uint8.

    Of other images than RGB of 8 bits these are the first three bands, or the first alone as grey, from two deviations
    below the mean (black) to two above it.
    """
    images = images.cpu().float()
    if config.form.is_rgb:
        mean, std = _statistics(config)
        shares = images * std + mean
    else:
        shares = (images[:, :3] if config.bands >= 3 else images[:, :1].expand(-1, 3, -1, -1)) / 4 + 0.5
    return (shares * 255).round().clamp(0, 255).to(torch.uint8)


def _statistics(config: DataConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std, (1, B, 1, 1)."""
    return torch.tensor(config.mean).view(1, -1, 1, 1), torch.tensor(config.std).view(1, -1, 1, 1)
