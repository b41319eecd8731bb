"""Names of everything a run keeps under its `checkpoints` folder, and nothing else.

runs/<run>/checkpoints/
  step-00001200/                        a checkpoint, if and only if its manifest is there and verifies
    rank-00000-of-00002.safetensors     fragments, keyed name|state|start|end
    rank-00001-of-00002.safetensors
    trainer.json                        what the engine needs besides tensors
    manifest.json                       written last, removed first
  .tmp-step-00001300-5f0c21aa/          being written by the attempt of that name; swept by a later save
    rank-00001-of-00002.done.json       a rank's word that its file is durable, or that it could not be written
  .replaced-step-00001200-5f0c21aa/     the old one of its step, for the instant in which a new one takes its name
  aside/
    step-00001100-5f0c21aa/             did not verify at a resume; kept for inspection, never counted
    step-00001100-5f0c21aa.reason.txt   why
    superseded-step-00001000-5f0c21aa/  not known to be damaged, but its name was needed, or stood for another count
                                        of steps, or the guard went back behind it; never deleted
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
TRAINER = "trainer.json"
ASIDE = "aside"

_STEP_FOLDER = re.compile(r"step-(\d{8,15})")
_TEMPORARY = ".tmp-"
_TEMPORARY_FOLDER = re.compile(r"\.tmp-(step-\d{8,15})-[0-9a-f]{8}")
_REPLACED = ".replaced-"
_REPLACED_FOLDER = re.compile(r"\.replaced-(step-\d{8,15})-[0-9a-f]{8}")
_SUPERSEDED = "superseded-"


def step_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of an optimizer step lives."""
    return root / f"step-{step:08d}"


def temporary_folder(root: Path, step: int, attempt: str) -> Path:
    """Return where one attempt to save a step writes, before the folder is renamed into place."""
    return root / f"{_TEMPORARY}step-{step:08d}-{attempt}"


def aside_folder(root: Path, name: str, attempt: str) -> Path:
    """Return where a folder that did not verify is kept."""
    return root / ASIDE / f"{name}-{attempt}"


def superseded_folder(root: Path, name: str, attempt: str) -> Path:
    """Return where a folder is kept for good that may be sound but is no longer to be counted."""
    return root / ASIDE / f"{_SUPERSEDED}{name}-{attempt}"


def replaced_folder(root: Path, step: int, attempt: str) -> Path:
    """Return where the old checkpoint of a step waits until the new one has its name."""
    return root / f"{_REPLACED}step-{step:08d}-{attempt}"


def replaced(root: Path) -> list[tuple[Path, Path]]:
    """Return the folders that wait so, each with the name that it had; links and other names are none."""
    found = sorted(root.glob(f"{_REPLACED}*")) if root.is_dir() else []
    named = [(path, _REPLACED_FOLDER.fullmatch(path.name)) for path in found]
    return [(path, root / match[1]) for path, match in named if match and path.is_dir() and not path.is_symlink()]


def reason_file(aside: Path) -> Path:
    """Return where it is written why a folder was put aside."""
    return aside.with_name(f"{aside.name}.reason.txt")


def rank_file(rank: int, world_size: int) -> str:
    """Return the name of the file that one rank writes."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def done_file(rank: int, world_size: int) -> str:
    """Return the name of a rank's word about its file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.done.json"


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
    found = sorted(root.glob(f"{_TEMPORARY}*")) if root.is_dir() else []
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def final_of(leftover: Path) -> Path | None:
    """Return the name that a writer's folder was to have, or None if it is no writer's."""
    match = _TEMPORARY_FOLDER.fullmatch(leftover.name)
    return leftover.parent / match[1] if match else None


def put_aside(root: Path) -> list[Path]:
    """Return the folders that were put aside, oldest first."""
    folders = [path for path in (root / ASIDE).glob("step-*") if path.is_dir()]
    return sorted(folders, key=lambda path: (path.stat().st_mtime_ns, path.name))
