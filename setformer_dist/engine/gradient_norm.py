"""The norm of all gradients by a handful of kernels, where DeepSpeed launches a dozen for each parameter.

Written against DeepSpeed 0.19.8. Before an update it looks for inf and NaN in each gradient by itself, and then takes
the norm of each by itself: 6,600 kernels a step for the 439 parameters of SeTformer-Tiny, and with stage 0 in low
precision a wait for the device after each. The first is not needed: the norm of gradients that are not finite is not
finite either, and an update with such a norm is left out as well. The second is one call of torch's, whose result
DeepSpeed goes on with: the norm of all gradients is the norm of their norms.

Left as they are: offloaded optimizers, of which DeepSpeed takes the norm while gradients arrive, and stage 1 in bf16
with gradients in fp32 (`precision.grad_accum`), which has no such check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.zero.utils import get_norm_dtype

from setformer_dist.engine.protocol import Engine


def quicken(engine: Engine) -> None:
    """Have an engine take the norm of its gradients together.

    Args:
        engine: fresh from `deepspeed.initialize`.
    """
    made: Any = engine
    optimizer = made.optimizer
    if isinstance(optimizer, unfused_optimizer.FP16_UnfusedOptimizer):
        optimizer.overflow_checker.check = lambda param_groups=None: False
        optimizer.unscale_and_clip_grads = _scaled_together(optimizer)
    elif hasattr(optimizer, "get_grad_norm_direct") and not engine.zero_use_cpu_optimizer():
        optimizer.check_overflow = lambda partition_gradients=True: None
        optimizer.get_grad_norm_direct = _of_norms(optimizer.get_grad_norm_direct)
    elif not engine.zero_optimization_stage():
        made.clip_fp32_gradients = lambda: _clip(made)


def _clip(engine: Any) -> None:
    """Scale fp32 gradients, equal on all ranks, to the norm that the config allows; keep their norm."""
    parameters, most = engine.module.parameters(), engine.gradient_clipping()
    engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, most, foreach=True)


def norms_of(gradients: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """Return the 2-norm of each gradient that is not empty, (k,), computed in a dtype; None where there is none."""
    whole = [gradient for gradient in gradients if gradient.numel() and not getattr(gradient, "_zero_padding", False)]
    return torch.stack(torch._foreach_norm(whole, 2, dtype=dtype)) if whole else None


def _of_norms(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return DeepSpeed's function for ZeRO's partitions of gradients, given the norm of each as the only gradient."""

    def of_all(gradients: Sequence[torch.Tensor], params: Sequence[torch.Tensor], norm_type: int = 2) -> torch.Tensor:
        norms = norms_of(gradients, get_norm_dtype())
        return norm(gradients if norms is None else [norms], params, norm_type)

    return of_all


def _scaled_together(optimizer: Any) -> Callable[..., float]:
    """Return DeepSpeed's scaling of the gradients of fp32 masters, in one call for all."""
    scale_of = optimizer.unscale_and_clip_grads

    def scaled(total_norm: float, apply_scale: bool = True) -> float:
        scale: float = scale_of(total_norm, apply_scale=False)
        gradients = [p.grad for group in optimizer.fp32_groups for p in group if p.grad is not None]
        if apply_scale and gradients:
            torch._foreach_mul_(gradients, 1.0 / scale)
        return scale

    return scaled


_weight_norm = unfused_optimizer.get_weight_norm


def _weight_norm_of_norms(gradients: Sequence[torch.Tensor], norm_type: int = 2, mpu: object = None) -> float:
    """`deepspeed.runtime.utils.get_weight_norm`, which stage 0 in low precision calls as a global name."""
    norms = norms_of(gradients, torch.float32)
    return float(_weight_norm(gradients if norms is None else [norms], norm_type, mpu))


unfused_optimizer.get_weight_norm = _weight_norm_of_norms
