"""Processes of trials as actors of Ray: where they run, whether they live, and how many fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.hosts.names import HostSpec
from launch.ray.relay import on_named
from launch.sweep.page import BudgetTable
from launch.sweep.trial import Command, TrialProcess
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.words import counted

Key: TypeAlias = tuple[int, int]  # trial, seed
LOST = None


@dataclass(frozen=True)
class Need:
    """What a run takes of one node.

    Attributes:
        cpus: cores.
        gpus: devices.
    """

    cpus: float
    gpus: int

    @classmethod
    def of(cls, budget: BudgetTable) -> Need:
        """Return what the runs of a sweep take."""
        return cls(budget.ranks * budget.cpus_per_rank, budget.ranks * budget.gpus_per_rank)

    def times_in(self, cpus: float, gpus: float) -> int:
        """Return how many runs a node has room for."""
        rooms = [int(cpus / self.cpus + 1e-9)]
        if self.gpus:
            rooms.append(int(gpus // self.gpus))
        return min(rooms)

    def times_on(self, nodes: Sequence[tuple[float, float]]) -> int:
        """Return how many runs nodes have room for, other jobs apart, by the cores and devices of each."""
        return sum(self.times_in(cpus, gpus) for cpus, gpus in nodes)


def check_room(budget: BudgetTable, members: int, nodes: Sequence[tuple[float, float]]) -> None:
    """Check that runs fit.

    Args:
        budget: of the sweep.
        members: how many must run at one time.
        nodes: cores and devices of each.

    Raises:
        LaunchError: they do not; it says what would.
    """
    need = Need.of(budget)
    if (fits := need.times_on(nodes)) >= members:
        return
    if fits:
        raise LaunchError(
            f"scheduler.population = {members} runs at one time, and the cluster has room for {fits} of "
            f"{need.cpus:g} cores: set scheduler.population = {fits}, or budget.cpus_per_rank to a share of a core, or "
            "wait for more nodes with --wait"
        )
    cpus, gpus = max((n[0] for n in nodes), default=0.0), max((n[1] for n in nodes), default=0.0)
    most = int(cpus / budget.cpus_per_rank + 1e-9)
    if budget.gpus_per_rank:
        most = min(most, int(gpus // budget.gpus_per_rank))
    devices = f" and {counted(need.gpus, 'device')}" if need.gpus else ""
    takes = "takes" if budget.ranks == 1 else "take"
    has = f"{cpus:g} {'core' if cpus == 1 else 'cores'}" + (f" and {gpus:g} devices" if need.gpus else "")
    repair = f"budget.ranks of at most {most} fit" if most else "no rank of this kind fits"
    raise LaunchError(
        f"{counted(budget.ranks, 'rank')} of a trial {takes} {need.cpus:g} cores{devices} of "
        f"one node, and the largest node has {has}: {repair}, or wait for more nodes with --wait"
    )


class Actors:
    """The runs of a sweep that are placed by Ray.

    Args:
        need: of each run.
        nodes: addresses, and the ranks that this sweep may use of each; none for the whole cluster.
    """

    def __init__(self, need: Need, nodes: Sequence[HostSpec] = ()) -> None:
        where: dict[str, Any] = {}
        self._bundles = on_named((node.name, node.slots) for node in nodes) if nodes else []
        if nodes:
            self._group = placement_group(self._bundles, strategy="SPREAD")
            where["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group)
        self._class = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus, max_restarts=0, **where)(TrialProcess)
        self._actors: dict[Key, Any] = {}
        self._asked: dict[Any, Key] = {}

    def nodes(self) -> list[tuple[float, float]]:
        """Return the cores and devices of each node that runs may have."""
        have = self._bundles or [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [(float(one.get("CPU", 0)), float(one.get("GPU", 0))) for one in have]

    def start(self, key: Key, command: Command) -> None:
        """Start a run as soon as a node has room."""
        actor = self._actors[key] = self._class.remote(command)
        self._asked[actor.poll.remote()] = key

    def ended(self) -> Iterable[tuple[Key, int | str | None]]:
        """Yield the runs that have ended since the last call, with their exit codes.

        None where an actor is lost, a sentence where the run could not be started.
        """
        waiting = list(self._asked)
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])
        for reference in ready:
            key = self._asked.pop(reference)
            actor = self._actors.get(key)
            if actor is None:
                continue
            try:
                code = ray.get(reference, timeout=1)
            except GetTimeoutError:
                self._asked[reference] = key
                continue
            except RayError:
                self.release(key)
                yield key, LOST
                continue
            if code is None:
                self._asked[actor.poll.remote()] = key
                continue
            self.release(key)
            yield key, code

    def stop(self, key: Key) -> None:
        """Ask a run to save and end."""
        if (actor := self._actors.get(key)) is not None:
            actor.stop.remote()

    def release(self, key: Key) -> None:
        """Give back what a run has; what still runs of it is killed."""
        if (actor := self._actors.pop(key, None)) is not None:
            ray.kill(actor, no_restart=True)
