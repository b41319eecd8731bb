"""`setformer ckpt prune`: delete the checkpoints that retention does not keep."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rich.console import Console

from checkpoints import layout
from checkpoints.commit import delete_checkpoint
from checkpoints.config import CheckpointConfig
from checkpoints.policy import steps_to_delete
from checkpoints.reader import candidates, checkpoints_folder, list_checkpoints, open_checkpoint
from launch.ranks.lock import held_by_tool
from setformer_dist.core import config as base
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import read_state


def prune(path: Path, changes: dict[str, int], dry_run: bool, console: Console) -> None:
    """Delete what retention lets go, now.

    The newest checkpoint that verifies, all its bytes read, stays in any case, and so does what is newer than it.

    Args:
        path: a run's folder or its checkpoints folder.
        changes: to the run's own keep_last, keep_every and keep_best.
        dry_run: only say what would go.
        console: where to.

    Raises:
        CheckpointError: there is none that verifies, and nothing is deleted.
        LaunchError: a run trains in the folder, and does this itself.
    """
    root = checkpoints_folder(path)
    with contextlib.nullcontext() if dry_run or not root.is_dir() else held_by_tool(root):
        _prune(root, path, changes, dry_run, console)


def _prune(root: Path, path: Path, changes: dict[str, int], dry_run: bool, console: Console) -> None:
    config = base.build(CheckpointConfig, {**retention_of(root.parent), **changes}, str(path))
    anchor = open_checkpoint(root)
    entries = list_checkpoints(root)
    going = steps_to_delete(candidates(entries), anchor.step, config)
    for step in going:
        folder = layout.step_folder(root, step)
        if not dry_run:
            delete_checkpoint(folder)
        console.print(f"{'would delete' if dry_run else 'deleted'} {folder}", highlight=False, markup=False)
    console.print(
        f"{len(entries) - len(going)} stay, the newest that verifies is step {anchor.step}",
        highlight=False,
        markup=False,
    )


def retention_of(run_folder: Path) -> dict[str, object]:
    """Return the table [checkpoint] of a run's config; {} where the folder has none.

    Raises:
        ConfigError: config.json is damaged.
    """
    path = run_folder / "config.json"
    if not os.path.lexists(path):
        return {}
    try:
        table = read_state(path)[0].get("checkpoint")
        if not isinstance(table, dict):
            raise ValueError("has no table [checkpoint]")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): name --keep-last and the folder of checkpoints") from None
    return table
