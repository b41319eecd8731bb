"""The few collective operations that packages outside the engine need, as a protocol.

The engine implements it over torch.distributed; one process alone uses `Alone`.
Values travel as JSON, so nothing that arrives can run code.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from setformer_dist.core.ranks import RankInfo

T = TypeVar("T")  # what JSON gives back as it was: no tuples, no keys but text


class Collectives(Protocol):
    """Operations over all ranks; every rank must call them in the same order."""

    @property
    def ranks(self) -> RankInfo:
        """This process's place."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def broadcast_json(self, value: T) -> T:
        """Return rank 0's value (JSON-able) on every rank."""
        ...

    def gather_json(self, value: T) -> list[T]:
        """Return every rank's value (JSON-able), by rank, on every rank."""
        ...


class Exchange(Collectives, Protocol):
    """Collectives, and bytes from one rank to another."""

    def send_bytes(self, data: bytearray, to: int) -> None:
        """Send bytes to a rank, which receives as many."""
        ...

    def receive_bytes(self, data: bytearray, source: int) -> None:
        """Fill a buffer with what a rank sends."""
        ...


class Alone:
    """A single process."""

    ranks = RankInfo()

    def barrier(self) -> None:
        """Return at once."""

    def broadcast_json(self, value: T) -> T:
        """Return the value."""
        return value

    def gather_json(self, value: T) -> list[T]:
        """Return the value as the only rank's."""
        return [value]

    def send_bytes(self, data: bytearray, to: int) -> None:
        """Refuse: there is nobody."""
        raise ValueError("one process alone has no peer")

    def receive_bytes(self, data: bytearray, source: int) -> None:
        """Refuse likewise."""
        raise ValueError("one process alone has no peer")
