"""`setformer ckpt ls`: the checkpoints of a run as a table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoints.reader import list_checkpoints
from setformer_dist.core.errors import CheckpointError


def list_folder(folder: Path, verify: bool, console: Console) -> int:
    """Print the table; return how many checkpoints do not verify.

    Args:
        folder: a run's folder or its checkpoints folder.
        verify: hash every file instead of comparing sizes.
        console: where to.

    Raises:
        CheckpointError: there is no checkpoint there.
    """
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    entries = list_checkpoints(root, hashes=verify) if root.is_dir() else []
    if not entries:
        raise CheckpointError(f"{folder} holds no checkpoints: name a run's folder, such as runs/demo")
    table = Table("step", "written", "ranks", "ZeRO", "MiB", "metrics", "state")
    for entry in entries:
        manifest = entry.manifest
        if manifest is None:
            table.add_row(entry.path.name, "", "", "", "", "", f"[red]{entry.fault}")
            continue
        metrics = " ".join(f"{name} {value:.4f}" for name, value in sorted(manifest.metrics.items()))
        table.add_row(
            str(manifest.step),
            manifest.created,
            str(manifest.identity.world_size),
            str(manifest.identity.stage),
            f"{manifest.size / 2**20:.1f}",
            metrics,
            f"[red]{entry.fault}" if entry.fault else "[green]verified" if verify else "complete",
        )
    console.print(table)
    return sum(entry.fault is not None for entry in entries)
