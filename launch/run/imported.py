"""How a run resumes from a checkpoint that `setformer ckpt import` has put into its folder.

DeepSpeed's directory holds weights and, from stage 1 on, Adam's states by name; it knows neither our order of samples
nor our averages. What is not in it begins where it must: the samples as if the steps so far had been trained by this
config, the average from the weights, and a fresh optimizer where Adam's states have no names (stage 0) or the run has
another optimizer. All of it is said in one line, and the next checkpoint is an ordinary one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable

from checkpoints.identity import Identity
from checkpoints.reader import Checkpoint
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.engine.run_state import Best, RunState

log = logging.getLogger(__name__)

KEY = "imported"
_ADAM_STATES = ("exp_avg", "exp_avg_sq")
# Optimizers of ours to which those states mean the same.
ADAMS = ("adamw", "adam")


def is_imported(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint came from another program and no run has written it."""
    return KEY in checkpoint.trainer


def trainer_state(
    checkpoint: Checkpoint,
    mine: Identity,
    cursor_at: Callable[[int], dict[str, object]],
    total_steps: int,
    says: bool,
    optimizer: str = "adamw",
) -> dict[str, object]:
    """Return trainer.json as a run of this config would have written it after as many steps.

    Args:
        checkpoint: an imported one.
        mine: identity of the run that is to continue.
        cursor_at: the stream's cursor after a number of steps.
        total_steps: length of the run.
        says: log what continues and what starts fresh.
        optimizer: the run's optim.name.

    Raises:
        CheckpointError: it is of another model, or the run is not longer than the steps done.
    """
    if checkpoint.identity.model not in (KEY, mine.model):  # the first: its model was not named
        raise CheckpointError(
            f"{checkpoint.path} was imported as {checkpoint.identity.model}, and this config has model.name = "
            f"{mine.model!r}: set it, or import the checkpoint again with another --model"
        )
    if checkpoint.identity.parameters != mine.parameters:
        raise CheckpointError(
            f"{checkpoint.path} was imported from another model than {mine.model} of this config: names or shapes of "
            "its parameters differ; set model.name, model.args and the data's classes to those it was trained with"
        )
    if checkpoint.step >= total_steps:
        raise CheckpointError(
            f"{checkpoint.path} was imported after {checkpoint.step} steps, and this run has {total_steps}: lengthen "
            "schedule.steps or schedule.epochs"
        )
    adam = optimizer in ADAMS and set(_ADAM_STATES) <= set(checkpoint.states())
    if says:
        source = checkpoint.trainer[KEY]
        log.warning(
            "step %d was imported from DeepSpeed (ZeRO stage %s, %s ranks): %s; samples continue as if this config had "
            "trained these steps, the average of the weights begins with them",
            checkpoint.step,
            source.get("stage"),
            source.get("ranks"),
            "weights and Adam's states continue" if adam else "the weights continue, the optimizer starts fresh",
        )
    fresh = RunState(step=checkpoint.step, best=Best("", "max")).as_dict()
    return {
        **checkpoint.trainer,
        "stream": cursor_at(checkpoint.step),
        "optimizer_steps": checkpoint.trainer["optimizer_steps"] if adam else 0,
        "run": fresh,
    }


def loadable(checkpoint: Checkpoint, fragments: Iterable[Fragment], optimizer: str = "adamw") -> list[Fragment]:
    """Return the fragments that the checkpoint fills: averages from the weights. What it lacks begins with zeros.

    The zeros are written, for a rollback of the guard comes here with states that have been trained.
    """
    there = set(checkpoint.states()) - set(() if optimizer in ADAMS else _ADAM_STATES)
    as_held = [dataclasses.replace(f, state="param") if f.state == "ema" else f for f in fragments]
    for fragment in as_held:
        if fragment.state not in there:
            fragment.tensor.detach().zero_()
    return [f for f in as_held if f.state in there]
