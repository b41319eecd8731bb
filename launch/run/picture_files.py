"""Files of what a trained model marks in images: masks of a segmentation, boxes of a detection drawn on the image."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from dataloaders.config import DataConfig
from dataloaders.pixels.colours import colour
from dataloaders.pixels.decode import decode
from dataloaders.reading.device import pictures_of
from dataloaders.sources.files import LARGEST_SAMPLE, read_whole
from launch.run.detected import LEAST_SCORE, drawn
from launch.run.trained import Prediction, Trained
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import check_new, replacing
from setformer_dist.tasks.detection import Detection
from setformer_dist.tasks.segmentation import Segmentation

_COLOURS_OF_MASKS = [part for label in range(VOID) for part in colour(label)] + [0, 0, 0]


class PictureFolder:
    """Where one PNG file for each image is written.

    The values of a mask are classes, shown in the colours of `data inspect`. Boxes are drawn from `LEAST_SCORE` on.

    Args:
        trained: the model that predicts them.
        folder: a new or an empty one.
        images: all whose pictures will be written.

    Raises:
        ConfigError: the model marks nothing, the folder cannot be used, or two images have the same name.
    """

    def __init__(self, trained: Trained, folder: Path, images: Iterable[Path]) -> None:
        if not isinstance(trained.task, Segmentation | Detection):
            raise ConfigError(
                f"--out writes masks or boxes, and {trained.place} (task {trained.task.name}) predicts none: leave it "
                "out"
            )
        assert isinstance(trained.config.data, DataConfig)  # of these tasks
        check_new(folder)
        self._folder, self._data = folder, trained.config.data
        named: dict[str, Path] = {}
        for image in images:
            if (other := named.setdefault(_name_of(image), image)) != image:
                raise ConfigError(
                    f"{other} and {image} would both be written to {folder / _name_of(image)}: predict one of them "
                    "into another folder"
                )

    def write(self, found: Prediction) -> None:
        """Write the picture of an image.

        Raises:
            ConfigError: the folder cannot be written.
        """
        name = _name_of(found.image)
        picture = _mask(found.mask) if found.mask is not None else self._with_boxes(found)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._folder / name) as aside:
                picture.save(aside, "PNG")
        except OSError as error:
            raise ConfigError(f"{self._folder / name} cannot be written: {error.strerror or error}") from None

    def _with_boxes(self, found: Prediction) -> Image.Image:
        """Return the image of a file with the boxes that were found in it."""
        assert found.objects is not None  # of a detection
        pixels = torch.from_numpy(decode(read_whole(found.image, LARGEST_SAMPLE), form=self._data.form))
        picture = pictures_of(pixels.permute(2, 0, 1).unsqueeze(0), self._data)[0].permute(1, 2, 0)
        marked = [(o.box, o.label, f"{o.name} {o.score:.0%}") for o in found.objects if o.score >= LEAST_SCORE]
        shape = int(picture.shape[0]), int(picture.shape[1])
        return drawn(Image.fromarray(picture.contiguous().numpy()), shape, marked)


def _mask(mask: torch.Tensor) -> Image.Image:
    """Return (H, W) classes as an image of their numbers, shown in their colours."""
    made = Image.fromarray(mask.numpy()).convert("L")
    made.putpalette(_COLOURS_OF_MASKS)
    return made


def _name_of(image: Path) -> str:
    return f"{image.stem}.png"
