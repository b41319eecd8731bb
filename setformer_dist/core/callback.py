"""Events of a training run, and the base class of callbacks: loggers, and those of users.

Each event is a method. A run calls them in this order, on every callback in turn:

    on_run_start                 once per start of the program, also where it resumes
      on_step_end                after each optimizer step
      on_refresh                 reference sets were set by K-means ([refresh])
      on_bad_step                a loss that is not finite, or a loss spike, with the response to it ([guard])
      on_metrics                 every run.log_every steps
      on_evaluation_end          after each evaluation
      on_checkpoint_saved        when a checkpoint is durable: with asynchronous saving, some steps after its own
    on_run_end                   the last step is done and saved, or a signal or a callback ended the run before
    on_exception                 an error ends the run; called instead of on_run_end

A resumed run continues with the first step after its checkpoint. Events of earlier steps do not come again. Steps that
were lost, after a crash or by a rollback, are computed again, and so are their events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Event = Literal[
    "on_run_start",
    "on_step_end",
    "on_bad_step",
    "on_metrics",
    "on_refresh",
    "on_evaluation_end",
    "on_checkpoint_saved",
    "on_run_end",
    "on_exception",
]


@dataclass(frozen=True)
class RunStart:
    """The start of a run, as a callback receives it.

    Attributes:
        folder: of the run; a callback may write files there.
        config: the whole config, as config.json has it: no secrets of URLs.
        step: optimizer steps done: 0, or those of the checkpoint that the run resumes from.
        total_steps: at the end of the run.
        resumed_from: that checkpoint's folder; None where the run begins.
    """

    folder: Path
    config: Mapping[str, Any]
    step: int
    total_steps: int
    resumed_from: Path | None


@dataclass(frozen=True)
class RunEnd:
    """The end of a run without an error.

    Attributes:
        step: optimizer steps done.
        signum: the signal that stopped it; None where the last step is done, or a callback ended the run before it.
        evaluation: metrics of the last evaluation.
    """

    step: int
    signum: int | None
    evaluation: Mapping[str, float]


class Callback:
    """Receives the events of a run; a subclass overrides the methods that it needs.

    A callback receives metrics and paths, not the model or the data, and the run waits while it works. An exception in
    it ends the run, with its name in the message. If `essential` is false, an exception is a warning instead, and the
    callback receives no further events of this run.

    Attributes:
        name: unique in a run; messages name it, and it is the key of the state.
        essential: whether an exception in this callback ends the run.
        every_rank: whether every rank calls it. Otherwise only rank 0 does, and it must not wait for other ranks.
        should_stop: set it to true, on any rank and in any event, to end the run early. It ends on all ranks at the
            same step, as at its last one: with an evaluation, a checkpoint and exit code 0. It takes
            effect at this step if an evaluation is due there, otherwise one step later.
    """

    name: str = ""
    essential: bool = True
    every_rank: bool = False
    should_stop: bool = False

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name") or cls.__name__

    def on_run_start(self, run: RunStart) -> None:
        """Handle the start or the resume of a run; its folder exists."""

    def on_step_end(self, step: int) -> None:
        """Handle the end of an optimizer step; `step` are done. No metrics, so that no rank waits for its device."""

    def on_bad_step(self, step: int, values: Mapping[str, Any]) -> None:
        """Handle a bad step (0-based), with its line of kind "guard" in metrics.jsonl."""

    def on_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Handle the metrics of the steps since the last call, means over all ranks: kind "train" in metrics.jsonl."""

    def on_refresh(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Handle a refresh of the reference sets, after `step` steps: kind "refresh" in metrics.jsonl."""

    def on_evaluation_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Handle the metrics of an evaluation: kind "eval" in metrics.jsonl."""

    def on_checkpoint_saved(self, step: int, folder: Path) -> None:
        """Handle a checkpoint that is complete on disk. Only rank 0 knows, so only its callbacks are called.

        Retention ([checkpoint]) may delete it later: copy what you want to keep.
        """

    def on_run_end(self, end: RunEnd) -> None:
        """Handle the end or the stop of the run; everything is saved."""

    def on_exception(self, error: BaseException) -> None:
        """Handle the error that ends the run. Exceptions in here are only logged."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON; rank 0's state is saved in each checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, on resume and after a rollback; called before `on_run_start`."""


def scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested metrics, named by their path: ("seconds/data", 0.5)."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)
