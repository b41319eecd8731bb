"""The loop over optimizer steps: schedule, evaluation, checkpoints, metrics, signals.

Everything is a function of the step: the samples (stream), the learning rate (schedule), the randomness
(step.py). So a run that resumes at step k does what an uninterrupted one would have done from step k on.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.callback import RunEnd
from setformer_dist.core.errors import TrainingError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import SavedState, Snapshot
from setformer_dist.core.words import counted
from setformer_dist.engine.components import Components
from setformer_dist.engine.config import EvalConfig
from setformer_dist.engine.evaluation import Evaluation
from setformer_dist.engine.guard import Incident, Updates
from setformer_dist.engine.metrics import StepClock
from setformer_dist.engine.progress import RunProgress
from setformer_dist.engine.refresh import Refresh
from setformer_dist.engine.run_state import Best, Outcome, RunState, check_within
from setformer_dist.engine.signals import StopRequest
from setformer_dist.engine.step import TrainStep
from setformer_dist.engine.step_log import RewindError, StepLog
from setformer_dist.engine.stop_vote import StopVote

log = logging.getLogger(__name__)

_COPIES_SLICE_S = 1.0  # of a wait for copies in an object store
_COPIES_AT_STOP_S = 15.0  # how long a run that is to stop waits for them; its checkpoint is on its disk


class Trainer:
    """Runs training from wherever the newest checkpoint left it to the last step."""

    def __init__(
        self,
        components: Components,
        evaluation: EvalConfig,
        best: Best,
        total_steps: int,
        log_every: int,
        seed: int,
        record_samples: bool = False,
        copies_s: float = 0.0,
    ) -> None:
        c = self._c = components
        self._total_steps = total_steps
        self._copies_s = copies_s
        self._log_every = log_every
        self._clock = StepClock(c.meter, c.heartbeat)
        updates = Updates(c.engine)
        self._step = TrainStep(c.engine, c.task, c.prepare, self._clock, c.plan, seed, c.comm, updates, c.refresh)
        self._steps = StepLog(c, self._clock, record_samples)
        self._evaluation = Evaluation(c, evaluation, self._clock, total_steps)
        self._state = RunState(step=0, best=best)
        self._started = time.perf_counter()
        self._resumed: SavedState | None = None
        self._began_with = ""
        self._began = False
        self._say: Callable[[str], None] = log.info
        self._over = False
        self._early = False  # whether the run ended before its last step: by a callback, or by eval.patience

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
        with StopRequest(self._c.heartbeat) as stop, contextlib.closing(self):  # the signal's first: it cuts no save
            return self._advance(self._total_steps, stop)

    def advance(self, last_step: int) -> Outcome:
        """Train up to a step, or to a signal, and leave all open for more. Collective; the same step on all ranks.

        Args:
            last_step: optimizer steps done at the end; the run's own end comes before.

        Raises:
            TrainingError: the loss is not finite or spikes, and the guard does not tolerate it (`engine.guard`); or a
                callback failed (`engine.events`).
            ConfigError: the loss is none, or other parameters train than in the beginning.
            SetformerError: from the stream or the store.
        """
        with StopRequest(self._c.heartbeat) as stop:
            return self._advance(min(last_step, self._total_steps), stop)

    def close(self) -> None:
        """Close the streams, the store and the record; wait for what is being written."""
        c = self._c
        c.meter.remove()
        with (
            contextlib.closing(c.record),
            contextlib.closing(c.store),
            contextlib.closing(c.stream),
            contextlib.closing(c.validation),
            contextlib.closing(c.refresh) if c.refresh is not None else contextlib.nullcontext(),
        ):
            if self._began and not self._over:  # paused, and nobody continues
                self._end(0)

    def save(self) -> None:
        """Write a checkpoint of where the run is, unless it is there; durable when this returns. Collective.

        Raises:
            CheckpointError: it could not be written, on every rank.
        """
        self._save({})
        self._finish_saving()
        self._tell_of_checkpoints()

    def score(self) -> dict[str, float]:
        """Evaluate the weights and their average, and leave no record of it. Collective.

        Returns:
            The task's metrics; those of averaged weights with `ema_` before their names.
        """
        not_entered = StopRequest()  # Ctrl-C is an ordinary one
        scores = self._evaluation.scores(StopVote(not_entered, self._c.comm, self._c.store, self._c.callbacks))
        assert scores is not None
        return {name: value for result, prefix in scores for name, value in result.as_dict(prefix).items()}

    def _advance(self, last_step: int, stop: StopRequest) -> Outcome:
        c = self._c
        with (
            self._telling_of_errors(),
            RunProgress(self._total_steps, self._state.step, c.comm.ranks.is_main) as progress,
        ):
            if not self._began:
                self._begin(progress)
            self._say = progress.say
            c.engine.train()  # a program may have looked at the model in between
            self._clock.take()
            vote = StopVote(stop, c.comm, c.store, c.callbacks)
            signum = self._steps_until(last_step, vote, progress)
            over = self._early or self._state.step == self._total_steps
            if signum is not None or over:
                self._finish_copies(signum, vote)
            if signum is None and over:
                c.store.complete()
            self._state.seconds = time.perf_counter() - self._started
            c.record.note("spent", step=self._state.step, seconds=self._clock.take()[0])
            self._steps.restart_clock()
            self._tell_of_checkpoints()
            if signum is not None or over:
                self._end(signum)
        if signum is not None:  # below the bar: it is the last that a user sees
            progress.say(f"stopped and saved at step {self._state.step}; the same command resumes from there")
        elif self._early:
            progress.say(f"ended early and saved at step {self._state.step}: {self._why_early()}")
        elif self._state.step < self._total_steps:
            signum = 0
        images = self._state.train_steps * c.plan.global_size
        speed = images / self._state.train_seconds if images else 0.0
        return Outcome(self._state, signum, speed)

    def _why_early(self) -> str:
        state = self._state
        if self._evaluation.out_of_patience(state):
            return (
                f"{counted(state.since_best, 'evaluation')} without a better {state.best.metric} than at step "
                f"{state.best.step}; "
                "the same command with a larger eval.patience continues"
            )
        name = self._c.callbacks.asks_to_stop  # "" where it is another rank's
        return f"callback {name!r} asked for it" if name else "a callback asked for it"

    @contextlib.contextmanager
    def _telling_of_errors(self) -> Iterator[None]:
        """Tell the callbacks of an error that ends the run."""
        try:
            yield
        except BaseException as error:
            self._over = True
            self._c.callbacks.exception(error)
            raise

    def _end(self, signum: int | None) -> None:
        """Tell the callbacks, once, that the run is over; 0 where it was left before its end."""
        if not self._over:
            self._over = True
            self._c.callbacks.end(RunEnd(self._state.step, signum, self._state.evaluation))

    def _begin(self, progress: RunProgress) -> None:
        """Say where the run begins or resumes, once."""
        c, saved = self._c, self._resumed
        self._began = True
        self._started = time.perf_counter() - self._state.seconds
        if saved is not None:
            left = "" if saved.step < self._total_steps else ": the run is done, and no step is left to train"
            progress.say(f"resumed at step {saved.step} from {saved.path}{left}")
        elif self._began_with:
            progress.say(self._began_with)
            log.info(self._began_with)
            c.record.note("weights", what=self._began_with)
        c.heartbeat.step = self._state.step
        c.record.note("began", step=self._state.step)
        folder = saved.path if saved is not None else None
        c.callbacks.start(self._state.step, self._total_steps, folder, progress.say)

    def _steps_until(self, last_step: int, stop: StopVote, progress: RunProgress) -> int | None:
        """Run the steps that are left up to one, over all rollbacks; return a signal that ended it."""
        signum = self._pay_owed_evaluation(stop, progress)
        self._early = self._evaluation.out_of_patience(self._state) and self._state.step < self._total_steps
        while signum is None and not self._early and self._state.step < last_step:
            batches = self._c.stream.micro_batches(self._state.step)
            try:
                signum = self.train_until(last_step, batches, stop, progress)
            except RewindError as rewind:
                self._rewind(rewind.incident, stop, progress)
        return signum

    def train_until(
        self, last_step: int, batches: Iterator[MicroBatch], stop: StopVote, progress: RunProgress
    ) -> int | None:
        """Run optimizer steps up to `last_step`, with all that comes with them; return a signal that ended it."""
        c, state = self._c, self._state
        signum: int | None = None
        while state.step < last_step and signum is None and not self._early:
            c.heartbeat.step = state.step
            lr = c.schedule.apply(state.step)
            if c.guard.passes_over(state.step):
                self._pass_over(batches)
            else:
                self._do_step(batches)
            c.heartbeat.warm = True
            state.step += 1
            state.seconds = time.perf_counter() - self._started
            progress.advance(state.step)
            c.callbacks.step_end(state.step)
            if c.refresh is not None and c.refresh.acts(state.step):
                self._refresh(c.refresh)
            if state.step % self._log_every == 0 or state.step == self._total_steps:
                self._steps.write(state, lr, progress)
            signum = self._after_step(stop, progress)
            self._tell_of_checkpoints()
        stop.settle()
        return signum

    def _do_step(self, batches: Iterator[MicroBatch]) -> None:
        step = self._state.step
        outcome = self._step(step, batches)
        self._c.master.check_trained()
        if self._c.ema is not None:
            with self._clock.section("optimizer"):
                self._c.ema.update(step)
                self._follow_average()
        if self._c.refresh is not None and self._c.refresh.sampled(step):  # a section waits for the device
            with self._clock.section("refresh"):
                self._c.refresh.after_update(step)
        self._steps.take(step, outcome)

    def _follow_average(self) -> None:
        """Let what the task compares with take over the averaged weights."""
        if self._c.averaged is not None and self._c.ema is not None:
            self._c.averaged.follow(self._c.ema, self._c.comm)

    def _refresh(self, refresh: Refresh) -> None:
        """Begin to compute reference sets, and set them, where that is due: before this step is evaluated and saved."""
        step = self._state.step
        with self._clock.section("refresh"):
            refresh.begin(step)
            if not refresh.due(step):
                return
            values = refresh.apply(step)
        c = self._c
        c.record.write("refresh", step, values)
        c.record.note(
            "refreshed", step=step, skipped=values.get("skipped", ""), by=values.get("by", ""),
            late=values.get("late", ""),
        )  # fmt: skip
        c.callbacks.figures("on_refresh", step, values)

    def _pass_over(self, batches: Iterator[MicroBatch]) -> None:
        """Let a step's samples go by without an update."""
        with self._clock.section("data"):
            _, of_step = self._c.plan.of_step(batches)
            collections.deque(of_step, maxlen=0)
        self._steps.take_passed_over()

    def _after_step(self, stop: StopVote, progress: RunProgress) -> int | None:
        """Evaluate and save where that is due; return a signal that any rank got."""
        signum = stop.of_last_step()
        state = self._state
        last = state.step == self._total_steps or stop.had_enough
        measured: dict[str, float] | None = {}
        improved = False
        if last or self._evaluation.due(state.step):
            measured = None if signum else self._evaluation.run(state, stop, progress)
            state.evaluation_owed = measured is None
            signum = signum or stop.now()
            improved = state.take_best(measured or {}, self._evaluation.due(state.step))
            last = last or stop.enough() or self._evaluation.out_of_patience(state)
        self._early = last and not signum and state.step < self._total_steps
        if last or signum or improved or self._c.store.due(state.step):
            self._save(measured or {})
        if last or signum:
            self._finish_saving()
        return signum

    def _pay_owed_evaluation(self, stop: StopVote, progress: RunProgress) -> int | None:
        """Evaluate at the step where a stop came in between; return a signal that comes again."""
        state = self._state
        if not state.evaluation_owed:
            return None
        measured = self._evaluation.run(state, stop, progress)
        if measured is None:
            return stop.now()
        state.evaluation_owed = False
        state.take_best(measured, self._evaluation.due(state.step))
        self._save(measured, replace=True)
        if state.step == self._total_steps or self._evaluation.out_of_patience(state):
            self._finish_saving()
        return None

    # Checkpoints.

    def resume(self) -> None:
        """Take over the newest checkpoint that verifies, or the first weights. Collective; call it before `run`.

        Raises:
            SetformerError: the checkpoint is of another model, or its cursor of other data.
        """
        c = self._c
        c.store.agree()
        c.guard.load()
        saved = self._to_go_on_from()
        if saved is not None:
            self._take_over(saved)
            check_within(self._state.step, self._total_steps, saved.path)
            if self._state.step == self._total_steps and not saved.metrics:  # the end came here by another schedule
                self._state.evaluation_owed = True
            if self._state.step != saved.step:
                c.guard.forget()
                self._save_renumbered(saved)
        elif c.first_weights is not None:
            self._began_with = c.first_weights(self._fragments())
            c.master.refresh()
        self._follow_average()
        c.guard.went_back(self._state.step)  # where a rollback was cut short
        self._resumed = saved

    def _rewind(self, incident: Incident, stop: StopVote, progress: RunProgress) -> None:
        """Go back to the newest checkpoint, or to one before it, on all ranks.

        Raises:
            TrainingError: there is none.
        """
        reached = self._state.step
        saved = self._to_go_on_from()
        if saved is None:
            raise TrainingError(
                f"the loss is {incident.loss:.4g} at step {incident.step} ({incident.why}), and there is no checkpoint "
                "to go back to: save earlier (checkpoint.every_steps), or lower optim.lr"
            )
        self._steps.drop()
        self._early = False  # an end that was about to be saved is undone, too
        stop.settle()
        self._take_over(saved)
        self._follow_average()
        if self._state.step != saved.step:
            self._save_renumbered(saved)
        self._c.guard.went_back(self._state.step)
        self._c.record.note("spent", step=reached, seconds=self._clock.take()[0])
        self._c.record.note("rewound", step=self._state.step, reached=reached, bad=self._c.guard.last)
        progress.advance(self._state.step)
        progress.say(
            f"loss {incident.loss:.4g} at step {incident.step} ({incident.why}): back to step {self._state.step}, "
            f"step {incident.step} will be skipped"
        )

    def _to_go_on_from(self) -> SavedState | None:
        """Return the newest checkpoint; where the guard says so and there is one, that before the one it names."""
        below = self._c.guard.below
        if below is None:
            return self._c.store.newest()
        saved = self._c.store.newest_before(below, f"after a rollback to step {below} there was another incident")
        if saved is None and self._c.comm.ranks.is_main:
            log.warning("there is no checkpoint before step %d, so the run returns to the newest one again", below)
        return saved or self._c.store.newest()

    def _take_over(self, saved: SavedState) -> None:
        c, trainer = self._c, saved.trainer
        step = c.stream.check_state(trainer["stream"])
        kept = c.refresh.take_back(trainer.get("refresh", {}), step) if c.refresh is not None else []
        c.store.load(saved, [*self._fragments(), *kept])
        if c.refresh is not None:
            c.refresh.go_on()
        c.master.optimizer_steps = trainer["optimizer_steps"]
        c.master.set_loss_scale(trainer["loss_scale"])
        c.master.refresh()
        self._state = self._state.taken_back(step, trainer["run"])
        c.guard.take_back(trainer.get("guard", {}))
        c.callbacks.load_state(trainer.get("callbacks", {}))

    def _fragments(self) -> list[Fragment]:
        averaged = self._c.ema.fragments() if self._c.ema is not None else []
        return [*self._c.master.fragments("param", *self._c.master.states), *averaged]

    def _snapshot(self, evaluation: dict[str, float]) -> Snapshot:
        """Return the run at this step, as `_take_over` takes it; `check_trainer` knows the form of its JSON."""
        c = self._c
        trainer = {
            "stream": c.stream.state(self._state.step),
            "optimizer_steps": c.master.optimizer_steps,
            "loss_scale": c.master.loss_scale(),
            "run": self._state.as_dict(),
            "guard": c.guard.state(),
            "callbacks": c.callbacks.state(),
            "refresh": c.refresh.state() if c.refresh is not None else {},
        }
        kept = c.refresh.share() if c.refresh is not None else []
        return Snapshot(self._state.step, [*self._fragments(), *kept], trainer, evaluation)

    def _save(self, evaluation: dict[str, float], replace: bool = False) -> None:
        self._steps.reduce(self._state)
        with self._clock.section("checkpoint"):
            self._c.store.save(self._snapshot(evaluation), replace)

    def _save_renumbered(self, saved: SavedState) -> None:
        """Begin the new count of steps that another global batch or other data bring, in the store too."""
        log.warning("step %d is step %d from here on (checkpoint.allow_changes)", saved.step, self._state.step)
        self._c.store.save_renumbered(self._snapshot(saved.metrics))

    def _finish_saving(self) -> None:
        with self._clock.section("checkpoint"):
            self._c.store.finish(last=True)

    def _finish_copies(self, signum: int | None, stop: StopVote) -> None:
        """Wait for the copy of the last checkpoint in an object store; not long where the run is to stop."""
        begun, told = time.monotonic(), False
        limit = min(_COPIES_AT_STOP_S, self._copies_s) if signum is not None else self._copies_s
        while True:
            with self._clock.section("checkpoint"):  # each time a sign of life
                done = self._c.store.finish_copies(_COPIES_SLICE_S)
            self._tell_of_checkpoints()
            if done:
                return
            waited = self._c.comm.max(time.monotonic() - begun)  # the same on all ranks
            if waited >= limit:
                break
            if not told:
                self._say("waiting for the copy of the last checkpoint (checkpoint.mirror)")
                told = True
            if signum is None and (signum := stop.now()) is not None:
                limit = min(limit, waited + _COPIES_AT_STOP_S)
        self._say("warning: the last checkpoint is not copied yet (checkpoint.mirror); the next start copies it")

    def _tell_of_checkpoints(self) -> None:
        for step, folder in self._c.store.committed():
            self._c.record.note("saved", step=step)
            self._c.callbacks.saved(step, folder)
        for event in self._c.store.copies():
            self._c.record.note("copied" if event.ok else "not copied", **event.as_dict())
            if event.fetched or not event.ok:
                self._say(event.text)
            log.info(event.text)
