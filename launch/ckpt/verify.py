"""`setformer ckpt verify`: read every byte of checkpoints and report damage."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from checkpoints import layout
from checkpoints.manifest import read_manifest
from checkpoints.reader import checkpoints_folder, verified
from launch.ckpt.progress import progress
from setformer_dist.core.errors import CheckpointError


def verify(path: Path, console: Console, as_json: bool = False) -> int:
    """Read every byte of one checkpoint, or of all of a run; print what is wrong; return how many do not verify.

    Raises:
        CheckpointError: there is no checkpoint there.
    """
    single = layout.step_of(path) is not None or (path / layout.MANIFEST).exists()
    folders = [path] if single else layout.step_folders(checkpoints_folder(path))
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoints: name a run's folder, such as runs/demo")
    answers: list[dict[str, str | None]] = []
    total = sum(_bytes_of(folder) for folder in folders)
    began = time.perf_counter()
    with progress(console, "verify", total, as_json) as advance:
        for folder in folders:
            try:
                verified(folder, workers=len(os.sched_getaffinity(0)), advance=advance)
                answers.append({"path": str(folder), "fault": None})
            except CheckpointError as error:
                answers.append({"path": str(folder), "fault": str(error)})
    show_verified(answers, total, time.perf_counter() - began, console, as_json)
    return sum(answer["fault"] is not None for answer in answers)


def show_verified(
    answers: Sequence[Mapping[str, str | None]], total: int, seconds: float, console: Console, as_json: bool
) -> None:
    """Print what was found of checkpoints, or of copies of them: path, fault, bytes read, seconds."""
    if as_json:
        print(json.dumps({"checkpoints": answers, "bytes": total, "seconds": seconds}, indent=2))
        return
    for answer in answers:
        console.print(f"{answer['path']}: {answer['fault'] or 'verifies'}", highlight=False, markup=False)
    rate = f"{total / 2**20:.1f} MiB in {seconds:.2f} s, {total / seconds / 1e9:.2f} GB/s"
    console.print(rate, highlight=False, markup=False)


def _bytes_of(folder: Path) -> int:
    try:
        return read_manifest(folder).size
    except CheckpointError:
        return 0
