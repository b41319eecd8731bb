"""`setformer ckpt ls` and `show`: the checkpoints of a run as a table, and one of them in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.manifest import Manifest
from checkpoints.policy import best_first
from checkpoints.reader import Checkpoint, Entry, candidates, checkpoints_folder, list_checkpoints, open_checkpoint
from launch.ckpt.prune import retention_of
from launch.shown import cell
from setformer_dist.core import config as base
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.metric import is_of_class
from setformer_dist.core.terminal import open_table
from setformer_dist.core.words import counted


def list_folder(folder: Path, verify: bool, console: Console, as_json: bool = False) -> int:
    """Print the table; return how many checkpoints do not verify.

    Args:
        folder: a run's folder or its checkpoints folder.
        verify: hash every file instead of comparing sizes.
        console: where to.
        as_json: print a JSON list instead.

    Raises:
        CheckpointError: there is no checkpoint there.
    """
    root = checkpoints_folder(folder)
    entries = list_checkpoints(root, hashes=verify) if root.is_dir() else []
    if not entries:
        raise CheckpointError(f"{folder} holds no checkpoints: name a run's folder, such as runs/demo")
    faulty = sum(entry.fault is not None for entry in entries)
    best = _best_of(root, entries)
    if as_json:
        lines = [{**line_of(str(e.path), e.manifest, e.fault), "best": e is best} for e in entries]
        print(json.dumps(lines, indent=2))
        return faulty
    table = table_of_checkpoints()
    for entry in entries:
        row_of(table, entry.path.name, entry.manifest, entry.fault, verify, entry is best)
    console.print(table)
    if aside := layout.put_aside(root):
        console.print(f"{len(aside)} that did not verify at a resume: {root / layout.ASIDE}", markup=False)
    return faulty


def _best_of(root: Path, entries: list[Entry]) -> Entry | None:
    """Return the best sound checkpoint, which `--best` takes: by `checkpoint.best_metric` of the newest one's run."""
    sound = [entry for entry in entries if entry.fault is None]
    try:
        config = base.build(CheckpointConfig, _retention(root, sound), str(root.parent))
    except ConfigError:  # a damaged config.json hides no checkpoint
        return None
    ranked = best_first(candidates(sound), config)
    return next((e for e in sound if ranked and e.manifest is not None and e.manifest.step == ranked[0].step), None)


def _retention(root: Path, sound: list[Entry]) -> dict[str, object]:
    """Return the table [checkpoint] that the newest sound checkpoint holds, else that of config.json beside them."""
    for path, manifest in ((entry.path, entry.manifest) for entry in sound if entry.manifest is not None):
        try:
            config = Checkpoint(path, manifest, {}).trainer.get("config")
        except CheckpointError:
            continue
        table = config.get("checkpoint") if isinstance(config, dict) else None
        return table if isinstance(table, dict) else retention_of(root.parent)
    return {}


def table_of_checkpoints() -> Table:
    """Return a table for `row_of`."""
    return open_table("step", "written", "ranks", "ZeRO", "MiB", "metrics", "state")


def row_of(
    table: Table, name: str, manifest: Manifest | None, fault: str | None, verified: bool, best: bool = False
) -> None:
    """Add the row of a checkpoint, or of the copy of one, to a table."""
    if manifest is None:
        table.add_row(cell(name), "", "", "", "", "", cell(fault, "red"))
        return
    state = cell("verified", "green") if verified else cell("complete")
    # Figures of single classes, of which there may be hundreds, are shown by `ckpt show` and --json.
    shown = sorted((name, value) for name, value in manifest.metrics.items() if not is_of_class(name))
    metrics = " ".join(f"{name} {value:.4f}" for name, value in shown)
    table.add_row(
        str(manifest.step),
        cell(manifest.created),
        str(manifest.identity.world_size),
        str(manifest.identity.stage),
        f"{manifest.size / 2**20:.1f}",
        cell(metrics),
        cell(fault, "red") if fault else state.append(", best") if best else state,
    )


def line_of(path: str, manifest: Manifest | None, fault: str | None) -> dict[str, Any]:
    """Return the same as JSON."""
    about = {}
    if manifest is not None:
        about = {
            "step": manifest.step,
            "created": manifest.created,
            "ranks": manifest.identity.world_size,
            "stage": manifest.identity.stage,
            "bytes": manifest.size,
            "metrics": manifest.to_json()["metrics"],
            "tags": list(manifest.tags),
        }
    return {"path": path, "fault": fault, **about}


def show(path: Path, console: Console, as_json: bool = False) -> None:
    """Print all that a checkpoint says about itself, after verifying it.

    Raises:
        CheckpointError: nothing there verifies.
    """
    checkpoint = open_checkpoint(path)
    shapes, states = checkpoint.parameters(), checkpoint.states()
    manifest = checkpoint.manifest
    value: dict[str, Any] = {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "created": manifest.created,
        "identity": checkpoint.identity.model_dump(),
        "bytes": manifest.size,
        "files": {record.name: record.digest for record in manifest.files},
        "metrics": manifest.to_json()["metrics"],
        "tags": list(manifest.tags),
        "parameters": len(shapes),
        "elements": states,
        "trainer": {key: part for key, part in checkpoint.trainer.items() if key not in ("config", "classes")},
    }
    if as_json:
        print(json.dumps(value, indent=2))
        return
    table = open_table("", "", show_header=False, box=None)
    for key in ("path", "step", "created", "tags"):
        table.add_row(key, cell(value[key] or "none"))
    identity = checkpoint.identity
    table.add_row("model", cell(f"{identity.model} {identity.model_args}"))
    table.add_row(
        "written by", cell(f"{counted(identity.world_size, 'rank')}, ZeRO stage {identity.stage}, {identity.versions}")
    )
    table.add_row("size", f"{manifest.size / 2**20:.1f} MiB in {counted(len(manifest.files), 'file')}, verified")
    table.add_row("parameters", f"{len(shapes)} of {states.get('param', 0):,} elements")
    table.add_row("states", cell(", ".join(f"{state} {count:,}" for state, count in states.items())))
    table.add_row("metrics", cell(", ".join(f"{k} {v:.4f}" for k, v in sorted(manifest.metrics.items())) or "none"))
    for key, part in value["trainer"].items():
        table.add_row(cell(key), cell(json.dumps(part)[:200]))
    console.print(table, highlight=False)
