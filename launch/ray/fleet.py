"""The crew of a run on Ray: a fleet whose hosts are the bundles of a placement group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.hosts.fleet import Fleet
from launch.hosts.names import HostSpec
from launch.ranks.signals import Received
from launch.ray.bundles import Bundles, UnwantedError

VIA = "ray "  # begins how hosts are reached, in the record of a run


@dataclass
class RayFleet(Fleet):
    """Starts the ranks of a run on a Ray cluster; see `launch.ranks.supervise.Crew`.

    Attributes:
        via: the cluster's address behind `VIA`: host:port, or "auto".
        world_size: ranks to begin with.
        per_node: ranks of each node; None for as many as it has room for.
        nodes: the nodes by address, with the ranks of each; none for those that Ray chooses.
        wait: for room, instead of giving up.
    """

    via: str = f"{VIA}auto"
    world_size: int = 1
    per_node: int | None = None
    nodes: Sequence[HostSpec] = ()
    wait: bool = False
    soon_s: float = 1.0
    _bundles: Bundles | None = None

    def prepare(self, received: Received) -> None:
        """Connect to the cluster, the first time, and go on as a fleet does; raises as that does."""
        if self._bundles is None:
            address = self.via.removeprefix(VIA)
            try:
                self._bundles = Bundles(
                    address, self.world_size, self.per_node, lambda: bool(received.stop),
                    (lambda why: self.say(f"waiting for room (--wait): {why}")) if self.wait else None, self.nodes,
                )  # fmt: skip
            except UnwantedError:
                return
            self.specs, self.reach = self._bundles.specs, self._bundles.open
        super().prepare(received)

    def close(self) -> None:
        """End all agents, and give the bundles back."""
        super().close()
        if self._bundles is not None:
            self._bundles.close()
