"""Events of a training run, and the base class of what hears them: loggers, and a user's own callbacks.

Each event is a method. A run calls them in this order, on every callback in turn:

    on_run_start                 once per start of the program, also where it resumes
      on_step_end                after each optimizer step
      on_bad_step                a loss that is not finite, or a loss spike, and what is done about the step ([guard])
      on_metrics                 every run.log_every steps
      on_evaluation_end          after each evaluation
      on_checkpoint_saved        when a checkpoint is durable: with asynchronous saving, some steps after its own
    on_run_end                   the last step is done and saved, or a signal or a callback ended the run before
    on_exception                 in place of on_run_end, where an error ends the run

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
    "on_evaluation_end",
    "on_checkpoint_saved",
    "on_run_end",
    "on_exception",
]


@dataclass(frozen=True)
class RunStart:
    """What a callback learns first.

    Attributes:
        folder: of the run; files of a callback may lie there.
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
    """How a run ended that ended well.

    Attributes:
        step: optimizer steps done.
        signum: the signal that stopped it; None where the last step is done, or a callback ended the run before it.
        evaluation: metrics of the last evaluation.
    """

    step: int
    signum: int | None
    evaluation: Mapping[str, float]


class Callback:
    """Hears the events of a run; a subclass overrides those that it needs.

    A callback looks on: it sees figures and paths, not the model or the data, and the run waits while it works. An
    exception in it ends the run, with its name in the message. Where `essential` is false, the exception costs a
    warning, and the callback hears no more of this run.

    Attributes:
        name: unique in a run; stands in messages and keys the state.
        essential: whether an exception in this callback ends the run.
        every_rank: whether every rank calls it. Otherwise rank 0 alone does, and it must not wait for other ranks.
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
        """Hear that the run begins or resumes; its folder is there."""

    def on_step_end(self, step: int) -> None:
        """Hear that so many optimizer steps are done. Nothing is measured, so that no rank waits for its device."""

    def on_bad_step(self, step: int, values: Mapping[str, Any]) -> None:
        """Hear of a bad step (0-based), with what metrics.jsonl says of it under kind "guard"."""

    def on_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hear the figures of the steps since the last call, means over all ranks: kind "train" in metrics.jsonl."""

    def on_evaluation_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hear the figures of an evaluation: kind "eval" in metrics.jsonl."""

    def on_checkpoint_saved(self, step: int, folder: Path) -> None:
        """Hear that a checkpoint is complete on disk. Rank 0 alone knows, so only its callbacks hear it.

        Retention ([checkpoint]) may delete it later: copy what is to be kept.
        """

    def on_run_end(self, end: RunEnd) -> None:
        """Hear that the run ended or was stopped; everything is saved."""

    def on_exception(self, error: BaseException) -> None:
        """Hear of the error that ends the run. Exceptions in here are logged, and nothing else."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON; rank 0's is saved in each checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned, on resume and after a rollback; before `on_run_start`."""


def scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested figures, named by their path: ("seconds/data", 0.5)."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)
