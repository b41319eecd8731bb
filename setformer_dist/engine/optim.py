"""Parameter groups, AdamW and the learning-rate schedule; all of it timm's and PyTorch's, configured here."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError


class OptimConfig(FrozenConfig):
    """AdamW (Loshchilov & Hutter 2019).

    Attributes:
        lr: peak learning rate at the configured global batch.
        weight_decay: decoupled; not applied to norms, biases, references and what else the model names.
        clip_norm: bound of the global gradient norm; 0 turns clipping off.
        layer_decay: factor per layer group from the head down; 1 turns it off.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = pydantic.Field(default=1e-3, gt=0)
    weight_decay: float = pydantic.Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = pydantic.Field(default=1e-8, gt=0)
    clip_norm: float = pydantic.Field(default=5.0, ge=0)
    layer_decay: float = pydantic.Field(default=1.0, gt=0, le=1)

    @pydantic.field_validator("betas", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples

    @pydantic.field_validator("betas")
    @classmethod
    def _in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must lie in [0, 1)")
        return value


class ScheduleConfig(FrozenConfig):
    """Linear warm-up, then cosine decay (Loshchilov & Hutter 2017). Give epochs or steps, not both.

    Attributes:
        epochs: length of the run in epochs.
        steps: length of the run in optimizer steps.
        warmup_epochs: length of the warm-up in epochs (of the run's own epochs).
        warmup_steps: length of the warm-up in optimizer steps.
        warmup_lr: learning rate at step 0.
        min_lr: learning rate at the end.
    """

    epochs: int | None = pydantic.Field(default=None, gt=0)
    steps: int | None = pydantic.Field(default=None, gt=0)
    warmup_epochs: float | None = pydantic.Field(default=None, ge=0, le=1e9)
    warmup_steps: int | None = pydantic.Field(default=None, ge=0)
    warmup_lr: float = pydantic.Field(default=1e-6, ge=0)
    min_lr: float = pydantic.Field(default=5e-6, ge=0)

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("schedule: give either epochs or steps, one of them")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("schedule: give warmup_epochs or warmup_steps, not both")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the run in optimizer steps."""
        return self.steps if self.steps is not None else int(self.epochs or 0) * steps_per_epoch

    def warmup(self, steps_per_epoch: int) -> int:
        """Return the length of the warm-up in optimizer steps.

        Raises:
            ConfigError: the warm-up is as long as the run.
        """
        if self.warmup_steps is not None:
            steps = self.warmup_steps
        else:
            steps = round((self.warmup_epochs or 0) * steps_per_epoch)
        total = self.total_steps(steps_per_epoch)
        if steps >= total:
            raise ConfigError(f"schedule: a warm-up of {steps} steps does not fit into a run of {total} steps")
        return steps


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
