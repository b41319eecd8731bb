"""Gradients reduced a bucket at once are those of DeepSpeed, bit by bit, in all layouts and with unused parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Kernels
from launch.testing.ranks import run_ranks
from setformer_dist.core.errors import ConfigError
from setformer_dist.engine import fused_update, reduction
from setformer_dist.engine.comm import disconnect
from setformer_dist.tasks.classification import soft_cross_entropy
from tests.distributed import workers

# Stage, dtype, dtype of sums; elements of a bucket: all weights at once, a few, less than one of them; overlap_comm.
LAYOUTS = [
    (stage, dtype, sums, bucket, overlap)
    for stage in (0, 1, 2)
    for dtype, sums in (("fp32", "auto"), ("bf16", "auto"), ("fp16", "auto"), ("bf16", "fp32"), ("fp16", "fp32"))
    for bucket, overlap in ((100_000, False), (3000, False), (100, False), (3000, True), (100, True))
    if stage or (sums == "auto" and bucket != 100)  # DeepSpeed has no sums in fp32 there
    if (stage, dtype, sums) != (1, "bf16", "fp32")  # DeepSpeed has another optimizer for it
    if (stage, dtype, sums, overlap) != (1, "fp16", "fp32", True)  # is DeepSpeed's, see below
]
OTHER_WAYS = [
    {"zero_optimization": {"reduce_scatter": False}},
    {"zero_optimization": {"use_multi_rank_bucket_allreduce": False}},
    {"zero_optimization": {"contiguous_gradients": False}},
]


class Partly(torch.nn.Module):
    """Layers of sizes that no number of ranks divides; one is frozen, two are used by every second pass alone."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(depth)
        self.first = torch.nn.Linear(768, 31)
        self.frozen = torch.nn.Linear(31, 31).requires_grad_(False)
        self.by_turns = torch.nn.ModuleList(torch.nn.Linear(31, 31) for _ in range(2))
        self.inner = torch.nn.ModuleList(torch.nn.Linear(31, 31) for _ in range(depth))
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.last = torch.nn.Linear(31, 10)
        self.passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.first(images.flatten(1)))
        x = x + self.by_turns[self.passes % 2](x)
        self.passes += 1
        for layer in self.inner:
            x = x + torch.nn.functional.gelu(layer(x))
        return self.last(x * self.scale)


class Reentrant(torch.nn.Module):
    """A layer that is computed again in the backward pass, which runs one of its own for it."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(self.layer, x, use_reentrant=True)
        return found


class Shift(torch.nn.Module):
    """Adds a weight that is viewed as its input: autograd lets the gradient of one be a view of that of the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.linspace(-1, 1, count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift.view_as(x)


def shifted() -> torch.nn.Module:
    """Return a model for micro batches of six images."""
    torch.manual_seed(0)
    first = torch.nn.Linear(768, 30)
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.Tanh(), Shift(180), torch.nn.Linear(30, 10))


def with_a_small_group() -> torch.nn.Module:
    """Return a model whose weights without decay are one number, of which all ranks but one keep nothing."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.PReLU(), torch.nn.Linear(768, 10, bias=False))


MODULES = {made.__name__: made for made in (Partly, shifted, with_a_small_group)}


def trained(
    stage: int,
    dtype: str,
    sums: str,
    bucket: int,
    overlap: bool,
    *,
    ours: bool,
    module: str = "Partly",
    deepspeed: dict[str, Any] | None = None,
) -> tuple[list[torch.Tensor], list[float], bool]:
    """Return the master weights after three steps of two micro batches, the norms, and whether buckets were ours."""
    real = fused_update.reduce_together, reduction.buckets_of
    with (
        mock.patch.object(fused_update, "reduce_together", wraps=real[0] if ours else None),
        mock.patch.object(reduction, "buckets_of", lambda parameters, _: real[1](parameters, bucket)),
    ):
        micro = 12 // workers.RankInfo.from_env().world_size
        trainee = workers.Trainee(
            stage, dtype, sums, micro, module=MODULES[module](), deepspeed=deepspeed, global_size=24, overlap=overlap
        )
    if stage:
        trainee.engine.optimizer.reduce_bucket_size = bucket
    norms = []
    for k in range(3):
        trainee.step(k)
        norms.append(float(trainee.engine.get_global_grad_norm()))
    made: Any = trainee.engine
    reduced = made.optimizer.reduce_gradients if stage else made.buffered_allreduce_fallback
    taken = "reduction" in getattr(reduced, "__module__", "")
    return [fragment.tensor.clone() for fragment in trainee.master.fragments("param")], norms, taken


def both(
    module: str = "Partly", layouts: Sequence[tuple[Any, ...]] = LAYOUTS
) -> list[tuple[bool, list[float], list[float], bool]]:
    """Return of each layout whether the weights are DeepSpeed's, the norms with and without, and who reduced."""
    accelerator: Any = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True  # DeepSpeed lists no CPU; torch computes it on all
    found = []
    for layout in layouts:
        weights, norms, taken = trained(*layout, ours=True, module=module)
        # DeepSpeed with overlap_comm leaves out, under stage 1, what the last micro batch does not use.
        wanted, wanted_norms, other = trained(*layout[:-1], False, ours=False, module=module)
        same = all(map(torch.equal, weights, wanted)) and len(weights) == len(wanted) > 0
        found.append((same, norms, wanted_norms, taken and not other))
    disconnect()
    return found


