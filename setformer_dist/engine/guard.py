"""Losses that are not finite or that spike: what is done about the optimizer step that made them.

    "stop"      the run ends with an error; the newest checkpoint is from before
    "skip"      the update is left out and the run continues; no weight has seen the bad gradient
    "rollback"  all ranks go back to the newest checkpoint, and pass over the step when they come to it again; where
                an incident returns soon after that, the weights in that checkpoint were on their way to it already, and
                they go back to one before it

Judged are the means over all ranks, which are the same on every rank, whenever they are logged and before every
checkpoint; so the ranks agree without a word, and no checkpoint holds what came of a bad step. A step that is passed
over uses up its samples and its place in the schedules, so all other steps see what they would have seen. Which steps
are passed over, and what is to be gone back to, is kept in the run's folder (`guard.json`), durably and before the
rollback: a run that is interrupted at any instant and resumed passes over the same ones, and goes back as far.

    guard.json   passed_over, skipped: steps
                 troubles: one table per bad step, with its loss, the ids of its samples, below which step a checkpoint
                 was looked for (null: the newest), and the step gone back to (null: not yet)
                 revision, sha256: how often it was written, and the digest of all the rest
    guard.copy.json   the same, so that one damaged file costs nothing; the later one that is whole counts
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch

from setformer_dist.core.comm import Collectives
from setformer_dist.core.config import readable
from setformer_dist.core.errors import CheckpointError, TrainingError
from setformer_dist.core.files import read_state, write_state
from setformer_dist.engine.config import SPIKE_NEEDS, GuardConfig
from setformer_dist.engine.protocol import Engine

log = logging.getLogger(__name__)

GUARD_FILE = "guard.json"
GUARD_COPY = "guard.copy.json"


@dataclass(frozen=True)
class Incident:
    """A bad step.

    Attributes:
        step: 0-based optimizer step.
        loss: mean over all ranks.
        why: "nonfinite" or "spike".
        action: "skip" (it has been left out already) or "rollback".
        below: the rollback goes to a checkpoint below this step, if there is one; None for the newest.
    """

    step: int
    loss: float
    why: Literal["nonfinite", "spike"]
    action: Literal["skip", "rollback"]
    below: int | None = None


class _Entry(pydantic.BaseModel):
    """A bad step in guard.json."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    step: int = pydantic.Field(ge=0)
    loss: float | None = None
    why: Literal["nonfinite", "spike"]
    action: Literal["skip", "rollback"]
    below: int | None = pydantic.Field(default=None, ge=0)
    sample_ids: list[int] = []
    back_to: int | None = pydantic.Field(default=None, ge=0)


_Step = Annotated[int, pydantic.Field(ge=0)]


