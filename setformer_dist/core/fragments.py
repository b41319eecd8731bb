"""A fragment: this rank's piece of one state of one parameter. All that checkpoints know of ZeRO.

Every ZeRO stage is the same thing seen this way: for each parameter a rank owns the elements
[start, start + numel) of the flattened fp32 master and of each optimizer state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# How the names begin of what a part of a run keeps in its checkpoints as fragments, and that are no parameters.
KEPT = "~"


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + tensor.numel()) of the flattened state `state` of parameter `name`.

    Attributes:
        name: the parameter's name in the model; one that begins with `KEPT` is no parameter.
        state: "param" (fp32 master), an optimizer state ("exp_avg", "exp_avg_sq") or "ema".
        start: first element within the flattened parameter.
        shape: the whole parameter's shape.
        tensor: 1-D, on any device; a copy or a live view, as the producer says.
    """

    name: str
    state: str
    start: int
    shape: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.tensor.numel()

    @property
    def full_numel(self) -> int:
        """Elements in the whole parameter."""
        return math.prod(self.shape)
