"""`setformer sweep promote`: a trial of a sweep becomes a run of its own, outside Ray, on any number of ranks.

The new run repeats the trial's, as `setformer train --from` does: with its config and seed, and with the same care for
what its files name outside. It begins at the trial's newest checkpoint, with optimizer, position in the data and
averages, or from the start.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from checkpoints.reader import open_checkpoint
from launch.run.config import RunConfig
from launch.run.repeat import Repetition, check_trusted, repetition
from launch.sweep.journal import read_events
from launch.sweep.page import Sweep, read_sweep
from launch.sweep.state import Trial, book_of
from launch.sweep.trial import TRIAL, hand_over
from setformer_dist.core import config as base
from setformer_dist.core.errors import CheckpointError, ConfigError, DataError
from setformer_dist.core.words import counted
from setformer_dist.engine.config import ScheduleConfig

OUT = "runs"


def promoted(
    folder: Path, best: int, from_start: bool, overrides: Sequence[str], trust: bool
) -> tuple[Repetition, Path | None]:
    """Return the run that repeats a winner, and the run whose checkpoint it is to take over; None for none.

    Args:
        folder: of the sweep.
        best: which of its complete trials, 1 for the best one.
        from_start: train from the first step.
        overrides: of the new run.
        trust: use the modules, commands and addresses that the trial's files name.

    Raises:
        DataError: there is no such trial.
        ConfigError: an override is bad, the checkpoint has nothing left to do, or something is not trusted.
    """
    sweep = read_sweep(folder)
    trial = _ranked(sweep, folder, best)
    source = sweep.run_folder(trial.number, 0)
    name, out = f"run.name={folder.resolve().name}-trial-{trial.number}", f"run.out={OUT}"
    repeated = repetition(source, [name, out, "run.threads=0", *overrides])
    if not trust:
        check_trusted(repeated, overrides, [], None)
    config = repeated.config
    if from_start or (config.folder / "checkpoints").exists():  # then it goes on by itself
        return repeated, None
    if repair := missing_change(config, base.load(RunConfig, source / TRIAL), _since_best(source)):
        raise ConfigError(
            f"trial {trial.number} has ended, so its checkpoint has nothing left to do: give {repair}, or --from-start"
        )
    return repeated, source


def missing_change(config: RunConfig, was: RunConfig, since_best: int) -> str:
    """Return what must change for a run to train on from the last checkpoint of a trial; "" where nothing must.

    Args:
        config: of the run.
        was: of the trial.
        since_best: evaluations of the trial since its best one.
    """
    if 0 < config.eval.patience <= since_best:
        return f"a larger eval.patience, as {counted(since_best, 'evaluation')} in a row were no better"
    ended_early = 0 < was.eval.patience <= since_best
    if ended_early or _longer(config.schedule, was.schedule):
        return ""
    return "a longer schedule, such as schedule.epochs=300"


def _since_best(trial: Path) -> int:
    try:
        return int(open_checkpoint(trial).trainer["run"].get("since_best", 0))
    except CheckpointError:  # `take_over` says so
        return 0


def _longer(ours: ScheduleConfig, theirs: ScheduleConfig) -> bool:
    """Return whether a schedule has more steps; of one in epochs and one in steps, whether it is another."""
    for mine, other in ((ours.epochs, theirs.epochs), (ours.steps, theirs.steps)):
        if mine is not None and other is not None:
            return mine > other
    return ours != theirs


def _ranked(sweep: Sweep, folder: Path, best: int) -> Trial:
    ranked = book_of(sweep, read_events(folder)).ranked()
    if not 1 <= best <= len(ranked):
        raise DataError(f"--best {best}: the sweep in {folder} has {counted(len(ranked), 'complete trial')}")
    return ranked[best - 1]


def take_over(source: Path, config: RunConfig) -> int:
    """Put a trial's newest checkpoint where the new run resumes from; return its step.

    Raises:
        ConfigError: the new run's folder holds something.
        DataError: the trial has no checkpoint.
    """
    if config.folder.exists() and any(config.folder.iterdir()):
        raise ConfigError(f"{config.folder} is not empty: give the run another name with run.name=NAME")
    step = hand_over(source, config.folder)
    if step is None:
        shutil.rmtree(config.folder, ignore_errors=True)
        raise DataError(f"{source} has no checkpoint: use --from-start")
    return step
