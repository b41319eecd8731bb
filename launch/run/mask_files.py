"""Files of the masks that a trained segmentation model predicts."""

from __future__ import annotations

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

    Raises:
        ConfigError: the model predicts no masks, or the folder cannot be used.
    """

    def __init__(self, trained: Trained, folder: Path) -> None:
        if not isinstance(trained.task, Segmentation):
            raise ConfigError(
                f"--out writes masks, and {trained.place} (task {trained.task.name}) predicts none: leave it out"
            )
        check_new(folder)
        self._folder = folder
        self._written: dict[str, Path] = {}
        self._colours = [part for label in range(VOID) for part in colour(label)] + [0, 0, 0]

    def write(self, found: Prediction) -> None:
        """Write the mask of an image.

        Raises:
            ConfigError: another image of the same name has one there, or the folder cannot be written.
        """
        assert found.mask is not None
        name = f"{found.image.stem}.png"
        if (other := self._written.setdefault(name, found.image)) != found.image:
            raise ConfigError(
                f"{found.image} and {other} would both be written to {self._folder / name}: predict folder by folder"
            )
        image = Image.fromarray(found.mask.numpy()).convert("L")
        image.putpalette(self._colours)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._folder / name) as aside:
                image.save(aside, "PNG")
        except OSError as error:
            raise ConfigError(f"{self._folder / name} cannot be written: {error.strerror or error}") from None
