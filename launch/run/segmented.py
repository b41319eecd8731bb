"""Pictures of a split's images with their masks, and with those of a trained segmentation model."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dataloaders.config import DataConfig
from dataloaders.pixels.colours import colour
from dataloaders.pixels.transforms import show_for_eval
from dataloaders.reading.device import pictures_of
from dataloaders.source import spread_evenly
from launch.run.inputs import Split, images_of
from launch.run.trained import Trained
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import DataError
from setformer_dist.core.pixel_maps import classes_of
from setformer_dist.report.html import Annotated, AnnotatedImage
from setformer_dist.tasks.segmentation import Segmentation

_LARGEST = 320  # pixels of the longer side of a picture
_OPACITY = 0.6


def segmented_samples(trained: Trained, split: Split, count: int = 8) -> Annotated | None:
    """Return images spread evenly over a split with their masks and those of the model; None for other tasks.

    Each is seen as evaluation sees it: of an image that is too large for the memory, its centre.

    Args:
        trained: the model.
        split: where the images come from.
        count: most images that are returned.
    """
    data = trained.config.data
    if not (isinstance(trained.task, Segmentation) and isinstance(data, DataConfig)):
        return None
    source, found = images_of(split), []
    for sample in spread_evenly(split.num_samples, count):
        try:
            shown = show_for_eval(source.read(sample), data)
        except DataError:  # damaged: evaluation has counted it
            continue
        if shown.mask is None:
            continue
        images = shown.image.unsqueeze(0)
        picture, size = _shrunk(pictures_of(images, data)[0])
        predicted = classes_of(trained.outputs(images), shown.mask.shape[0], shown.mask.shape[1])[0].cpu()
        found.append(AnnotatedImage(picture, *(_over(picture, mask, size) for mask in (shown.mask, predicted))))
    return Annotated("masks", found, {name: colour(label) for label, name in enumerate(trained.task.outputs)})


def _shrunk(picture: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return a picture (3, H, W) that is small enough for a page, and its (width, height)."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_LARGEST, _LARGEST))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), image.size


def _over(picture: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return a picture with the colours of a mask's classes laid over it."""
    small = torch.from_numpy(np.array(Image.fromarray(mask.numpy()).resize(size, Image.Resampling.NEAREST)))
    colours = torch.tensor([colour(label) for label in range(VOID + 1)]).float()[small.long()].permute(2, 0, 1)
    mixed = picture.float() * (1 - _OPACITY) + colours * _OPACITY
    return torch.where(small == VOID, picture.float(), mixed).round().to(torch.uint8)
