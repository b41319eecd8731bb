"""The loop over optimizer steps: schedule, evaluation, checkpoints, metrics, signals.

Everything is a function of the step: the samples (stream), the learning rate (schedule), the randomness
(step.py). So a run that resumes at step k does what an uninterrupted one would have done from step k on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from setformer_dist.core.batch import EvalStream, MicroBatch, TrainStream
from setformer_dist.core.errors import TrainingError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import CheckpointStore, SavedState
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.comm import CommMeter, TorchCollectives
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.evaluate import EvalConfig, EvalResult, Prepare, evaluate
from setformer_dist.engine.master import OPTIMIZER_STATES, MasterState
from setformer_dist.engine.metrics import RunRecord, StepClock, peak_memory_mib
from setformer_dist.engine.optim import Schedule
from setformer_dist.engine.progress import RunProgress
from setformer_dist.engine.signals import StopRequest
from setformer_dist.engine.step import TrainStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Costs:
    """What one image costs, for images/s, tokens/s and model-FLOPs utilisation.

    Attributes:
        tokens: tokens of the first stage.
        multiply_adds: of one forward pass.
        peak_flops: of one device, where known.
    """

    tokens: int
    multiply_adds: int
    peak_flops: float | None


@dataclass(frozen=True)
class Best:
    """Best value of the watched metric so far."""

    metric: str
    mode: str
    value: float | None = None
    step: int = 0

    def improved_by(self, value: float) -> bool:
        """Return whether a value beats the best so far."""
        if not math.isfinite(value):
            return False
        if self.value is None:
            return True
        return value > self.value if self.mode == "max" else value < self.value


@dataclass
class RunState:
    """What changes while a run goes on; `as_dict` is what trainer.json holds of it.

    `seconds` is the wall time of the run over all its interruptions; `train_seconds` of that, spent on
    `train_steps` logged steps without evaluation and checkpoints. `pending_losses` are those of the steps since the
    last line of metrics, means over all ranks; `evaluation_owed` says that a stop came before the evaluation that
    was due at this step. So a resumed run writes the lines that an uninterrupted one writes.
    """

    step: int
    best: Best
    evaluation: dict[str, float] = field(default_factory=dict)
    substitutions: int = 0
    seconds: float = 0.0
    train_steps: int = 0
    train_seconds: float = 0.0
    pending_losses: list[float] = field(default_factory=list)
    evaluation_owed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return JSON."""
        return {
            "best": {"metric": self.best.metric, "value": self.best.value, "step": self.best.step},
            "evaluation": self.evaluation,
            "substitutions": self.substitutions,
            "seconds": self.seconds,
            "train_steps": self.train_steps,
            "train_seconds": self.train_seconds,
            "pending_losses": self.pending_losses,
            "evaluation_owed": self.evaluation_owed,
        }


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.run` ended.

    Attributes:
        state: the run's state at the end.
        signum: the signal that stopped it, or None when it ran to its end.
        images_per_s: mean over the run's training steps, without evaluation and checkpoints.
    """

    state: RunState
    signum: int | None
    images_per_s: float


@dataclass(frozen=True)
class Parts:
    """All that a trainer works with, made by the composition root."""

    engine: Any
    master: MasterState
    ema: Ema | None
    plan: BatchPlan
    stream: TrainStream
    validation: EvalStream
    prepare: Prepare
    schedule: Schedule
    store: CheckpointStore
    comm: TorchCollectives
    meter: CommMeter
    record: RunRecord
    costs: Costs


def _nobody() -> float:
    """No rank got a signal: none was asked yet."""
    return 0.0


class Trainer:
    """Runs training from wherever the newest checkpoint left it to the last step."""

    def __init__(
        self, parts: Parts, evaluation: EvalConfig, best: Best, total_steps: int, log_every: int, seed: int
    ) -> None:
        self._p = parts
        self._evaluation = evaluation
        self._total_steps = total_steps
        self._log_every = log_every
        self._clock = StepClock(parts.meter)
        self._step = TrainStep(
            parts.engine, parts.prepare, self._clock, parts.plan.accumulation, seed, parts.comm.ranks.rank
        )
        self._state = RunState(step=0, best=best)
        self._main = parts.comm.ranks.is_main
        self._started = time.perf_counter()
        self._unreduced: list[torch.Tensor] = []
        self._unreported: list[str] = []
        self._steps_timed = 0
        self._resumed: SavedState | None = None
        self._stop_answer: Callable[[], float] = _nobody

    def run(self) -> Outcome:
        """Train to the end, or to a signal. Collective; the same step on all ranks.

        Raises:
            TrainingError: the loss is not finite.
            SetformerError: from the stream or the store.
        """
        saved = self._resumed
        self._started = time.perf_counter() - self._state.seconds
        with (
            contextlib.closing(self._p.record),
            contextlib.closing(self._p.stream),
            contextlib.closing(self._p.validation),
            StopRequest() as stop,
            RunProgress(self._total_steps, self._state.step, self._main) as progress,
        ):
            if saved is not None:
                progress.say(f"resumed at step {saved.step} from {saved.path}")
            batches = self._p.stream.micro_batches(self._state.step)
            self._clock.take()
            signum = self._pay_owed_evaluation(stop, progress)
            if signum is None:
                signum = self.train_until(self._total_steps, batches, stop, progress)
            self._state.seconds = time.perf_counter() - self._started
        images = self._state.train_steps * self._p.plan.global_size
        speed = images / self._state.train_seconds if images else 0.0
        return Outcome(self._state, signum, speed)

    def train_until(
        self, last_step: int, batches: Iterator[MicroBatch], stop: StopRequest, progress: RunProgress
    ) -> int | None:
        """Run optimizer steps up to `last_step`, with all that comes with them; return a signal that ended it."""
        signum: int | None = None
        while self._state.step < last_step and signum is None:
            lr = self._p.schedule.apply(self._state.step)
            outcome = self._step(self._state.step, batches)
            if self._p.ema is not None:
                with self._clock.section("optimizer"):
                    self._p.ema.update(self._state.step)
            self._unreduced.append(outcome.loss)
            self._unreported += outcome.substitutions
            self._steps_timed += 1
            self._state.step += 1
            self._state.seconds = time.perf_counter() - self._started
            progress.advance(self._state.step)
            if self._state.step % self._log_every == 0 or self._state.step == self._total_steps:
                self._log(lr, progress)
            signum = self._after_step(stop, progress)
        self._stop_answer()
        self._stop_answer = _nobody
        return signum

    # Checkpoints.

    def _fragments(self) -> list[Fragment]:
        averaged = self._p.ema.fragments() if self._p.ema is not None else []
        return [*self._p.master.fragments("param", *OPTIMIZER_STATES), *averaged]

    def resume(self) -> None:
        """Take over the newest checkpoint that verifies, if there is one. Collective; call it before `run`.

        Raises:
            SetformerError: the checkpoint is of another model, or its cursor of other data.
        """
        saved = self._p.store.newest()
        if saved is None:
            return
        trainer = saved.trainer
        step = self._p.stream.check_state(trainer["stream"])
        self._p.store.load(saved, self._fragments())
        self._p.master.optimizer_steps = trainer["optimizer_steps"]
        self._p.master.set_loss_scale(trainer["loss_scale"])
        self._p.master.refresh()
        run = trainer["run"]
        best = self._state.best
        if run["best"]["metric"] == best.metric:
            best = Best(best.metric, best.mode, run["best"]["value"], run["best"]["step"])
        self._state = RunState(step, **{**run, "best": best})
        self._resumed = saved

    def _save(self, evaluation: dict[str, float]) -> None:
        self._reduce_losses()
        self._refuse_infinity(self._state.pending_losses)
        with self._clock.section("checkpoint"):
            trainer = {
                "stream": self._p.stream.state(self._state.step),
                "optimizer_steps": self._p.master.optimizer_steps,
                "loss_scale": self._p.master.loss_scale(),
                "run": self._state.as_dict(),
            }
            path = self._p.store.save(self._state.step, self._fragments(), trainer, evaluation)
            log.info("checkpoint %s", path)

    # After each step.

    def _agree_to_stop(self, stop: StopRequest) -> int | None:
        """Return the signal if any rank got one; all ranks stop at the same place."""
        return int(self._p.comm.max(stop.signum or 0)) or None

    def _agreed_a_step_ago(self, stop: StopRequest) -> int | None:
        """Return the signal that any rank had a step ago, and ask again: nobody waits for the answer."""
        answer, self._stop_answer = self._stop_answer, self._p.comm.max_later(stop.signum or 0)
        return int(answer()) or None

    def _after_step(self, stop: StopRequest, progress: RunProgress) -> int | None:
        """Evaluate and save where that is due; return a signal that any rank got."""
        signum = self._agreed_a_step_ago(stop)
        step = self._state.step
        measured: dict[str, float] | None = {}
        improved = False
        if step == self._total_steps or self._evaluation_due(step):
            measured = None if signum else self._evaluate(stop, progress)
            self._state.evaluation_owed = measured is None
            signum = signum or self._agree_to_stop(stop)
            improved = self._take_best(measured or {})
        if step == self._total_steps or signum or improved or self._p.store.due(step):
            self._save(measured or {})
        return signum

    def _pay_owed_evaluation(self, stop: StopRequest, progress: RunProgress) -> int | None:
        """Evaluate at the step where a stop came in between; return a signal that comes again."""
        if not self._state.evaluation_owed:
            return None
        measured = self._evaluate(stop, progress)
        if measured is None:
            return self._agree_to_stop(stop)
        self._state.evaluation_owed = False
        self._take_best(measured)
        return None

    def _evaluation_due(self, step: int) -> bool:
        config = self._evaluation
        by_step = config.every_steps > 0 and step % config.every_steps == 0
        return by_step or (
            config.every_epochs > 0 and step % (config.every_epochs * self._p.stream.steps_per_epoch) == 0
        )

    def _evaluate(self, stop: StopRequest, progress: RunProgress) -> dict[str, float] | None:
        """Score the weights and their average; None if a signal came before the end, the same on all ranks."""
        with self._clock.section("evaluation"):
            result = self._score(stop)
            if result is None:
                return None
            measured: dict[str, float] = result.as_dict()
            text = f"step {self._state.step}: top-1 {result.top1:.2%}, loss {result.loss:.4f}"
            if self._p.ema is not None:
                with self._p.ema.swapped_in():
                    averaged = self._score(stop)
                if averaged is None:
                    return None
                measured |= averaged.as_dict("ema_")
                text += f" · averaged weights: top-1 {averaged.top1:.2%}, loss {averaged.loss:.4f}"
        self._state.evaluation = measured
        left_out = {"left_out": result.left_out} if result.left_out else {}
        self._p.record.write("eval", self._state.step, {**measured, "samples": result.samples, **left_out})
        progress.say(f"{text} ({result.samples} validation images)")
        log.info(text)
        return measured

    def _score(self, stop: StopRequest) -> EvalResult | None:
        self._p.engine.eval()
        try:
            return evaluate(
                self._p.engine,
                self._p.validation,
                self._p.prepare,
                self._p.comm,
                given_up=lambda: self._agree_to_stop(stop) is not None,
            )
        finally:
            self._p.engine.train()

    def _take_best(self, measured: dict[str, float]) -> bool:
        best = self._state.best
        value = measured.get(best.metric)
        if value is None or not best.improved_by(value):
            return False
        self._state.best = Best(best.metric, best.mode, value, self._state.step)
        return True

    # Metrics.

    def _reduce_losses(self) -> None:
        """Turn the losses of the last steps into means over all ranks, step by step; report damaged samples.

        Step by step, because a sum over several steps would depend on where a checkpoint cut it.
        """
        if not self._unreduced:
            return
        local = torch.stack(self._unreduced).double().tolist()
        *losses, substituted = self._p.comm.sum([*local, float(len(self._unreported))])
        parts = self._p.plan.accumulation * self._p.plan.world_size
        self._state.pending_losses += [loss / parts for loss in losses]
        for line in self._unreported:
            log.warning("%s", line)
        self._state.substitutions += round(substituted)
        self._unreduced.clear()
        self._unreported.clear()

    def _refuse_infinity(self, losses: list[float]) -> None:
        """Stop before anything that is not finite reaches a checkpoint.

        Raises:
            TrainingError: a loss is not finite; in fp16 DeepSpeed skips such steps and lowers the loss scale.
        """
        if not all(map(math.isfinite, losses)) and not self._p.engine.fp16_enabled():
            raise TrainingError(
                f"the loss is not finite near step {self._state.step}: lower optim.lr or optim.clip_norm, or lengthen "
                "the warm-up; the newest checkpoint is from before and stays"
            )

    def _log(self, lr: float, progress: RunProgress) -> None:
        """Write a line about the steps since the last one."""
        self._reduce_losses()
        losses = self._state.pending_losses
        loss = math.fsum(losses) / len(losses)
        seconds, wall = self._clock.take()
        steps, self._steps_timed = self._steps_timed, 0
        training = wall - seconds["checkpoint"] - seconds["evaluation"]
        self._state.train_seconds += training
        self._state.train_steps += steps
        images_per_s = steps * self._p.plan.global_size / training
        progress.figures(loss, images_per_s)
        values = {
            "epoch": self._state.step / self._p.stream.steps_per_epoch,
            "loss": loss,
            "lr": lr,
            "grad_norm": self._gradient_norm(),
            "images_per_s": images_per_s,
            "tokens_per_s": images_per_s * self._p.costs.tokens,
            "memory_mib": peak_memory_mib(),
            "mfu": self._utilisation(images_per_s),
            "substitutions": self._state.substitutions,
            "seconds": {name: value / steps for name, value in seconds.items()},
        }
        self._p.record.write("train", self._state.step, values)
        log.info("step %d loss %.6f lr %.3g %.0f images/s", self._state.step, loss, lr, images_per_s)
        self._refuse_infinity(losses)
        self._state.pending_losses = []

    def _gradient_norm(self) -> float | None:
        norm = self._p.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _utilisation(self, images_per_s: float) -> float | None:
        costs = self._p.costs
        if costs.peak_flops is None:
            return None
        # A multiply-add is two operations; the backward pass costs two forward passes.
        return images_per_s * 6 * costs.multiply_adds / (costs.peak_flops * self._p.plan.world_size)