def other_ways() -> list[tuple[bool, list[float]]]:
    found = [trained(2, "fp32", "auto", 3000, False, ours=True, deepspeed=way)[1:] for way in ({}, *OTHER_WAYS)]
    disconnect()
    return [(taken, norms) for norms, taken in found]


def used_by_some(overlap: bool) -> list[list[float]]:
    """Return the masters of a rank after three steps in which each rank uses another layer, under stages 0 to 2."""
    found = []
    for stage in (0, 1, 2):
        module = Partly()
        module.passes = workers.RankInfo.from_env().rank
        module.register_forward_hook(lambda made, *_: setattr(made, "passes", made.passes + 1))  # the same each time
        trainee = workers.Trainee(stage, "fp32", micro=8, module=module, overlap=overlap)
        for k in range(3):
            trainee.step(k)
        found.append(torch.cat([p.detach().flatten() for p in trainee.engine.module.parameters()]).tolist())
    disconnect()
    return found


def apart(stage: int, overlap: bool) -> list[float]:
    """Return a rank's weights after two steps; in the second the loss of a rank is of weights alone."""
    real = reduction.buckets_of
    with mock.patch.object(reduction, "buckets_of", lambda parameters, _: real(parameters, 100)):
        trainee = workers.Trainee(stage, "fp32", module=Partly(), overlap=overlap)
    trainee.step(0)
    images, targets = workers.samples(1, 4)
    for factor in (1, 2):
        if trainee.ranks.is_main:
            loss = factor * sum(p.square().sum() for p in trainee.engine.module.last.parameters())
        else:
            loss = soft_cross_entropy(trainee.engine(images), targets)
        trainee.engine.backward(loss)
        trainee.engine.step()
    disconnect()
    return torch.cat([p.detach().flatten() for p in trainee.engine.module.parameters()]).tolist()


def peak(sums: str, ours: bool) -> int:
    """Return the bytes that a step of stage 2 in bf16 takes at most, besides what is there before it."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(768, 768) for _ in range(6)]
    with (
        mock.patch.object(fused_update, "reduce_together", wraps=fused_update.reduce_together if ours else None),
        mock.patch.object(reduction, "buckets_of", lambda parameters, _: [list(parameters)]),
    ):
        module = torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(768, 10))
        trainee = workers.Trainee(2, "bf16", sums, micro=8, module=module)
    trainee.engine.optimizer.reduce_bucket_size = 4_000_000  # all weights: DeepSpeed allocates so many
    trainee.step(0)
    # The least of three: whether what one thread frees is gone when another allocates, is a matter of chance.
    return min(most_of_step(trainee, step) for step in (1, 2, 3))


def most_of_step(trainee: workers.Trainee, step: int) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainee.step(step)
    events, changes = list(profiled.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if hasattr(event.extra_fields, "alloc_size"):
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def peaks() -> list[tuple[int, int]]:
    found = [(peak(sums, True), peak(sums, False)) for sums in ("auto", "fp32")]
    disconnect()
    return found


def kernels(depth: int) -> list[int]:
    """Return how many kernels a backward pass has beyond the model's, under stages 0 to 2."""
    found = []
    for stage in (0, 1, 2):
        trainee = workers.Trainee(stage, "bf16", micro=8, module=Partly(depth))
        images, targets = workers.samples(0, 16)
        counts = []
        for backward in (trainee.engine.backward, torch.Tensor.backward):
            module = trainee.engine if backward == trainee.engine.backward else Partly(depth).bfloat16()
            loss = soft_cross_entropy(module(images.bfloat16()), targets)
            with Kernels() as counted:
                backward(loss)
            counts.append(counted.count)
        found.append(counts[0] - counts[1])
    disconnect()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_are_those_of_deepspeed(world_size: int) -> None:
    for found in run_ranks(both, world_size, timeout=280):
        for layout, (same, norms, wanted, ours) in zip(LAYOUTS, found, strict=True):
            assert ours == (layout[::2][:2] != (1, "fp32")), layout  # there gradients wait in fp32, too
            assert same, layout
            assert norms == wanted, layout


