"""The teacher of a run: a trained checkpoint or an exported model, whose weights are part of what the run is.

Its folder may lie anywhere and move; a digest of its weights is in the run's checkpoints, and a run continues with the
same weights or not at all. Nothing in a checkpoint names a teacher that is opened: the run's config does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from torch import nn

from dataloaders.config import DataConfig
from launch.run.config import ResolvedRun
from launch.run.exported import load_named
from launch.run.inputs import check_shapes
from launch.run.trained import Trained
from setformer_dist.core.comm import Collectives
from setformer_dist.core.errors import CheckpointError, ConfigError, LaunchError
from setformer_dist.core.task import Counted, Prepare, Task
from setformer_dist.engine.deepspeed_engine import DTYPES
from setformer_dist.tasks.distilled import Distilled, TeachingPrepare

log = logging.getLogger(__name__)

KEY = "teacher"  # in trainer.json


def teacher_of(run: ResolvedRun, task: Task, input_spec: dict[str, object]) -> Trained | None:
    """Return the trained model that a run learns from, None where it learns from none.

    Args:
        run: whose config may name it.
        task: of the run.
        input_spec: of the run's model.

    Raises:
        CheckpointError: nothing there verifies, or it is neither a trained run nor an exported model.
        ConfigError: it does not fit the run.
    """
    config = run.config.distill
    if not config.teacher:
        return None
    if isinstance(task, Counted):
        raise ConfigError(
            f"distill.teacher: task {task.name} has a loss of a sum and a count, which cannot be mixed with a "
            "teacher's: remove distill"
        )
    trained = load_named(Path(config.teacher), config.weights)
    _check_fits(run, task, input_spec, trained)
    return trained


def _check_fits(run: ResolvedRun, task: Task, input_spec: dict[str, object], teacher: Trained) -> None:
    """Refuse a teacher that would see other inputs than it was trained with, or whose outputs mean something else.

    Raises:
        ConfigError: naming what differs.
    """
    place, ours, theirs = run.config.distill.teacher, run.config.data, teacher.config.data
    same = teacher.task.outputs == task.outputs if teacher.named else len(teacher.classes) == len(task.outputs)
    if not same or teacher.task.exclusive != task.exclusive:
        raise ConfigError(
            f"distill.teacher = {place!r} was trained for other outputs ({', '.join(teacher.task.outputs[:4])} …) than "
            f"this run has ({', '.join(task.outputs[:4])} …): take a teacher of the same classes in the same order"
        )
    seen = teacher.inputs
    names = ("kind", "mean", "std")
    pairs = [(name, getattr(theirs, name, None), getattr(ours, name, None)) for name in names]
    pairs += [(name, seen.get(name), input_spec.get(name)) for name in sorted({*seen, *input_spec})]
    for name, a, b in pairs:
        if a != b:
            raise ConfigError(
                f"distill.teacher = {place!r} was trained with data.{name} = {a!r}, and this run has {b!r}: both see "
                "the same inputs, so set it alike or take another teacher"
            )
    if isinstance(ours, DataConfig):
        check_shapes(teacher.model, teacher.config.model.name, ours)


def digest_of(teacher: Trained) -> str:
    """Return what a teacher is, wherever it lies and however it was sharded: its weights and its model's config."""
    found = hashlib.sha256(json.dumps(teacher.config.model.model_dump(mode="json"), sort_keys=True).encode())
    for name, parameter in sorted(teacher.model.state_dict().items()):
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_one_teacher(digest: str, comm: Collectives) -> None:
    """Check that all ranks have read the same teacher. Collective.

    Raises:
        LaunchError: naming the ranks that have not.
    """
    views = comm.gather_json({"digest": digest})
    odd = [rank for rank, view in enumerate(views) if view != views[0]]
    if odd:
        raise LaunchError(
            f"ranks {', '.join(map(str, odd))} have another teacher than rank 0: every host must see the same "
            "checkpoint at distill.teacher"
        )


def with_teacher(
    run: ResolvedRun,
    task: Task,
    prepare: Prepare,
    input_spec: dict[str, object],
    device: torch.device,
    comm: Collectives,
) -> tuple[Task, Prepare, str | None]:
    """Return task and input preparation with the teacher's part in them, and the teacher's digest. Collective.

    Without a teacher in the config both stay as they are, and the digest is None.

    Raises:
        SetformerError: as `teacher_of` and `check_one_teacher`.
    """
    teacher = teacher_of(run, task, input_spec)
    if teacher is None:
        return task, prepare, None
    if not teacher.named and comm.ranks.is_main:
        log.warning(
            "teacher %s names no classes: its outputs are taken for the classes of the data, in their order",
            teacher.place,
        )
    digest = digest_of(teacher)
    check_one_teacher(digest, comm)
    return *distilled(run, task, prepare, teacher, device), digest


def distilled(
    run: ResolvedRun, task: Task, prepare: Prepare, teacher: Trained, device: torch.device
) -> tuple[Task, Prepare]:
    """Return a run's task and prepare with the teacher in them; it is whole on every rank, in the compute dtype."""
    config, dtype = run.config.distill, DTYPES[run.config.precision.dtype]
    model: nn.Module = teacher.model.eval().requires_grad_(False)
    taught = TeachingPrepare(prepare, model.to(device=device, dtype=dtype))
    return Distilled(task, config.share, config.temperature), taught


def check_same_teacher(trainer: dict[str, object], mine: str | None, place: Path) -> None:
    """Refuse a checkpoint that was trained with another teacher.

    Raises:
        CheckpointError: with what differs.
    """
    theirs = trainer.get(KEY)
    if theirs == mine:
        return
    there, here = ("no teacher" if digest is None else f"teacher {str(digest)[:12]}" for digest in (theirs, mine))
    raise CheckpointError(
        f"{place} was trained with {there}, and this run has {here} (distill.teacher, by a digest of its weights): put "
        "the same one back, or give this run another run.name"
    )
