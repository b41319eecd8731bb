"""What a run learns, behind one interface: engine, predict and report ask the task, and never which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.metric import Metric


class Prepare(Protocol):
    """Turns a micro batch into what the model takes and what the loss compares it with."""

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, Any]:
        """Return inputs of the compute dtype, such as images (m, 3, H, W), and what the task's loss takes for targets.

        For tasks of this package these are fp32, (m, classes). Both lie on the device. Smoothing and mixing are for
        training alone.
        """
        ...


class Task(Protocol):
    """The loss and the scores of a model's outputs.

    Evaluation adds up `sums` over all micro batches and ranks in fp64, then asks for `figures` once; so no figure
    depends on how samples were cut into micro batches.
    """

    @property
    def name(self) -> str:
        """As [task] names it."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `figures` returns, the most important first."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs, such as the classes: the model is built with so many."""
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
        """Return what `figures` is made of, (k,), summed over the samples that count (batch.weights); on the CPU."""
        ...

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return the metrics of a split.

        Args:
            sums: of `sums`, over the whole split.
            count: samples that count, at least 1.
        """
        ...

    def confidences(self, outputs: Any) -> torch.Tensor:
        """Return how sure the model is of each output, (m, outputs) fp32, 0 to 1."""
        ...


@runtime_checkable
class Counted(Protocol):
    """What a task has as well if its samples hold different amounts of what counts, such as pixels or tokens.

    Its `loss` is then a sum, and an optimizer step divides by the count of all its micro batches on all ranks. A mean
    of means would weight a pixel by the micro batch that it happens to be in, so that the loss would depend on the
    number of ranks.
    """

    def count(self, batch: MicroBatch) -> float:
        """Return how much of a micro batch counts in `loss`, such as its pixels that have a class; on the CPU.

        It is known before the model runs. A step in which nothing counts must have a loss of 0.
        """
        ...
