"""`setformer doctor --ray`: whether a run can train on a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ray

from launch.machine.doctor import Finding
from launch.machine.hosts import survey
from launch.ray.bundles import Bundles
from launch.ray.cluster import Cluster, connected
from launch.ray.relay import rooms
from launch.ray.room import Room
from launch.run.config import load_run
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.words import counted


def examine(address: str, run_folder: Path, config: Path | None = None, overrides: Sequence[str] = ()) -> list[Finding]:
    """Look at a cluster, and at each node that has room for a rank; takes some seconds. Nothing stays there.

    Args:
        address: host:port, or "auto".
        run_folder: where runs are to be kept.
        config: of a run that is to start there.
        overrides: of the run config.
    """
    try:
        with connected(address) as cluster:
            nodes = rooms()
            findings = [*_cluster(cluster), *map(_node, nodes)]
    except LaunchError as error:
        return [Finding("Ray cluster", "cannot be used", "problem", str(error))]
    free = sum(room.free > 0 for room in nodes)
    if not free:
        return [*findings, Finding("Ray cluster", "no node is free", "problem", "wait for other jobs, or add nodes")]
    try:
        bundles = Bundles(cluster.address, free, 1)
    except LaunchError as error:
        return [*findings, Finding("Ray cluster", "gives no bundles", "problem", str(error))]
    try:
        imports = load_run(config, overrides).run.imports if config is not None else ()
        return findings + survey(bundles.specs, None, run_folder, config, overrides, imports, bundles.open)
    finally:
        bundles.close()


def _cluster(cluster: Cluster) -> list[Finding]:
    found = [Finding("Ray cluster", f"answers at {cluster.address}; Ray {ray.__version__}, Python "
                                    f"{sys.version.split()[0]}, as here")]  # fmt: skip
    if os.environ.get("RAY_AUTH_MODE") == "token":
        found.append(Finding("authentication", "by token"))
    else:
        found.append(
            Finding(
                "authentication",
                "none",
                "note",
                "whoever reaches the cluster can run programs on its nodes: start it with RAY_AUTH_MODE=token",
            )
        )
    dead = [str(node["NodeManagerAddress"]) for node in ray.nodes() if not node["Alive"]]
    if dead:
        found.append(Finding("nodes", f"{counted(len(dead), 'node')} lost ({', '.join(dead[:5])})", "note"))
    return found


def _node(room: Room) -> Finding:
    text = f"room for {counted(room.ranks, 'rank')}, {room.free} free now"
    if room.free:
        return Finding(f"node {room.node}", text)
    return Finding(f"node {room.node}", text, "note", "it takes no part now: wait for its jobs, or free a CPU")
