"""One class per sample: a loss with soft targets, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from setformer_dist.core import config as base
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.metric import METRICS_OF, Metric
from setformer_dist.tasks.losses import Loss, LossConfig


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over samples of −Σ_c targets_c · log softmax(logits)_c, in fp32.

    Args:
        logits: (m, classes), any float dtype.
        targets: (m, classes) fp32, rows sum to 1.
    """
    return F.cross_entropy(logits.float(), targets)


class Classification:
    """A sample is right where its class is the most probable (top-1), or among five (top-5)."""

    name = "classification"
    metrics: tuple[Metric, ...] = METRICS_OF["classification"]
    exclusive = True

    def __init__(self, args: Mapping[str, object], classes: tuple[str, ...]) -> None:
        config = base.build(LossConfig, args, "task.args")
        self.outputs = classes
        self._loss = Loss(config, classes)
        self._exclusive = config.loss == "cross_entropy"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss that the config names, of logits and targets, both (m, classes)."""
        return self._loss.mean(outputs, targets)

    def sums(self, outputs: torch.Tensor, batch: MicroBatch, targets: torch.Tensor) -> torch.Tensor:
        """Return (loss, top-1 hits, top-5 hits) summed over the samples that count."""
        weights, logits = batch.weights, outputs.float().cpu()
        loss = self._loss.each(logits, batch.labels if batch.soft is None else targets.cpu())
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        top1, top5 = ranked[:, 0].float(), ranked.any(dim=1).float()
        return torch.stack([(loss * weights).sum(), (top1 * weights).sum(), (top5 * weights).sum()])

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return means over the samples."""
        loss, top1, top5 = sums
        return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}

    def confidences(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return class probabilities; of a loss that takes each class by itself they need not sum to 1."""
        return outputs.float().softmax(dim=1) if self._exclusive else outputs.float().sigmoid()
