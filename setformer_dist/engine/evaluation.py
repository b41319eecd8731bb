"""Evaluations during training: when they are due, of the weights and of their average, and what their metrics go to."""

from __future__ import annotations

import contextlib
import logging

from setformer_dist.core.metric import AVERAGED, PROBE_METRICS, headline
from setformer_dist.engine.components import Components
from setformer_dist.engine.config import EvalConfig
from setformer_dist.engine.evaluate import EvalResult, evaluate
from setformer_dist.engine.metrics import StepClock
from setformer_dist.engine.progress import RunProgress
from setformer_dist.engine.run_state import RunState
from setformer_dist.engine.stop_vote import StopVote

log = logging.getLogger(__name__)


class Evaluation:
    """Scores a run's weights on its validation split, and by a probe where there is one.

    Args:
        components: of the run.
        config: when.
        clock: takes the time of it.
        total_steps: of the run; its end has a probe too.
    """

    def __init__(self, components: Components, config: EvalConfig, clock: StepClock, total_steps: int) -> None:
        self._c = components
        self._config = config
        self._clock = clock
        self._total_steps = total_steps

    def due(self, step: int) -> bool:
        """Return whether the config wants an evaluation after so many steps; the end of the run has one always."""
        every_steps = self._config.every_steps
        every_epochs = self._config.every_epochs * self._c.stream.steps_per_epoch
        own = (every_steps > 0 and step % every_steps == 0) or (every_epochs > 0 and step % every_epochs == 0)
        return own or (self._c.probe is not None and self._c.probe.due(step))

    def out_of_patience(self, state: RunState) -> bool:
        """Return whether so many evaluations in a row were no better that the run ends early; the same on all ranks."""
        return 0 < self._config.patience <= state.since_best

    def run(self, state: RunState, stop: StopVote, progress: RunProgress) -> dict[str, float] | None:
        """Score the weights and their average; None if a signal came before the end, the same on all ranks."""
        with self._clock.section("evaluation"), progress.busy("evaluating"):
            scores = self.scores(stop)
            probed = self._probed(state.step, stop) if scores is not None else None
            if scores is None or probed is None:
                return None
            (result, _), *averaged = scores
            measured = {name: value for part, prefix in scores for name, value in part.as_dict(prefix).items()}
            measured |= probed
            metrics = self._c.task.metrics
            text = f"step {state.step}: {headline(metrics, result.figures)}"
            for part, _ in averaged:
                text += f" · averaged weights: {headline(metrics, part.figures)}"
            for metric in PROBE_METRICS:
                text += "".join(
                    f" · {metric.title} {metric.show(probed[n])}" for n in probed if n.endswith(metric.name)
                )
        state.evaluation = measured
        left_out = {"left_out": result.left_out} if result.left_out else {}
        values = {**measured, "samples": result.samples, **left_out}
        self._c.record.write("eval", state.step, values)
        self._c.callbacks.figures("on_evaluation_end", state.step, values)
        progress.say(f"{text} ({result.samples} validation samples)")
        log.info(text)
        return measured

    def scores(self, stop: StopVote) -> list[tuple[EvalResult, str]] | None:
        """Score the weights and, where there is one, their average; with what its metrics' names begin with.

        None if a signal came before the end, the same on all ranks.
        """
        result = self._score(stop)
        if result is None or self._c.ema is None:
            return None if result is None else [(result, "")]
        with self._c.ema.swapped_in():
            averaged = self._score(stop)
        return None if averaged is None else [(result, ""), (averaged, AVERAGED)]

    def _score(self, stop: StopVote) -> EvalResult | None:
        self._c.engine.eval()
        try:
            return evaluate(
                self._c.engine,
                self._c.task,
                self._c.validation,
                self._c.prepare,
                self._c.comm,
                given_up=lambda: self._given_up(stop),
                watch=self._c.watch,
                counted=self._c.comm.ranks.rank % self._c.plan.sequence == 0,
            )
        finally:
            self._c.engine.train()

    def _probed(self, step: int, stop: StopVote) -> dict[str, float] | None:
        """Return the figures of the probe, of the averaged weights where there are any; {} where none is due."""
        probe, ema = self._c.probe, self._c.ema
        if probe is None or not (probe.due(step) or step == self._total_steps):
            return {}
        self._c.engine.eval()
        try:
            with ema.swapped_in() if ema is not None else contextlib.nullcontext():
                figures = probe.run(lambda: self._given_up(stop))
        finally:
            self._c.engine.train()
        prefix = AVERAGED if ema is not None else ""
        return None if figures is None else {f"{prefix}{name}": value for name, value in figures.items()}

    def _given_up(self, stop: StopVote) -> bool:
        self._c.heartbeat.beat("evaluation")
        return stop.now() is not None
