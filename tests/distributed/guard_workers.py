"""A whole run on each rank, of which chosen optimizer steps are poisoned."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from launch.run.compose import compose, open_splits
from launch.run.config import load_run, resolve
from launch.run.inputs import inputs_of
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.deepspeed_engine import quiet_deepspeed
from setformer_dist.tasks.build import build_task


class Poisoned:
    """Makes the images of some steps infinite, as a broken sensor or kernel would."""

    def __init__(self, prepare: Any, steps: list[int]) -> None:
        self._prepare = prepare
        self._steps = steps

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = self._prepare(batch, train)
        return (images * torch.inf if train and batch.step in self._steps else images), targets


class PoisonedLoss:
    """Makes the losses of some steps infinite, and leaves their gradients finite."""

    def __init__(self, loss: Any, steps: list[int], micro_batches: int) -> None:
        self._loss = loss
        self._steps = steps
        self._micro_batches = micro_batches
        self._calls = 0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        step, self._calls = self._calls // self._micro_batches, self._calls + 1
        loss: torch.Tensor = self._loss(outputs, targets)
        return loss + torch.inf if step in self._steps else loss


class Deadly:
    """Takes a method's place and ends the process, as a kill would, before or after its n-th call."""

    def __init__(self, owner: Any, name: str, when: str, call: int) -> None:
        self._method = getattr(owner, name)
        self._when = when
        self._left = call
        setattr(owner, name, self)

    def __call__(self, *args: Any) -> Any:
        self._left -= 1
        if self._when == "before" and not self._left:
            os._exit(9)
        result = self._method(*args)
        if self._when == "after" and not self._left:
            os._exit(9)
        return result


def run_poisoned(
    path: str,
    overrides: list[str],
    steps: list[int],
    death: tuple[str, str, str, int] | None = None,
    losses: bool = False,
) -> dict[str, Any]:
    """Train to the end, or to a death at a call of a part's method; return what is left.

    Args:
        path: of the run config.
        overrides: of it.
        steps: that are poisoned.
        death: part of the trainer, its method, "before" or "after" which call of it.
        losses: poison losses alone.
    """
    ranks = RankInfo.from_env()
    quiet_deepspeed()
    torch.set_num_threads(1)
    config = load_run(Path(path), overrides)
    run = resolve(config, ranks.world_size)
    splits = open_splits(run)
    inputs = inputs_of(config.data)
    task = build_task(config.task, splits.train.classes)
    model = inputs.build_model(config.model, len(task.outputs), inputs.spec(splits.train), config.run.seed)
    connect(ranks, os.environ["SETFORMER_RENDEZVOUS"])
    config.folder.mkdir(parents=True, exist_ok=True)
    try:
        trainer = compose(run, splits, task, model, TorchCollectives(ranks))
        if losses:
            task.loss = PoisonedLoss(task.loss, steps, run.plan.accumulation)  # type: ignore[method-assign]
        else:
            trainer._step._prepare = Poisoned(trainer._step._prepare, steps)
        if death is not None:
            part, name, when, call = death
            Deadly(getattr(trainer._c, part), name, when, call)
        trainer.resume()
        outcome = trainer.run()
        held = trainer._fragments()
    finally:
        disconnect()
    digest = hashlib.sha256()
    for fragment in held:
        digest.update(fragment.tensor.detach().contiguous().view(torch.uint8).numpy().data)
    finite = all(bool(fragment.tensor.isfinite().all()) for fragment in held)
    return {"step": outcome.state.step, "weights": digest.hexdigest(), "finite": finite}
