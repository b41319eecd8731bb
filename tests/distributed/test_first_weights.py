"""The weights that a run begins with reach masters, average and what computes, under every ZeRO stage."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.run.initial_weights import FirstWeights
from launch.testing.ranks import run_ranks
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.engine.comm import disconnect
from tests.distributed.workers import Trainee, samples, small_model

LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")]


def begin(path: str) -> list[list[float]]:
    """Begin with the file's weights under each stage; return the greatest differences to a model that has them."""
    found = []
    fresh = small_model()
    there = copy.deepcopy(fresh)
    there.load_state_dict({n: t for n, t in load_file(path).items() if not n.startswith("head.")}, strict=False)
    images, _ = samples(0, 4)
    for stage, dtype in LAYOUTS:
        trainee = Trainee(stage, dtype, module=copy.deepcopy(fresh))
        shapes = {name: tuple(p.shape) for name, p in fresh.named_parameters()}
        first = FirstWeights(ModelConfig(weights=path, skip=("head.",)), shapes, frozenset(), trainee.comm)
        first(trainee.held())
        trainee.master.refresh()
        wanted = dict(there.named_parameters())
        # Not the head: at stage 0 in bf16 DeepSpeed takes masters from weights that are rounded already.
        held = [f for f in trainee.held() if f.state in ("param", "ema") and not f.name.startswith("head.")]
        masters = [(f.tensor.detach() - wanted[f.name].detach().reshape(-1)[f.start : f.end]).abs().max() for f in held]
        model = copy.deepcopy(there).to(trainee.dtype).eval()
        trainee.engine.eval()
        with torch.no_grad():
            computed = (trainee.engine(images.to(trainee.dtype)) - model(images.to(trainee.dtype))).abs().max()
        trainee.engine.train()
        found.append([float(max(masters)), float(computed), trainee.step(0)])
    disconnect()
    return found


def test_all_stages_begin_with_the_same_weights(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for found in run_ranks(begin, 2, str(tmp_path / "model.safetensors")):
        assert [row[:2] for row in found] == [[0.0, 0.0]] * len(LAYOUTS)
        losses = [row[2] for row, (_, dtype) in zip(found, LAYOUTS, strict=True) if dtype == "fp32"]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
