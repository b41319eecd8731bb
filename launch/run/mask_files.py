"""Files of the masks that a trained segmentation model predicts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from dataloaders.pixels.colours import colour
from launch.run.trained import Prediction, Trained
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import check_new, replacing
from setformer_dist.tasks.segmentation import Segmentation


class MaskFolder:
    """Where masks of image files are written, one PNG file each: values are classes, in the colours of `data inspect`.

    Args:
        trained: the model that predicts them.
        folder: a new or an empty one.
        images: all whose masks will be written.

    Raises:
        ConfigError: the model predicts no masks, the folder cannot be used, or two images have the same name.
    """

    def __init__(self, trained: Trained, folder: Path, images: Iterable[Path]) -> None:
        if not isinstance(trained.task, Segmentation):
            raise ConfigError(
                f"--out writes masks, and {trained.place} (task {trained.task.name}) predicts none: leave it out"
            )
        check_new(folder)
        self._folder = folder
        named: dict[str, Path] = {}
        for image in images:
            if (other := named.setdefault(_name_of(image), image)) != image:
                raise ConfigError(
                    f"{other} and {image} would both be written to {folder / _name_of(image)}: predict one of them "
                    "into another folder"
                )
        self._colours = [part for label in range(VOID) for part in colour(label)] + [0, 0, 0]

    def write(self, found: Prediction) -> None:
        """Write the mask of an image.

        Raises:
            ConfigError: the folder cannot be written.
        """
        assert found.mask is not None
        name = _name_of(found.image)
        image = Image.fromarray(found.mask.numpy()).convert("L")
        image.putpalette(self._colours)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._folder / name) as aside:
                image.save(aside, "PNG")
        except OSError as error:
            raise ConfigError(f"{self._folder / name} cannot be written: {error.strerror or error}") from None


def _name_of(image: Path) -> str:
    return f"{image.stem}.png"
