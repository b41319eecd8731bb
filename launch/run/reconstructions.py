"""Pictures of images with hidden parts: the image, what the model saw, and its reconstruction."""

from __future__ import annotations

import torch

from dataloaders.config import DataConfig
from dataloaders.pixels.transforms import decode_for_eval
from dataloaders.reading.device import denormalised_picture, pictures_of
from launch.run.inputs import Split, images_of
from launch.run.trained import Trained
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import DataError
from setformer_dist.models.masked import MaskedModel
from setformer_dist.report.html import ReconstructedImage
from setformer_dist.tasks.mae import Hidden, hidden_pixels, moments

_GREY = 128


@torch.no_grad()
def reconstructed_samples(trained: Trained, split: Split, count: int = 8) -> list[ReconstructedImage]:
    """Return images spread evenly over a split, with the masks of evaluation; none if the task predicts no pixels.

    Args:
        trained: the model.
        split: where the images come from.
        count: most images that are returned.
    """
    model, task, data = trained.model, trained.task, trained.config.data
    if not (isinstance(model, MaskedModel) and isinstance(task, Hidden) and isinstance(data, DataConfig)):
        return []
    if task.latent:
        return []
    source, pixels, ids = images_of(split), [], []
    for sample in range(0, split.num_samples, max(1, split.num_samples // count)):
        try:
            pixels.append(decode_for_eval(source.read(sample).image, data))
        except DataError:  # damaged: evaluation has counted it
            continue
        ids.append(sample)
    images, numbers = torch.stack(pixels[:count]), torch.tensor(ids[:count])
    zeros, ones = torch.zeros(len(images), dtype=torch.int64), torch.ones(len(images))
    given, _ = trained.prepare()(MicroBatch(images, zeros, ones, numbers), train=False)
    outputs = model(given).float()
    if task.config.normalise:  # a unit's own mean and contrast are not predicted, so its true ones serve
        hidden = given[:, -1, :: model.unit, :: model.unit] > 0
        mean, scale = moments(hidden_pixels(given[:, :-1].float(), hidden.cpu(), model.unit))
        outputs = outputs * scale + mean
    reconstructed = _laid_back(given, outputs, model)
    shown = pictures_of(images, data), *_as_pixels(given, reconstructed, data)
    return [ReconstructedImage(*three) for three in zip(*shown, strict=True)]


def _laid_back(given: torch.Tensor, outputs: torch.Tensor, model: MaskedModel) -> torch.Tensor:
    """Return the images with the model's pixels (m, K, U, U, B) in hidden units."""
    m, unit = len(given), model.unit
    hidden = model.visible_of(given).hidden()
    whole = hidden.scatter(outputs.reshape(m, -1, unit, given.shape[1] - 1)).permute(0, 3, 1, 2)
    return torch.where(given[:, -1:] > 0, whole, given[:, :-1])


def _as_pixels(given: torch.Tensor, reconstructed: torch.Tensor, data: DataConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (m, 3, H, W) uint8: the images with grey in hidden units, and with what was reconstructed."""
    seen, whole = (denormalised_picture(images, data) for images in (given[:, :-1], reconstructed))
    return torch.where(given[:, -1:].cpu() > 0, torch.tensor(_GREY, dtype=torch.uint8), seen), whole
