"""Addresses and network interfaces of this host."""

from __future__ import annotations

import socket

import psutil


def addresses() -> list[tuple[str, str]]:
    """Return (interface, IPv4 address) of every interface that is up and leads to other hosts."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]


def interface_of(address: str) -> str | None:
    """Return the interface that has an address."""
    return next((name for name, known in addresses() if known == address), None)


def interface_to(host: str) -> str | None:
    """Return the interface by which this host reaches another one, None where it is unknown.

    No packet is sent: a datagram socket that is connected knows its way.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            mine = str(probe.getsockname()[0])
    except OSError:
        return None
    return "lo" if mine.startswith("127.") else interface_of(mine)
