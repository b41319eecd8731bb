"""A training that plain DeepSpeed began continues as a run of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints.reader import open_checkpoint
from launch.testing.commands import setformer, train_words
from launch.testing.ranks import run_ranks
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.models.build import build_model
from tests.distributed.workers import Trainee

DONE = 3
STEPS = 6
# The demo's model, as a user of DeepSpeed would have built it.
MODEL = ModelConfig(name="setformer_nano", drop_path=0.05, args={"stem_strides": [1, 2]})


def deepspeed_trains(root: str, stage: int) -> None:
    """Train a few steps and let DeepSpeed save."""
    trainee = Trainee(stage, "fp32", module=build_model(MODEL, 10, 16, 0))
    for k in range(DONE):
        trainee.engine.module.set_sample_keys(torch.arange(trainee.plan.micro) + 100 * k)
        trainee.step(k)
    trainee.engine.save_checkpoint(root, tag=f"global_step{DONE}")


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(3, 1), pytest.param(2, 2, marks=pytest.mark.drill), pytest.param(0, 1, marks=pytest.mark.drill)],
)
def test_a_run_continues_from_what_deepspeed_saved(tmp_path: Path, digits: Path, stage: int, ranks: int):
    run_ranks(deepspeed_trains, 2, str(tmp_path / "ds"), stage)
    folder = tmp_path / "runs" / "demo"
    done = setformer("ckpt", "import", str(tmp_path / "ds"), str(folder / "checkpoints"), "--model", MODEL.name)
    assert done.code == 0, done.err
    words = train_words(
        digits, tmp_path / "runs", f"schedule.steps={STEPS}", "~schedule.epochs", "~schedule.warmup_epochs",
        "checkpoint.every_steps=1", "checkpoint.keep_last=9", "run.record_samples=true", "optim.lr=1e-30",
        "optim.weight_decay=0", "schedule.min_lr=0", "schedule.warmup_lr=0", "ema.decay=0.5", "ema.warmup=false",
        ranks=ranks,
    )  # fmt: skip
    ended = setformer(*words)
    assert ended.code == 0, ended.err
    assert f"step {DONE} was imported from DeepSpeed (ZeRO stage {stage}, 2 ranks)" in ended.err
    imported = open_checkpoint(folder / "checkpoints" / f"step-{DONE:08d}")
    last = open_checkpoint(folder / "checkpoints")
    assert last.step == STEPS
    # With a learning rate of nothing the weights stay those of DeepSpeed, and so does their average.
    theirs, ours, averaged = imported.read_full(), last.read_full(), last.read_full("ema")
    assert all(torch.equal(ours[name], theirs[name]) and torch.equal(averaged[name], theirs[name]) for name in theirs)
    assert last.trainer["optimizer_steps"] == (STEPS if stage else STEPS - DONE)
    if stage:
        before, after = imported.read_full("exp_avg_sq"), last.read_full("exp_avg_sq")
        assert all((after[name] >= 0.99 * before[name]).all() for name in before)  # 0.999 of it, and what came to it
    seen = [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert seen == list(range(DONE, STEPS))
