"""`setformer sweep promote`: a trial of a sweep becomes a run of its own, outside Ray, on any number of ranks.

The new run has the trial's config and seed. It begins at the trial's newest checkpoint, with optimizer, position in the
data and averages, or from the start.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from launch.run.config import RunConfig
from launch.sweep.journal import read_events
from launch.sweep.page import Sweep, read_sweep
from launch.sweep.state import COMPLETE, Trial, book_of
from launch.sweep.trial import TRIAL, hand_over
from setformer_dist.core import config as base
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.words import counted

OUT = "runs"


def promoted(
    folder: Path, best: int, from_start: bool, overrides: Sequence[str]
) -> tuple[Path, list[str], RunConfig, Path | None]:
    """Return what `setformer train` is to run for a winner.

    Args:
        folder: of the sweep.
        best: which of its complete trials, 1 for the best one.
        from_start: train from the first step.
        overrides: of the new run.

    Returns:
        Path of the config, overrides, the config, and the run whose checkpoint is to be taken over; None for the start.

    Raises:
        DataError: there is no such trial.
        ConfigError: an override is bad, or the checkpoint has nothing left to do.
    """
    sweep = read_sweep(folder)
    trial = _ranked(sweep, folder, best)
    source = sweep.run_folder(trial.number, 0)
    path = source / TRIAL
    if not path.is_file():
        raise DataError(f"{path} is missing: trial {trial.number} cannot be promoted without it")
    own = [f"run.name={folder.name}-trial-{trial.number}", f"run.out={OUT}", "run.threads=0", *overrides]
    config = base.load(RunConfig, path, own)
    if (config.folder / "checkpoints").exists() or from_start:
        return path, own, config, None  # it goes on by itself, or begins
    if trial.state == COMPLETE and config.schedule == base.load(RunConfig, path).schedule:
        raise ConfigError(
            f"trial {trial.number} has done all its steps, so its checkpoint has nothing left to do: give another "
            "schedule, such as schedule.epochs=300, or --from-start"
        )
    return path, own, config, source


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
