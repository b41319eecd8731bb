"""Checkpoints of hosts that have a disk each: every file lies on `checkpoint.replicas` hosts besides its writer's.

Each host has a folder `step-…` of its own with the manifest, `trainer.json`, the files of its ranks, and replicas of
other hosts' files. One thread per rank writes, as in `commit`; the threads speak over a group of their own, so that
they meet the training's collectives nowhere. "Leader" is the first rank of a host.

     1  leaders  remove what killed attempts left; make `.tmp-step-…-<attempt>`
     2  each     writes its rank file, durable, the digest being taken of the bytes as they go out
     3  each     sends it to one rank of each of the next `replicas` hosts, which write it, durable, and compare digests
                 Then all hosts get what else rank 0 has written into the run's folder (`beside`)
     4  leaders  write `trainer.json` and `manifest.json`, durable: from the first manifest on, every replica of every
                 file is durable, and the checkpoint counts
     5  leaders  rename the folder to `step-…`, durable
     6  leaders  delete what retention lets go, manifest first; a failure here costs space alone

After each of 1 to 5 all ranks tell each other how it went; whatever fails before 4 is given up on all hosts.

A search (`newest`) asks every host what it has. A checkpoint is there if every file of one manifest is on some host,
by its digest. Hosts then take the files that they lack, or that are damaged, from a host that has them, so that each
host has all of them before a rank is filled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import layout
from checkpoints.commit import (
    Failure,
    Payload,
    PeerFailedError,
    Save,
    describe,
    disk_full,
    is_transient,
    put_aside,
)
from checkpoints.digest import Digest, algorithm_of, opened
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError, StorageError
from checkpoints.manifest import FileRecord, Manifest, read_manifest
from checkpoints.rankfile import write_bytes
from setformer_dist.core.comm import Exchange
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.ranks import RankInfo

log = logging.getLogger(__name__)

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Hosts:
    """Which ranks share a disk.

    Attributes:
        leaders: the first rank of each host, in order.
        sizes: ranks of each host.
    """

    leaders: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, places: Sequence[Sequence[int]]) -> Hosts:
        """Return them.

        Args:
            places: of each rank, its local rank and the number of ranks of its host.

        Raises:
            CheckpointError: the ranks of a host do not follow each other.
        """
        leaders, sizes = [], []
        rank = 0
        while rank < len(places):
            size = places[rank][1]
            if [list(place) for place in places[rank : rank + size]] != [[at, size] for at in range(size)]:
                raise CheckpointError(
                    f"checkpoint.replicas needs ranks that are numbered host by host, and rank {rank} is not: start "
                    "them so (for srun: --distribution=block)"
                )
            leaders.append(rank)
            sizes.append(size)
            rank += size
        return cls(tuple(leaders), tuple(sizes))

    def host_of(self, rank: int) -> int:
        """Return the number of a rank's host."""
        return max(at for at, leader in enumerate(self.leaders) if leader <= rank)

    def transfers(self, replicas: int) -> Iterator[tuple[int, int]]:
        """Yield (sender, receiver) of every replica, in an order in which no rank waits for another in a circle.

        Hosts form a ring. Those that send at the same time and those that receive then are different ones.
        """
        count = len(self.leaders)
        for distance in range(1, min(replicas, count - 1) + 1):
            by_phase: dict[int, list[int]] = {0: [], 1: [], 2: []}
            for host in range(count):
                by_phase[2 if host + distance >= count else host // distance % 2].append(host)
            for hosts in by_phase.values():
                for host in hosts:
                    to = (host + distance) % count
                    for local in range(self.sizes[host]):
                        yield self.leaders[host] + local, self.leaders[to] + local % self.sizes[to]


def send_file(comm: Exchange, folder: Path, record: FileRecord, to: int) -> None:
    """Send a file to another rank. What cannot be read is sent as zeros: the receiver's digest finds it."""
    left = record.size
    with contextlib.ExitStack() as stack:
        descriptor = -1
        with contextlib.suppress(OSError, DamagedError):
            descriptor = stack.enter_context(opened(folder / record.name))
        while left:
            size = min(_CHUNK, left)
            data = bytearray(size)
            with contextlib.suppress(OSError):
                if descriptor >= 0:
                    os.preadv(descriptor, [data], record.size - left)
            comm.send_bytes(data, to)
            left -= size


def receive_file(comm: Exchange, disk: Disk, folder: Path, record: FileRecord, source: int) -> None:
    """Write a file that another rank sends, durable.

    All of it is taken off the wire also where it cannot be written.

    Raises:
        StorageError: the bytes are not those of the record.
        OSError: the disk does not take it.
    """
    digest, left, fault = Digest(algorithm_of(record.digest) or ""), record.size, None
    part = folder / f"{record.name}.part"
    with contextlib.ExitStack() as stack:
        file = None
        try:
            disk.remove(part)
            file = stack.enter_context(disk.create(part))
        except OSError as error:
            fault = error
        while left:
            data = bytearray(min(_CHUNK, left))
            comm.receive_bytes(data, source)
            left -= len(data)
            digest.update(data)
            if file is not None and fault is None:
                try:
                    disk.write(file, memoryview(data))
                except OSError as error:
                    fault = error
        if file is not None and fault is None:
            disk.sync(file)
    if fault is not None:
        raise fault
    if part.stat().st_size != record.size or digest.text() != record.digest:
        raise StorageError(f"{record.name} did not arrive as it was written")
    disk.rename(part, folder / record.name)


class SpreadSave(Save):
    """Steps 1 to 6 on one rank.

    Args:
        save: what `Save` is made with.
        comm: the threads' own group.
        hosts: which ranks share a disk.
        replicas: of each file, on other hosts.
        follow: gives all hosts what else rank 0 has written into the run's folder. Collective.
    """

    def __init__(
        self, *save: Any, comm: Exchange, hosts: Hosts, replicas: int, follow: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(*save)
        self._comm = comm
        self._hosts = hosts
        self._replicas = replicas
        self._follow = follow

    @property
    def _leads(self) -> bool:
        return self.attempt.ranks.local_rank == 0

    def _work(self) -> None:
        payload, self._payload = self._payload, None
        assert payload is not None  # a save is started once
        try:
            self._all("make the folder", self._make_folder)
            records = self._all("write", lambda: self._own_file(payload).model_dump())
        finally:
            self._free()
        assert isinstance(payload, Payload)  # what it was not, has been raised on all ranks
        files = [FileRecord.model_validate(record) for record in records]
        self._replicate(files)
        self._follow()
        trainer, manifest = self._comm.broadcast_json((payload.trainer.decode(), payload.manifest.to_json()))
        self._all("write the manifest", lambda: self._write_manifest(files, trainer, manifest))
        self._all("rename", self._rename)
        log.info("checkpoint %s", self.attempt.final)
        self._after_commit(self.attempt)

    def _all(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """Do a step on every rank and hear how it went everywhere.

        Raises:
            PeerFailedError: it failed on some rank.
        """
        answer: dict[str, Any]
        try:
            answer = {"value": work()}
        except Exception as error:  # noqa: BLE001 — the other ranks must hear of it
            answer = {"error": describe(error), "full": disk_full(error), "transient": is_transient(error)}
        answers = self._comm.gather_json(answer)
        for rank, told in enumerate(answers):
            if "error" in told:
                raise PeerFailedError(
                    f"rank {rank}: could not {what}: {told['error']}", told["full"], told["transient"]
                )
        return [told["value"] for told in answers]

    def _make_folder(self) -> None:
        if not self._leads:
            return
        root = self.attempt.root
        self._disk.make_folder(root)
        for leftover in layout.leftovers(root):
            if not (leftover / layout.MANIFEST).exists() or layout.final_of(leftover) == self.attempt.final:
                self._disk.remove_tree(leftover)
        self._disk.make_folder(self.attempt.folder)

    def _own_file(self, payload: Payload | Exception) -> FileRecord:
        if not isinstance(payload, Payload):
            raise payload
        return self._write(payload)

    def _replicate(self, files: Sequence[FileRecord]) -> None:
        """Step 3."""
        me, faults = self.attempt.ranks.rank, []
        for sender, receiver in self._hosts.transfers(self._replicas):
            if me == sender:
                send_file(self._comm, self.attempt.folder, files[sender], receiver)
            elif me == receiver:
                try:
                    receive_file(self._comm, self._disk, self.attempt.folder, files[sender], sender)
                except (OSError, CheckpointError) as error:
                    faults.append(error)

        def told() -> None:
            if faults:
                raise faults[0]

        self._all("write a replica", told)

    def _write_manifest(self, files: Sequence[FileRecord], trainer: str, value: dict[str, Any]) -> None:
        if not self._leads:
            return
        folder, disk = self.attempt.folder, self._disk
        record = write_bytes(disk, folder / layout.TRAINER, trainer.encode())
        manifest = dataclasses.replace(Manifest.parts_of(value), files=(*files, record))
        for written in manifest.files:  # a short write says nothing by itself
            path = folder / written.name
            if path.exists() and path.stat().st_size != written.size:
                raise StorageError(f"{path} has {path.stat().st_size} bytes, not {written.size}")
        write_bytes(disk, folder / layout.MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())
        read_manifest(folder)
        disk.sync_folder(folder)

    def _rename(self) -> None:
        if not self._leads:
            return
        attempt, disk = self.attempt, self._disk
        if attempt.final.exists():
            reason = "it was replaced, or is not complete on all hosts"
            put_aside(disk, attempt.root, attempt.final, attempt.name, reason)
        disk.rename(attempt.folder, attempt.final)
        disk.sync_folder(attempt.root)

    def _say_error(self, failure: Failure) -> None:
        """All ranks know."""

    def _drop(self) -> None:
        if self._leads:
            with contextlib.suppress(OSError):
                self._disk.remove_tree(self.attempt.folder)


def places_of(comm: Exchange) -> Hosts:
    """Return which ranks share a disk. Collective."""
    return Hosts.of(comm.gather_json(_place(comm.ranks)))


def _place(ranks: RankInfo) -> list[int]:
    return [ranks.local_rank, ranks.local_world_size]
