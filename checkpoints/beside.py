"""What a run's folder holds besides checkpoints, where hosts have a disk each: every host follows that of rank 0.

Rank 0 alone writes these files, on its own host. Each save hands the others what has changed since (`follow`), before
the checkpoint counts, so that any host can go on as rank 0's with no more lost than was written after it.

Before a resume (`agree`) the hosts decide whose files count. A host keeps in `turn.json` how many starts it has seen,
and whether it was rank 0's in the last: of those that have seen the most, the writer counts, or else the longest copy.
All others take over its files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.digest import Digest, opened, read_small
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError, MissingError
from checkpoints.manifest import FileRecord
from checkpoints.rankfile import write_bytes
from checkpoints.spread import Hosts, receive_file, send_file
from checkpoints.strictjson import parse
from checkpoints.together import Together
from setformer_dist.core.comm import Exchange
from setformer_dist.core.errors import CheckpointError

log = logging.getLogger(__name__)

TURN = "turn.json"
_SMALL = 16 << 20  # bytes of a file that is handed on whole
_TAIL = 16 << 20  # bytes of a file that one save hands on
_CHUNK = 1 << 20
_TURNS = 2**53


@dataclass(frozen=True)
class Names:
    """Files of a run's folder.

    Attributes:
        whole: small ones, replaced when they change; what rank 0's host does not have, no host has.
        grown: those that rank 0 appends lines to.
        kept: one of `grown` that a host with a supervisor writes as well, whose own stays; marked by the other name.
    """

    whole: tuple[str, ...] = ()
    grown: tuple[str, ...] = ()
    kept: tuple[str, str] = ("", "")


class Beside:
    """The files of one run. Methods are collective.

    Args:
        folder: of the run, on each host its own.
        names: of the files.
        hosts: which ranks share a disk.
        disk: of this host.
    """

    def __init__(self, folder: Path, names: Names, hosts: Hosts, disk: Disk) -> None:
        self._folder = folder
        self._names = names
        self._hosts = hosts
        self._disk = disk

    def agree(self, comm: Exchange, together: Together) -> None:
        """Give every host the files that count.

        Raises:
            CheckpointError: on all ranks: a host cannot read or write them.
        """
        leads = comm.ranks.local_rank == 0
        told = together.everywhere("compare the files beside", lambda: self._told() if leads else {})
        views = [told[leader] for leader in self._hosts.leaders]
        source = max(range(len(views)), key=lambda at: (*self._claim(views[at]), -at))
        mine = self._hosts.host_of(comm.ranks.rank)
        faults: list[Exception] = []
        for name, record in views[source]["files"].items():
            sent = FileRecord.model_validate(record)
            for to, view in enumerate(views):
                if view["files"].get(name) == record or name in view["kept"]:
                    continue
                if leads and mine == source:
                    send_file(comm, self._folder, sent, self._hosts.leaders[to])
                elif leads and mine == to:
                    try:
                        receive_file(comm, self._disk, self._folder, sent, self._hosts.leaders[source])
                        log.info("%s is taken from host %d", name, source)
                    except Exception as error:  # noqa: BLE001 — told to all below
                        faults.append(error)
        turn = 1 + max(view["turn"] for view in views)
        gone = [name for name in self._names.whole if name not in views[source]["files"]]
        together.everywhere(
            "take over the files beside", lambda: self._settle(turn, mine == 0, gone, faults) if leads else None
        )

    def _claim(self, view: Mapping[str, Any]) -> tuple[int, bool, int]:
        """Return how much a host's files count."""
        return view["turn"], view["writer"], sum(view["files"].get(n, {"size": 0})["size"] for n in self._names.grown)

    def _told(self) -> dict[str, Any]:
        """Return what this host has."""
        turn, writer = self._turn()
        own, mark = self._names.kept
        kept = [own] if own and (self._folder / own).exists() and (self._folder / mark).exists() else []
        files = {}
        for name in (*self._names.whole, *self._names.grown):
            with contextlib.suppress(MissingError):
                files[name] = _record(self._folder / name).model_dump()
        return {"turn": turn, "writer": writer, "files": files, "kept": kept}

    def _turn(self) -> tuple[int, bool]:
        path = self._folder / TURN
        try:
            value = parse(read_small(path, _SMALL), path.name)
            turn, writer = value["turn"], value["writer"]
            if type(turn) is int and 0 <= turn < _TURNS and type(writer) is bool:
                return turn, writer
        except MissingError:
            return 0, False
        except (DamagedError, TypeError, LookupError):
            pass
        log.warning("%s is damaged, so the files of this host count only where no other host has any", path)
        return 0, False

    def _settle(self, turn: int, writes: bool, gone: Sequence[str], faults: Sequence[Exception]) -> None:
        if faults:
            raise faults[0]
        for name in gone:
            self._disk.remove(self._folder / name)
        self._replace(TURN, json.dumps({"turn": turn, "writer": writes}).encode())

    def _replace(self, name: str, data: bytes) -> None:
        part = self._folder / f".{name}.part"
        self._disk.remove(part)
        write_bytes(self._disk, part, data)
        self._disk.rename(part, self._folder / name)

    def follow(self, comm: Exchange) -> None:
        """Hand all hosts what rank 0 has written since they last heard; what fails costs a warning and that alone."""
        leads = comm.ranks.local_rank == 0
        sizes = comm.gather_json(self._sizes() if leads else {})
        others = [sizes[leader] for leader in self._hosts.leaders[1:]]
        if not others:
            return
        whole, tails = comm.broadcast_json(self._news(others) if comm.ranks.is_main else ({}, {}))
        if not leads or comm.ranks.is_main:
            return
        try:
            for name, text in whole.items():
                if text is None:
                    self._disk.remove(self._folder / name)
                elif text != self._text(name):
                    self._replace(name, text.encode(errors="surrogateescape"))
            for name, (start, text) in tails.items():
                if name in sizes[comm.ranks.rank]:
                    self._continue(name, start, text.encode(errors="surrogateescape"))
        except (OSError, CheckpointError) as error:
            log.warning("this host could not follow rank 0's files in %s: %s", self._folder, error)

    def _sizes(self) -> dict[str, int]:
        """Return how much this host has of the files that grow, without one that is its own."""
        own, mark = self._names.kept
        found = {}
        for name in self._names.grown:
            path = self._folder / name
            with contextlib.suppress(OSError):
                if not path.exists():
                    found[name] = 0
                elif name != own or not (self._folder / mark).exists():
                    found[name] = path.stat().st_size
        return found

    def _news(self, others: Sequence[Mapping[str, int]]) -> tuple[dict[str, str | None], dict[str, tuple[int, str]]]:
        """Return the texts of small files, and where the lines of the others begin that some host lacks."""
        whole = {name: self._text(name) for name in self._names.whole}
        tails = {}
        for name in self._names.grown:
            start = min((sizes[name] for sizes in others if name in sizes), default=None)
            if start is None:
                continue
            with contextlib.suppress(OSError, DamagedError), opened(self._folder / name) as descriptor:
                data = os.pread(descriptor, _TAIL, start)
                data = data[: data.rfind(b"\n") + 1]  # a line may be on its way
                if data:
                    tails[name] = (start, data.decode(errors="surrogateescape"))
        return whole, tails

    def _text(self, name: str) -> str | None:
        """Return what a small file holds; None where it is not there or cannot be read."""
        try:
            return read_small(self._folder / name, _SMALL).decode(errors="surrogateescape")
        except (OSError, DamagedError):
            return None

    def _continue(self, name: str, start: int, data: bytes) -> None:
        """Write lines at their place in a file that grows; nobody else writes it here."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(self._folder / name, flags, 0o644), "wb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size >= start:
                os.pwrite(file.fileno(), data, start)
                os.ftruncate(file.fileno(), start + len(data))


def _record(path: Path) -> FileRecord:
    """Return name, size and digest of a file as it is now; it may grow meanwhile."""
    digest = Digest()
    with opened(path) as descriptor:
        size = left = os.fstat(descriptor).st_size
        while left:
            data = os.pread(descriptor, min(_CHUNK, left), size - left)
            if not data:
                raise DamagedError(f"{path.name} became shorter while it was read")
            digest.update(data)
            left -= len(data)
    return FileRecord(name=path.name, size=size, digest=digest.text())
