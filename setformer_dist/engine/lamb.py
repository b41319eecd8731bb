"""LAMB (You et al. 2020) for ranks that hold parts of parameters.

Its step scales the update u of each parameter w by |w| / |u|. timm's takes both norms of whole parameters, and ZeRO
divides parameters among ranks anywhere. Here norms are sums of squares of parts, added over the ranks: one small
collective for each group of parameters. The rest is timm's arithmetic, with its choices: no scaling without weight
decay (norms, biases), and weight decay within u.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """What of a parameter lies in one of the optimizer's tensors.

    Attributes:
        parameter: its number, the same on all ranks.
        start: first element within the tensor.
        count: elements.
    """

    parameter: int
    start: int
    count: int


class Lamb(torch.optim.Optimizer):
    """LAMB, whose tensors are whole parameters until `divide` says what they are.

    Args:
        params: groups, as torch's optimizers take them.
        lr: learning rate.
        betas: decay rates of the averages of gradients and of their squares.
        eps: in the denominator of an update.
        weight_decay: added to an update, before it is scaled.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._parts: Mapping[torch.Tensor, Sequence[Part]] | None = None
        self._parameters = 0
        self._at: dict[torch.Tensor, torch.Tensor] = {}
        self._sum: Callable[[torch.Tensor], torch.Tensor] = lambda squares: squares

    def divide(
        self,
        parts: Mapping[torch.Tensor, Sequence[Part]],
        parameters: int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Say which parts of parameters each tensor holds.

        Args:
            parts: for each of the optimizer's tensors; what belongs to none is padding.
            parameters: their number over all ranks.
            sum_over_ranks: adds a float64 tensor up. Collective.
        """
        self._parts, self._parameters, self._sum = parts, parameters, sum_over_ranks
        # On the tensors' device once, not in each step.
        self._at = {
            tensor: torch.tensor([part.parameter for part in found], dtype=torch.int64, device=tensor.device)
            for tensor, found in parts.items()
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here has a closure
        """Update every parameter that has a gradient. Collective where parameters are divided."""
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if not tensors:
                continue
            updates = self._updates(tensors, group)
            if group["weight_decay"]:
                torch._foreach_add_(updates, tensors, alpha=group["weight_decay"])
                self._scale(tensors, updates)
            torch._foreach_add_(tensors, updates, alpha=-group["lr"])

    def _updates(self, tensors: list[torch.Tensor], group: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return Adam's updates without learning rate, after the averages have taken the gradients in."""
        states = [self._state_of(tensor) for tensor in tensors]
        (beta1, beta2), gradients = group["betas"], [g for tensor in tensors if (g := tensor.grad) is not None]
        averages, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_add_([state["step"] for state in states], 1.0)
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        counts = [state["step"].item() for state in states]  # they lie in host memory
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, [math.sqrt(1 - beta2**count) for count in counts])
        torch._foreach_add_(divisors, group["eps"])
        updates = torch._foreach_div(averages, [1 - beta1**count for count in counts])
        torch._foreach_div_(updates, divisors)
        return list(updates)

    def _state_of(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
        return state

    def _scale(self, tensors: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
        """Multiply the update of each parameter by the parameter's norm over its own."""
        if self._parts is None:
            ratios = _ratios(_squares(tensors), _squares(updates))
            torch._foreach_mul_(updates, list(ratios.unbind()))
            return
        found = [(i, part) for i, tensor in enumerate(tensors) for part in self._parts[tensor]]
        mine = [
            [flat[i].view(-1).narrow(0, part.start, part.count) for i, part in found] for flat in (tensors, updates)
        ]
        squares = torch.zeros(2, self._parameters, dtype=torch.float64, device=tensors[0].device)
        at = torch.cat([self._at[tensor] for tensor in tensors])
        if found:  # a rank may have nothing but padding
            squares[:, at] = torch.stack([_squares(views) for views in mine])
        weights, steps = self._sum(squares)
        if found:
            torch._foreach_mul_(mine[1], list(_ratios(weights, steps)[at].unbind()))


def _squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the squared norm of each tensor, (k,), float64."""
    return torch.stack(torch._foreach_norm(tensors, 2)).double().square()


def _ratios(weights: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """Return norms of weights over norms of updates, of their squares, (k,), fp32; 1 where either is zero."""
    usable = (weights > 0) & (updates > 0)
    return torch.where(usable, (weights / updates).sqrt(), 1.0).float()
