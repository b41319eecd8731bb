"""`setformer ckpt diff`: in which parameters, metrics and config keys two checkpoints differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from checkpoints.reader import Checkpoint, open_checkpoint, read_kept
from setformer_dist.core.continuing import flatten
from setformer_dist.core.terminal import open_table


def diff(first: Path, second: Path, state: str, console: Console, as_json: bool = False) -> bool:
    """Print in what two checkpoints differ; return whether they do.

    Args:
        first: a checkpoint.
        second: another.
        state: which state of the parameters to compare, such as "param" or "ema".
        console: where to.
        as_json: print JSON instead.

    Raises:
        CheckpointError: one does not verify, or does not hold the state.
    """
    # Either may be deleted by the run that writes it, while it is read: newer ones are then compared.
    a, b, found = read_kept(first, lambda: read_kept(second, lambda: _compared(first, second, state)))
    different = any(found[key] for key in found if key not in ("steps", "common"))
    if as_json:
        print(json.dumps(found, indent=2))
        return different
    for key in ("only_first", "only_second"):
        if found[key]:
            console.print(f"{key.replace('_', ' in the ')}: {', '.join(found[key])}", highlight=False, markup=False)
    table = open_table("what", str(a.path), str(b.path))
    for group in ("shapes", "metrics", "config"):
        for key, (left, right) in found[group].items():
            table.add_row(key, str(left), str(right))
    if table.row_count:
        console.print(table)
    distances = open_table(f"{state} of", "largest difference", "relative to the largest value")
    for name, (absolute, relative) in found["parameters"].items():
        distances.add_row(name, f"{absolute:.3e}", f"{relative:.3e}")
    if distances.row_count:
        console.print(distances)
    common = found["common"]
    same = common - len(found["parameters"])
    console.print(f"{same} of {common} common parameters are the same bit by bit", highlight=False, markup=False)
    return different


def _compared(first: Path, second: Path, state: str) -> tuple[Checkpoint, Checkpoint, dict[str, Any]]:
    """Return two checkpoints and in what they differ."""
    a, b = open_checkpoint(first), open_checkpoint(second)
    shapes_a, shapes_b = a.parameters(), b.parameters()
    both = [name for name, shape in shapes_a.items() if shapes_b.get(name) == shape]
    found: dict[str, Any] = {
        "steps": [a.step, b.step],
        "common": len(both),
        "only_first": sorted({*shapes_a} - {*shapes_b}),
        "only_second": sorted({*shapes_b} - {*shapes_a}),
        "shapes": {n: [shapes_a[n], shapes_b[n]] for n in shapes_a if n in shapes_b and n not in both},
        "parameters": _distances(a, b, both, state),
        "metrics": _differing(a.metrics, b.metrics),
        "config": _differing(_config_of(a), _config_of(b)),
    }
    return a, b, found


def _distances(a: Checkpoint, b: Checkpoint, names: list[str], state: str) -> dict[str, tuple[float, float]]:
    """Return the largest absolute difference, and that over the largest magnitude, of parameters that differ."""
    others = dict(b.iterate_full(state))
    found = {}
    for name, tensor in a.iterate_full(state):
        if name not in names or torch.equal(tensor, others[name]):
            continue
        largest = float((tensor - others[name]).abs().max())
        found[name] = (largest, largest / max(float(tensor.abs().max()), 1e-38))
    return found


def _config_of(checkpoint: Checkpoint) -> dict[str, object]:
    """Return the config of the run that wrote a checkpoint, flat; nothing where it holds none."""
    config = checkpoint.trainer.get("config")
    return flatten(config) if isinstance(config, dict) else {}


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}
