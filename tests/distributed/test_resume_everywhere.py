"""Save and resume under every ZeRO stage, precision and offload: the continuation is bit by bit the uninterrupted run.

Whole runs through the composition root, on two gloo ranks that share their start-up: training to step 2 and on to
step 4, and a second run that finds the checkpoint of step 2 alone. All that both hold at step 4 is compared by the
digests in the manifests. CPUs do not compute fp16 in DeepSpeed's view, so the test makes the accelerator claim it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from dataloaders.packing.pack import pack_image_folder
from launch.run.compose import check_device, compose, open_splits
from launch.run.config import load_run, resolve
from launch.run.inputs import inputs_of
from launch.testing.commands import DEMO, SHORT
from launch.testing.ranks import run_ranks
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.tasks.build import build_task

LAYOUTS = [
    (0, "none"),
    (1, "none"),
    (1, "optimizer"),
    (2, "none"),
    (2, "optimizer"),
    (3, "none"),
    (3, "optimizer"),
    (3, "all"),
]
PRECISIONS = ["fp32", "bf16", "fp16 dynamic", "fp16 static"]
TINY = (
    "~model.args",
    "model.name=vit_tiny_patch16_224",
    "model.args={patch_size = 4, embed_dim = 12, depth = 1, num_heads = 2}",
    "model.drop_path=0.0",
    "~schedule.epochs",
    "~schedule.warmup_epochs",
    "schedule.steps=4",
    "batch.global_size=16",
    "batch.micro=4",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
    "zero.bucket_mib=1",
)


def precision_words(precision: str) -> list[str]:
    """Return the overrides of a precision; both scales are small enough that no gradient leaves fp16's range."""
    dtype, _, scaling = precision.partition(" ")
    return [f"precision.dtype={dtype}", *(["precision.loss_scale=128.0"] if scaling == "static" else [])]


def train(words: list[str]) -> dict[str, Any]:
    """Build a run and train it to its end from wherever its folder lets it; return what its trainer.json held."""
    ranks = RankInfo.from_env()
    config = load_run(Path(DEMO), words)
    run = resolve(config, ranks.world_size)
    check_device(run)
    splits = open_splits(run)
    inputs = inputs_of(config.data)
    task = build_task(config.task, splits.train.classes)
    model = inputs.build_model(config.model, len(task.outputs), inputs.spec(splits.train), config.run.seed)
    config.folder.mkdir(parents=True, exist_ok=True)
    trainer = compose(run, splits, task, model, TorchCollectives(ranks))
    trainer.resume()
    resumed = trainer._state.step
    scale = trainer._c.master.loss_scale()
    outcome = trainer.run()
    return {"resumed": resumed, "scale": scale, "step": outcome.state.step}


def save_and_resume(data: str, out: str) -> list[dict[str, Any]]:
    """Return, for each combination, what both runs found and left."""
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True
    connect(RankInfo.from_env(), os.environ["SETFORMER_RENDEZVOUS"])
    found = []
    for precision in PRECISIONS:
        for stage, offload in LAYOUTS:
            name = f"{precision.replace(' ', '-')}-{stage}-{offload}"
            where = [f"data.root={data}", f"run.name={name}", f"zero.stage={stage}", f"zero.offload={offload}"]
            words = [*SHORT, *TINY, *precision_words(precision), *where]
            whole = train([*words, f"run.out={out}/whole"])
            first = Path(out) / "resumed" / name / "checkpoints" / "step-00000002"
            if RankInfo.from_env().is_main:
                shutil.copytree(Path(out) / "whole" / name / "checkpoints" / first.name, first)
            torch.distributed.barrier()
            found.append({"name": name, "whole": whole, "resumed": train([*words, f"run.out={out}/resumed"])})
    disconnect()
    return found


@pytest.fixture(scope="module")
def few_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight digits of each class to train on and two to score: opening and scoring are most of so short a run."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 8), ("val", 2)):
        for label in sorted((digits / "images" / split).iterdir()):
            (folder / "images" / split / label.name).mkdir(parents=True)
            for image in sorted(label.iterdir())[:count]:
                shutil.copy(image, folder / "images" / split / label.name)
        pack_image_folder(folder / "images" / split, folder / split)
    return folder


@pytest.fixture(scope="module")
def both(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("everywhere")
    found = run_ranks(save_and_resume, 2, str(few_digits), str(out), timeout=400)[0]
    return out, {entry["name"]: entry for entry in found}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("stage", "offload"), LAYOUTS)
def test_every_stage_precision_and_offload_resumes_bit_by_bit(
    both: tuple[Path, dict[str, dict[str, Any]]], stage: int, offload: str, precision: str
) -> None:
    out, found = both
    name = f"{precision.replace(' ', '-')}-{stage}-{offload}"
    entry = found[name]
    assert (entry["whole"]["resumed"], entry["whole"]["step"]) == (0, 4)
    assert (entry["resumed"]["resumed"], entry["resumed"]["step"]) == (2, 4)
    manifests = [
        json.loads((out / run / name / "checkpoints" / "step-00000004" / "manifest.json").read_text())
        for run in ("whole", "resumed")
    ]
    tensors = [[f for f in m["files"] if f["name"].endswith(".safetensors")] for m in manifests]
    assert tensors[0] == tensors[1]
    states = [
        json.loads((out / run / name / "checkpoints" / "step-00000004" / "trainer.json").read_text())
        for run in ("whole", "resumed")
    ]
    for key in ("loss_scale", "optimizer_steps", "stream"):
        assert states[0][key] == states[1][key], key
    if precision.startswith("fp16"):
        assert states[0]["loss_scale"]["cur_scale"] > 1.0
