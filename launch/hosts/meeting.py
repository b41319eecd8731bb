"""Where the ranks of several hosts meet: an address of the first host that all others reach, and the interface to it.

Which of a host's addresses others can reach nobody knows beforehand: 127.0.0.1 is the trap of gloo, a container's
bridge another. So it is tried: the first host listens, the others connect, and each sees by which interface it went.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.hosts.link import Link, ask
from launch.ranks.environment import HOST
from setformer_dist.core.errors import LaunchError

_LIMIT_S = 15.0


@dataclass(frozen=True)
class Meeting:
    """Where rank 0 is met.

    Attributes:
        address: of the first host.
        port: free there.
        interfaces: by which each host gets there, in order of the hosts.
    """

    address: str
    port: int
    interfaces: tuple[str, ...]

    def variables(self, at: int, world_size: int, slots: int) -> dict[str, str]:
        """Return the variables by which ranks meet; an interface that the user has chosen stays.

        Args:
            at: the host's place.
            world_size: ranks on all hosts.
            slots: ranks on this one.
        """
        ways = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        return {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(slots),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            **{name: os.environ.get(name, self.interfaces[at]) for name in ways},
        }


def arrange(links: Sequence[Link], port: int | None = None, meanwhile: Callable[[], object] = lambda: None) -> Meeting:
    """Find where the ranks of some hosts meet.

    Args:
        links: of the hosts, the first one rank 0's.
        port: to meet at; by default a free one.
        meanwhile: as in `ask`.

    Raises:
        LaunchError: no address of the first host can be reached from all others.
    """
    first, others = links[0], links[1:]
    candidates = [address for _, address in first.facts["addresses"]] if others else [HOST]
    faults = [f"host {first.name} has no address but 127.0.0.1"] if not candidates else []
    for address in candidates:
        [heard] = ask([first], [{"do": "listen", "address": address, "port": port}], _LIMIT_S, meanwhile)
        if "error" in heard:
            faults.append(f"{heard['error']} (at {address})")
            continue
        request = {"do": "reach", "address": address, "port": heard["port"]}
        answers = ask(others, [request] * len(others), _LIMIT_S, meanwhile)
        wrong = [answer["error"] for answer in answers if "error" in answer]
        if wrong:
            faults += wrong
            continue
        ways = [heard["interface"] or "lo", *(answer["interface"] for answer in answers)]
        if None in ways:
            faults.append(f"host {links[ways.index(None)].name} has no interface of its own to {address}")
            continue
        return Meeting(address, heard["port"], tuple(ways) if others else ("lo",))
    raise LaunchError(f"the hosts cannot meet at host {first.name}: {'; '.join(faults)}: open its firewall for them")
