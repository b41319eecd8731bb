"""zero.offload on two gloo ranks: the losses of a run without it, live fragments, no gradient that outlives its step.

On a CPU the device's memory is host memory, so this is about DeepSpeed's paths and ours, not about transfers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from launch.testing.ranks import run_ranks
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError
from setformer_dist.engine.comm import disconnect
from setformer_dist.engine.config import ZeroConfig
from setformer_dist.engine.deepspeed_engine import set_accumulation
from setformer_dist.engine.guard import Updates
from tests.distributed import workers
from tests.distributed.test_zero_stages import assert_covered

OFFLOADED = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
# Side by side with the same stage: DeepSpeed's stage 3 changes how its process multiplies from then on.
WITH_AND_WITHOUT = [(1, "none"), OFFLOADED[0], (2, "none"), OFFLOADED[1], (3, "none"), OFFLOADED[2], OFFLOADED[3]]
POISONED = [
    (1, "optimizer", "fp32", "auto"),
    (3, "all", "bf16", "auto"),
    (1, "optimizer", "bf16", "fp32"),  # here and below DeepSpeed alone leaves out every step after the bad one
    (2, "optimizer", "bf16", "fp32"),
]


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_ranks(everything, 2, timeout=280)


def everything() -> dict[str, Any]:
    """Run all of the below in one process per rank: to start them takes longer than the trainings."""
    found = {
        "unclipped": losses_with_and_without("bf16", 0.0),
        "clipped": losses_with_and_without("fp32", 0.05),
        "trips": round_trips(),
        "live": [is_live(*layout) for layout in OFFLOADED],
        "poisoned": [poisoned_and_passed_over(*layout) for layout in POISONED],
        "cut": [losses_with_other_micro_batches(*layout) for layout in [(0, "none"), *WITH_AND_WITHOUT]],
        "sometimes": [losses_of_sometimes(*layout) for layout in [(2, "none"), (3, "none"), *OFFLOADED]],
    }
    disconnect()
    return found


def losses_with_and_without(dtype: str, clip_norm: float) -> list[list[list[float]]]:
    """Return the losses of each offloaded layout and of its stage without offload; two micro batches a step."""
    found: dict[tuple[int, str], list[float]] = {}
    for stage, offload in WITH_AND_WITHOUT:
        trainee = workers.Trainee(stage, dtype, offload=offload, clip_norm=clip_norm)
        assert trainee.plan.accumulation == 2
        found[stage, offload] = [trainee.step(k) for k in range(3)]
    return [[found[stage, offload], found[stage, "none"]] for stage, offload in OFFLOADED]


def test_without_clipping_offload_changes_no_bit(by_rank: list[dict[str, Any]]) -> None:
    for with_it, without in by_rank[0]["unclipped"]:
        assert with_it == without


def test_with_clipping_fp32_losses_agree_to_1e_6(by_rank: list[dict[str, Any]]) -> None:
    # DeepSpeed sums up the norms of gradients in host memory in another order.
    for with_it, without in by_rank[0]["clipped"]:
        assert with_it == pytest.approx(without, rel=1e-6, abs=0)


def losses_with_other_micro_batches(stage: int, offload: str) -> list[list[float]]:
    """Return the losses of 6 steps of 2 micro batches each, and of steps of 2, 4, 1, 2, 1 and 4."""
    found = []
    for micros in ([4] * 6, [4, 2, 8, 4, 8, 2]):
        trainee = workers.Trainee(stage, "fp32", offload=offload, clip_norm=0.05)
        losses = []
        for k, micro in enumerate(micros):
            accumulation = trainee.plan.global_size // (micro * trainee.plan.groups)
            if micro != trainee.plan.micro:
                trainee.plan = dataclasses.replace(trainee.plan, micro=micro, accumulation=accumulation)
                set_accumulation(trainee.engine, trainee.plan, accumulation)
            losses.append(trainee.step(k))
        found.append(losses)
    return found


def test_steps_may_accumulate_other_numbers_of_micro_batches(by_rank: list[dict[str, Any]]) -> None:
    for fixed, changing in by_rank[0]["cut"]:
        assert changing == pytest.approx(fixed, rel=2e-6, abs=0)
        assert len(set(fixed)) == 6


def round_trips() -> list[dict[str, Any]]:
    dtypes = ("fp32", "bf16", "fp32", "bf16")
    return [
        workers.round_trip_of(workers.Trainee(stage, dtype, offload=offload))
        for (stage, offload), dtype in zip(OFFLOADED, dtypes, strict=True)
    ]


def test_fragments_cover_restore_and_swap(by_rank: list[dict[str, Any]]) -> None:
    for trip in [trip for found in by_rank for trip in found["trips"]]:
        assert trip["first"] == trip["second"]  # bit by bit
        assert trip["steps"] == 3
        assert trip["same_at_start"]
        assert trip["swap_restores"]
        assert trip["swap_changes"]
    for trip in by_rank[0]["trips"]:
        assert_covered(trip["cover"], replicated=False)


def is_live(stage: int, offload: str) -> bool:
    """Return whether what is written into fragments is there when they are asked for again, and in host memory."""
    trainee = workers.Trainee(stage, "bf16", offload=offload)
    written = trainee.held()
    for number, fragment in enumerate(written):
        fragment.tensor.fill_(number)
    again = trainee.held()
    same_place = [f.tensor.data_ptr() for f in again] == [f.tensor.data_ptr() for f in written]
    in_host_memory = all(f.tensor.device.type == "cpu" for f in again)
    return same_place and in_host_memory and all(bool((f.tensor == n).all()) for n, f in enumerate(again))


def test_fragments_are_the_memory_that_adam_works_on(by_rank: list[dict[str, Any]]) -> None:
    assert all(all(found["live"]) for found in by_rank)


def poisoned_and_passed_over(stage: int, offload: str, dtype: str, grad_accum: str) -> dict[str, Any]:
    """Run steps of which one has infinite images, and the same without that step."""
    poisoned, without = (workers.Trainee(stage, dtype, grad_accum, offload=offload) for _ in range(2))
    updates = Updates(poisoned.engine)
    left_out = []
    for k in range(5):
        poisoned.step(k, factor=torch.inf if k == 2 else 1.0)
        left_out.append(updates.left_out)
    for k in (0, 1, 3, 4):
        without.step(k)
    states = ("param", "exp_avg", "exp_avg_sq")
    pairs = zip(poisoned.master.fragments(*states), without.master.fragments(*states), strict=True)
    same = all(torch.equal(a.tensor, b.tensor) for a, b in pairs)
    return {"left_out": left_out, "steps": poisoned.master.optimizer_steps, "same": same}


def test_a_step_with_infinite_gradients_leaves_nothing_behind(by_rank: list[dict[str, Any]]) -> None:
    for result in [result for found in by_rank for result in found["poisoned"]]:
        assert result == {"left_out": [False, False, True, False, False], "steps": 4, "same": True}


class Sometimes(torch.nn.Module):
    """A model of which one layer takes part only when `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = workers.small_model()
        self.extra = torch.nn.Linear(10, 10)
        self.on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y + self.extra(y) if self.on else y


def losses_of_sometimes(stage: int, offload: str) -> list[float]:
    trainee = workers.Trainee(stage, "fp32", offload=offload, module=Sometimes())
    losses = []
    for k in range(6):
        trainee.engine.module.on = k in (0, 1, 4)
        losses.append(trainee.step(k))
    return losses


def test_a_parameter_without_gradient_does_not_get_that_of_an_earlier_step(by_rank: list[dict[str, Any]]) -> None:
    without, *others = by_rank[0]["sometimes"]  # of stage 2; stage 3 has the fault without offload, too
    for losses in others:
        assert losses == pytest.approx(without, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("stage", "offload", "words"),
    [
        (0, "optimizer", ["offload = 'optimizer'", "stage = 0", 'zero.offload = "none"']),
        (0, "all", ["offload = 'all'", "stage = 0", "raise zero.stage"]),
        (2, "all", ["offload = 'all'", "stage = 2", "zero.stage = 3", 'zero.offload = "optimizer"']),
    ],
)
def test_impossible_pairs_are_refused(stage: int, offload: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        build(ZeroConfig, {"stage": stage, "offload": offload}, "config")
    assert all(word in str(refused.value) for word in words)
