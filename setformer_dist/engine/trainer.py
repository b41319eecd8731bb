"""The loop over optimizer steps: schedule, evaluation, checkpoints, metrics, signals.

Everything is a function of the step: the samples (stream), the learning rate (schedule), the randomness
(step.py). So a run that resumes at step k does what an uninterrupted one would have done from step k on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pydantic
import torch

from setformer_dist.core.batch import EvalStream, MicroBatch, TrainStream
from setformer_dist.core.errors import CheckpointError, TrainingError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.heartbeat import Heartbeat
from setformer_dist.core.metric import AVERAGED, Mode, headline
from setformer_dist.core.store import CheckpointStore, SavedState
from setformer_dist.core.task import Prepare, Task
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.comm import CommMeter, TorchCollectives
from setformer_dist.engine.config import EvalConfig
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.evaluate import EvalResult, Watch, evaluate
from setformer_dist.engine.guard import Guard, Trouble, Updates
from setformer_dist.engine.master import OPTIMIZER_STATES, MasterState
from setformer_dist.engine.metrics import RunRecord, StepClock, peak_memory_mib
from setformer_dist.engine.optim import Schedule
from setformer_dist.engine.progress import RunProgress
from setformer_dist.engine.signals import StopRequest
from setformer_dist.engine.step import TrainStep

log = logging.getLogger(__name__)

# Phases in which a rank computes by itself; in all others it may wait for the others.
_BUSY = ("data", "forward", "backward", "optimizer")
# What a rank without a signal says of itself when a save has failed; less than any signal.
_SAVE_FAILED = 0.5
# As `MasterState.loss_scale` has it; earlier versions wrote null for what a static scaler lacks.
_LOSS_SCALE: pydantic.TypeAdapter[dict[str, float | None]] = pydantic.TypeAdapter(dict[str, float | None])
# A rank is a straggler when these take longer than the middle rank's by more than this share.
_SLOWER = 0.1


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
    mode: Mode
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


def check_trainer(trainer: dict[str, Any], place: Path) -> None:
    """Check what a checkpoint holds for `Trainer`, before any of it is taken over.

    Args:
        trainer: contents of trainer.json.
        place: of the checkpoint, for the error.

    Raises:
        CheckpointError: something is missing, unknown, or of another kind; as in a checkpoint that no run wrote.
    """
    try:
        run = dict(trainer["run"])
        unknown = run.keys() - {field.name for field in fields(RunState)} | run.keys() & {"step"}
        if unknown:
            raise ValueError(f"run.{min(unknown)} is unknown")
        best = {"mode": "max", **{key: run["best"][key] for key in ("metric", "value", "step")}}
        pydantic.TypeAdapter(RunState).validate_json(json.dumps({**run, "step": 0, "best": best}), strict=True)
        for key, kind in {"stream": dict, "optimizer_steps": int, "loss_scale": dict}.items():
            if type(trainer[key]) is not kind:
                raise ValueError(f"{key} is no {kind.__name__}")
        window = trainer.get("guard", {}).get("window", [])
        pydantic.TypeAdapter(list[float]).validate_json(json.dumps(window), strict=True)
        _LOSS_SCALE.validate_json(json.dumps(trainer["loss_scale"]), strict=True)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # pydantic's are ValueErrors
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error).replace("\n", " ")
        raise CheckpointError(
            f"a run cannot go on from {place} (trainer.json: {what}): only what a run of this program saved can be "
            "resumed"
        ) from None


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.run` or `Trainer.advance` ended.

    Attributes:
        state: the run's state at the end.
        signum: the signal that stopped it, 0 where it came to the step that was asked for, None at the run's end.
        images_per_s: mean over the run's training steps, without evaluation and checkpoints.
    """

    state: RunState
    signum: int | None
    images_per_s: float


@dataclass(frozen=True)
class Parts:
    """All that a trainer works with, made by the composition root.

    `first_weights`, where a run begins with other weights than its seed's, fills fragments with them and says which.
    """

    engine: Any
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
    watch: Watch | None = None
    first_weights: Callable[[list[Fragment]], str] | None = None


