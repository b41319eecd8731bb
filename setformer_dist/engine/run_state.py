"""What changes while a run is under way, and what trainer.json holds of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pydantic

from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.metric import Mode

# As `MasterState.loss_scale` has it; earlier versions wrote null for what a static scaler lacks.
_LOSS_SCALE: pydantic.TypeAdapter[dict[str, float | None]] = pydantic.TypeAdapter(dict[str, float | None])


class _Pending(pydantic.BaseModel):
    step: int
    rows: dict[str, int]


class _Refresh(pydantic.BaseModel):
    """What `Refresh.state` returns."""

    rows: dict[str, int] = {}
    pending: _Pending | None = None


def check_within(step: int, total_steps: int, path: Path) -> None:
    """Check that a run whose schedule has changed does not end before its checkpoint.

    Args:
        step: of the checkpoint, as this run counts.
        total_steps: of the run.
        path: of the checkpoint.

    Raises:
        CheckpointError: it does.
    """
    if step > total_steps:
        raise CheckpointError(
            f"{path} is at step {step:,}, and the run now ends at step {total_steps:,}: make schedule.epochs or "
            "schedule.steps larger, or give the shorter run another run.name"
        )


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
    """What changes while a run is under way; `as_dict` is what trainer.json holds of it.

    `seconds` is the wall time of the run over all its interruptions; `train_seconds` of that, spent on
    `train_steps` logged steps without evaluation and checkpoints. `pending_losses` are those of the steps since the
    last line of metrics, means over all ranks; `evaluation_owed` says that a stop came before the evaluation that
    was due at this step. So a resumed run writes the lines that an uninterrupted one writes. `since_best` counts
    the evaluations since the one that gave `best`.
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
    since_best: int = 0

    def as_dict(self) -> dict[str, object]:
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
            "since_best": self.since_best,
        }

    def taken_back(self, step: int, run: dict[str, Any]) -> RunState:
        """Return the state that `as_dict` was saved of.

        Args:
            step: optimizer steps done, as this run counts them.
            run: what was saved; the best value counts if it is of this run's metric.
        """
        best, was = self.best, run["best"]
        if was["metric"] != best.metric:
            return RunState(step, **{**run, "best": best, "since_best": 0})
        return RunState(step, **{**run, "best": Best(best.metric, best.mode, was["value"], was["step"])})

    def take_best(self, measured: dict[str, float], due: bool) -> bool:
        """Note an evaluation's value of the watched metric if it is the best so far; return whether it is.

        Args:
            measured: by the evaluation; empty for none.
            due: whether the config wants the evaluation at this step. Others, as at an early end, are not counted: a
                run that goes on must count as one that did not end.
        """
        value = measured.get(self.best.metric)
        if value is None:
            return False
        if not self.best.improved_by(value):
            self.since_best += due
            return False
        self.best, self.since_best = Best(self.best.metric, self.best.mode, value, self.step), 0
        return True


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.run` ended.

    Attributes:
        state: the run's state at the end.
        signum: the signal that stopped it, or None when it ran to its end or ended early (a callback, eval.patience).
        images_per_s: mean over the run's training steps, without evaluation and checkpoints.
    """

    state: RunState
    signum: int | None
    images_per_s: float


def check_trainer(trainer: dict[str, Any], place: Path) -> None:
    """Check what a checkpoint holds for `Trainer`, before any of it is taken over.

    Args:
        trainer: contents of trainer.json.
        place: of the checkpoint, for the error.

    Raises:
        CheckpointError: something is missing, unknown, or of another kind; as in a checkpoint that no run wrote.
    """
    try:
        _check_run(dict(trainer["run"]))
        for key, kind in {"stream": dict, "optimizer_steps": int, "loss_scale": dict}.items():
            if type(trainer[key]) is not kind:
                raise ValueError(f"{key} is no {kind.__name__}")
        window = trainer.get("guard", {}).get("window", [])
        pydantic.TypeAdapter(list[float]).validate_json(json.dumps(window), strict=True)
        _Refresh.model_validate_json(json.dumps(trainer.get("refresh", {})), strict=True)
        for name, state in trainer.get("callbacks", {}).items():
            if not isinstance(state, dict):
                raise ValueError(f"callbacks.{name} is no object")
        _LOSS_SCALE.validate_json(json.dumps(trainer["loss_scale"]), strict=True)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # pydantic's are ValueErrors
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error).replace("\n", " ")
        raise CheckpointError(
            f"a run cannot resume from {place} (trainer.json: {what}): only what a run of this program saved can be "
            "resumed"
        ) from None


def _check_run(run: dict[str, Any]) -> None:
    unknown = run.keys() - {field.name for field in fields(RunState)} | run.keys() & {"step"}
    if unknown:
        raise ValueError(f"run.{min(unknown)} is unknown")
    best = {"mode": "max", **{key: run["best"][key] for key in ("metric", "value", "step")}}
    pydantic.TypeAdapter(RunState).validate_json(json.dumps({**run, "step": 0, "best": best}), strict=True)
