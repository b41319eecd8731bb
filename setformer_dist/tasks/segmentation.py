"""Semantic segmentation: a class for every pixel of an image.

The loss is a mean over the pixels that have a class, of all micro batches and ranks of a step. Evaluation compares
whole images with their masks as they are stored: logits are resized to a mask, not the mask to the logits. Hits are
counted in one matrix over the whole split, so no figure depends on ranks or micro batches.

m = images of a micro batch, K = classes, H, W = rows and columns of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import pydantic
import torch
import torch.nn.functional as F

from setformer_dist.core import config as base
from setformer_dist.core.batch import VOID, MicroBatch
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.metric import IOU_OF, METRICS_OF, Metric
from setformer_dist.core.pixel_maps import pixel_loss, strips
from setformer_dist.tasks.losses import weights_of

# The model's outputs: logits, and in training with an auxiliary head also that head's.
Outputs = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class SegmentationConfig(FrozenConfig):
    """The table [task.args] of task "segmentation".

    Attributes:
        channels: of the head, a multiple of 64.
        auxiliary: weight of the loss of a second head, on the last map but one; 0 leaves that head out.
        class_weights: factor of a class in the training loss, by its name; 1 for those not named.
    """

    channels: int = pydantic.Field(default=512, ge=64)
    auxiliary: float = pydantic.Field(default=0.4, ge=0, lt=math.inf)
    class_weights: dict[str, Annotated[float, pydantic.Field(gt=0, lt=math.inf)]] = pydantic.Field(default_factory=dict)


class Segmentation:
    """Cross entropy of pixels; mean intersection over union, accuracy over pixels and over classes."""

    name = "segmentation"
    metrics: tuple[Metric, ...] = METRICS_OF["segmentation"]
    exclusive = False
    needs_parts = frozenset({"mask"})

    def __init__(self, args: Mapping[str, object], classes: tuple[str, ...]) -> None:
        """Read the task's table.

        Raises:
            ConfigError: an argument is not the task's own, or names no class.
        """
        self.config = base.build(SegmentationConfig, args, "task.args")
        if len(classes) > VOID:
            raise ConfigError(
                f"task segmentation: masks have room for {VOID} classes, and the data have {len(classes)}"
            )
        self.outputs = classes
        self._weights = weights_of(self.config.class_weights, classes)

    def targets(self, batch: MicroBatch) -> torch.Tensor:
        """Return the masks, (m, H, W) uint8, 255 where a pixel has no class.

        Raises:
            DataError: there are none, or a pixel has a class that the data do not name.
        """
        masks = batch.annotations.masks if batch.annotations is not None else None
        if masks is None:
            raise DataError("task segmentation learns from masks, and the samples have none: pack them with --masks")
        known = (masks < len(self.outputs)) | (masks == VOID)
        if not bool(known.all()):
            wrong = int(known.flatten(1).all(dim=1).int().argmin())
            value = int(masks[wrong][~known[wrong]][0])
            raise DataError(
                f"the mask of sample {int(batch.sample_ids[wrong])} has class {value} in a pixel, and the data name "
                f"{len(self.outputs)} classes, counted from 0: repair the mask, or name all classes"
            )
        return masks

    def count(self, batch: MicroBatch) -> float:
        """Return the weights of the pixels that have a class, summed."""
        masks = self.targets(batch)
        if self._weights is None:
            return float((masks != VOID).sum())
        pixels = torch.bincount(masks.flatten(), minlength=VOID + 1)[: len(self.outputs)]
        return float(pixels.double() @ self._weights.double())

    def loss(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """Return the weighted cross entropy summed over pixels, of both heads, shape ().

        Args:
            outputs: logits, of any size.
            targets: (m, H, W) uint8.
        """
        if isinstance(outputs, torch.Tensor):
            return self._summed(outputs, targets)
        logits, auxiliary = outputs
        return self._summed(logits, targets) + self.config.auxiliary * self._summed(auxiliary, targets)

    def _summed(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        weights = None if self._weights is None else self._weights.to(logits.device)
        return pixel_loss(logits, masks, weights)

    def sums(self, outputs: torch.Tensor, batch: MicroBatch, targets: torch.Tensor) -> torch.Tensor:
        """Return (loss, pixels, the K x K matrix of them by class and by what was predicted) of what counts."""
        masks, classes = targets.clone(), len(self.outputs)
        masks[batch.weights.to(masks.device) == 0] = VOID
        found = torch.zeros(2 + classes**2, dtype=torch.float64)
        for rows, logits in strips(outputs.float(), *masks.shape[1:]):
            known, pixels = masks[:, rows].flatten().long(), logits.flatten(0, 2)
            counted = known != VOID
            loss = F.cross_entropy(pixels, known, ignore_index=VOID, reduction="sum")
            pairs = (known * classes + pixels.argmax(dim=1))[counted].cpu()
            found[0] += loss.double().cpu()
            found[1] += len(pairs)
            found[2:] += torch.bincount(pairs, minlength=classes**2)
        return found

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return the metrics, and the IoU of every class that is there or was predicted."""
        loss, pixels, *flat = sums
        classes = len(self.outputs)
        matrix = torch.tensor(flat, dtype=torch.float64).view(classes, classes)
        hits, there, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
        union = there + predicted - hits
        each = {f"{IOU_OF}{self.outputs[k]}": float(hits[k] / union[k]) for k in range(classes) if union[k]}
        found = [float(hits[k] / there[k]) for k in range(classes) if there[k]]
        return {
            "miou": sum(each.values()) / max(1, len(each)),
            "pixel_accuracy": float(hits.sum()) / max(1.0, pixels),
            "class_accuracy": sum(found) / max(1, len(found)),
            "loss": loss / max(1.0, pixels),
            **each,
        }

    def confidences(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the share of an image that each class is expected to fill, (m, K)."""
        return outputs.float().softmax(dim=1).mean(dim=(2, 3))
