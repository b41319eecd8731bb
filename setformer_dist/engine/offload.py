"""Repairs of DeepSpeed's offload and stage 3 (written against 0.19.8): no step sees a gradient of an earlier one.

With zero.offload the gradients of a step end in buffers in host memory that stay from step to step, and DeepSpeed only
overwrites what the step has gradients for. Two things go wrong by that. A parameter without a gradient in some step is
updated by that of an earlier one (zero under stages 0 to 2 without offload). And where gradients accumulate in fp32
besides weights of low precision (stages 1 and 2), those of a step that is left out, as they are not finite, are
added to, so that every later step is left out as well. Stage 3 without offload, whose buffer is on the device, has the
first fault, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def forget_gradients_after_steps(optimizer: Any) -> None:
    """Have kept gradients be zero after every step, taken or left out, of an optimizer with offload or of stage 3."""
    if not getattr(optimizer, "cpu_offload", False) and not getattr(optimizer, "offload_optimizer", False):
        _forget_on_device(optimizer)
        return
    reset = optimizer.reset_cpu_buffers  # called at both ends of a step, and nowhere else

    def reset_all() -> None:
        reset()
        # The values are buffers on the device that are made again at need; the dictionary is known elsewhere too.
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))
        for gradient in _in_host_memory(optimizer):
            gradient.zero_()

    optimizer.reset_cpu_buffers = reset_all


def _forget_on_device(optimizer: Any) -> None:
    """Have stage 3's gradients be zero after every step."""
    step = optimizer.step

    def step_and_forget() -> None:
        step()
        optimizer.grad_partitions_flat_buffer.zero_()

    optimizer.step = step_and_forget


def _in_host_memory(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield what the optimizer takes, and what micro batches are added into."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        masters = optimizer.single_partition_of_fp32_groups
        yield from optimizer.accumulated_grads_in_cpu.values()
    else:
        masters = optimizer.fp32_partitioned_groups_flat
        yield optimizer.grad_partitions_flat_buffer
    yield from (master.grad for master in masters if master.grad is not None)
