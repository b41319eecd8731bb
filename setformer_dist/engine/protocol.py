"""What this package uses of DeepSpeed's engine, as a type; the engine itself has none."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class Engine(Protocol):
    """A model under DeepSpeed: called like the model, it computes in the compute dtype, sharded as ZeRO wants it."""

    module: nn.Module
    optimizer: Any  # DeepSpeed's, of another class for each stage and precision; master.py knows them
    device: torch.device
    micro_steps: int  # micro batches so far

    def __call__(self, inputs: torch.Tensor) -> Any:
        """Return the model's outputs, as the task takes them."""
        ...

    def backward(self, loss: torch.Tensor) -> object:
        """Add the gradients of a micro batch's loss."""
        ...

    def step(self) -> object:
        """Update the weights, if this was the last micro batch of the optimizer step."""
        ...

    def set_train_micro_batch_size(self, micro_batch_size: int) -> object:
        """Set the samples of a rank's micro batch."""
        ...

    def set_train_batch_size(self, train_batch_size: int) -> object:
        """Set the samples of a step; how many micro batches it accumulates follows."""
        ...

    def train(self) -> object:
        """Set the mode of the model."""
        ...

    def eval(self) -> object:
        """Set the mode of the model."""
        ...

    def get_global_grad_norm(self) -> Any:
        """Return the norm of the last step's gradients, a number or a tensor; None where it is not known."""
        ...

    def was_step_applied(self) -> bool:
        """Return whether the last optimizer step changed the weights."""
        ...

    def zero_optimization_stage(self) -> int:
        """Return ZeRO's stage."""
        ...

    def zero_use_cpu_optimizer(self) -> bool:
        """Return whether optimizer states lie in host memory."""
        ...

    def fp16_enabled(self) -> bool:
        """Return whether the compute dtype is fp16."""
        ...

    def bfloat16_enabled(self) -> bool:
        """Return whether the compute dtype is bf16."""
        ...
