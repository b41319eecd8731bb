"""An update treats all gradients at once: as many kernels for 40 parameters as for 8, the right norm, no bad update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.measure import Kernels
from launch.testing.ranks import run_ranks
from setformer_dist.engine.comm import disconnect
from setformer_dist.engine.config import OptimConfig
from setformer_dist.engine.guard import Updates
from setformer_dist.tasks.classification import soft_cross_entropy
from tests.distributed import workers
from tests.distributed.test_offload import poisoned_and_passed_over

LAYOUTS = [(stage, dtype) for dtype in ("fp32", "bf16") for stage in range(4)]
SIZE = 16  # samples of a step


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


def scaled(stage: int, dtype: str) -> dict[str, Any]:
    """Train with the optimizer whose updates are as large as gradients; fp16 scales its loss."""
    usual, workers.OPTIM = workers.OPTIM, OptimConfig(name="sgd", lr=0.3, momentum=0.1, weight_decay=0.0)
    trainee = workers.Trainee(stage, dtype, micro=8, module=layers(4), clip_norm=1e3)
    workers.OPTIM = usual
    trainee.master.set_loss_scale({"cur_scale": 1024.0, "cur_iter": 998.0})  # the third update raises it
    losses, norms = [], []
    for k in range(5):
        losses.append(trainee.step(k))
        norms.append(float(trainee.engine.get_global_grad_norm()))
    return {"losses": losses, "norms": norms, "scale": trainee.master.loss_scale().get("cur_scale")}


def too_long(stage: int, dtype: str) -> dict[str, Any]:
    """Take an update of finite gradients whose norm no fp32 number holds."""
    trainee = workers.Trainee(stage, dtype, micro=8, module=layers(4))
    updates = Updates(trainee.engine)
    before = [fragment.tensor.clone() for fragment in trainee.master.fragments("param")]
    images, targets = workers.samples(0, 8)
    loss = soft_cross_entropy(trainee.engine(images.to(trainee.dtype)), targets)
    trainee.engine.backward(loss * 1e25)
    trainee.engine.step()
    now = [fragment.tensor for fragment in trainee.master.fragments("param")]
    same = all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    return {"left_out": updates.left_out, "same": same, "norm": float(trainee.engine.get_global_grad_norm())}


def everything() -> dict[str, Any]:
    accelerator: Any = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True  # DeepSpeed lists no CPU; torch computes it on all
    found = {
        "updates": [[update(stage, dtype, depth) for depth in (4, 20)] for stage, dtype in LAYOUTS],
        "scaled": [scaled(*layout) for layout in ((0, "fp32"), *((stage, "fp16") for stage in range(4)))],
        "too long": [too_long(stage, dtype) for stage, dtype in LAYOUTS if stage < 3],
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


def test_fp16_takes_the_updates_of_fp32(by_rank: list[dict[str, Any]]) -> None:
    # DeepSpeed alone divides by a scale that it never multiplied by (stage 0): losses as if nothing was learned; and in
    # the third step by one that was raised before: half an update.
    full, *halves = by_rank[0]["scaled"]
    for half in halves:
        assert half["scale"] == 2048
        assert half["losses"] == pytest.approx(full["losses"], rel=1e-4)
        assert half["norms"] == pytest.approx(full["norms"], rel=5e-3)


def test_a_norm_that_is_not_finite_leaves_the_update_out(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        assert found["too long"] == [{"left_out": True, "same": True, "norm": float("inf")}] * 6
