"""Any number of labels per sample, each by itself; a class of the data names a set of labels, such as "cat+dog".

So class folders, text labels of shards and packed splits all serve: their classes are the sets that occur, and the
model has one output per label. Mixed and smoothed targets over the classes become soft targets over the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from setformer_dist.core import config as base
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.metric import METRICS_OF, Metric
from setformer_dist.tasks.losses import Loss, LossConfig

# A label counts as predicted from this confidence on.
_LIKELY = 0.5


class MultiLabelConfig(LossConfig):
    """The table [task.args] of task "multilabel".

    Attributes:
        separator: between the labels in a class's name.
        none: name of the class without any label.
        loss: "binary_cross_entropy" or "focal".
    """

    loss: Literal["binary_cross_entropy", "focal"] = "binary_cross_entropy"

    separator: str = "+"
    none: str = "none"


class MultiLabel:
    """Losses are means over samples and labels; micro-averaged F1, and the share of wholly right samples."""

    name = "multilabel"
    metrics: tuple[Metric, ...] = METRICS_OF["multilabel"]
    exclusive = False

    def __init__(self, args: Mapping[str, object], classes: tuple[str, ...]) -> None:
        """Read the labels from the classes' names.

        Raises:
            ConfigError: an argument is not the task's own, or the classes name no labels.
        """
        config = base.build(MultiLabelConfig, args, "task.args")
        sets = [() if name == config.none else tuple(name.split(config.separator)) for name in classes]
        self.outputs = tuple(sorted({label for labels in sets for label in labels}))
        if not self.outputs or "" in self.outputs:
            what = f"no label but {config.none!r}" if not self.outputs else "an empty label"
            raise ConfigError(
                f"task multilabel: the data's classes ({', '.join(classes[:4])} …) name {what}: join labels by "
                f"{config.separator!r}, or set task.args.separator"
            )
        place = {label: at for at, label in enumerate(self.outputs)}
        self._loss = Loss(config, self.outputs)
        self._labels_of_class = torch.zeros(len(classes), len(self.outputs))
        for row, labels in zip(self._labels_of_class, sets, strict=True):
            row[[place[label] for label in labels]] = 1.0

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean over samples and labels.

        Args:
            outputs: (m, labels) logits.
            targets: (m, classes) fp32, rows sum to 1.
        """
        return self._loss.mean(outputs, self._soft(targets))

    def sums(self, outputs: torch.Tensor, batch: MicroBatch, targets: torch.Tensor) -> torch.Tensor:
        """Return (loss, wholly right samples, true positives, predicted, present) over the samples that count."""
        weights, logits, wanted = batch.weights, outputs.float().cpu(), self._labels_of_class[batch.labels]
        soft = wanted if batch.soft is None else targets.cpu() @ self._labels_of_class.cpu()
        loss = self._loss.each(logits, soft)
        found = (logits.sigmoid() >= _LIKELY).float()
        right = (found == wanted).all(dim=1).float()
        counts = [(found * wanted).sum(dim=1), found.sum(dim=1), wanted.sum(dim=1)]
        return torch.stack([(value * weights).sum() for value in (loss, right, *counts)])

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return micro-averaged F1, exact match and loss."""
        loss, right, hits, found, present = sums
        f1 = 2 * hits / (found + present) if found + present else 0.0
        return {"f1": f1, "exact": right / count, "loss": loss / count}

    def confidences(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the probability of each label."""
        return outputs.float().sigmoid()

    def _soft(self, targets: torch.Tensor) -> torch.Tensor:
        self._labels_of_class = self._labels_of_class.to(targets.device)
        return targets @ self._labels_of_class
