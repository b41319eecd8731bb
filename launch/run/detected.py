"""Pictures of a split's images with the boxes of their objects, and with those that a trained model finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from dataloaders.config import DataConfig
from dataloaders.pixels.colours import colour
from dataloaders.pixels.transforms import show_for_eval
from dataloaders.reading.device import pictures_of
from dataloaders.source import spread_evenly
from launch.run.inputs import Split, images_of
from launch.run.trained import Trained, detected_in
from setformer_dist.core.errors import DataError
from setformer_dist.report.html import Annotated, AnnotatedImage
from setformer_dist.tasks.detection import Detection

_LARGEST = 320  # pixels of the longer side of a picture
LEAST_SCORE = 0.3  # of a box that is drawn

# A box, its class, and what is written at it.
Marked = tuple[Sequence[float], int, str]


def detected_samples(trained: Trained, split: Split, count: int = 8) -> Annotated | None:
    """Return images spread evenly over a split with their objects and those found; None for other tasks.

    Each is seen as evaluation sees it: of an image that is too large for the memory, its centre.

    Args:
        trained: the model.
        split: where the images come from.
        count: most images that are returned.
    """
    data = trained.config.data
    if not (isinstance(trained.task, Detection) and isinstance(data, DataConfig)):
        return None
    names, source, found = trained.task.outputs, images_of(split), []
    for sample in spread_evenly(split.num_samples, count):
        try:
            shown = show_for_eval(source.read(sample), data)
        except DataError:  # damaged: evaluation has counted it
            continue
        if shown.boxes is None:
            continue
        images = shown.image.unsqueeze(0)
        view = int(images.shape[2]), int(images.shape[3])
        shape = shown.stored if data.eval_view == "whole" else view  # whose pixels the boxes are in
        seen = detected_in(trained.outputs(images), view, shape)
        picture = Image.fromarray(pictures_of(images, data)[0].permute(1, 2, 0).contiguous().numpy())
        picture.thumbnail((_LARGEST, _LARGEST))
        real = ~shown.boxes.crowds
        there = zip(shown.boxes.corners[real].tolist(), shown.boxes.labels[real].tolist(), strict=True)
        said = zip(seen.boxes.tolist(), seen.labels.tolist(), seen.scores.tolist(), strict=True)
        parts: tuple[list[Marked], ...] = (
            [],
            [(box, label, names[label]) for box, label in there],
            [(box, label, f"{names[label]} {score:.0%}") for box, label, score in said if score >= LEAST_SCORE],
        )
        found.append(AnnotatedImage(*(_tensor(drawn(picture, shape, boxes)) for boxes in parts)))
    return Annotated("boxes", found, {name: colour(label) for label, name in enumerate(names)})


def drawn(picture: Image.Image, shape: tuple[int, int], boxes: Iterable[Marked]) -> Image.Image:
    """Return a picture of an image of (height, width) with boxes drawn on it, in the colours of their classes.

    Args:
        picture: of the image, of any size.
        shape: of the image.
        boxes: in its pixels.
    """
    made = picture.convert("RGB")
    canvas = ImageDraw.Draw(made)
    columns, rows = made.width / shape[1], made.height / shape[0]
    line = max(1, round(max(made.size) / 300))
    for (x0, y0, x1, y1), label, text in reversed(list(boxes)):  # the best last, on top
        corners = (x0 * columns, y0 * rows, x1 * columns, y1 * rows)
        canvas.rectangle(corners, outline=colour(label), width=line)
        place = (corners[0] + line, corners[1] + line)
        canvas.rectangle(canvas.textbbox(place, text, font_size=6 + 4 * line), fill=colour(label))
        canvas.text(place, text, fill=(0, 0, 0), font_size=6 + 4 * line)
    return made


def _tensor(picture: Image.Image) -> torch.Tensor:
    """Return (3, H, W) uint8."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
