"""The crew of a run on Ray: a fleet whose hosts are the bundles of a placement group."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from launch.hosts.fleet import Fleet
from launch.hosts.names import HostSpec
from launch.ranks.signals import Received
from launch.ray.bundles import Bundles, UnwantedError

_SOON_S = 1.0
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

    def _leave_out(self, name: str) -> None:
        """Leave a bundle out for a while; where none is left, it is tried again at once: nothing trains meanwhile."""
        super()._leave_out(name)
        if not any(link.lost is None for link in self._links.values()):
            for absence in self._absences.values():
                absence.until = min(absence.until, time.monotonic() + _SOON_S)

    def close(self) -> None:
        """End all agents, and give the bundles back."""
        super().close()
        if self._bundles is not None:
            self._bundles.close()
