"""Distillation: a task's loss and the distance from a teacher's outputs, weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.metric import Metric
from setformer_dist.core.task import Prepare, Task


class Taught(NamedTuple):
    """What a micro batch is compared with in training: the task's targets, and the teacher's logits (m, outputs)."""

    targets: Any
    logits: torch.Tensor


class TeachingPrepare:
    """A `Prepare` that asks the teacher about the very inputs that the model sees, mixed ones too.

    Args:
        prepare: makes inputs and the task's targets.
        teacher: in evaluation mode, on the device, of the inputs' dtype.
    """

    def __init__(self, prepare: Prepare, teacher: nn.Module) -> None:
        self._prepare = prepare
        self._teacher = teacher

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, object]:
        """Return inputs, and `Taught` in training or the task's own targets in evaluation."""
        inputs, targets = self._prepare(batch, train)
        if not train:
            return inputs, targets
        with torch.no_grad():
            return inputs, Taught(targets, self._teacher(inputs).float())


class Distilled:
    """A task whose loss looks at a teacher as well; it is evaluated as it is without one.

    Args:
        task: with a mean for a loss, over logits (m, outputs).
        share: of the teacher in the loss.
        temperature: of both distributions (Hinton et al. 2015).
    """

    def __init__(self, task: Task, share: float, temperature: float) -> None:
        self._task = task
        self._share = share
        self._temperature = temperature

    @property
    def name(self) -> str:
        """The task's."""
        return self._task.name

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The task's."""
        return self._task.metrics

    @property
    def outputs(self) -> tuple[str, ...]:
        """The task's."""
        return self._task.outputs

    @property
    def exclusive(self) -> bool:
        """The task's."""
        return self._task.exclusive

    def loss(self, outputs: torch.Tensor, targets: Taught) -> torch.Tensor:
        """Return (1 - share) · the task's loss + share · the distance from the teacher, shape ().

        The distance is temperature² times the Kullback-Leibler divergence of the classes where a sample has one, and
        the mean binary cross entropy over the outputs where it may have several.
        """
        own = self._task.loss(outputs, targets.targets)
        ours, theirs = outputs.float() / self._temperature, targets.logits / self._temperature
        if self.exclusive:
            logs = ours.log_softmax(dim=1), theirs.log_softmax(dim=1)
            distance = F.kl_div(*logs, reduction="batchmean", log_target=True)
        else:
            distance = F.binary_cross_entropy_with_logits(ours, theirs.sigmoid())
        return (1 - self._share) * own + self._share * self._temperature**2 * distance

    def sums(self, outputs: object, batch: MicroBatch, targets: object) -> torch.Tensor:
        """Return the task's."""
        return self._task.sums(outputs, batch, targets)

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return the task's."""
        return self._task.figures(sums, count)

    def confidences(self, outputs: object) -> torch.Tensor:
        """Return the task's."""
        return self._task.confidences(outputs)