class _RewindError(Exception):
    """All ranks go back to a checkpoint; raised on all of them at the same place."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(f"step {trouble.step}")
        self.trouble = trouble


def _nobody() -> float:
    """No rank got a signal: none was asked yet."""
    return 0.0


class Trainer:
    """Runs training from wherever the newest checkpoint left it to the last step."""

    def __init__(
        self,
        parts: Parts,
        evaluation: EvalConfig,
        best: Best,
        total_steps: int,
        log_every: int,
        seed: int,
        record_samples: bool = False,
    ) -> None:
        self._p = parts
        self._evaluation = evaluation
        self._total_steps = total_steps
        self._log_every = log_every
        self._record_samples = record_samples
        self._clock = StepClock(parts.meter, parts.heartbeat)
        self._step = TrainStep(
            parts.engine,
            parts.task,
            parts.prepare,
            self._clock,
            parts.plan.accumulation,
            seed,
            parts.comm.ranks.rank,
            Updates(parts.engine),
        )
        self._state = RunState(step=0, best=best)
        self._main = parts.comm.ranks.is_main
        self._started = time.perf_counter()
        self._unreduced: list[torch.Tensor] = []
        self._unreported: list[str] = []
        self._samples_seen: dict[int, list[int]] = {}
        self._steps_timed = 0
        self._resumed: SavedState | None = None
        self._began_with = ""
        self._stop_answer: Callable[[], float] = _nobody
        self._began = False

    @property
    def began(self) -> bool:
        """Whether training has begun in this process."""
        return self._began

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._state.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._total_steps

    def run(self) -> Outcome:
        """Train to the end, or to a signal, and close all that training uses. Collective; as `advance`."""
        with StopRequest(self._p.heartbeat) as stop, contextlib.closing(self):  # the signal's first: it cuts no save
            return self._advance(self._total_steps, stop)

    def advance(self, last_step: int) -> Outcome:
        """Train up to a step, or to a signal, and leave all open for more. Collective; the same step on all ranks.

        Args:
            last_step: optimizer steps done at the end; the run's own end comes before.

        Raises:
            TrainingError: the loss is not finite, or leaps, and the guard does not bear it (`engine.guard`).
            SetformerError: from the stream or the store.
        """
        with StopRequest(self._p.heartbeat) as stop:
            return self._advance(min(last_step, self._total_steps), stop)

    def close(self) -> None:
        """Close the streams, the store and the record; wait for what is being written."""
        self._p.meter.remove()
        with (
            contextlib.closing(self._p.record),
            contextlib.closing(self._p.store),
            contextlib.closing(self._p.stream),
            contextlib.closing(self._p.validation),
        ):
            return

    def save(self) -> None:
        """Write a checkpoint of where the run is, unless it is there; durable when this returns. Collective.

        Raises:
            CheckpointError: it could not be written, on every rank.
        """
        self._save({})
        self._p.store.finish(last=True)

    def score(self) -> dict[str, float]:
        """Evaluate the weights and their average, and leave no record of it. Collective.

        Returns:
            The task's metrics; those of averaged weights with `ema_` before their names.
        """
        measured = self._scores(StopRequest())  # not entered: Ctrl-C is an ordinary one
        assert measured is not None
        return {name: value for result, prefix in measured for name, value in result.as_dict(prefix).items()}

    def _begin(self, progress: RunProgress) -> None:
        """Say and record from where the run goes on, once."""
        self._began = True
        self._started = time.perf_counter() - self._state.seconds
        if self._resumed is not None:
            progress.say(f"resumed at step {self._resumed.step} from {self._resumed.path}")
        elif self._began_with:
            progress.say(self._began_with)
            log.info(self._began_with)
            self._p.record.note("weights", what=self._began_with)
        self._p.heartbeat.step = self._state.step
        self._p.record.note("began", step=self._state.step)

    def _advance(self, last_step: int, stop: StopRequest) -> Outcome:
        with RunProgress(self._total_steps, self._state.step, self._main) as progress:
            if not self._began:
                self._begin(progress)
            self._clock.take()
            signum = self._pay_owed_evaluation(stop, progress)
            while signum is None and self._state.step < last_step:
                batches = self._p.stream.micro_batches(self._state.step)
                try:
                    signum = self.train_until(last_step, batches, stop, progress)
                except _RewindError as rewind:
                    self._rewind(rewind.trouble, progress)
            self._state.seconds = time.perf_counter() - self._started
            self._p.record.note("spent", step=self._state.step, seconds=self._clock.take()[0])
            self._steps_timed = 0
        if signum is not None:  # below the bar: it is the last that a user sees
            progress.say(f"stopped and saved at step {self._state.step}; the same command goes on from there")
        elif self._state.step < self._total_steps:
            signum = 0
        images = self._state.train_steps * self._p.plan.global_size
        speed = images / self._state.train_seconds if images else 0.0
        return Outcome(self._state, signum, speed)

    def train_until(
        self, last_step: int, batches: Iterator[MicroBatch], stop: StopRequest, progress: RunProgress
    ) -> int | None:
        """Run optimizer steps up to `last_step`, with all that comes with them; return a signal that ended it."""
        signum: int | None = None
        while self._state.step < last_step and signum is None:
            self._p.heartbeat.step = self._state.step
            lr = self._p.schedule.apply(self._state.step)
            if self._p.guard.passes_over(self._state.step):
                self._pass_over(batches)
            else:
                self._do_step(batches)
            self._p.heartbeat.warm = True
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

    def _do_step(self, batches: Iterator[MicroBatch]) -> None:
        step = self._state.step
        outcome = self._step(step, batches)
        if self._p.ema is not None:
            with self._clock.section("optimizer"):
                self._p.ema.update(step)
        self._unreduced.append(outcome.loss)
        self._unreported += outcome.substitutions
        self._samples_seen[step] = outcome.sample_ids

    def _pass_over(self, batches: Iterator[MicroBatch]) -> None:
        """Let a step's samples go by without an update."""
        with self._clock.section("data"):
            for _ in range(self._p.plan.accumulation):
                next(batches)
        self._unreduced.append(torch.full((), math.nan, device=self._p.engine.device))

    def _rewind(self, trouble: Trouble, progress: RunProgress) -> None:
        """Go back to the newest checkpoint, or to one before it, on all ranks.

        Raises:
            TrainingError: there is none.
        """
        reached = self._state.step
        saved = self._to_go_on_from()
        if saved is None:
            raise TrainingError(
                f"the loss is {trouble.loss:.4g} at step {trouble.step} ({trouble.why}), and there is no checkpoint to "
                "go back to: save earlier (checkpoint.every_steps), or lower optim.lr"
            )
        self._unreduced.clear()
        self._samples_seen.clear()
        self._stop_answer()  # all ranks have asked
        self._stop_answer = _nobody
        self._take_over(saved)
        if self._state.step != saved.step:
            self._save_renumbered(saved)
        self._p.guard.went_back(self._state.step)
        self._p.record.note("spent", step=reached, seconds=self._clock.take()[0])
        self._p.record.note("rewound", step=self._state.step, reached=reached, bad=self._p.guard.last)
        self._steps_timed = 0
        progress.advance(self._state.step)
        progress.say(
            f"loss {trouble.loss:.4g} at step {trouble.step} ({trouble.why}): back to step {self._state.step}, "
            f"step {trouble.step} will be passed over"
        )

    # Checkpoints.

    def _fragments(self) -> list[Fragment]:
        averaged = self._p.ema.fragments() if self._p.ema is not None else []
        return [*self._p.master.fragments("param", *OPTIMIZER_STATES), *averaged]

    def resume(self) -> None:
        """Take over the newest checkpoint that verifies, or the first weights. Collective; call it before `run`.

        Raises:
            SetformerError: the checkpoint is of another model, or its cursor of other data.
        """
        self._p.guard.load()
        saved = self._to_go_on_from()
        if saved is not None:
            self._take_over(saved)
            if self._state.step != saved.step:
                self._p.guard.forget()
                self._save_renumbered(saved)
        elif self._p.first_weights is not None:
            self._began_with = self._p.first_weights(self._fragments())
            self._p.master.refresh()
        self._p.guard.went_back(self._state.step)  # where a rollback was cut short
        self._resumed = saved

    def _to_go_on_from(self) -> SavedState | None:
        """Return the newest checkpoint; where the guard says so and there is one, that before the one it names."""
        below = self._p.guard.below
        if below is None:
            return self._p.store.newest()
        saved = self._p.store.newest_before(below, f"after a rollback to step {below} there was trouble again")
        if saved is None and self._main:
            log.warning("there is no checkpoint below step %d, so the newest is gone back to once more", below)
        return saved or self._p.store.newest()

    def _take_over(self, saved: SavedState) -> None:
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
        self._p.guard.take_back(trainer.get("guard", {}))

    def _save(self, evaluation: dict[str, float], replace: bool = False) -> None:
        self._reduce_losses()
        with self._clock.section("checkpoint"):
            self._p.store.save(self._state.step, self._fragments(), self._for_trainer(), evaluation, replace)

    def _save_renumbered(self, saved: SavedState) -> None:
        """Begin the new count of steps that another global batch or other data bring, in the store too."""
        log.warning("step %d is step %d from here on (checkpoint.allow_changes)", saved.step, self._state.step)
        self._p.store.save_renumbered(self._state.step, self._fragments(), self._for_trainer(), saved.metrics)

    def _for_trainer(self) -> dict[str, Any]:
        """Return what `_take_over` takes; `check_trainer` knows its form."""
        return {
            "stream": self._p.stream.state(self._state.step),
            "optimizer_steps": self._p.master.optimizer_steps,
            "loss_scale": self._p.master.loss_scale(),
            "run": self._state.as_dict(),
            "guard": self._p.guard.state(),
        }

    # After each step.

    def _agree_to_stop(self, stop: StopRequest) -> int | None:
        """Return the signal if any rank got one; all ranks stop at the same place."""
        return int(self._p.comm.max(stop.signum or 0)) or None

    def _agreed_a_step_ago(self, stop: StopRequest) -> int | None:
        """Return the signal that any rank had a step ago, and ask again: nobody waits for the answer.

        The same question carries whether a save has failed meanwhile; then all ranks look into it at this step.

        Raises:
            CheckpointError: a save has failed on some rank, and the config does not bear it.
        """
        wish = stop.signum or (_SAVE_FAILED if self._p.store.failed() else 0)
        answer, self._stop_answer = self._stop_answer, self._p.comm.max_later(wish)
        told = answer()
        if told == _SAVE_FAILED:
            self._p.store.finish()
        return int(told) or None

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
        if step == self._total_steps or signum:
            with self._clock.section("checkpoint"):
                self._p.store.finish(last=True)
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
        self._save(measured, replace=True)
        if self._state.step == self._total_steps:
            with self._clock.section("checkpoint"):
                self._p.store.finish(last=True)
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
            scores = self._scores(stop)
            if scores is None:
                return None
            (result, _), *averaged = scores
            measured = {name: value for part, prefix in scores for name, value in part.as_dict(prefix).items()}
            metrics = self._p.task.metrics
            text = f"step {self._state.step}: {headline(metrics, result.figures)}"
            for part, _ in averaged:
                text += f" · averaged weights: {headline(metrics, part.figures)}"
        self._state.evaluation = measured
        left_out = {"left_out": result.left_out} if result.left_out else {}
        self._p.record.write("eval", self._state.step, {**measured, "samples": result.samples, **left_out})
        progress.say(f"{text} ({result.samples} validation samples)")
        log.info(text)
        return measured

    def _scores(self, stop: StopRequest) -> list[tuple[EvalResult, str]] | None:
        """Score the weights and, where there is one, their average; with what its metrics' names begin with."""
        result = self._score(stop)
        if result is None or self._p.ema is None:
            return None if result is None else [(result, "")]
        with self._p.ema.swapped_in():
            averaged = self._score(stop)
        return None if averaged is None else [(result, ""), (averaged, AVERAGED)]

    def _score(self, stop: StopRequest) -> EvalResult | None:
        self._p.engine.eval()
        try:
            return evaluate(
                self._p.engine,
                self._p.task,
                self._p.validation,
                self._p.prepare,
                self._p.comm,
                given_up=lambda: self._given_up(stop),
                watch=self._p.watch,
            )
        finally:
            self._p.engine.train()

    def _given_up(self, stop: StopRequest) -> bool:
        self._p.heartbeat.beat("evaluation")
        return self._agree_to_stop(stop) is not None

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
        means = [loss / parts for loss in losses]
        first = self._state.step - len(means)
        self._state.pending_losses += means
        for line in self._unreported:
            log.warning("%s", line)
        self._state.substitutions += round(substituted)
        self._unreduced.clear()
        self._unreported.clear()
        self._judge(first, means)
        if self._record_samples:
            self._write_samples(first, len(means))
        self._samples_seen.clear()

    def _write_samples(self, first: int, steps: int) -> None:
        """Write which samples each of the last steps took, in the order of the stream; collective."""
        for step in range(first, first + steps):
            parts = self._p.comm.gather_json(self._samples_seen.get(step, []))
            micro = self._p.plan.micro
            slots = range(0, len(parts[0]), micro)
            self._p.record.write_samples(step, [i for at in slots for part in parts for i in part[at : at + micro]])

    def _judge(self, first: int, means: list[float]) -> None:
        """Have the guard look at the losses of the last steps, before anything that came of a bad one is kept.

        Raises:
            TrainingError: a bad step that the guard does not bear.
            _RewindError: one that all ranks go back for.
        """
        while (trouble := self._p.guard.judge(first, means)) is not None:
            parts = self._p.comm.gather_json(self._samples_seen.get(trouble.step, []))
            ids = [sample for part in parts for sample in part]
            values = {**vars(trouble), "sample_ids": ids}
            self._p.record.write("guard", trouble.step, values)
            log.warning("bad step: %s", values)
            self._p.guard.remember(trouble, ids)
            if trouble.action == "rollback":
                raise _RewindError(trouble)
            means = means[trouble.step + 1 - first :]
            first = trouble.step + 1

    def _log(self, lr: float, progress: RunProgress) -> None:
        """Write a line about the steps since the last one."""
        self._reduce_losses()
        losses = [loss for loss in self._state.pending_losses if math.isfinite(loss)]
        loss = math.fsum(losses) / len(losses) if losses else math.nan
        seconds, wall = self._clock.take()
        steps, self._steps_timed = self._steps_timed, 0
        training = wall - seconds["checkpoint"] - seconds["evaluation"]
        self._state.train_seconds += training
        self._state.train_steps += steps
        images_per_s = steps * self._p.plan.global_size / training
        epoch = self._state.step / self._p.stream.steps_per_epoch
        progress.figures(loss, images_per_s, self._state.substitutions, epoch, lr)
        values = {
            "epoch": epoch,
            "loss": loss if losses else None,
            "lr": lr,
            "grad_norm": self._gradient_norm(),
            "images_per_s": images_per_s,
            "tokens_per_s": images_per_s * self._p.costs.tokens,
            "memory_mib": peak_memory_mib(),
            "mfu": self._utilisation(images_per_s),
            "substitutions": self._state.substitutions,
            "seconds": {name: value / steps for name, value in seconds.items()},
        }
        values |= self._slowest_rank(seconds, steps)
        self._p.record.write("train", self._state.step, values)
        self._p.record.note("spent", step=self._state.step, seconds=seconds)
        log.info("step %d loss %.6f lr %.3g %.0f images/s", self._state.step, loss, lr, images_per_s)
        self._state.pending_losses = []

    def _slowest_rank(self, seconds: dict[str, float], steps: int) -> dict[str, Any]:
        """Name the rank that the others waited for, if one was slower than the middle one by a tenth; collective."""
        ranks = self._p.comm.ranks
        mine = [seconds[phase] / steps for phase in _BUSY]
        table = [0.0] * (len(mine) * ranks.world_size)
        table[ranks.rank * len(mine) : (ranks.rank + 1) * len(mine)] = mine
        if ranks.world_size == 1:
            return {}
        table = self._p.comm.sum(table)
        by_rank = [table[at : at + len(mine)] for at in range(0, len(table), len(mine))]
        totals = [sum(row) for row in by_rank]
        usual = statistics.median_low(totals)
        slowest = max(range(len(totals)), key=totals.__getitem__)
        if totals[slowest] <= (1 + _SLOWER) * usual:
            return {}
        typical = [statistics.median_low(column) for column in zip(*by_rank, strict=True)]
        phase = max(range(len(mine)), key=lambda at: by_rank[slowest][at] - typical[at])
        return {"straggler": {"rank": slowest, "phase": _BUSY[phase], "seconds": totals[slowest] - usual}}

    def _gradient_norm(self) -> float | None:
        norm = self._p.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _utilisation(self, images_per_s: float) -> float | None:
        costs = self._p.costs
        if costs.peak_flops is None:
            return None
        # A multiply-add is two operations; the backward pass costs two forward passes.
        return images_per_s * 6 * costs.multiply_adds / (costs.peak_flops * self._p.plan.world_size)
