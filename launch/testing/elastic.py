"""Elastic resume measured: what one layout of ranks, ZeRO stage and offload wrote, every other one continues.

Each function is what one gloo rank runs (`testing.ranks.run_ranks`). The training is real DeepSpeed on a small vision
transformer; which samples a step holds comes from the loader's own order, and a sample is a function of its id, so
that the ids a run trained on can be counted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from dataloaders.order.order import Cut, FullOrder, SetPlan, cursor_at, step_of_cursor
from setformer_dist.core.config import build
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.store import Snapshot
from setformer_dist.engine.batch_plan import solve
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.config import (
    BatchConfig,
    EmaConfig,
    OptimConfig,
    PrecisionConfig,
    ScheduleConfig,
    ZeroConfig,
)
from setformer_dist.engine.deepspeed_engine import DTYPES, initialize
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.master import MasterState
from setformer_dist.engine.optim import Schedule
from setformer_dist.engine.zero import deepspeed_config
from setformer_dist.tasks.classification import soft_cross_entropy

GLOBAL_BATCH = 24  # shared by 1, 2, 3 and 4 ranks
SAMPLES = 24 * 12 + 5
_SEED = 7
# What is trained with: an optimizer, and a schedule as a function of the step.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": ({"name": "adamw"}, {"name": "constant"}),
    "adam": ({"name": "adam", "weight_decay": 1e-3}, {"name": "linear", "warmup_steps": 2}),
    "nadamw": ({"name": "nadamw"}, {"name": "polynomial"}),
    "adopt": ({"name": "adopt", "lr": 3e-3}, {"name": "step", "drop_steps": 3, "drop_factor": 0.5}),
    "lamb": ({"name": "lamb", "lr": 5e-3}, {"name": "cosine", "warmup_steps": 1}),
    "lion": ({"name": "lion", "lr": 3e-4}, {"name": "wsd", "decay_steps": 3}),
    "sgd": ({"name": "sgd", "lr": 0.1, "weight_decay": 1e-3, "nesterov": True}, {"name": "cosine"}),
    "layers": ({"name": "adamw", "layer_decay": 0.6}, {"name": "cosine", "warmup_steps": 2}),
}
_RUN = 8  # steps that the schedules reach over
_IDENTITY = Identity(model="elastic")
_KEEP_ALL = CheckpointConfig(keep_last=1000)


@dataclass(frozen=True)
class Where:
    """A layout: ranks, ZeRO stage, precision, and what lies in host memory (`zero.offload`)."""

    ranks: int
    stage: int
    dtype: str
    offload: str = "none"

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.ranks}-{self.stage}-{self.dtype}-{self.offload}"


class _Trainee:
    """A DeepSpeed engine with fragments, average, manager and place in the order of samples."""

    def __init__(self, stage: int, dtype: str, offload: str, recipe: str = "adamw") -> None:
        self.ranks = RankInfo.from_env()
        connect(self.ranks, os.environ["SETFORMER_RENDEZVOUS"])
        self.comm = TorchCollectives(self.ranks)
        self.batch = solve(BatchConfig(global_size=GLOBAL_BATCH, max_micro=6), self.ranks.world_size)
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=10
        )
        precision, zero = (
            build(PrecisionConfig, {"dtype": dtype}, "layout"),
            build(ZeroConfig, {"stage": stage, "offload": offload, "bucket_mib": 1}, "layout"),
        )
        optim = build(OptimConfig, {"lr": 1e-3, "clip_norm": 1.0, **RECIPES[recipe][0]}, "recipe")
        schedule = build(ScheduleConfig, {"steps": _RUN, **RECIPES[recipe][1]}, "recipe")
        json = deepspeed_config(precision, zero, self.batch, optim.clip_norm, {})
        self.dtype = DTYPES[dtype]
        self.saving: CheckpointManager | None = None
        self.engine = initialize(model, optim, json)
        self.master = MasterState(self.engine)
        self.schedule = Schedule(self.engine.optimizer, schedule, SAMPLES // GLOBAL_BATCH)
        self.ema = Ema(self.master, EmaConfig(decay=0.9))
        self.plan = SetPlan(FullOrder(SAMPLES, _SEED), GLOBAL_BATCH)
        self.cut = Cut(GLOBAL_BATCH, self.batch.micro, self.ranks.rank, self.ranks.world_size)

    def step(self, step: int) -> tuple[float, list[int]]:
        """Run optimizer step `step`; return the mean loss over all ranks and the ids that this rank saw."""
        total, seen = 0.0, []
        self.schedule.apply(step)
        for places in self.cut.places():
            ids, epochs = self.plan.pick(step, places)
            images, targets = _samples(ids.tolist())
            loss = soft_cross_entropy(self.engine(images.to(self.dtype)), targets)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
            seen += [int(epoch) * SAMPLES + int(sample) for epoch, sample in zip(epochs, ids, strict=True)]
        self.ema.update(step)
        return self.comm.sum([total])[0] / (self.batch.accumulation * self.ranks.world_size), seen

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Run steps; return their losses, and the ids of all ranks in no particular order."""
        losses, mine = [], []
        for step in range(first, first + count):
            loss, seen = self.step(step)
            losses.append(loss)
            mine += seen
        return {"losses": losses, "ids": sorted(sample for part in self.comm.gather_json(mine) for sample in part)}

    def held(self) -> list[Any]:
        return [*self.master.fragments("param", *self.master.states), *self.ema.fragments()]

    def manager(self, root: Path) -> CheckpointManager:
        return CheckpointManager(root, self.comm, _KEEP_ALL)

    def save(self, root: Path, step: int) -> None:
        trainer = {
            "stream": cursor_at(self.plan, _SEED, "elastic", step).to_json(),
            "optimizer_steps": self.master.optimizer_steps,
            "loss_scale": self.master.loss_scale(),
        }
        # The writers work while the next steps change what they would see if they looked at it.
        self.saving = self.manager(root)
        self.saving.begin(Snapshot(step, self.held(), trainer, {}), _IDENTITY)

    def load(self, root: Path) -> int:
        manager = self.manager(root)
        checkpoint = manager.newest()
        assert checkpoint is not None, manager.skipped
        manager.load(checkpoint, self.held())
        self.master.optimizer_steps = checkpoint.trainer["optimizer_steps"]
        self.master.set_loss_scale(checkpoint.trainer["loss_scale"])
        self.master.refresh()
        return step_of_cursor(checkpoint.trainer["stream"], self.plan, _SEED, "elastic")


