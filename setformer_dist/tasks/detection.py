"""Object detection: boxes around the objects of an image, and their classes.

The loss is a mean over images, so no figure depends on ranks or micro batches. Evaluation finds the objects of whole
images and ranks what was found in the whole split, as COCO does; the arithmetic is that of faster-coco-eval.

m = images of a micro batch, k = most boxes of one of them, K = classes, d = detections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pydantic
import torch

from setformer_dist.core import config as base
from setformer_dist.core.batch import Annotations, MicroBatch
from setformer_dist.core.boxes import NO_BOX, Detected, detection_loss, detections_of
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import DataError
from setformer_dist.core.metric import METRICS_OF, Metric
from setformer_dist.tasks.average_precision import COLUMNS, average_precision


class DetectionConfig(FrozenConfig):
    """The table [task.args] of task "detection".

    Attributes:
        channels: of feature pyramid and heads, a multiple of 8.
    """

    channels: int = pydantic.Field(default=256, ge=32)


class Detection:
    """RetinaNet's loss; average precision over IoUs from 0.5 to 0.95."""

    name = "detection"
    metrics: tuple[Metric, ...] = METRICS_OF["detection"]
    exclusive = False
    needs_parts = frozenset({"boxes"})
    columns = COLUMNS

    def __init__(self, args: Mapping[str, object], classes: tuple[str, ...]) -> None:
        """Read the task's table; raises ConfigError where an argument is not its own."""
        self.config = base.build(DetectionConfig, args, "task.args")
        self.outputs = classes

    def targets(self, batch: MicroBatch) -> torch.Tensor:
        """Return boxes in pixels of the inputs, and their classes, (m, k, 5) fp32; the class of filling is `NO_BOX`.

        Raises:
            DataError: there are none, or one has a class that the data do not name.
        """
        known, all_boxes, all_labels = _known(batch)
        height, width = batch.inputs.shape[-2:]
        found = torch.zeros((len(batch.labels), max(1, *map(len, all_labels)), 5))
        found[:, :, 4] = NO_BOX
        for image, (boxes, labels) in enumerate(zip(all_boxes, all_labels, strict=True)):
            self._check(labels, int(batch.sample_ids[image]))
            if known.sizes is not None and known.box_crowds is not None:  # as stored, the image seen whole
                rows, columns = (float(side) for side in known.sizes[image])
                objects = ~known.box_crowds[image]
                scale = torch.tensor([width / max(1.0, columns), height / max(1.0, rows)] * 2)
                boxes, labels = boxes[objects] * scale, labels[objects]
            found[image, : len(labels), :4], found[image, : len(labels), 4] = boxes, labels.float()
        return found

    def _check(self, labels: torch.Tensor, sample: int) -> None:
        outside = labels[(labels < 0) | (labels >= len(self.outputs))]
        if len(outside):
            raise DataError(
                f"a box of sample {sample} has class {int(outside[0])}, and the data name {len(self.outputs)} classes, "
                "counted from 0: repair the box, or name all classes"
            )

    def loss(self, outputs: Detected, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of images, shape ().

        Args:
            outputs: logits, offsets and anchors (`core.boxes`).
            targets: (m, k, 5).
        """
        return detection_loss(outputs, targets).mean()

    def sums(self, outputs: Detected, batch: MicroBatch, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of images that count, summed, (1,)."""
        losses = detection_loss(outputs, targets).double().cpu()
        return (losses * (batch.weights > 0)).sum().view(1)

    def rows(self, outputs: Detected, batch: MicroBatch) -> torch.Tensor:
        """Return the objects of images that count, and what was found in them, in stored pixels; see `core.task`."""
        known, _, _ = _known(batch)
        shape = int(batch.inputs.shape[-2]), int(batch.inputs.shape[-1])
        rows = [torch.zeros((0, self.columns), dtype=torch.float64)]
        for image, found in enumerate(detections_of(outputs, shape)):
            if not batch.weights[image]:
                continue
            boxes = found.boxes.cpu().double()
            if known.sizes is not None:
                boxes *= torch.tensor([known.sizes[image, 1] / shape[1], known.sizes[image, 0] / shape[0]] * 2)
            sample = int(batch.sample_ids[image])
            rows += [_objects(batch, image), _table(sample, found.labels, boxes, scores=found.scores)]
        return torch.cat(rows)

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return the mean loss."""
        return {"loss": sums[0] / count}

    def figures_of_rows(self, rows: torch.Tensor) -> dict[str, float]:
        """Return average precision and recall, and the average precision of each class that is there."""
        return average_precision(rows, self.outputs)

    def confidences(self, outputs: Detected) -> torch.Tensor:
        """Return how sure the model is that an image shows a class somewhere, (m, K): of its surest box."""
        return outputs[0].float().sigmoid().amax(dim=1)


def _known(batch: MicroBatch) -> tuple[Annotations, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return the annotations of a micro batch, its boxes, and their labels; raises DataError where it has none."""
    known = batch.annotations
    if known is None or known.boxes is None or known.box_labels is None:
        raise DataError("task detection learns from boxes, and the samples have none: pack them with --coco")
    return known, known.boxes, known.box_labels


def _objects(batch: MicroBatch, image: int) -> torch.Tensor:
    known, boxes, labels = _known(batch)
    areas = known.box_areas[image].double() if known.box_areas is not None else None
    crowds = known.box_crowds[image] if known.box_crowds is not None else None
    return _table(int(batch.sample_ids[image]), labels[image], boxes[image].double(), areas=areas, crowds=crowds)


def _table(
    sample: int,
    labels: torch.Tensor,
    boxes: torch.Tensor,
    scores: torch.Tensor | None = None,
    areas: torch.Tensor | None = None,
    crowds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return rows of `tasks.average_precision` of an image's objects, or of its detections, which have scores."""
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(dim=1) if areas is None else areas
    of_each = torch.full((len(labels),), float(sample), dtype=torch.float64)
    scores = torch.full_like(of_each, math.nan) if scores is None else scores.cpu().double()
    crowds = torch.zeros_like(of_each) if crowds is None else crowds.double()
    return torch.stack([of_each, labels.cpu().double(), scores, *boxes.unbind(dim=1), areas, crowds], dim=1)
