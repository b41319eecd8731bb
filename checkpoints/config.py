"""When a checkpoint is due and which ones stay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from setformer_dist.core.config import FrozenConfig


class CheckpointConfig(FrozenConfig):
    """The `[checkpoint]` table of a run page.

    Attributes:
        every_steps: optimizer steps between two checkpoints.
        keep_last: newest checkpoints that stay.
        keep_best: checkpoints that stay for their metric, besides the newest; 0 keeps none for that.
        best_metric: name of the metric, as evaluation reports it, that ranks checkpoints.
    """

    every_steps: int = Field(default=1000, ge=1)
    keep_last: int = Field(default=3, ge=1)
    keep_best: int = Field(default=1, ge=0)
    best_metric: Literal["top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss"] = "top1"

    @property
    def best_mode(self) -> Literal["max", "min"]:
        """Whether a larger or a smaller value of the metric is better."""
        return "min" if self.best_metric.endswith("loss") else "max"

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` optimizer steps."""
        return step > 0 and step % self.every_steps == 0
