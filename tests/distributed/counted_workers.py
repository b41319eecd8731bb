"""What the ranks of test_counted_losses.py run: a dense task, whose micro batches hold very different counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from setformer_dist.core.batch import Annotations, MicroBatch
from setformer_dist.engine.comm import disconnect
from setformer_dist.engine.guard import Updates
from setformer_dist.engine.metrics import StepClock
from setformer_dist.engine.step import TrainStep
from tests.distributed.workers import Trainee

GLOBAL = 24
SIDE = 8
UNKNOWN = 255  # a pixel that does not count


class Dense:
    """Cross entropy of each pixel that has a class."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), targets, ignore_index=UNKNOWN, reduction="sum")

    def count(self, batch: MicroBatch) -> float:
        return float((masks_of(batch) != UNKNOWN).sum())


class DenseMean:
    """The same as a mean of each micro batch: what a task without a count does."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), targets, ignore_index=UNKNOWN)


def masks_of(batch: MicroBatch) -> torch.Tensor:
    assert batch.annotations is not None
    assert batch.annotations.masks is not None
    return batch.annotations.masks


def prepare(batch: MicroBatch, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.inputs.float() / 255, masks_of(batch).long()


def sample(step: int, place: int, nothing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image and its mask; sample k of a step has about k/24 of its pixels marked."""
    generator = torch.Generator().manual_seed(1000 * step + place)
    image = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    mask = (image.sum(dim=0) // 192).to(torch.uint8)
    known = torch.rand((SIDE, SIDE), generator=generator) < (0 if nothing else place / GLOBAL)
    return image, torch.where(known, mask, UNKNOWN)


def batches(trainee: Trainee, step: int, nothing: bool) -> Iterator[MicroBatch]:
    plan, rank = trainee.plan, trainee.ranks.rank
    for a in range(plan.accumulation):
        first = (a * plan.world_size + rank) * plan.micro
        places = range(first, first + plan.micro)
        images, masks = zip(*(sample(step, place, nothing) for place in places), strict=True)
        yield MicroBatch(
            inputs=torch.stack(images),
            labels=torch.zeros(plan.micro, dtype=torch.int64),
            weights=torch.ones(plan.micro),
            sample_ids=torch.tensor(list(places)),
            annotations=Annotations(masks=torch.stack(masks)),
        )


def losses_of(stage: int, micro: int, steps: int, mean: bool = False) -> dict[str, Any]:
    """Train with the engine's own step; step 2 has no pixel that counts. Return losses and a sum over the weights."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(16, 4, 1))
    trainee = Trainee(stage, "fp32", micro=micro, module=net, global_size=GLOBAL, clip_norm=0.5)
    task: Any = DenseMean() if mean else Dense()
    plan = trainee.plan
    run = TrainStep(trainee.engine, task, prepare, StepClock(None), plan, 0, trainee.comm, Updates(trainee.engine))
    losses = []
    for k in range(steps):
        local = float(run(k, batches(trainee, k, nothing=k == 2 and not mean)).loss)
        losses.append(trainee.comm.sum([local])[0] / (plan.accumulation * plan.world_size))
    disconnect()
    return {"losses": losses, "accumulation": plan.accumulation}
