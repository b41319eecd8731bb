"""What a run learns, behind one interface: engine, predict and report do not depend on which task it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.metric import Metric
from setformer_dist.core.transfer import on_device


class Prepare(Protocol):
    """Turns a micro batch into model inputs and loss targets."""

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, Any]:
        """Return inputs of the compute dtype, such as images (m, 3, H, W), and the targets of the task's loss.

        The targets of this package's tasks are fp32, (m, classes). Both are on the device. Smoothing and mixing apply
        in training only.
        """
        ...


class Task(Protocol):
    """The loss and the metrics of a model's outputs.

    Evaluation adds up `sums` over all micro batches and ranks in fp64, and then calls `figures` once. So no metric
    depends on how the samples were split into micro batches.
    """

    @property
    def name(self) -> str:
        """The name in [task]."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `figures` returns, the most important first."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs, such as the classes; the model has one output for each."""
        ...

    @property
    def exclusive(self) -> bool:
        """Whether each sample has exactly one class, so that a prediction is right or wrong."""
        ...

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Return the mean loss of a micro batch, shape (), fp32, differentiable; of a `Counted` task the sum.

        Args:
            outputs: the model's, (m, outputs) where it classifies.
            targets: as `Prepare` makes them, over the data's classes.
        """
        ...

    def sums(self, outputs: Any, batch: MicroBatch, targets: Any) -> torch.Tensor:
        """Return the sums that `figures` needs, (k,), over the samples that count (batch.weights); on the CPU."""
        ...

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return the metrics of a split.

        Args:
            sums: of `sums`, over the whole split.
            count: samples that count, at least 1.
        """
        ...

    def confidences(self, outputs: Any) -> torch.Tensor:
        """Return the confidence of each output, (m, outputs) fp32, 0 to 1."""
        ...


@runtime_checkable
class Counted(Protocol):
    """A further method of tasks whose samples contain different numbers of valid elements, such as pixels or tokens.

    Their `loss` is a sum, and an optimizer step divides it by the count of all its micro batches on all ranks. With a
    mean of means, the weight of a pixel would depend on its micro batch, and the loss on the world size.
    """

    def count(self, batch: MicroBatch) -> float:
        """Return the number of valid elements of a micro batch, such as pixels with a class; on the CPU.

        It is called before the model runs. A step without valid elements must have a loss of 0.
        """
        ...


@runtime_checkable
class Dense(Protocol):
    """A further method of tasks that learn from masks, boxes or numbers, not from the samples' classes."""

    @property
    def needs_parts(self) -> frozenset[str]:
        """What samples must have: "mask", "boxes", "number"."""
        ...

    def targets(self, batch: MicroBatch) -> torch.Tensor:
        """Return what the loss takes in place of classes, on the CPU; it is moved to the device."""
        ...


@runtime_checkable
class Ranked(Protocol):
    """Further methods of tasks with figures that rank the results of a whole split, such as average precision.

    Evaluation brings the rows of all micro batches and ranks together, in any order, and then calls `figures_of_rows`
    once.
    """

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        ...

    def rows(self, outputs: Any, batch: MicroBatch) -> torch.Tensor:
        """Return what is to be ranked, (r, columns) fp64 on the CPU, of the samples that count (batch.weights)."""
        ...

    def figures_of_rows(self, rows: torch.Tensor) -> dict[str, float]:
        """Return metrics of a split from its rows, besides those of `figures`; they must not depend on their order."""
        ...


@dataclass(frozen=True)
class DensePrepare:
    """A `Prepare` whose targets are those of a `Dense` task.

    Attributes:
        inputs: makes the model's inputs.
        task: makes the targets.
    """

    inputs: Prepare
    task: Dense

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, both on the device."""
        inputs, _ = self.inputs(batch, train=train)
        return inputs, on_device(self.task.targets(batch), inputs.device)


@runtime_checkable
class Hiding(Protocol):
    """A further method of tasks that hide parts of their inputs and learn to fill them in.

    Their `outputs` are none: the model has no classifier, and is part of a larger one (`launch.run.objective`).
    """

    def prepared(self, whole: Prepare, dtype: torch.dtype, seed: int, steps_per_epoch: int) -> Prepare:
        """Return what makes inputs with masks, and targets, from what makes whole fp32 images.

        Args:
            whole: makes the images.
            dtype: of the inputs.
            seed: of the run.
            steps_per_epoch: optimizer steps of an epoch.
        """
        ...
