"""Runs on Ray. The package ray is an extra: whoever imports a module of this room calls installed.require_ray first.

bundles.py     channels to the agents in the bundles of a placement group
cluster.py     connects to a cluster, or starts one on this machine and ends it
courier.py     the driver of a run's refreshes: an actor computes new reference sets for all runs of a cluster
doctor.py      whether a run can train on a cluster
fits.py        what that actor computes
fleet.py       the crew of a run: a fleet whose hosts are bundles
head.py        the process that holds a cluster of our own
installed.py   whether the package is there; imports nothing of it
loop.py        a run as the training loop of Ray Train's TorchTrainer
relay.py       the cluster's driver: an actor for each bundle, which runs an agent and relays its pipes
watch.py       prints the nodes of a cluster again and again, for the queue
room.py        how many ranks each bundle has
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.ray.loop import train_loop

__all__ = ["train_loop"]


def __getattr__(name: str) -> object:
    """Return `train_loop`; torch and Ray are imported now."""
    if name not in __all__:
        raise AttributeError(f"module 'launch.ray' has no attribute {name!r}")
    return getattr(importlib.import_module("launch.ray.loop"), name)
