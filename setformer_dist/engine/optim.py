"""Parameter groups, AdamW and the learning-rate schedule; all of it timm's and PyTorch's, configured here."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from setformer_dist.engine.config import OptimConfig, ScheduleConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return timm's groups: decay for matrices, none for norms, biases and `model.no_weight_decay()`.

    With layer_decay < 1 each group carries an `lr_scale`, which the schedule multiplies in.
    """
    listed: Any = getattr(model, "no_weight_decay", None)
    named = listed() if listed is not None else set()
    if config.layer_decay < 1:
        groups = param_groups_layer_decay(
            model,
            weight_decay=config.weight_decay,
            no_weight_decay_list=named,
            layer_decay=config.layer_decay,
        )
    else:
        groups = param_groups_weight_decay(model, weight_decay=config.weight_decay, no_weight_decay_list=named)
    kept = [group for group in groups if group["params"]]
    return [{key: value for key, value in group.items() if key != "param_names"} for group in kept]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Return PyTorch's fused AdamW, one kernel per flat ZeRO partition, on CPU and GPU."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class Schedule:
    """The learning rate as a pure function of the optimizer step (timm's CosineLRScheduler)."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps_per_epoch: int) -> None:
        self._groups = optimizer.param_groups
        warmup = config.warmup(steps_per_epoch)
        self._cosine = CosineLRScheduler(
            optimizer,
            t_initial=max(1, config.total_steps(steps_per_epoch) - warmup),
            lr_min=config.min_lr,
            warmup_t=warmup,
            warmup_lr_init=config.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def apply(self, step: int) -> float:
        """Set every group's learning rate for this step and return the largest."""
        self._cosine.step_update(step)
        return max(float(group["lr"]) for group in self._groups)
