"""Regression: a number for every sample, such as how similar two sentences are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats
import torch

from setformer_dist.core import config as base
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.metric import METRICS_OF, Metric


class RegressionConfig(FrozenConfig):
    """The table [task.args] of task "regression", which is empty."""


class Regression:
    """Mean square error; correlation with the numbers that are known, of values (Pearson) and of ranks (Spearman)."""

    name = "regression"
    metrics: tuple[Metric, ...] = METRICS_OF["regression"]
    outputs = ("value",)
    exclusive = False
    needs_parts = frozenset({"number"})
    columns = 2

    def __init__(self, args: Mapping[str, object], classes: tuple[str, ...]) -> None:
        """Read the task's table; raises ConfigError."""
        base.build(RegressionConfig, args, "task.args")

    def targets(self, batch: MicroBatch) -> torch.Tensor:
        """Return the known numbers, (m,) fp32.

        Raises:
            DataError: there are none.
        """
        if batch.numbers is None:
            raise DataError("task regression learns from numbers, and the samples have none: pack them with --number")
        return batch.numbers

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean square error, shape (), of (m, 1) outputs and (m,) targets."""
        return (outputs.float().squeeze(1) - targets).square().mean()

    def sums(self, outputs: torch.Tensor, batch: MicroBatch, targets: torch.Tensor) -> torch.Tensor:
        """Return the square error summed over the samples that count."""
        each = (outputs.float().squeeze(1) - targets).square().cpu()
        return (each * batch.weights).sum().unsqueeze(0)

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return the mean over the samples."""
        return {"loss": sums[0] / count}

    def rows(self, outputs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Return (known, computed) of the samples that count, (r, 2) fp64."""
        table = torch.stack([self.targets(batch).double(), outputs.double().squeeze(1).cpu()], dim=1)
        return table[batch.weights > 0]

    def figures_of_rows(self, rows: torch.Tensor) -> dict[str, float]:
        """Return the correlations; 0 where one of both sides is constant."""
        # Sums depend on the order of what they sum, in their last bits.
        table = rows.numpy()
        known, computed = table[np.lexsort((table[:, 1], table[:, 0]))].T
        if len(known) < 2 or not (known.std() and computed.std()):
            return {"pearson": 0.0, "spearman": 0.0}
        found = {
            "pearson": float(scipy.stats.pearsonr(known, computed).statistic),
            "spearman": float(scipy.stats.spearmanr(known, computed).statistic),
        }
        return {name: value if math.isfinite(value) else 0.0 for name, value in found.items()}

    def confidences(self, outputs: torch.Tensor) -> torch.Tensor:
        """Refuse: there are no classes."""
        raise ConfigError("a model of task regression gives a number and has no classes")
