"""The steps since the last line of metrics: their losses, reduced over the ranks, judged by the guard, and written."""

from __future__ import annotations

import logging
import math
import statistics
from typing import Any

import torch

from setformer_dist.core.phases import BUSY, Section
from setformer_dist.engine.components import Components
from setformer_dist.engine.guard import Incident
from setformer_dist.engine.metrics import StepClock, peak_memory_mib
from setformer_dist.engine.progress import RunProgress
from setformer_dist.engine.run_state import RunState
from setformer_dist.engine.step import StepOutcome

log = logging.getLogger(__name__)

# A rank is a straggler when these take longer than the middle rank's by more than this share.
_SLOWER = 0.1


class RewindError(Exception):
    """All ranks go back to a checkpoint; raised on all of them at the same place."""

    def __init__(self, incident: Incident) -> None:
        super().__init__(f"step {incident.step}")
        self.incident = incident


class StepLog:
    """Collects steps on this rank; `reduce` and `write` are collective."""

    def __init__(self, components: Components, clock: StepClock, record_samples: bool) -> None:
        self._c = components
        self._clock = clock
        self._record_samples = record_samples
        self._unreduced: list[torch.Tensor] = []
        self._accumulated: list[int] = []  # micro batches of each of those steps
        self._unreported: list[str] = []
        self._samples_seen: dict[int, list[int]] = {}
        self._steps_timed = 0

    def take(self, step: int, outcome: StepOutcome) -> None:
        """Note an optimizer step (0-based) of this rank."""
        self._unreduced.append(outcome.loss)
        self._accumulated.append(outcome.accumulation)
        self._unreported += outcome.substitutions
        self._samples_seen[step] = outcome.sample_ids
        self._steps_timed += 1

    def take_passed_over(self) -> None:
        """Note a step that was left out: its loss is NaN."""
        self._unreduced.append(torch.full((), math.nan, device=self._c.engine.device))
        self._accumulated.append(1)
        self._steps_timed += 1

    def drop(self) -> None:
        """Forget the steps of which nothing is written yet: a rollback undoes them."""
        self._unreduced.clear()
        self._accumulated.clear()
        self._samples_seen.clear()
        self._steps_timed = 0

    def restart_clock(self) -> None:
        """Forget how many steps were timed: their time has been taken."""
        self._steps_timed = 0

    def reduce(self, state: RunState) -> None:
        """Turn the losses of the last steps into means over all ranks, step by step; report damaged samples.

        Step by step, because a sum over several steps would depend on where a checkpoint cut it.

        Raises:
            TrainingError: a bad step that the guard does not bear.
            RewindError: one that all ranks go back for.
        """
        if not self._unreduced:
            return
        local = torch.stack(self._unreduced).double().tolist()
        first_of_group = self._c.comm.ranks.rank % self._c.plan.sequence == 0  # the others have the same samples
        *losses, substituted = self._c.comm.sum([*local, float(len(self._unreported)) * first_of_group])
        accumulated, world_size = list(self._accumulated), self._c.plan.world_size
        means = [loss / (parts * world_size) for loss, parts in zip(losses, accumulated, strict=True)]
        first = state.step - len(means)
        state.pending_losses += means
        for line in self._unreported:
            log.warning("%s", line)
        state.substitutions += round(substituted)
        self._unreduced.clear()
        self._accumulated.clear()
        self._unreported.clear()
        self._judge(first, means)
        if self._record_samples:
            self._write_samples(first, accumulated)
        self._samples_seen.clear()

    def write(self, state: RunState, lr: float, progress: RunProgress) -> None:
        """Write a line about the steps since the last one; raises as `reduce`."""
        self.reduce(state)
        losses = [loss for loss in state.pending_losses if math.isfinite(loss)]
        loss = math.fsum(losses) / len(losses) if losses else math.nan
        seconds, wall = self._clock.take()
        steps, self._steps_timed = self._steps_timed, 0
        training = wall - seconds["checkpoint"] - seconds["evaluation"]
        state.train_seconds += training
        state.train_steps += steps
        images_per_s = steps * self._c.plan.global_size / training
        epoch = state.step / self._c.stream.steps_per_epoch
        progress.figures(loss, images_per_s, state.substitutions, epoch, lr, self._c.costs.samples)
        values = {
            "epoch": epoch,
            "loss": loss if losses else None,
            "lr": lr,
            "grad_norm": self._gradient_norm(),
            "images_per_s": images_per_s,
            "tokens_per_s": images_per_s * self._c.costs.tokens,
            "memory_mib": peak_memory_mib(),
            "mfu": self._utilisation(images_per_s),
            "substitutions": state.substitutions,
            "seconds": {name: value / steps for name, value in seconds.items()},
        }
        values |= self._slowest_rank(seconds, steps)
        self._c.record.write("train", state.step, values)
        self._c.record.note("spent", step=state.step, seconds=seconds)
        self._c.callbacks.figures("on_metrics", state.step, values)
        log.info("step %d loss %.6f lr %.3g %.0f %s/s", state.step, loss, lr, images_per_s, self._c.costs.samples)
        state.pending_losses = []

    def _judge(self, first: int, means: list[float]) -> None:
        """Have the guard look at the losses of the last steps, before anything that came of a bad one is kept."""
        while (incident := self._c.guard.judge(first, means)) is not None:
            parts = self._c.comm.gather_json(self._samples_seen.get(incident.step, []))[:: self._c.plan.sequence]
            ids = [sample for part in parts for sample in part]
            values = {**vars(incident), "sample_ids": ids}
            self._c.record.write("guard", incident.step, values)
            log.warning("bad step: %s", values)
            self._c.guard.remember(incident, ids)
            self._c.callbacks.figures("on_bad_step", incident.step, values)
            if incident.action == "rollback":
                raise RewindError(incident)
            means = means[incident.step + 1 - first :]
            first = incident.step + 1

    def _write_samples(self, first: int, accumulated: list[int]) -> None:
        """Write which samples each of the last steps took, in the order of the stream; collective."""
        for step, accumulation in enumerate(accumulated, first):
            parts = self._c.comm.gather_json(self._samples_seen.get(step, []))[:: self._c.plan.sequence]
            micro = len(parts[0]) // accumulation
            slots = range(0, len(parts[0]), micro or 1)
            self._c.record.write_samples(step, [i for at in slots for part in parts for i in part[at : at + micro]])

    def _slowest_rank(self, seconds: dict[Section, float], steps: int) -> dict[str, Any]:
        """Name the rank that the others waited for, if one was slower than the middle one by a tenth; collective."""
        ranks = self._c.comm.ranks
        mine = [seconds[phase] / steps for phase in BUSY]
        table = [0.0] * (len(mine) * ranks.world_size)
        table[ranks.rank * len(mine) : (ranks.rank + 1) * len(mine)] = mine
        if ranks.world_size == 1:
            return {}
        table = self._c.comm.sum(table)
        by_rank = [table[at : at + len(mine)] for at in range(0, len(table), len(mine))]
        totals = [sum(row) for row in by_rank]
        usual = statistics.median_low(totals)
        slowest = max(range(len(totals)), key=totals.__getitem__)
        if totals[slowest] <= (1 + _SLOWER) * usual:
            return {}
        typical = [statistics.median_low(column) for column in zip(*by_rank, strict=True)]
        phase = max(range(len(mine)), key=lambda at: by_rank[slowest][at] - typical[at])
        return {"straggler": {"rank": slowest, "phase": BUSY[phase], "seconds": totals[slowest] - usual}}

    def _gradient_norm(self) -> float | None:
        norm = self._c.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _utilisation(self, images_per_s: float) -> float | None:
        costs = self._c.costs
        if costs.peak_flops is None:
            return None
        # A multiply-add is two operations; the backward pass costs two forward passes.
        return images_per_s * 6 * costs.multiply_adds / (costs.peak_flops * self._c.plan.world_size)
