"""The mean of gradients over the ranks under ZeRO stages 0 to 2, taken for a bucket of them at once.

Written against DeepSpeed 0.19.8. Under stages 1 and 2 its hooks copy each gradient into a bucket, look up which ranks
keep which part of it, copy the bucket again to add it up, and copy each gradient out: two kernels and 40 µs of Python
for each of the 439 weights of SeTformer-Tiny, also for a rank alone. Under stage 0 it begins when the backward pass is
over, and copies each gradient back. Here a hook only notes that a gradient is there, and a bucket is one concatenation,
one division, one sum over ranks and, where a rank keeps a part of it, one copy of that. A rank alone has its gradients
where they should be.

With `zero.overlap_comm` a bucket is summed while the backward pass goes on, two buckets at a time.

DeepSpeed does it where a run asks for something else: offload, or keys of its own for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from setformer_dist.core.errors import ConfigError
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
# The same of its engine under stage 0.
_USUAL_WHOLE = {
    "gradient_average": True,
    "has_moe_layers": False,
    "pipeline_parallelism": False,
    "sequence_parallel_size": 1,
}
_AT_ONCE = 2  # buckets that are summed beside a backward pass; each is memory


def reduce_together(engine: Engine) -> None:
    """Have an engine of ZeRO stage 0, 1 or 2 reduce gradients by `Reduction`, unless its config asks for another way.

    Args:
        engine: fresh from `deepspeed.initialize`.
    """
    made: Any = engine
    if made.torch_autocast_enabled():
        return
    if not engine.zero_optimization_stage():
        scaled = not made.postscale_gradients() or made.gradient_predivide_factor() != 1
        own_buffer = hasattr(made.optimizer, "get_grads_for_reduction")  # of sums in fp32
        if not (scaled or own_buffer) and _are(made, _USUAL_WHOLE):
            Whole(made).install()
    elif type(made.optimizer) is DeepSpeedZeroOptimizer and _are(made.optimizer, _USUAL):
        Parts(made).install()


def _are(owner: Any, usual: Mapping[str, object]) -> bool:
    return all(getattr(owner, name) == value for name, value in usual.items())


class Reduction(ABC):
    """Gradients of one engine on their way to the ranks that keep them.

    Buckets are fixed: weights from the model's last to its first, as their gradients come. Ranks reduce them in this
    order, each when all its gradients are there, and the rest after the backward pass, with zeros for weights that this
    rank has not used. So ranks agree whatever order gradients come in, and on weights that some of them use alone.

    Args:
        weights: all that are trained, in the order of the model.
        group: of the ranks that have gradients of the same weights.
        dtype: in which gradients are summed.
        bucket: elements of a bucket, at most.
        overlap: whether they are summed beside the backward pass.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], group: Any, dtype: torch.dtype, bucket: int, overlap: bool
    ) -> None:
        self._group, self._dtype, self._overlap = group, dtype, overlap
        self._ranks: int = comm.get_world_size(group=group)
        self._buckets = buckets_of(weights, min(bucket, OVERLAPPED) if overlap else bucket)
        self._bucket = {weight: index for index, bucket in enumerate(self._buckets) for weight in bucket}
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = 0
        self._under_way: deque[tuple[list[torch.Tensor], torch.Tensor, Any]] = deque()

    def _hook(self) -> list[Any]:
        """Have each weight say when its gradient is there; return the handles."""
        weights: list[Any] = list(self._bucket)
        return [weight.register_post_accumulate_grad_hook(self._take) for weight in weights]

    @abstractmethod
    def _now(self) -> bool:
        """Return whether gradients of this backward pass are reduced."""

    @abstractmethod
    def _keep(self, weights: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> None:
        """Put what this rank keeps of means, which have the weights' shapes, where it belongs."""

    def _reduce_the_rest(self) -> None:
        """Reduce what is left after a backward pass."""
        while self._next < len(self._buckets):
            self._begin()
        while self._under_way:
            self._settle()
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = 0

    def _take(self, weight: torch.Tensor) -> None:
        """Take note of a gradient; reduce what is complete."""
        if not self._now():
            return
        index = self._bucket[weight]
        self._missing[index] -= 1
        if self._missing[index] < 0:
            raise ConfigError(
                "a weight got a second gradient in one backward pass, as those that several reentrant checkpoints use, "
                "and the first may be reduced by now: use checkpoint(..., use_reentrant=False), or zero.stage = 0 or 1 "
                "with zero.overlap_comm = false. Or the last backward pass failed, and this engine cannot go on"
            )
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Begin to take the means of the next bucket."""
        weights, self._next = self._buckets[self._next], self._next + 1
        if self._in_place():
            return
        work = None
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        bucket = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if self._ranks > 1:
            bucket = bucket.div_(float(self._ranks)).to(self._dtype)
            work = comm.all_reduce(bucket, group=self._group, async_op=self._overlap)
        del gradients  # their memory may be that of the means
        for weight in weights:
            weight.grad = None
        self._under_way.append((weights, bucket, work))
        while len(self._under_way) > (_AT_ONCE if self._overlap else 0):
            self._settle()

    def _in_place(self) -> bool:
        """Return whether gradients are where they belong without any reduction."""
        return self._ranks == 1

    @torch.no_grad()
    def _settle(self) -> None:
        """Keep what this rank keeps of the means of the oldest bucket."""
        weights, bucket, work = self._under_way.popleft()
        if work is not None:
            work.wait()
        means = torch.split(bucket, [weight.numel() for weight in weights])
        self._keep(weights, [mean.view_as(weight) for mean, weight in zip(means, weights, strict=True)])


class Whole(Reduction):
    """All means on all ranks: stage 0."""

    def __init__(self, engine: Any) -> None:
        """Take over from an engine's own reduction, by `install`."""
        self._engine = engine
        super().__init__(
            [p for p in engine.module.parameters() if p.requires_grad],
            groups._get_sequence_data_parallel_group(),
            engine.communication_data_type,
            engine.zero_reduce_bucket_size(),
            engine.zero_overlap_comm(),
        )

    def install(self) -> None:
        """Take the place of what DeepSpeed does after the last backward pass of a step."""
        if self._overlap and self._ranks > 1:
            self._hook()
        self._engine.buffered_allreduce_fallback = self.finish

    @torch.no_grad()
    def finish(self, grads: object = None, elements_per_buffer: int = 0) -> None:
        """Reduce what is left; weights that no micro batch has used get zeros, as DeepSpeed gives them."""
        self._reduce_the_rest()
        for weight in self._bucket:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def _now(self) -> bool:
        return bool(self._engine.is_gradient_accumulation_boundary())

    def _keep(self, weights: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> None:
        for weight, mean in zip(weights, means, strict=True):
            weight.grad = mean.to(weight.dtype)


class Parts(Reduction):
    """What an optimizer of stage 1 or 2 keeps on each rank."""

    def __init__(self, engine: Any) -> None:
        """Take over from an engine's optimizer, by `install`."""
        self._optimizer = optimizer = engine.optimizer
        # The optimizer has a copy of it, which is that of the last pass until a gradient reaches the model's outputs.
        self._is_last = engine.is_gradient_accumulation_boundary
        self._kept: list[list[torch.Tensor]] = optimizer.params_in_partition
        self._index = {p: index for index, group in enumerate(self._kept) for p in group}
        # With `precision.grad_accum = "fp32"` what this rank keeps of means is added to one fp32 tensor of a group.
        self._sums = any(map(optimizer._use_compact_grad_partition_buffer, range(len(self._kept))))
        known = {p for group in optimizer.bit16_groups for p in group if p.requires_grad}
        super().__init__(
            [p for p in engine.module.parameters() if p in known],
            optimizer.dp_process_group,
            optimizer.communication_data_type,
            optimizer.reduce_bucket_size,
            optimizer.overlap_comm,
        )

    def install(self) -> None:
        """Take the place of DeepSpeed's hooks, and of what it does after a backward pass."""
        optimizer = self._optimizer
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks = []
        if optimizer.partition_gradients or self._overlap:  # stage 2 frees gradients that other ranks keep
            optimizer._grad_acc_hooks = self._hook()
        optimizer.reduce_gradients = self.finish
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.finish

    @torch.no_grad()
    def finish(self, pipeline_parallel: bool = False) -> None:
        """Reduce what is left, and hand DeepSpeed what the update needs.

        It calls this after each backward pass of stage 2, and after the last one of a step of stage 1.
        """
        self._reduce_the_rest()
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

    def _now(self) -> bool:
        """Return whether gradients are reduced: stage 1 has all in the last micro batch of a step."""
        return bool(self._optimizer.partition_gradients or self._is_last())

    def _in_place(self) -> bool:
        return self._ranks == 1 and not self._sums

    def _keep(self, weights: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> None:
        kept = [(weight, mean) for weight, mean in zip(weights, means, strict=True) if weight in self._index]
        if self._sums:
            self._add_to_sums(kept)
        elif kept:
            # Not where gradients lay: autograd may have made one of them a view of what it still reads.
            own = [torch.empty_like(weight) for weight, _ in kept]
            torch._foreach_copy_(own, [mean for _, mean in kept])
            for (weight, _), mean in zip(kept, own, strict=True):
                weight.grad = mean

    def _add_to_sums(self, kept: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add what this rank keeps of means to the sums of their groups."""
        optimizer = self._optimizer
        sums, parts = [], []
        for weight, mean in kept:
            group, known = self._index[weight], optimizer.get_param_id(weight)
            rank = comm.get_rank(group=optimizer.real_dp_process_group[group])
            start = optimizer.grad_start_offset[group][rank][known]
            room = optimizer.partition_size[group] - optimizer.grad_partition_insertion_offset[group][rank][known]
            part = mean.flatten().narrow(0, int(start), int(min(weight.numel() - start, room)))
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
