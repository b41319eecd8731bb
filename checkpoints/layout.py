"""Names of everything a run keeps under its `checkpoints` folder, and nothing else.

runs/<run>/checkpoints/
  step-00001200/                        a checkpoint, if and only if its manifest is there and verifies
    rank-00000-of-00002.safetensors     fragments, keyed name|state|start|end
    rank-00001-of-00002.safetensors
    trainer.json                        whatever the engine needs besides tensors
    manifest.json                       written last, removed first
  .tmp-step-00001300/                   being written; a leftover of a killed run is swept by the next save
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
TRAINER = "trainer.json"

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"


def step_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of an optimizer step lives."""
    return root / f"step-{step:08d}"


def temporary_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written before it is renamed into place."""
    return root / f"{_TEMPORARY}step-{step:08d}"


def rank_file(rank: int, world_size: int) -> str:
    """Return the name of the file that one rank writes."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def step_of(folder: Path) -> int | None:
    """Return the optimizer step that a folder's name states, or None if it is no checkpoint's name."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def step_folders(root: Path) -> list[Path]:
    """Return all folders named like checkpoints, newest step first, sound or not."""
    if not root.is_dir():
        return []
    found = [(step_of(path), path) for path in root.iterdir() if path.is_dir()]
    return [path for step, path in sorted(found, key=lambda f: f[0] or 0, reverse=True) if step is not None]


def leftovers(root: Path) -> list[Path]:
    """Return folders that a killed writer left behind."""
    return sorted(root.glob(f"{_TEMPORARY}*")) if root.is_dir() else []
