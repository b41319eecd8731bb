"""One pass over a split: every sample counts once, sums travel, means are made at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from setformer_dist.core.batch import EvalStream, MicroBatch
from setformer_dist.core.errors import DataError
from setformer_dist.engine.comm import TorchCollectives


class Prepare(Protocol):
    """Turns a micro batch into normalised images on the device and soft targets."""

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (m, 3, H, W) in the compute dtype and targets (m, classes) fp32."""
        ...


# Opens a context that collects one tensor (k m, ...) of non-negative errors for each thing that a forward pass of m
# samples (of k sequences) meets.
Watch = Callable[[], AbstractContextManager[list[torch.Tensor]]]


@dataclass(frozen=True)
class EvalResult:
    """Means over a split.

    Attributes:
        loss: cross entropy.
        top1: share of samples whose class is the most probable.
        top5: share of samples whose class is among the five most probable.
        samples: what was scored.
        left_out: what was damaged and allowed to be.
        watched: figures of `evaluate`'s watch by name; empty without one.
    """

    loss: float
    top1: float
    top5: float
    samples: int
    left_out: int
    watched: dict[str, float] = field(default_factory=dict)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Return the figures with a prefix before each name."""
        figures = {"loss": self.loss, "top1": self.top1, "top5": self.top5, **self.watched}
        return {f"{prefix}{name}": value for name, value in figures.items()}


@torch.no_grad()
def evaluate(
    model: Callable[[torch.Tensor], Any],
    stream: EvalStream,
    prepare: Prepare,
    comm: TorchCollectives,
    given_up: Callable[[], bool] | None = None,
    watch: Watch | None = None,
) -> EvalResult | None:
    """Score a split. Collective: every rank runs the same number of micro batches.

    Args:
        model: in evaluation mode; images (m, 3, H, W) -> logits (m, classes).
        stream: this rank's share of the split.
        prepare: see `Prepare`.
        comm: sums over the ranks.
        given_up: asked before each micro batch, must answer the same on all ranks.
        watch: collects marginal errors during the first micro batch; given on all ranks or on none.

    Returns:
        The means, or None when given up.

    Raises:
        DataError: the samples counted over all ranks are not the split's.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    errors: list[torch.Tensor] = []
    for index, batch in enumerate(stream.micro_batches()):
        if given_up is not None and given_up():
            return None
        images, _ = prepare(batch, train=False)
        with nullcontext([]) if watch is None or index else watch() as collected:
            logits = model(images).float()
        errors += [_of_real_samples(tensor, batch) for tensor in collected]
        sums += _scores(logits.cpu(), batch).double()
    loss, top1, top5, count, damaged = comm.sum(sums.tolist())
    if round(count + damaged) != stream.num_samples:
        raise DataError(f"evaluation counted {count + damaged:.0f} samples of {stream.num_samples}: this is a defect")
    if count == 0:
        raise DataError("evaluation had no sample that decodes: run `setformer data pack` on the split again")
    watched = {} if watch is None else _over_ranks(errors, comm)
    return EvalResult(loss / count, top1 / count, top5 / count, round(count), round(damaged), watched)


def _of_real_samples(errors: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return the errors of samples that count, flat, on the CPU; a sample may have several rows, one per sequence."""
    counts = batch.weights > 0
    return errors.cpu().double()[counts.repeat_interleave(errors.shape[0] // len(counts))].flatten()


def _over_ranks(errors: list[torch.Tensor], comm: TorchCollectives) -> dict[str, float]:
    """Return the largest and the mean over all ranks, of which some may have nothing."""
    flat = torch.cat([torch.zeros(0, dtype=torch.float64), *errors])
    total, count = comm.sum([float(flat.sum()), float(flat.numel())])
    largest = comm.max(float(flat.max()) if flat.numel() else 0.0)
    return {"marginal_error_max": largest, "marginal_error_mean": total / max(count, 1.0)}


def _scores(logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return sums of (loss, top-1 hits, top-5 hits, samples that count, damaged samples), shape (5,)."""
    weights = batch.weights
    loss = F.cross_entropy(logits, batch.labels, reduction="none")
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
    top1, top5 = ranked[:, 0].float(), ranked.any(dim=1).float()
    damaged = torch.tensor(float(len(batch.substitutions)))
    return torch.stack([(loss * weights).sum(), (top1 * weights).sum(), (top5 * weights).sum(), weights.sum(), damaged])
