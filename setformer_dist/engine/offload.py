"""Repairs of DeepSpeed's offload (written against 0.19.8): no step sees a gradient of an earlier one.

With zero.offload the gradients of a step end in buffers in host memory that stay from step to step, and DeepSpeed only
overwrites what the step has gradients for. Two things go wrong by that. A parameter without a gradient in some step is
updated by that of an earlier one (without offload it would be zero). And where gradients accumulate in fp32 besides
weights of low precision (stages 1 and 2), those of a step that is left out, because they are not finite, are added to,
so that every later step is left out as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def forget_gradients_after_steps(optimizer: Any) -> None:
    """Have all gradients in host memory be zero after every step of an optimizer with offload, taken or left out."""
    reset = optimizer.reset_cpu_buffers  # called at both ends of a step, and nowhere else

    def reset_all() -> None:
        reset()
        # The values are buffers on the device that are made again at need; the dictionary is known elsewhere too.
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))
        for gradient in _in_host_memory(optimizer):
            gradient.zero_()

    optimizer.reset_cpu_buffers = reset_all


def _in_host_memory(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield what the optimizer takes, and what micro batches are added into."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        masters = optimizer.single_partition_of_fp32_groups
        yield from optimizer.accumulated_grads_in_cpu.values()
    else:
        masters = optimizer.fp32_partitioned_groups_flat
        yield optimizer.grad_partitions_flat_buffer
    yield from (master.grad for master in masters if master.grad is not None)
