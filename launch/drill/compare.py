"""Whether a run that had faults is the same as one that had none: losses, samples, weights, bit by bit."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from checkpoints.reader import open_checkpoint
from launch.drill.run import DrillRun
from setformer_dist.core.errors import DrillError

_STATES = ("param", "exp_avg", "exp_avg_sq", "ema")


def same_as(reference: DrillRun, run: DrillRun) -> None:
    """Compare losses, samples and weights with the run without faults.

    Raises:
        DrillError: naming the first that differs.
    """
    for name, read in (("loss", _losses), ("samples", _samples)):
        ours, theirs = read(run.folder), read(reference.folder)
        differing = sorted(step for step in {*ours, *theirs} if ours.get(step) != theirs.get(step))
        if differing:
            step = differing[0]
            raise DrillError(
                f"the {name} of step {step} is {ours.get(step)!r} after faults and {theirs.get(step)!r} without"
            )
    one, other = (open_checkpoint(r.folder / "checkpoints") for r in (run, reference))
    if one.step != other.step:
        raise DrillError(f"the run ended at step {one.step} after faults and at {other.step} without")
    for state in _STATES:
        after, without = one.read_full(state), other.read_full(state)
        for key, value in without.items():
            if not torch.equal(after[key], value):
                raise DrillError(f"{state} of {key} differs from the run without faults")


def _losses(folder: Path) -> dict[int, float]:
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if row["kind"] == "train":
                found[row["step"]] = row["loss"]
    return found


def _samples(folder: Path) -> dict[int, list[int]]:
    found = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["step"]] = row["ids"]
    return found
