"""The faults that a save on hosts with a disk each can meet, at every step of spread.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from checkpoints import layout
from checkpoints.testing.disk_faults import Fault

_ALL = ("exception", "killed", "slow")
_WRITING = ("exception", "disk full", "short write", "killed", "slow")
DEAD = ".tmp-step-00000002-dead"  # what a killed attempt has left


@dataclass(frozen=True)
class Case:
    """A fault of the table.

    Attributes:
        number: of the step in spread.py's list.
        rank: on which it happens; each rank is a host.
        what: the operation in words.
        fault: the operation and what goes wrong.
        found: the steps of which one must be found afterwards.
    """

    number: int
    rank: int
    what: str
    fault: Fault
    found: tuple[int, ...]


def cases() -> list[Case]:
    """Return the table: every operation of every step on either host, with every kind of fault that it can meet."""
    return [
        Case(number, rank, what, Fault(operation, pattern, kind), _expected(number, kind))
        for rank in (0, 1)
        for number, what, operation, pattern, kinds in _operations(rank)
        for kind in kinds
    ]


def _expected(number: int, kind: str) -> tuple[int, ...]:
    if number >= 5 or kind == "slow":
        return (2,)
    # The other host's manifest may be durable, and then every replica is.
    return (1, 2) if number == 4 and kind == "killed" else (1,)


def _operations(rank: int) -> Iterator[tuple[int, str, str, str, tuple[str, ...]]]:
    yield 1, "remove a leftover", "remove_tree", DEAD, _ALL
    yield 1, "make the folder", "make_folder", ".tmp-*", (*_ALL, "disk full")
    own, replica = layout.rank_file(rank, 2), f"{layout.rank_file(1 - rank, 2)}.part"
    for number, what, name in ((2, "the rank file", own), (3, "the replica", replica)):
        yield number, f"create {what}", "create", name, (*_ALL, "disk full")
        yield number, f"write {what}", "write", name, _WRITING
        yield number, f"fsync {what}", "sync", name, (*_ALL, "disk full")
    yield 3, "rename the replica", "rename", layout.rank_file(1 - rank, 2), _ALL
    for name in (layout.TRAINER, layout.MANIFEST):
        yield 4, f"create {name}", "create", name, (*_ALL, "disk full")
        yield 4, f"write {name}", "write", name, _WRITING
        yield 4, f"fsync {name}", "sync", name, (*_ALL, "disk full")
    yield 4, "fsync the folder", "sync_folder", ".tmp-*", _ALL
    yield 5, "rename the folder", "rename", "step-00000002", (*_ALL, "disk full")
    yield 5, "fsync the root", "sync_folder", "checkpoints", _ALL
    yield 6, "remove the old manifest", "remove", layout.MANIFEST, _ALL
    yield 6, "remove the old folder", "remove_tree", "step-00000001", _ALL
