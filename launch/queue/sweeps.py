"""Sweeps as jobs: what is kept of one at submission, and the command that runs it on the job's slots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from launch.queue.config import ClusterTable
from launch.queue.nodes import named
from launch.queue.state import Placement
from launch.sweep.page import Sweep, base_of, load_sweep, shipped_page
from setformer_dist.core.config import apply_override, read_toml
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.files import write_state
from setformer_dist.core.words import counted

_SWEEP, _BASE = "sweep.json", "base.json"


def read(path: Path, overrides: Sequence[str]) -> tuple[Sweep, str]:
    """Return a sweep, and what the queue keeps of it: its config and its base, as they are now.

    Raises:
        ConfigError: as `setformer sweep` does.
    """
    page = shipped_page(path)
    sweep = load_sweep(page, overrides)
    table = read_toml(page)
    for text in overrides:
        table = apply_override(table, text)
    base = read_toml(base_of(page, sweep.config.sweep.base))
    table["sweep"] = {**sweep.config.sweep.model_dump(mode="json", exclude_unset=True), "base": _BASE}
    return sweep, json.dumps({"sweep": table, "base": base, "slots_of_trial": slots_of_trial(sweep)})


def slots_of_trial(sweep: Sweep) -> int:
    """Return the slots that a trial takes."""
    budget = sweep.config.budget
    return budget.ranks if budget.gpus_per_rank else math.ceil(budget.ranks * budget.cpus_per_rank)


def check(sweep: Sweep, cluster: ClusterTable, sizes: Sequence[int], per_node: int | None) -> None:
    """Refuse what a queue cannot run.

    Raises:
        LaunchError: naming what it can.
    """
    if cluster.kind == "hosts":
        raise LaunchError(
            'cluster.kind = "hosts" has no Ray, which a sweep needs: use a queue of kind "local" or "ray"'
        )
    if per_node is not None:
        raise LaunchError("a sweep has no --nodes: --ranks says how many slots its trials share")
    if sizes[0] < (least := slots_of_trial(sweep)):
        raise LaunchError(
            f"--ranks {sizes[0]} has no room for one trial, which takes {counted(least, 'slot')} (budget.ranks, "
            f"budget.cpus_per_rank): give --ranks {least} or more"
        )


def command(words: Sequence[str], cluster: ClusterTable, folder: Path, config: str, placement: Placement) -> list[str]:
    """Return the command of a sweep; its configs are written into the job's folder, the same for all its attempts.

    Args:
        words: that begin every command of this program.
        cluster: of the queue.
        folder: of the job.
        config: what `read` gave.
        placement: the slots that its trials share.
    """
    kept = json.loads(config)
    write_state(folder / _BASE, kept["base"])
    write_state(folder / _SWEEP, kept["sweep"])
    slots = sum(count for _, count in placement)
    parallel = slots // int(kept["slots_of_trial"])
    where = ["--ray", cluster.ray, "--ray-nodes", named(placement)] if cluster.kind == "ray" else []
    return [*words, "sweep", "run", str(folder / _SWEEP), f"budget.parallel={parallel}", *where]
