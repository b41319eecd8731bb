"""What the ranks of a step send each other under each ZeRO stage, and how long it takes.

The list of collectives is that of DeepSpeed 0.19.8 as we configure it, read in its source and held by
tests/distributed/test_plan.py, which counts them on running ranks:

    stage 0   gradients, all-reduced in buckets, in the last micro batch
    stage 1   the same; updated weights gathered
    stage 2   the same, but gradients after each micro batch (DeepSpeed's "reduce" sends whole buckets to all ranks)
    stage 3   each weight gathered once per micro batch, as many at once as DeepSpeed gathers ahead; small ones
              ("persistent") once per step, all at once; gradients reduce-scattered after each micro batch. Every tensor
              is padded to a multiple of the ranks.

Ranks that share images (groups.py) wait for their sums and rows, which no computation hides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launch.plan.hardware import Device
from setformer_dist.engine.zero import OVERLAPPED

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]

_PERSISTENT = 100_000  # elements: stage3_param_persistence_threshold, DeepSpeed's default
_PREFETCH = 50_000_000  # elements: stage3_prefetch_bucket_size, likewise
_REUSE = 1_000_000_000  # elements: stage3_max_reuse_distance, likewise
_ALIGNED = 2  # elements: ZeRO-1 and 2 pad a group to a multiple of this times the ranks


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in an optimizer step.

    Attributes:
        operation: of torch.distributed.
        payload: bytes of the whole tensors, added up, as a rank hands them over or gets them.
        calls: collectives they are sent in.
        what: is sent.
        group: neighbouring ranks among which it goes; None for all.
    """

    operation: Operation
    payload: int
    calls: int
    what: str
    group: int | None = None

    def sent(self, world_size: int) -> float:
        """Return the bytes that a rank sends, in a ring (Thakur et al. 2005): W-1 parts, an all-reduce twice."""
        if self.operation == "send":
            return self.payload
        world_size = self.group or world_size
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.payload * (world_size - 1) / world_size


@dataclass(frozen=True)
class Model:
    """What traffic follows from.

    Attributes:
        groups: elements of each parameter, by the optimizer's parameter groups.
        item: bytes of an element as the model computes.
        bucket: elements of a reduction bucket.
        persistent: elements up to which ZeRO-3 keeps a parameter whole on every rank.
        prefetch: elements that ZeRO-3 gathers ahead.
        reuse: elements; a parameter that is needed again before so many others stays.
        fixed: elements of each parameter that does not train. ZeRO-3 gathers the large ones; in the backward pass they
            are taken to be needed no more, as where all before them is fixed, too.
    """

    groups: tuple[tuple[int, ...], ...]
    item: int
    bucket: int
    persistent: int = _PERSISTENT
    prefetch: int = _PREFETCH
    reuse: int = _REUSE
    fixed: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        groups: tuple[tuple[int, ...], ...],
        item: int,
        bucket_mib: int,
        deepspeed: Mapping[str, Any],
        fixed: tuple[int, ...] = (),
    ) -> Model:
        """Return the facts with what a run's [deepspeed] table says of ZeRO-3."""
        zero = deepspeed.get("zero_optimization", {})
        persistent = int(zero.get("stage3_param_persistence_threshold", _PERSISTENT))
        prefetch = int(zero.get("stage3_prefetch_bucket_size", _PREFETCH))
        reuse = int(zero.get("stage3_max_reuse_distance", _REUSE))
        return cls(groups, item, bucket_mib * 2**20 // 4, persistent, prefetch, reuse, fixed)

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter that trains."""
        return [size for group in self.groups for size in group]

    @property
    def count(self) -> int:
        """Elements of all parameters that train."""
        return sum(self.sizes)


def traffic(
    model: Model, stage: int, world_size: int, accumulation: int, overlap: bool = False
) -> tuple[Transfer, ...]:
    """Return the collectives of one optimizer step on one rank; sums of norms and flags (bytes) are left out.

    Args:
        model: its sizes.
        stage: of ZeRO.
        world_size: number of ranks.
        accumulation: micro batches of a step.
        overlap: whether stages 0 to 2 reduce gradients beside the backward pass.
    """
    gradients = model.count * model.item
    if stage < 3:
        times = accumulation if stage == 2 else 1
        calls = times * math.ceil(model.count / (min(model.bucket, OVERLAPPED) if overlap else model.bucket))
        reduced = Transfer("all_reduce", times * gradients, calls, "gradients")
        if not stage:
            return (reduced,)
        step = _ALIGNED * world_size
        padded = sum(math.ceil(sum(group) / step) * step for group in model.groups) * model.item
        return reduced, Transfer("all_gather", padded, len(model.groups), "updated weights")
    large = [size for size in (*model.fixed, *model.sizes) if size > model.persistent]
    small = [size for size in model.sizes if size <= model.persistent]
    gathers = large + _gathered_again(model)
    scattered = _padded(model.sizes, world_size) * model.item
    at_once = math.ceil(sum(gathers) / model.prefetch) if model.prefetch else len(gathers)
    found = [
        Transfer("all_gather", accumulation * _padded(gathers, world_size) * model.item,
                 accumulation * min(at_once, len(gathers)), "weights"),
        Transfer("all_gather", _padded(small, world_size) * model.item, 1, "small weights"),
        Transfer("reduce_scatter", accumulation * scattered, accumulation * math.ceil(model.count / model.bucket),
                 "gradients"),
    ]  # fmt: skip
    return tuple(transfer for transfer in found if transfer.payload)


def _padded(sizes: Sequence[int], world_size: int) -> int:
    return sum(math.ceil(size / world_size) * world_size for size in sizes)


def _gathered_again(model: Model) -> list[int]:
    """Return the large parameters that are released between forward and backward: what lies between is too long.

    DeepSpeed's prefetching keeps some of them that this rule lets go.
    """
    behind, again = 0, []
    for size in reversed(model.sizes):
        behind += size
        if size > model.persistent and 2 * behind > model.reuse:
            again.append(size)
    return again


def seconds(transfer: Transfer, device: Device, world_size: int, per_node: int) -> float:
    """Return how long a transfer takes.

    Within a node in a ring, between nodes each rank with those of its place on the other nodes, which is how NCCL
    uses one adapter per GPU: all of the payload goes over the links inside, a node's share of it over each rank's
    adapter. Latency is a ring's hop per rank inside; between nodes a tree's for all-reduces (double binary trees, NCCL
    2.4) and a ring's for the others. Rows go to a neighbour, over the slowest link of the group.
    """
    world_size = transfer.group or world_size
    inside = min(per_node, world_size)
    nodes = math.ceil(world_size / per_node)
    if transfer.operation == "send":
        link = device.inside if nodes == 1 else device.between
        return transfer.payload / link.bandwidth + transfer.calls * link.latency
    rounds = 2 if transfer.operation == "all_reduce" else 1
    bandwidth = (inside - 1) / inside * transfer.payload / device.inside.bandwidth
    bandwidth += (nodes - 1) / nodes * transfer.payload / inside / device.between.bandwidth
    hops = math.ceil(math.log2(nodes)) if transfer.operation == "all_reduce" else nodes - 1
    latency = (inside - 1) * device.inside.latency + hops * device.between.latency
    return rounds * (bandwidth + transfer.calls * latency)
