"""The mean of gradients over the ranks under ZeRO stages 1 and 2, taken for a bucket of them at once.

Written against DeepSpeed 0.19.8, whose hooks copy each gradient into a bucket, look up which ranks keep which part of
it, copy the bucket again to add it up, and copy each gradient out: two kernels and 40 µs of Python for each of the 439
weights of SeTformer-Tiny, also for a rank alone. Here a hook only notes the weight, and a bucket is one concatenation,
one division, one sum over ranks and one copy of what this rank keeps: DeepSpeed's operations on the same numbers. A
rank alone has its gradients where they should be.

With `zero.overlap_comm` a full bucket is summed while the backward pass goes on, two buckets at a time.

DeepSpeed does it where a run asks for something else: offload, or keys of its own for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from setformer_dist.engine.protocol import Engine

# Of DeepSpeed's optimizer: what must hold for its reduction to be the one of this module.
_USUAL = {
    "cpu_offload": False,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
    "use_grad_accum_attribute": False,
    "gradient_average": True,
    "has_moe_layers": False,
    "zenflow": False,
    "sequence_parallel_size": 1,
}
_AT_ONCE = 2  # buckets that are summed beside a backward pass; each is memory


def reduce_together(engine: Engine) -> None:
    """Have an engine of ZeRO stage 1 or 2 reduce gradients by `Reduction`, unless its config asks for another way.

    Args:
        engine: fresh from `deepspeed.initialize`.
    """
    made: Any = engine
    optimizer = made.optimizer
    if type(optimizer) is not DeepSpeedZeroOptimizer or made.torch_autocast_enabled():
        return
    if all(getattr(optimizer, name) == usual for name, usual in _USUAL.items()):
        Reduction(optimizer).install()


class Reduction:
    """Gradients of one ZeRO optimizer on their way to the ranks that keep them."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._ranks = comm.get_world_size(group=optimizer.dp_process_group)
        self._weights: list[torch.Tensor] = [p for group in optimizer.bit16_groups for p in group if p.requires_grad]
        self._order = {p: index for index, p in enumerate(self._weights)}
        self._kept: list[list[torch.Tensor]] = optimizer.params_in_partition
        self._group = {p: index for index, group in enumerate(self._kept) for p in group}
        # With `precision.grad_accum = "fp32"` what this rank keeps of means is added to one fp32 tensor of a group.
        self._sums = any(map(optimizer._use_compact_grad_partition_buffer, range(len(self._kept))))
        self._overlap: bool = optimizer.overlap_comm
        self._begun: set[torch.Tensor] = set()
        self._waiting: list[torch.Tensor] = []
        self._elements = 0
        self._under_way: deque[tuple[list[torch.Tensor], torch.Tensor, Any]] = deque()

    def install(self) -> None:
        """Take the place of DeepSpeed's hooks, and of what it does after a backward pass."""
        optimizer = self._optimizer
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks = []
        if optimizer.partition_gradients or self._overlap:  # stage 2 frees gradients that other ranks keep
            weights: list[Any] = self._weights
            optimizer._grad_acc_hooks = [weight.register_post_accumulate_grad_hook(self._arrived) for weight in weights]
        optimizer.reduce_gradients = self.reduce
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.finish

    def reduce(self, pipeline_parallel: bool = False) -> None:
        """Reduce the gradients of all weights; DeepSpeed calls it after the last backward pass of a step of stage 1."""
        for weight in self._weights:  # all of them, or those that the last micro batch did not use
            if weight.grad is not None and weight not in self._begun:
                self._add(weight)
        self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what waits, and hand DeepSpeed what the update needs; it calls this after backward passes."""
        self._flush()
        while self._under_way:
            self._settle()
        self._begun.clear()
        optimizer = self._optimizer
        last = optimizer.is_gradient_accumulation_boundary()
        for index, weights in enumerate(self._kept):
            if self._sums:
                if last:
                    optimizer._get_compact_grad_partition_buffer(index)
                continue
            gradients = optimizer.get_all_grad_tensors(weights, dtype=optimizer.gradient_accumulation_dtype)
            earlier = optimizer.all_grad_tensors.get(index)
            if earlier is not None:
                torch._foreach_add_(earlier, gradients)
            elif last:
                optimizer.all_grad_tensors[index] = gradients
            else:  # those of further micro batches may come to lie where these do (`cuda_graphs.py`)
                optimizer.all_grad_tensors[index] = [torch.empty_like(gradient) for gradient in gradients]
                torch._foreach_copy_(optimizer.all_grad_tensors[index], gradients)
            if last:
                optimizer.averaged_gradients[index] = optimizer.get_flat_partition(
                    weights,
                    optimizer.first_offset[index],
                    optimizer.partition_size[index],
                    dtype=optimizer.gradient_accumulation_dtype,
                    device=optimizer.device,
                    param_group_idx=index,
                    return_tensor_list=True,
                )
                optimizer.all_grad_tensors[index] = None
        for weight in self._weights:
            weight.grad = None

    def _arrived(self, weight: torch.Tensor) -> None:
        """Note a weight whose gradient is there. Stage 1 reduces those of the last micro batch, which hold all."""
        if self._optimizer.partition_gradients or self._optimizer.is_gradient_accumulation_boundary():
            self._add(weight)

    def _add(self, weight: torch.Tensor) -> None:
        """Have a gradient wait; where it does not fit into the bucket, reduce those that wait."""
        if self._elements + weight.numel() > self._optimizer.reduce_bucket_size:
            self._flush()
        self._begun.add(weight)
        self._waiting.append(weight)
        self._elements += weight.numel()

    @torch.no_grad()
    def _flush(self) -> None:
        """Begin to take the means of the gradients that wait, in an order that is the same on all ranks."""
        weights = sorted(self._waiting, key=self._order.__getitem__)
        self._waiting, self._elements = [], 0
        if not weights or (self._ranks == 1 and not self._sums):
            return
        work, optimizer = None, self._optimizer
        bucket = torch.cat([_gradient(weight).reshape(-1) for weight in weights])
        if self._ranks > 1:
            bucket = bucket.div_(float(self._ranks)).to(optimizer.communication_data_type)
            work = comm.all_reduce(bucket, group=optimizer.dp_process_group, async_op=self._overlap)
        for weight in weights:
            if self._sums or weight not in self._group:
                weight.grad = None
        self._under_way.append((weights, bucket, work))
        while len(self._under_way) > (_AT_ONCE if self._overlap else 0):
            self._settle()

    def _settle(self) -> None:
        """Put what this rank keeps of the means of the oldest bucket where it belongs."""
        weights, bucket, work = self._under_way.popleft()
        if work is not None:
            work.wait()
        if self._sums:
            bucket = bucket.to(self._optimizer.gradient_accumulation_dtype)
        means = dict(zip(weights, torch.split(bucket, [weight.numel() for weight in weights]), strict=True))
        kept = [weight for weight in weights if weight in self._group]
        if self._sums:
            self._add_to_sums(kept, means)
        elif kept:
            gradients = [_gradient(weight) for weight in kept]
            torch._foreach_copy_(gradients, [means[w].view_as(g) for w, g in zip(kept, gradients, strict=True)])

    def _add_to_sums(self, weights: Sequence[torch.Tensor], means: dict[torch.Tensor, torch.Tensor]) -> None:
        """Add what this rank keeps of means to the sums of their groups."""
        optimizer = self._optimizer
        sums, parts = [], []
        for weight in weights:
            group, known = self._group[weight], optimizer.get_param_id(weight)
            rank = comm.get_rank(group=optimizer.real_dp_process_group[group])
            start = optimizer.grad_start_offset[group][rank][known]
            room = optimizer.partition_size[group] - optimizer.grad_partition_insertion_offset[group][rank][known]
            part = means[weight].narrow(0, int(start), int(min(weight.numel() - start, room)))
            sums.append(optimizer._get_compact_grad_partition_slice(group, rank, known, part.numel()))
            parts.append(part)
        if parts:
            torch._foreach_add_(sums, parts)


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    assert weight.grad is not None  # only weights that have one wait
    return weight.grad
