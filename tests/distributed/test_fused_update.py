"""An update treats all gradients at once: as many kernels for 40 parameters as for 8, the right norm, no bad update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.testing.ranks import run_ranks
from setformer_dist.engine.comm import disconnect
from setformer_dist.tasks.classification import soft_cross_entropy
from tests.distributed import workers
from tests.distributed.test_offload import poisoned_and_passed_over

LAYOUTS = [(stage, dtype) for dtype in ("fp32", "bf16") for stage in range(4)]
SIZE = 16  # samples of a step


class Kernels(TorchDispatchMode):
    """Counts operators that compute or copy."""

    NO_KERNEL = (
        "detach",
        "view",
        "slice",
        "select",
        "alias",
        "split",
        "narrow",
        "as_strided",
        "empty",
        "empty_strided",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().split("::")[1].split(".")[0] not in self.NO_KERNEL
        return func(*args, **(kwargs or {}))


def layers(depth: int) -> torch.nn.Module:
    torch.manual_seed(depth)
    inner = [part for _ in range(depth - 2) for part in (torch.nn.Linear(32, 32), torch.nn.GELU())]
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 32), *inner, torch.nn.Linear(32, 10))


def update(stage: int, dtype: str, depth: int) -> dict[str, Any]:
    """Return what the update of a second step took, and its norm; the limit does not bite."""
    trainee = workers.Trainee(stage, dtype, micro=8, module=layers(depth), clip_norm=1e3)
    images, targets = workers.samples(0, SIZE)
    mine = slice(8 * trainee.ranks.rank, 8 * trainee.ranks.rank + 8)
    kernels = Kernels()
    for _ in range(2):
        weights = trainee.engine.module.state_dict() if stage < 3 else {}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        trainee.engine.backward(soft_cross_entropy(trainee.engine(images[mine].to(trainee.dtype)), targets[mine]))
        kernels = Kernels()
        with kernels:
            trainee.engine.step()
    found = float(trainee.engine.get_global_grad_norm())
    return {"kernels": kernels.count, "norm": found, "wanted": norm_of(before, depth) if before else None}


def norm_of(weights: dict[str, torch.Tensor], depth: int) -> float:
    """Return the norm of the gradients of all samples at these weights, in fp64, without DeepSpeed."""
    model = layers(depth).double()
    model.load_state_dict({name: weight.double() for name, weight in weights.items()})
    images, targets = workers.samples(0, SIZE)
    soft_cross_entropy(model(images.double()), targets.double()).backward()
    return float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())


def everything() -> dict[str, Any]:
    found = {
        "updates": [[update(stage, dtype, depth) for depth in (4, 20)] for stage, dtype in LAYOUTS],
        "poisoned": [poisoned_and_passed_over(stage, "none", dtype, "auto") for stage, dtype in LAYOUTS],
    }
    disconnect()
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_ranks(everything, 2, timeout=280)


def test_an_update_takes_as_many_kernels_for_any_number_of_parameters(by_rank: list[dict[str, Any]]) -> None:
    for (stage, dtype), (few, many) in zip(LAYOUTS, by_rank[0]["updates"], strict=True):
        each = 1 if stage == 3 else 0  # stage 3 copies each weight; it was a dozen for each parameter
        assert many["kernels"] - few["kernels"] <= each * 32, (stage, dtype)
        assert few["kernels"] < 150, (stage, dtype)


def test_the_norm_is_that_of_all_gradients(by_rank: list[dict[str, Any]]) -> None:
    for (stage, dtype), updates in zip(LAYOUTS, by_rank[0]["updates"], strict=True):
        for found in updates:
            if found["wanted"] is not None:
                assert found["norm"] == pytest.approx(found["wanted"], rel=1e-5 if dtype == "fp32" else 2e-2), stage
    for dtype in ("fp32", "bf16"):
        norms = [by_rank[0]["updates"][LAYOUTS.index((stage, dtype))][0]["norm"] for stage in range(4)]
        assert norms == pytest.approx([norms[0]] * 4, rel=1e-5 if dtype == "fp32" else 2e-2)


def test_gradients_that_are_not_finite_change_nothing(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        for layout, result in zip(LAYOUTS, found["poisoned"], strict=True):
            assert result == {"left_out": [False, False, True, False, False], "steps": 4, "same": True}, layout
