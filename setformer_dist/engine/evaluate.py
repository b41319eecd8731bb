"""One pass over a split: every sample counts once, sums travel, means are made at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from setformer_dist.core.batch import EvalStream, MicroBatch
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.task import Prepare, Ranked, Task
from setformer_dist.engine.comm import TorchCollectives

# Opens a context that collects one tensor (k m, ...) of non-negative errors for each thing that a forward pass of m
# samples (of k sequences) meets.
Watch = Callable[[], AbstractContextManager[list[torch.Tensor]]]


@dataclass(frozen=True)
class EvalResult:
    """Figures of a split.

    Attributes:
        figures: of the task, by name; and of `evaluate`'s watch.
        samples: what was scored.
        left_out: damaged samples that were left out, as the config allows.
    """

    figures: dict[str, float]
    samples: int
    left_out: int

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Return the figures with a prefix before each name."""
        return {f"{prefix}{name}": value for name, value in self.figures.items()}


@torch.no_grad()
def evaluate(
    model: Callable[[torch.Tensor], object],
    task: Task,
    stream: EvalStream,
    prepare: Prepare,
    comm: TorchCollectives,
    given_up: Callable[[], bool] | None = None,
    watch: Watch | None = None,
    counted: bool = True,
) -> EvalResult | None:
    """Score a split. Collective: every rank runs the same number of micro batches.

    Args:
        model: in evaluation mode; inputs as `prepare` makes them -> outputs as `task` takes them.
        task: scores the outputs.
        stream: this rank's share of the split.
        prepare: makes inputs and targets.
        comm: sums over the ranks.
        given_up: asked before each micro batch, must answer the same on all ranks.
        counted: false on ranks whose samples another rank of their group scores as well.
        watch: collects marginal errors during the first micro batch; given on all ranks or on none.

    Returns:
        The means, or None when given up.

    Raises:
        ConfigError: the task's `sums` or `figures` returns something else than the protocol says.
        DataError: the samples counted over all ranks are not the split's.
    """
    sums = torch.zeros(0, dtype=torch.float64)
    errors: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for index, batch in enumerate(stream.micro_batches()):
        if given_up is not None and given_up():
            return None
        inputs, targets = prepare(batch, train=False)
        with nullcontext([]) if watch is None or index else watch() as collected:
            outputs = model(inputs)
        errors += [_of_real_samples(tensor, batch) for tensor in collected]
        counts = torch.stack([batch.weights.sum(), torch.tensor(float(len(batch.substitutions)))])
        found = torch.cat([_sums_of(task, outputs, batch, targets).double(), counts.double()])
        found = found if counted else torch.zeros_like(found)
        sums = sums + found if len(sums) else found
        if isinstance(task, Ranked) and counted:
            rows.append(task.rows(outputs, batch))
    *scores, count, damaged = comm.sum(sums.tolist())
    if round(count + damaged) != stream.num_samples:
        raise DataError(f"evaluation counted {count + damaged:.0f} samples of {stream.num_samples}: this is a bug")
    if count == 0:
        raise DataError("evaluation had no sample that decodes: run `setformer data pack` on the split again")
    watched = {} if watch is None else _over_ranks(errors, comm)
    ranked = _ranked(task, rows, comm) if isinstance(task, Ranked) else {}
    return EvalResult({**_figures_of(task, scores, count, ranked), **watched}, round(count), round(damaged))


def _sums_of(task: Task, outputs: Any, batch: MicroBatch, targets: Any) -> torch.Tensor:
    sums = task.sums(outputs, batch, targets)
    if not isinstance(sums, torch.Tensor) or sums.ndim != 1:
        got = tuple(sums.shape) if isinstance(sums, torch.Tensor) else type(sums).__name__
        raise ConfigError(f"task {task.name}: its method sums must return a tensor of shape (k,), and returned {got}")
    return sums


def _ranked(task: Ranked, rows: list[torch.Tensor], comm: TorchCollectives) -> dict[str, float]:
    """Return a task's figures of the rows of all ranks, computed by one of them."""
    gathered = comm.gather_rows(torch.cat([torch.zeros((0, task.columns), dtype=torch.float64), *rows]))
    return comm.broadcast_json({} if gathered is None else task.figures_of_rows(gathered))


def _figures_of(task: Task, sums: Sequence[float], count: float, ranked: dict[str, float]) -> dict[str, float]:
    figures = {**ranked, **task.figures(sums, count)}
    if missing := [metric.name for metric in task.metrics if metric.name not in figures]:
        raise ConfigError(f"task {task.name}: its method figures must return {missing[0]!r}, one of its metrics")
    return figures


def _of_real_samples(errors: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return the errors of samples that count, flat, on the CPU; a sample may have several rows, one per sequence."""
    counts = batch.weights > 0
    return errors.cpu().double()[counts.repeat_interleave(errors.shape[0] // len(counts))].flatten()


def _over_ranks(errors: list[torch.Tensor], comm: TorchCollectives) -> dict[str, float]:
    """Return the largest and the mean over all ranks, of which some may have nothing."""
    flat = torch.cat([torch.zeros(0, dtype=torch.float64), *errors])
    total, count = comm.sum([float(flat.sum()), float(flat.numel())])
    largest = comm.max(float(flat.max()) if flat.numel() else 0.0)
    return {"marginal_error_max": largest, "marginal_error_mean": total / max(count, 1.0)}