def _samples(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = [], []
    for sample in ids:
        generator = torch.Generator().manual_seed(sample)
        images.append(torch.randn(3, 16, 16, generator=generator))
        labels.append(int(torch.randint(0, 10, (), generator=generator)))
    return torch.stack(images), torch.nn.functional.one_hot(torch.tensor(labels), 10).float()


def write(root: str, stage: int, dtype: str, offload: str, before: int, after: int) -> dict[str, Any]:
    """Train `before` steps, save, and continue for `after` steps without interruption, while the writers write.

    Returns:
        "losses" and "ids" of the steps after the checkpoint, "before" the ids up to it.
    """
    found = _write(_Trainee(stage, dtype, offload), root, before, after)
    disconnect()
    return found


def _write(trainee: _Trainee, root: str, before: int, after: int) -> dict[str, Any]:
    first = trainee.steps(0, before)
    trainee.save(Path(root), before)
    then = trainee.steps(before, after)
    assert trainee.saving is not None
    trainee.saving.finish(last=True)
    return {**then, "before": first["ids"]}


def resume(roots: list[str], stage: int, dtype: str, offload: str, count: int) -> list[dict[str, Any]]:
    """Continue from each of several checkpoints for `count` steps; return losses and ids of each."""
    trainee = _Trainee(stage, dtype, offload)
    found = [trainee.steps(trainee.load(Path(root)), count) for root in roots]
    disconnect()
    return found


def write_recipes(root: str, stage: int, dtype: str, offload: str, before: int, after: int) -> dict[str, Any]:
    """Return what `write` does of each of `RECIPES`, which are trained one after the other."""
    found = {name: _write(_Trainee(stage, dtype, offload, name), f"{root}/{name}", before, after) for name in RECIPES}
    disconnect()
    return found


def resume_recipes(root: str, stage: int, dtype: str, offload: str, count: int) -> dict[str, Any]:
    """Continue each of `RECIPES` from its checkpoint below a root; return losses and ids of each."""
    found = {}
    for name in RECIPES:
        trainee = _Trainee(stage, dtype, offload, name)
        found[name] = trainee.steps(trainee.load(Path(root) / name), count)
    disconnect()
    return found


def differences(resumed: list[float], uninterrupted: list[float]) -> tuple[float, float]:
    """Return the relative difference of the first loss, and the largest over all."""
    relative = [abs(a / b - 1) for a, b in zip(resumed, uninterrupted, strict=True)]
    return relative[0], max(relative)