class GuardFile(pydantic.BaseModel):
    """Contents of guard.json; see the module."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    revision: int = pydantic.Field(default=0, ge=0)
    passed_over: list[_Step] = []
    skipped: list[_Step] = []
    troubles: list[_Entry] = []


def read_guard(folder: Path) -> GuardFile:
    """Return what a run's guard has kept: the later of its two files that are whole; nothing where there is neither.

    Raises:
        CheckpointError: there are files, and none is whole.
    """
    whole: list[GuardFile] = []
    faults: list[str] = []
    for path in (folder / GUARD_FILE, folder / GUARD_COPY):
        try:
            value, vouched = read_state(path)
            whole.append(GuardFile.model_validate(value))
        except FileNotFoundError:
            continue
        except pydantic.ValidationError as error:
            faults.append(f"{path} is damaged: {readable(error)}")
        except (ValueError, OSError) as error:
            faults.append(f"{path} is damaged: {' '.join(str(error).split())}")
        else:
            if not vouched:
                log.warning("%s is of an earlier version and has no digest, so its content cannot be checked", path)
    if not whole and faults:
        raise CheckpointError(
            f"{'; '.join(faults)}; so the steps that this run skips are not known: restore one of the two from a "
            "copy, or remove both to have all steps judged again"
        )
    for fault in faults:
        log.warning("%s; the other copy is intact and is used", fault)
    return max(whole, key=lambda found: found.revision, default=GuardFile())


class Guard:
    """Judges losses, and remembers which steps are passed over. The same on all ranks.

    Args:
        config: what to do.
        folder: of the run.
        comm: gives all ranks what rank 0 reads.
        scaled: the loss is scaled (fp16), so that steps that are not finite are part of ordinary training.
    """

    def __init__(self, config: GuardConfig, folder: Path, comm: Collectives, scaled: bool = False) -> None:
        self._scaled = scaled
        self._config = config
        self._folder = folder
        self._comm = comm
        self._window: list[float] = []
        self._passed: set[int] = set()
        self._skipped: set[int] = set()
        self._incidents: list[dict[str, Any]] = []  # as in guard.json, oldest first
        self._revision = 0

    def load(self) -> None:
        """Read which steps earlier attempts of this run had an incident at. Collective.

        Raises:
            CheckpointError: on all ranks: both files are damaged, so it is not known which steps to pass over.
        """
        found: dict[str, Any] = {}
        if self._comm.ranks.is_main:
            try:
                found = read_guard(self._folder).model_dump()
            except CheckpointError as error:
                found = {"error": str(error)}
        found = self._comm.broadcast_json(found)
        if "error" in found:
            raise CheckpointError(found["error"])
        self._revision = found["revision"]
        self._passed = set(found["passed_over"])
        self._skipped = set(found["skipped"])
        self._incidents = list(found["troubles"])

    def forget(self) -> None:
        """Drop which steps are passed over: from here on their numbers stand for other batches. Collective."""
        if self._passed or self._skipped:
            log.warning(
                "steps %s are no longer skipped, because steps are counted differently now", sorted(self._passed)
            )
        self._passed.clear()
        self._skipped.clear()
        self._incidents.clear()
        if self._comm.ranks.is_main:
            for name in (GUARD_FILE, GUARD_COPY):
                (self._folder / name).unlink(missing_ok=True)
        self._comm.barrier()

    def passes_over(self, step: int) -> bool:
        """Return whether an optimizer step is to be left out."""
        return step in self._passed

    def judge(self, first_step: int, losses: Sequence[float]) -> Incident | None:
        """Return the first bad step of some, if there is one; take all before it into the median.

        Args:
            first_step: of `losses[0]`.
            losses: of consecutive steps, means over all ranks; NaN for a step that was passed over.

        Raises:
            TrainingError: a bad step, where the config wants the run to stop or has tolerated the most it may.
        """
        for step, loss in enumerate(losses, first_step):
            if step in self._passed or step in self._skipped:
                continue
            if self._scaled and not math.isfinite(loss):
                continue
            why = self._fault(loss)
            if why is None:
                self._window = [*self._window, loss][-self._config.window :]
                continue
            return self._incident(step, loss, why)
        return None

    def _fault(self, loss: float) -> Literal["nonfinite", "spike"] | None:
        if not math.isfinite(loss):
            return "nonfinite"
        known = self._window
        if self._config.spike and len(known) >= SPIKE_NEEDS and loss > self._config.spike * statistics.median(known):
            return "spike"
        return None

    def _incident(self, step: int, loss: float, why: Literal["nonfinite", "spike"]) -> Incident:
        repair = "lower optim.lr or optim.clip_norm, or lengthen the warm-up"
        if why == "nonfinite" and self._config.nonfinite == "stop":
            raise TrainingError(
                f"the loss is not finite at step {step}: {repair}, or skip such steps "
                '(guard.nonfinite = "skip" or "rollback"); the newest checkpoint is from before and stays'
            )
        tolerated = len(self._passed) + len(self._skipped)
        if tolerated >= self._config.limit:
            raise TrainingError(
                f"the loss is {loss:.4g} at step {step}, after {tolerated} tolerated bad steps (guard.limit): {repair}"
            )
        if why == "nonfinite" and self._config.nonfinite == "skip":
            return Incident(step, loss, why, "skip")
        return Incident(step, loss, why, "rollback", self._too_new(step))

    def _too_new(self, step: int) -> int | None:
        """Return the step of the checkpoint that an incident at a step comes from, if a rollback went there lately."""
        before = next((t for t in reversed(self._incidents) if t["back_to"] is not None), None)
        if before is None or step >= before["step"] + self._config.window:
            return None
        return int(before["back_to"])

    def remember(self, incident: Incident, sample_ids: Sequence[int] = ()) -> None:
        """Keep a bad step for this run and all its continuations; durable when this returns. Collective."""
        (self._skipped if incident.action == "skip" else self._passed).add(incident.step)
        loss = incident.loss if math.isfinite(incident.loss) else None  # JSON has no other numbers
        self._incidents.append({**asdict(incident), "loss": loss, "sample_ids": list(sample_ids), "back_to": None})
        self._write()

    @property
    def last(self) -> dict[str, Any]:
        """The last bad step, as guard.json has it."""
        return dict(self._incidents[-1])

    @property
    def below(self) -> int | None:
        """The step below which a rollback that is not complete looks for a checkpoint."""
        return self._pending["below"] if self._pending else None

    def went_back(self, step: int) -> None:
        """Complete the rollback that is not, if one is: training resumes from this step. Collective."""
        if self._pending is not None:
            self._pending["back_to"] = step
            self._write()

    @property
    def _pending(self) -> dict[str, Any] | None:
        last = self._incidents[-1] if self._incidents else None
        return last if last is not None and last["action"] == "rollback" and last["back_to"] is None else None

    def _write(self) -> None:
        self._revision += 1
        if self._comm.ranks.is_main:
            kept = {"revision": self._revision, "passed_over": sorted(self._passed), "skipped": sorted(self._skipped)}
            for name in (GUARD_FILE, GUARD_COPY):
                write_state(self._folder / name, {**kept, "troubles": self._incidents})
        self._comm.barrier()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, JSON-able."""
        return {"window": self._window}

    def take_back(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._window = list(state.get("window", []))


class Updates:
    """Whether the last optimizer step changed the weights: none with gradients that are not all finite may.

    DeepSpeed leaves such updates out by itself under every ZeRO stage and in low precision; under stage 0 in fp32 the
    gradients go straight to the optimizer, which is made to do the same here. A parameter without a gradient is not
    touched, nor are its states. Gradients are the same on all ranks by then, so all ranks decide alike.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._left_out = False
        if not (engine.zero_optimization_stage() or engine.fp16_enabled() or engine.bfloat16_enabled()):
            engine.optimizer.register_step_pre_hook(self._check)

    @property
    def left_out(self) -> bool:
        """Whether the last optimizer step was left out."""
        return self._left_out or not self._engine.was_step_applied()

    def _check(self, adam: torch.optim.Optimizer, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        parameters = [p for group in adam.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in parameters])
        self._left_out = bool(norms) and not bool(torch.stack([n.float() for n in norms]).isfinite().all())
        if self._left_out:
            for p in parameters:
                p.grad = None