def test_three_ranks_add_in_another_order_alone() -> None:
    for found in run_ranks(both, 3, timeout=280):
        for layout, (_, norms, wanted, _) in zip(LAYOUTS, found, strict=True):
            assert norms == pytest.approx(wanted, rel=1e-6 if layout[1] == "fp32" else 1e-2), layout


def test_gradients_that_autograd_still_reads_are_left_alone() -> None:
    layouts = [
        (stage, "fp32", "auto", 180, overlap) for stage, overlap in ((2, False), (2, True), (1, True), (0, True))
    ]
    for found in run_ranks(both, 2, "shifted", layouts, timeout=120):
        for layout, (same, norms, wanted, ours) in zip(layouts, found, strict=True):
            assert ours, layout
            assert same, layout
            assert norms == wanted, layout


def test_ranks_that_keep_nothing_of_a_group() -> None:
    layouts = [(2, "fp32", "auto", 3000, False), (2, "bf16", "fp32", 3000, True), (1, "fp32", "auto", 3000, True)]
    for found in run_ranks(both, 3, "with_a_small_group", layouts, timeout=120):
        for layout, (_, norms, wanted, ours) in zip(layouts, found, strict=True):
            assert ours, layout
            assert norms == pytest.approx(wanted, rel=1e-6 if layout[1] == "fp32" else 1e-2), layout


@pytest.mark.parametrize("overlap", [False, True])
def test_weights_that_some_ranks_use_alone(overlap: bool) -> None:
    for whole, *parts in run_ranks(used_by_some, 2, overlap, timeout=120):
        for part in parts:
            assert part == pytest.approx(whole, abs=1e-6)


def twice_by_checkpoints(overlap: bool) -> str:
    """Return how a step ends in which two reentrant checkpoints use one layer."""
    module = Partly()
    inner = module.inner[0]
    module.inner = torch.nn.ModuleList(Reentrant(inner) for _ in range(2))
    real = reduction.buckets_of
    with mock.patch.object(reduction, "buckets_of", lambda parameters, _: real(parameters, 100)):
        trainee = workers.Trainee(0, "fp32", module=module, overlap=overlap)
    try:
        trainee.step(0)
    except ConfigError as error:
        return str(error)
    finally:
        disconnect()
    return "done"


def test_weights_of_several_reentrant_checkpoints() -> None:
    assert run_ranks(twice_by_checkpoints, 2, False) == ["done", "done"]
    for said in run_ranks(twice_by_checkpoints, 2, True):
        assert "use_reentrant=False" in said


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_does_not_reach_the_outputs_waits_for_the_last_micro_batch(stage: int) -> None:
    for found, wanted in zip(run_ranks(apart, 2, stage, True), run_ranks(apart, 2, stage, False), strict=True):
        assert found == wanted


def test_a_step_holds_no_more_than_deepspeeds() -> None:
    for found in run_ranks(peaks, 2, timeout=120):
        for ours, theirs in found:
            assert ours < 1.05 * theirs


def test_buckets_hold_all_from_the_last_to_the_first() -> None:
    parameters = [torch.empty(size) for size in (3, 0, 5, 2, 2, 9, 1)]
    buckets = reduction.buckets_of(parameters, 4)
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[1], [9], [2, 2], [5], [0, 3]]
    assert reduction.buckets_of([], 4) == []


def test_a_config_that_asks_for_another_way_gets_deepspeeds() -> None:
    for (ours, norms), *others in run_ranks(other_ways, 2, timeout=120):
        assert ours
        for theirs, other in others:
            assert not theirs
            assert other == pytest.approx(norms, rel=1e-5)


def test_a_backward_pass_has_as_many_kernels_for_any_number_of_weights() -> None:
    few, many = (run_ranks(kernels, 2, depth, timeout=120)[0] for depth in (2, 20))
    for stage in (0, 1, 2):
        assert many[stage] <= few[stage] < 20, stage
