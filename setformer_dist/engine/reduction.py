"""The mean of gradients over the ranks under ZeRO stages 1 and 2, taken for a bucket of them at once.

Written against DeepSpeed 0.19.8, whose hooks copy each gradient into a bucket, look up which ranks keep which part of
it, copy the bucket again to add it up, and copy each gradient out: two kernels and 40 µs of Python for each of the 439
weights of SeTformer-Tiny, also for a rank alone. Here a hook only notes that a gradient is there, and a bucket is one
concatenation, one division, one sum over ranks and one copy of what this rank keeps: DeepSpeed's operations on the same
numbers. A rank alone has its gradients where they should be.

With `zero.overlap_comm` a bucket is summed while the backward pass goes on, two buckets at a time.

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
from setformer_dist.engine.zero import OVERLAPPED

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
        Reduction(engine).install()


class Reduction:
    """Gradients of one engine on their way to the ranks that keep them.

    Buckets are fixed: weights from the model's last to its first, as their gradients come. Ranks reduce them in this
    order, each when all its gradients are there, and the rest after the backward pass, with zeros for weights that this
    rank has not used. So ranks agree whatever order gradients come in, and on weights that some of them use alone.

    Args:
        engine: whose optimizer is of ZeRO stage 1 or 2.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = optimizer = engine.optimizer
        # The optimizer has a copy of it, which is that of the last pass until a gradient reaches the model's outputs.
        self._is_last = engine.is_gradient_accumulation_boundary
        self._overlap: bool = optimizer.overlap_comm
        self._ranks = comm.get_world_size(group=optimizer.dp_process_group)
        self._kept: list[list[torch.Tensor]] = optimizer.params_in_partition
        self._group = {p: index for index, group in enumerate(self._kept) for p in group}
        # With `precision.grad_accum = "fp32"` what this rank keeps of means is added to one fp32 tensor of a group.
        self._sums = any(map(optimizer._use_compact_grad_partition_buffer, range(len(self._kept))))
        known = {p for group in optimizer.bit16_groups for p in group if p.requires_grad}
        most = min(optimizer.reduce_bucket_size, OVERLAPPED) if self._overlap else optimizer.reduce_bucket_size
        self._buckets = buckets_of([p for p in engine.module.parameters() if p in known], most)
        self._bucket = {p: index for index, weights in enumerate(self._buckets) for p in weights}
        self._missing = [len(weights) for weights in self._buckets]
        self._next = 0
        self._under_way: deque[tuple[list[torch.Tensor], torch.Tensor, Any]] = deque()

    def install(self) -> None:
        """Take the place of DeepSpeed's hooks, and of what it does after a backward pass."""
        optimizer = self._optimizer
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks = []
        if optimizer.partition_gradients or self._overlap:  # stage 2 frees gradients that other ranks keep
            weights: list[Any] = list(self._bucket)
            optimizer._grad_acc_hooks = [weight.register_post_accumulate_grad_hook(self._take) for weight in weights]
        optimizer.reduce_gradients = self.finish
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.finish

    @torch.no_grad()
    def finish(self, pipeline_parallel: bool = False) -> None:
        """Reduce what is left, and hand DeepSpeed what the update needs.

        It calls this after each backward pass of stage 2, and after the last one of a step of stage 1.
        """
        while self._next < len(self._buckets):
            self._begin()
        while self._under_way:
            self._settle()
        self._missing = [len(weights) for weights in self._buckets]
        self._next = 0
        optimizer = self._optimizer
        last = self._is_last()
        for index, weights in enumerate(self._kept):
            if self._sums:
                if last:
                    optimizer._get_compact_grad_partition_buffer(index)
                continue
            gradients = optimizer.get_all_grad_tensors(weights, dtype=optimizer.gradient_accumulation_dtype)
            earlier = optimizer.all_grad_tensors.get(index)
            if earlier:
                torch._foreach_add_(earlier, gradients)
            elif last or not weights:  # of a small group some ranks keep nothing
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
        for weight in self._bucket:
            weight.grad = None

    def _take(self, weight: torch.Tensor) -> None:
        """Take note of a gradient; reduce what is complete. Stage 1 has it all in the last micro batch of a step."""
        if not (self._optimizer.partition_gradients or self._is_last()):
            return
        index = self._bucket[weight]
        self._missing[index] -= 1
        if self._missing[index] < 0:
            raise RuntimeError(
                "a weight got a second gradient in one backward pass, as reentrant checkpoints give, and the first may "
                "be reduced by now: only zero.stage = 1 with zero.overlap_comm = false adds them. Or the last backward "
                "pass failed: this engine cannot go on"
            )
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Begin to take the means of the next bucket."""
        weights, self._next = self._buckets[self._next], self._next + 1
        if self._ranks == 1 and not self._sums:
            return
        work, optimizer = None, self._optimizer
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        bucket = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if self._ranks > 1:
            bucket = bucket.div_(float(self._ranks)).to(optimizer.communication_data_type)
            work = comm.all_reduce(bucket, group=optimizer.dp_process_group, async_op=self._overlap)
        del gradients  # their memory may be that of the means
        for weight in weights:
            weight.grad = None
        self._under_way.append((weights, bucket, work))
        while len(self._under_way) > (_AT_ONCE if self._overlap else 0):
            self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        """Put what this rank keeps of the means of the oldest bucket where it belongs."""
        weights, bucket, work = self._under_way.popleft()
        if work is not None:
            work.wait()
        means = dict(zip(weights, torch.split(bucket, [weight.numel() for weight in weights]), strict=True))
        kept = [weight for weight in weights if weight in self._group]
        if self._sums:
            self._add_to_sums(kept, means)
        elif kept:
            # Not where gradients lay: autograd may have made one of them a view of what it still reads.
            own = [torch.empty_like(weight) for weight in kept]
            torch._foreach_copy_(own, [means[weight].view_as(weight) for weight in kept])
            for weight, mean in zip(kept, own, strict=True):
                weight.grad = mean

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
            wide = [torch.empty_like(total) for total in sums]
            torch._foreach_copy_(wide, parts)
            torch._foreach_add_(sums, wide)


def buckets_of(parameters: Sequence[torch.Tensor], most: int) -> list[list[torch.Tensor]]:
    """Return parameters from the last to the first, in buckets of so many elements at most, or of one parameter."""
    buckets: list[list[torch.Tensor]] = []
    room = 0
    for parameter in reversed(parameters):
        if not buckets or parameter.numel() > room:
            buckets.append([])
            room = most
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
