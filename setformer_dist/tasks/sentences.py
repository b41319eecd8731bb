"""One class per text, scored as GLUE does: accuracy, F1 and Matthews' correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.metric import METRICS_OF, Metric
from setformer_dist.tasks.classification import Classification


class Sentences(Classification):
    """Classification with figures that a constant answer does not raise.

    F1 is that of the second class where there are two (paraphrases, acceptable sentences), else the mean over classes.
    """

    name = "sentences"
    metrics: tuple[Metric, ...] = METRICS_OF["sentences"]

    def sums(self, outputs: torch.Tensor, batch: MicroBatch, targets: torch.Tensor) -> torch.Tensor:
        """Return (loss, and for each class: hits, times predicted, times there) over the samples that count."""
        loss, *_ = super().sums(outputs, batch, targets)
        counted = batch.weights > 0
        found, known = outputs.argmax(dim=1).cpu()[counted], batch.labels[counted]
        counts = (torch.bincount(which, minlength=len(self.outputs)) for which in (known[found == known], found, known))
        return torch.cat([loss.double().unsqueeze(0), *counts])

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return the metrics; a figure without a value, as of one class that is always predicted, is 0."""
        classes = len(self.outputs)
        loss, (hits, found, known) = sums[0], (sums[1 + i * classes : 1 + (i + 1) * classes] for i in range(3))
        f1 = [2 * h / (f + k) if f + k else 0.0 for h, f, k in zip(hits, found, known, strict=True)]
        # Gorodkin 2004: of two classes the phi coefficient.
        right, squares = sum(hits), count**2
        spread = (squares - sum(f * f for f in found)) * (squares - sum(k * k for k in known))
        agreed = right * count - sum(f * k for f, k in zip(found, known, strict=True))
        return {
            "top1": right / count,
            "f1": f1[1] if classes == 2 else math.fsum(f1) / max(1, classes),
            "mcc": agreed / math.sqrt(spread) if spread > 0 else 0.0,
            "loss": loss / count,
        }
