"""One row of a plan: a number of ranks under a ZeRO stage. Pure functions of what was measured once.

Time of a step, in seconds:

    compute   micro batches x (3 x 2 x multiply-adds x samples / reached FLOP/s + modules x launch_s); recomputed
              activations are a fourth pass besides a forward pass and a backward pass of twice its work
    traffic   launch.plan.traffic; with zero.overlap_comm gradients hide behind backward passes, weights of ZeRO-3
              behind forward passes, as far as they are shorter; updated weights are waited for, and so are the sums
              and rows of ranks that share images
    update    bytes of masters, gradients, states and average, read and written once, by the memory's bandwidth

Samples are taken to be there in time, and offload's transfers are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pydantic

from launch.plan.goodput import Saving
from launch.plan.hardware import Device
from launch.plan.subject import Subject
from launch.plan.traffic import Transfer, seconds, traffic
from launch.run.inputs import evaluation_micro
from setformer_dist.core.errors import ConfigError
from setformer_dist.engine.batch_plan import BatchPlan, possible_micros, solve
from setformer_dist.engine.config import ZeroConfig
from setformer_dist.engine.zero import check_precision, overlaps, set_aside
from setformer_dist.models.measure import Memory, checkpoint_bytes, memory_of, with_fixed

_COPY = 3.3e9  # bytes/s of one rank, as saving copies its fragments in host memory (docs/results.md, checkpoints)
MOST_MICRO = 65_536  # images: no larger micro batch is looked for
_NEAR = 1.03  # stages whose steps take so nearly the same time that the lower one is recommended


@dataclass(frozen=True)
class Cluster:
    """Where to.

    Attributes:
        device: of each rank.
        per_node: ranks of a node.
        storage: bytes/s that all nodes together write checkpoints with.
        device_hours: mean hours of one device between two failures.
        restart_s: seconds from a failure to the next step, repeated steps not counted.
    """

    device: Device
    per_node: int
    storage: float
    device_hours: float
    restart_s: float

    def between_failures(self, world_size: int) -> float:
        """Return the mean seconds between failures of a job: those of its devices add up."""
        return self.device_hours * 3600 / world_size


@dataclass(frozen=True)
class Row:
    """A number of ranks under a stage.

    Attributes:
        why_not: what forbids it, or "".
        batch: what the run would take; where nothing fits, the smallest that there is.
        memory: of a rank with that batch.
        fits: whether the device holds it.
        largest: micro batch that the device holds, without and with activation checkpointing; 0 for none.
        transfers: of a step.
        compute_s, traffic_s, update_s: of a step; hidden traffic is not counted.
    """

    world_size: int
    stage: int
    why_not: str = ""
    batch: BatchPlan | None = None
    memory: Memory | None = None
    fits: bool = False
    largest: tuple[tuple[bool, int], ...] = ()
    transfers: tuple[Transfer, ...] = ()
    compute_s: float = 0.0
    traffic_s: float = 0.0
    update_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.compute_s + self.traffic_s + self.update_s

    @property
    def samples_per_s(self) -> float:
        """Samples per second of all ranks."""
        return self.batch.global_size / self.step_s if self.batch else 0.0

    @property
    def efficiency(self) -> float:
        """Share of a step that is computation: the speed of a rank against one that has no others to wait for."""
        return self.compute_s / self.step_s if self.step_s else 0.0

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step."""
        return sum(transfer.sent(self.world_size) for transfer in self.transfers)


