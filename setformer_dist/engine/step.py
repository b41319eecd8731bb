"""One optimizer step through DeepSpeed: forward, backward and update of its micro batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.seeding import Purpose, sample_keys, torch_seed
from setformer_dist.core.task import Counted, Prepare, Task
from setformer_dist.core.transfer import on_device
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.comm import TorchCollectives
from setformer_dist.engine.deepspeed_engine import set_accumulation
from setformer_dist.engine.guard import Updates
from setformer_dist.engine.metrics import StepClock
from setformer_dist.engine.protocol import Engine
from setformer_dist.engine.refresh import Refresh


def seed_generators(seed: int) -> None:
    """Seed torch's generators of the host and of this rank's device; `torch.manual_seed` costs a half millisecond."""
    torch.default_generator.manual_seed(seed)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().manual_seed(seed)


def _spoiling(loss: torch.Tensor) -> torch.Tensor:
    """Return a loss; where it is not finite, one whose gradients are not either, so that no rank takes the update.

    Gradients of an infinite loss may be finite: those of a cross entropy whose class has a logit of minus infinity are.
    """
    known = loss.detach()
    return loss * (1 + (known - known))  # by 1 or NaN


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step left on this rank.

    Attributes:
        loss: sum over this rank's micro batches of their losses, on the device, shape (); its mean over all micro
            batches of all ranks is the step's loss. NaN where the update was left out for them or their gradients.
        accumulation: micro batches of this rank.
        substitutions: damaged samples that were replaced, one line each.
        sample_ids: of this rank's micro batches, in order.
    """

    loss: torch.Tensor
    accumulation: int
    substitutions: list[str]
    sample_ids: list[int]


class TrainStep:
    """Runs optimizer steps. Knows DeepSpeed's engine and the clock, not the schedule nor checkpoints."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        prepare: Prepare,
        clock: StepClock,
        plan: BatchPlan,
        seed: int,
        comm: TorchCollectives,
        updates: Updates,
        refresh: Refresh | None = None,
    ) -> None:
        self._engine = engine
        self._task = task
        self._prepare = prepare
        self._clock = clock
        self._plan = plan
        self._accumulation = plan.accumulation
        self._seed = seed
        self._comm = comm
        self._updates = updates
        self._refresh = refresh
        self._set_sample_keys = getattr(engine.module, "set_sample_keys", None)
        self._keys: dict[int, torch.Tensor] = {}

    def __call__(self, step: int, batches: Iterator[MicroBatch]) -> StepOutcome:
        """Run optimizer step `step` (0-based) on the next micro batches of the stream."""
        # What a model still draws from torch's own generator is a function of the step, so a resumed run
        # draws the same without any generator state in the checkpoint.
        seed_generators(torch_seed(Purpose.DROP_PATH, self._seed, step, self._comm.ranks.rank))
        self._accumulation, batches = self._cut(batches)
        losses: list[torch.Tensor] = []
        substitutions: list[str] = []
        sample_ids: list[int] = []
        micro_batches, factor = self._counted(batches)
        for index in range(self._accumulation):
            with self._clock.section("data"):
                batch = next(micro_batches)
                inputs, targets = self._prepare(batch, train=True)
            substitutions += batch.substitutions
            sample_ids += batch.sample_ids.tolist()
            self._key_drop_path(step, batch, inputs.device)
            watching = self._refresh.watching(step, index, batch) if self._refresh is not None else nullcontext()
            with self._clock.section("forward"), watching:
                loss = self._checked(self._task.loss(self._engine(inputs), targets))
                if factor is not None:
                    loss = loss * factor
            with self._clock.section("backward"):
                self._engine.backward(_spoiling(loss))
            with self._clock.section("optimizer"):
                self._engine.step()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        loss = loss * torch.nan if self._updates.left_out else loss
        return StepOutcome(loss, self._accumulation, substitutions, sample_ids)

    def _checked(self, loss: object) -> torch.Tensor:
        """Return a loss that can be trained with.

        Raises:
            ConfigError: it cannot: the task or the model is wrong.
        """
        if not isinstance(loss, torch.Tensor) or loss.dim():
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ConfigError(
                f"task {self._task.name}: its method loss must return a tensor of shape (), and returned {got}"
            )
        if not loss.requires_grad:
            raise ConfigError(
                f"the loss of task {self._task.name} does not depend on any parameter that trains: look for "
                "torch.no_grad or detach in the model and in the task"
            )
        return loss

    def _cut(self, batches: Iterator[MicroBatch]) -> tuple[int, Iterator[MicroBatch]]:
        """Return how many micro batches the next step has, and those; DeepSpeed is told where it changes."""
        with self._clock.section("data"):
            accumulation, of_step = self._plan.of_step(batches)
        if accumulation != self._accumulation:
            set_accumulation(self._engine, self._plan, accumulation)
        return accumulation, of_step

    def _counted(self, batches: Iterator[MicroBatch]) -> tuple[Iterator[MicroBatch], float | None]:
        """Return the step's micro batches and, for a task that counts, what makes the mean of its sums their quotient.

        DeepSpeed takes the mean over micro batches and ranks: sum · parts / count has the mean that is wanted.
        """
        if not isinstance(self._task, Counted):
            return batches, None
        with self._clock.section("data"):
            held = [next(batches) for _ in range(self._accumulation)]
        [count] = self._comm.sum([math.fsum(map(self._task.count, held))])
        return iter(held), self._accumulation * self._comm.ranks.world_size / (count or 1.0)

    def _key_drop_path(self, step: int, batch: MicroBatch, device: torch.device) -> None:
        if self._set_sample_keys is not None:
            keys = torch.from_numpy(sample_keys(Purpose.DROP_PATH, self._seed, step, batch.drawn_ids))
            # In one place for each size, as a CUDA graph reads attributes of modules where they lay when it was made.
            if len(keys) not in self._keys:
                self._keys[len(keys)] = torch.empty_like(keys, device=device)
            self._set_sample_keys(self._keys[len(keys)].copy_(on_device(keys, device)))
