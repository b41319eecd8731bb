"""Parameter groups, optimizers and learning-rate schedules; all but LAMB timm's and PyTorch's, configured here.

Every optimizer here keeps states of one value per element of a parameter, and nothing else but a count of steps. So
ZeRO may cut parameters anywhere, and a checkpoint of one layout continues in every other (`engine.master`); what does
not is refused by name (`engine.config`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Adopt, Lion, NAdamW, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from setformer_dist.engine.config import OptimConfig, ScheduleConfig
from setformer_dist.engine.lamb import Lamb

_Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer that a config can name.

    Attributes:
        make: the class.
        options: what the config says of its arguments, besides groups and lr.
        states: names of what it keeps per element, all zero before the first step.
        counts: whether it keeps, as "step", how many updates it has made.
    """

    make: type[torch.optim.Optimizer]
    options: Callable[[OptimConfig], dict[str, Any]]
    states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    counts: bool = True


def _adam(config: OptimConfig) -> dict[str, object]:
    return {"betas": config.betas, "eps": config.eps}


def _sgd(config: OptimConfig) -> dict[str, object]:
    return {"momentum": config.momentum, "nesterov": config.nesterov, "fused": True}


# PyTorch's are fused: one kernel per flat ZeRO partition, on CPU and GPU.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(torch.optim.AdamW, lambda config: {**_adam(config), "fused": True}),
    "adam": Optimizer(torch.optim.Adam, lambda config: {**_adam(config), "fused": True}),
    "nadamw": Optimizer(NAdamW, _adam),
    "adopt": Optimizer(Adopt, lambda config: {**_adam(config), "decoupled": True}),
    "lamb": Optimizer(Lamb, _adam),
    "lion": Optimizer(Lion, lambda config: {"betas": config.betas}, ("exp_avg",), counts=False),
    "sgd": Optimizer(torch.optim.SGD, _sgd, ("momentum_buffer",), counts=False),
}


def parameter_groups(model: nn.Module, config: OptimConfig) -> _Groups:
    """Return timm's groups: decay for matrices, none for norms, biases and `model.no_weight_decay()`.

    With layer_decay < 1 each group carries an `lr_scale`, which the schedule multiplies in.
    """
    listed: Any = getattr(model, "no_weight_decay", None)  # a method of timm's models; a set of names is as clear
    named = (listed() if callable(listed) else listed) or set()
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


def optimizer_of(groups: _Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that a config names."""
    kind = OPTIMIZERS[config.name]
    make: Callable[..., torch.optim.Optimizer] = kind.make
    return make(groups, lr=config.lr, **kind.options(config))


def kind_of(optimizer: torch.optim.Optimizer) -> Optimizer:
    """Return what `optimizer_of` made an optimizer from."""
    return next(kind for kind in OPTIMIZERS.values() if type(optimizer) is kind.make)


class _WarmupStableDecay(PolyLRScheduler):  # type: ignore[misc]  # timm has no types
    """timm's linear decay, begun only where the stable part ends (Hu et al. 2024, MiniCPM)."""

    def __init__(self, optimizer: torch.optim.Optimizer, stable: int, **kwargs: object) -> None:
        self._stable = stable
        super().__init__(optimizer, power=1.0, **kwargs)

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            return list(super()._get_lr(t))
        return list(super()._get_lr(max(self.warmup_t, t - self._stable)))


def _scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps_per_epoch: int) -> Scheduler:
    warmup, total = config.warmup(steps_per_epoch), config.total_steps(steps_per_epoch)
    after = max(1, total - warmup)
    common = {"warmup_t": warmup, "warmup_lr_init": config.warmup_lr, "warmup_prefix": True, "t_in_epochs": False}
    falling = {"lr_min": config.min_lr, **common}
    match config.name:
        case "cosine":
            return CosineLRScheduler(optimizer, t_initial=after, **falling)
        case "linear":
            return PolyLRScheduler(optimizer, t_initial=after, power=1.0, **falling)
        case "polynomial":
            return PolyLRScheduler(optimizer, t_initial=after, power=config.power, **falling)
        case "step":
            every = config.drop_every(steps_per_epoch)
            return StepLRScheduler(optimizer, decay_t=every, decay_rate=config.drop_factor, **common)
        case "constant":
            return StepLRScheduler(optimizer, decay_t=after, decay_rate=1.0, **common)
        case "wsd":
            decay = config.decay(steps_per_epoch)
            return _WarmupStableDecay(optimizer, stable=after - decay, t_initial=decay, **falling)


class Schedule:
    """The learning rate as a pure function of the optimizer step (timm's schedulers)."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps_per_epoch: int) -> None:
        self._groups = optimizer.param_groups
        self._scheduler = _scheduler(optimizer, config, steps_per_epoch)

    def apply(self, step: int) -> float:
        """Set every group's learning rate for this step and return the largest."""
        self._scheduler.step_update(step)
        return max(float(group["lr"]) for group in self._groups)
