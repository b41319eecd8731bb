"""What a trainer works with, as the composition root makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from setformer_dist.core.batch import EvalStream, TrainStream
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.heartbeat import Heartbeat
from setformer_dist.core.store import CheckpointStore
from setformer_dist.core.task import Prepare, Task
from setformer_dist.engine.averaged import AveragedModel
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.comm import CommMeter, TorchCollectives
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.evaluate import Watch
from setformer_dist.engine.events import Callbacks
from setformer_dist.engine.guard import Guard
from setformer_dist.engine.master import MasterState
from setformer_dist.engine.metrics import RunRecord
from setformer_dist.engine.optim import Schedule
from setformer_dist.engine.protocol import Engine
from setformer_dist.engine.refresh import Refresh


@dataclass(frozen=True)
class Costs:
    """What one image costs, for images/s, tokens/s and model-FLOPs utilisation.

    Attributes:
        tokens: tokens of the first stage.
        multiply_adds: of one forward pass; 0, not counted, where `peak_flops` is unknown.
        peak_flops: of one device, where known.
        samples: what they are, in the plural.
    """

    tokens: int
    multiply_adds: int
    peak_flops: float | None
    samples: str = "images"


class Probe(Protocol):
    """Scores the features of a run's model with labels, beside its task."""

    def due(self, step: int) -> bool:
        """Return whether it is wanted after so many optimizer steps."""
        ...

    def run(self, given_up: Callable[[], bool]) -> dict[str, float] | None:
        """Return the figures `core.metric.PROBE_METRICS`, on all ranks; None when given up. Collective.

        Args:
            given_up: asked again and again; the same answer on all ranks.
        """
        ...


@dataclass(frozen=True)
class Components:
    """The parts of a run on one rank.

    `first_weights`, where a run begins with other weights than its seed's, fills fragments with them and says which.
    """

    engine: Engine
    master: MasterState
    ema: Ema | None
    plan: BatchPlan
    stream: TrainStream
    validation: EvalStream
    task: Task
    prepare: Prepare
    schedule: Schedule
    store: CheckpointStore
    comm: TorchCollectives
    meter: CommMeter
    record: RunRecord
    costs: Costs
    guard: Guard
    heartbeat: Heartbeat
    callbacks: Callbacks
    watch: Watch | None = None
    refresh: Refresh | None = None
    averaged: AveragedModel | None = None
    probe: Probe | None = None
    first_weights: Callable[[list[Fragment]], str] | None = None
