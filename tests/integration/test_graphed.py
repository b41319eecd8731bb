"""Whole runs with the memory of CUDA graphs: micro batches, averaged weights, evaluations, probes, pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.testing.commands import module

PROGRAM = "tests.integration.graphed_runs"
HIDING = ("data.augment.mixup=0", "data.augment.cutmix=0", "checkpoint.best_metric=loss", "task.args.unit=4",
          "model.args.stem_strides=[1,1]")  # fmt: skip
MAE = (*HIDING, "task.name=mae", "task.args.decoder_dim=32", "task.args.decoder_depth=1")


@pytest.mark.drill
@pytest.mark.parametrize(
    "keys",
    [
        ("compile.mode=blocks", "zero.stage=0"),
        ("compile.mode=blocks", "zero.stage=0", "precision.dtype=bf16"),
        ("compile.mode=model", "zero.stage=1", "precision.dtype=bf16"),
        ("compile.mode=blocks", "zero.stage=1", "precision.dtype=bf16", "precision.grad_accum=fp32",
         "model.recompute=block"),
        ("compile.mode=blocks", "zero.stage=2", "precision.dtype=bf16"),
        ("compile.mode=blocks", "zero.stage=2", "zero.offload=optimizer"),
        ("compile.mode=blocks", "zero.stage=2", "eval.probe.every_epochs=1", *MAE),
        ("compile.mode=model", "zero.stage=1", "task.name=simmim", *HIDING),
    ],
    ids=lambda keys: " ".join(keys[:4]),
)  # fmt: skip
def test_a_run_has_the_losses_of_one_whose_graphs_keep_all(digits: Path, tmp_path: Path, keys: tuple[str, ...]) -> None:
    said = module(PROGRAM, str(digits), str(tmp_path), *keys, timeout=600)
    assert said.code == 0, said.err
    found = json.loads(said.out.splitlines()[-1])
    assert found["same"]  # to the last bit
    assert found["losses"] == 12  # 8 steps, 4 evaluations
    assert found["moved"] == 0
    first, last = found["seen"]
    # Nothing is recorded again; a probe comes at the end, and has passes of its own.
    assert 0 < first <= last <= first + (4 if "task.name=mae" in keys else 0)