def row_of(subject: Subject, cluster: Cluster, stage: int, world_size: int) -> Row:
    """Return what a run of the subject would be on so many ranks under a stage."""
    c, device = subject.config, cluster.device
    try:
        zero = ZeroConfig.model_validate({**c.zero.model_dump(), "stage": stage})
        check_precision(c.precision, zero, set(device.peak), device.name)
        first = solve(c.batch, world_size, c.data.group, subject.parts)
        most = evaluation_micro(c.data, first)
    except (ConfigError, pydantic.ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else str(error)
        return Row(world_size, stage, reason)

    room = device.memory - device.reserved
    checkpointed = c.model.recomputes_blocks
    micros = [most]
    if c.batch.micro == "auto":
        possible = possible_micros(c.batch.global_size, first.groups)
        micros = [m for m in possible if m <= most and m % c.data.group == 0]

    def plan(micro: int) -> BatchPlan:
        return dataclasses.replace(first, micro=micro, accumulation=first.global_size // (micro * first.groups))

    def memory(batch: BatchPlan, choice: bool = checkpointed) -> Memory:
        return rank_memory(subject, device, stage, batch, choice)

    fitting = [m for m in micros if memory(plan(m)).total <= room]
    batch = plan(fitting[-1] if fitting else micros[0])
    accumulation = batch.accumulation

    def fits(choice: bool, micro: int) -> bool:
        return memory(dataclasses.replace(first, micro=micro, accumulation=accumulation), choice).total <= room

    largest = tuple((choice, _largest(functools.partial(fits, choice))) for choice in subject.passes)
    overlap = overlaps(c.precision, c.zero.model_copy(update={"stage": stage}), c.deepspeed)
    transfers = traffic(subject.model, stage, world_size, accumulation, overlap)
    transfers += shared(subject, batch.micro, accumulation)
    compute, last_backward = _compute(subject, device, batch)
    times = {t.what: seconds(t, device, world_size, cluster.per_node) for t in transfers}
    if overlap:
        passes = accumulation if stage > 1 else 1
        times["gradients"] = max(0.0, times["gradients"] - passes * last_backward)
        times["weights"] = max(0.0, times.get("weights", 0.0) - accumulation * last_backward / 2)
    sending = sum(times.values())
    return Row(
        world_size,
        stage,
        batch=batch,
        memory=memory(batch),
        fits=bool(fitting),
        largest=largest,
        transfers=transfers,
        compute_s=compute,
        traffic_s=sending,
        update_s=_update(subject, device, stage, world_size),
    )


def shared(subject: Subject, micro: int, times: int) -> tuple[Transfer, ...]:
    """Return what ranks that share images send each other, in so many micro batches; nothing where images are whole."""
    exchange = subject.exchange
    if exchange is None:
        return ()
    images = micro * times
    found = (
        Transfer("all_reduce", images * exchange.sum_bytes, times * exchange.sums, "sums", subject.parts),
        Transfer("send", images * exchange.row_bytes, times * exchange.rows, "rows", subject.parts),
        Transfer("all_gather", images * exchange.gather_bytes, times * exchange.gathers, "keys", subject.parts),
    )
    return tuple(transfer for transfer in found if transfer.calls)


def rank_memory(subject: Subject, device: Device, stage: int, batch: BatchPlan, checkpointed: bool) -> Memory:
    """Return the memory of a rank; buckets are set aside by stages 1 to 3."""
    c = subject.config
    zero = c.zero.model_copy(update={"stage": stage})
    buckets = set_aside(c.precision, zero, c.deepspeed, subject.model.count) if device.buckets else 0
    memory = memory_of(
        subject.model.count,
        subject.passes[checkpointed].at(batch.micro),
        subject.dtype,
        subject.grad_dtype,
        stage,
        batch.world_size,
        subject.ema,
        c.zero.offload,
        batch.accumulation,
        subject.states,
        buckets * subject.model.item,
    )
    fixed = sum(subject.model.fixed)
    return with_fixed(memory, fixed, subject.dtype, stage, batch.world_size, subject.ema, c.zero.offload)


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, 0 for none, of those up to `MOST_MICRO`."""
    low, high = 0, MOST_MICRO + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _compute(subject: Subject, device: Device, batch: BatchPlan) -> tuple[float, float]:
    """Return (seconds of all passes of a step, of the last backward pass)."""
    dtype = subject.config.precision.dtype
    forward = 2 * subject.multiply_adds / subject.parts * batch.micro / device.reached_in(dtype)
    launching = subject.modules * device.launch_s
    passes = 4 if subject.config.model.recomputes_blocks else 3
    kernels, host = passes * forward, passes / 3 * launching
    return batch.accumulation * (kernels + host), (kernels + host) * (passes - 1) / passes


def _update(subject: Subject, device: Device, stage: int, world_size: int) -> float:
    part = math.ceil(subject.model.count / (world_size if stage else 1))
    touched = 4 * (3 + 2 * subject.states + 3 * subject.ema)  # master and states read and written, gradient read
    return part * touched / device.bandwidth


def recommended(rows: list[Row]) -> Row | None:
    """Return the fastest row that fits; of nearly equal ones that of the lowest stage."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    best = min(row.step_s for row in fitting)
    return next(row for row in sorted(fitting, key=lambda row: row.stage) if row.step_s <= best * _NEAR)


def saving_of(subject: Subject, cluster: Cluster, world_size: int) -> Saving:
    """Return what a checkpoint costs: every rank copies its part, then all write behind training."""
    size = checkpoint_bytes(subject.model.count, sum(subject.model.fixed), subject.states, subject.ema)
    return Saving(size, size / world_size / _COPY, size / cluster.storage)
