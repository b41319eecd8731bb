"""What `setformer plan` says that ranks send each other is what running ranks hand to DeepSpeed's collectives."""

from __future__ import annotations

from typing import Any

import deepspeed.comm.comm as deepspeed_comm
import pytest
import torch

from launch.plan.traffic import Model, traffic
from launch.testing.ranks import run_ranks
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.engine.comm import disconnect
from setformer_dist.engine.optim import parameter_groups
from setformer_dist.models.build import build_model
from tests.distributed import workers

LARGEST_FLAG = 8  # bytes: norms and flags are no tensors of the model
# Small parameters that stay, and some above DeepSpeed's threshold of 100,000 elements that are cut.
MODEL = ModelConfig(name="setformer_nano", args={"embed_dim": 128, "depths": [1, 1, 1], "num_heads": [2, 4, 8]})
RELEASED = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
KEPT: dict[str, int] = {}
# stage, dtype, micro batch of the 16 samples of a step on two ranks, keys of DeepSpeed's
CASES = [(stage, dtype, micro, KEPT) for stage in (0, 1, 2, 3) for dtype, micro in (("fp32", 8), ("bf16", 4))]
CASES += [(3, "fp32", 4, RELEASED), (3, "bf16", 8, {"stage3_param_persistence_threshold": 1000})]


class Counter:
    """Stands before DeepSpeed's backend and adds up the bytes of the tensors that its collectives are given."""

    NAMES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
             "reduce_scatter", "all_to_all_single")  # fmt: skip

    def __init__(self) -> None:
        self._backend = deepspeed_comm.cdb
        self.bytes: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._backend, name)
        if name not in self.NAMES:
            return attribute

        def counted(*args: Any, **kwargs: Any) -> Any:
            sizes = [_bytes(value) for value in (*args, *kwargs.values())]
            if max(sizes) > LARGEST_FLAG:  # of input and output the one that is the whole
                key = name.removesuffix("_into_tensor").removesuffix("_tensor")
                self.bytes[key] = self.bytes.get(key, 0) + max(sizes)
                self.calls[key] = self.calls.get(key, 0) + 1
            return attribute(*args, **kwargs)

        return counted


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return 0


def counted() -> list[tuple[dict[str, int], dict[str, int]]]:
    """Return the bytes and the calls of each collective in the third step of a case.

    Before, DeepSpeed learns the order of modules.
    """
    found = []
    for stage, dtype, micro, keys in CASES:
        extra = {"zero_optimization": keys} if keys else {}
        trainee = workers.Trainee(stage, dtype, model=MODEL, micro=micro, deepspeed=extra)
        for step in range(2):
            trainee.step(step)
        counter = Counter()
        deepspeed_comm.cdb = counter
        trainee.step(2)
        deepspeed_comm.cdb = counter._backend
        found.append((counter.bytes, counter.calls))
    disconnect()
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[list[tuple[dict[str, int], dict[str, int]]]]:
    return run_ranks(counted, 2, timeout=200)


def predicted(stage: int, dtype: str, micro: int, keys: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    groups = parameter_groups(build_model(MODEL, 10, 16, 0), workers.OPTIM)
    elements = tuple(tuple(p.numel() for p in group["params"]) for group in groups)
    facts = Model.of(elements, 4 if dtype == "fp32" else 2, 1, {"zero_optimization": keys})
    sizes: dict[str, int] = {}
    calls: dict[str, int] = {}
    for transfer in traffic(facts, stage, 2, 16 // (2 * micro)):
        sizes[transfer.operation] = sizes.get(transfer.operation, 0) + transfer.payload
        calls[transfer.operation] = calls.get(transfer.operation, 0) + transfer.calls
    return sizes, calls


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{s}-{d}-{m}-{'-'.join(k)}" for s, d, m, k in CASES])
def test_bytes_of_a_step_are_those_that_the_plan_says(
    number: int, by_rank: list[list[tuple[dict[str, int], dict[str, int]]]]
) -> None:
    sizes, calls = predicted(*CASES[number])
    for found in by_rank:
        found_sizes, found_calls = found[number]
        assert found_sizes == sizes
        assert found_calls.get("all_gather") == calls.get("all_gather")
        assert found_calls == pytest.approx(calls, rel=0.1)  # weights do not fill buckets to the last element
