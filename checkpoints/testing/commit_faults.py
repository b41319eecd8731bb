"""One fault at one step of the commit protocol, in a real save by two processes, and what is found afterwards.

Two forked processes are the two ranks; they hold checkpoint 1 and save checkpoint 2, in which the fault happens on one
of them. Afterwards a third process looks: it must find checkpoint 1 or checkpoint 2, whole, and be able to save
checkpoint 3, with anything left behind.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.disk import Disk
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.testing.disk_faults import Fault, FaultyDisk
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.store import Snapshot

_NUMEL = 1000
IDENTITY = Identity(model="m")
_ALL = ("exception", "killed", "slow")
_WRITING = ("exception", "disk full", "short write", "killed", "slow")


@dataclass(frozen=True)
class Case:
    """A fault of the table.

    Attributes:
        number: of the step in commit.py's list.
        rank: on which it happens.
        what: the operation in words.
        fault: the operation and what goes wrong; operation "copy" gives the rank a tensor that cannot be stored.
        found: the steps of which one must be found afterwards.
        damaged: folder of which a byte changes after the fault and before anybody looks; "" for none.
    """

    number: int
    rank: int
    what: str
    fault: Fault
    found: tuple[int, ...]
    damaged: str = ""


def cases() -> list[Case]:
    """Return the table: every operation of every step, with every kind of fault that it can meet, and the pairs."""
    return [*_single(), *_pairs()]


def _pairs() -> list[Case]:
    """Return the deaths at which both checkpoints are on the disk, each followed by damage to either.

    What is left is found: before the rename the new one lies complete in a temporary folder, until the old manifest is
    removed the old one is whole.
    """
    old, new, temporary = "step-00000001", "step-00000002", ".tmp-step-00000002-*"
    deaths = [
        (13, "fsync the folder", Fault("sync_folder", ".tmp-*", "killed"), temporary),
        (15, "rename the folder", Fault("rename", new, "killed"), temporary),
        (16, "fsync the root", Fault("sync_folder", "checkpoints", "killed"), new),
        (17, "remove the old manifest", Fault("remove", layout.MANIFEST, "killed"), new),
    ]
    return [
        Case(number, 0, f"{what}, then {which} is damaged", fault, found, damaged)
        for number, what, fault, place in deaths
        for which, damaged, found in (("the old checkpoint", old, (2,)), ("the new one", place, (1,)))
    ]


def _single() -> list[Case]:
    return [
        Case(number, rank, what, Fault(operation, pattern, kind), _expected(number, kind))
        for number, rank, what, operation, pattern, kinds in _operations()
        for kind in kinds
    ]


def _expected(number: int, kind: str) -> tuple[int, ...]:
    return (2,) if number >= 16 or kind == "slow" else (1,)


def _operations() -> Iterator[tuple[int, int, str, str, str, tuple[str, ...]]]:
    yield 1, 0, "remove a leftover", "remove_tree", ".tmp-*-dead", _ALL
    yield 1, 0, "make the folder", "make_folder", ".tmp-*", (*_ALL, "disk full")
    for rank in (0, 1):
        yield 3, rank, "copy to the host", "copy", "", ("exception",)
        own = layout.rank_file(rank, 2)
        silent = ("silent",) if rank else ()
        yield 4, rank, "create the rank file", "create", own, (*_ALL, "disk full", *silent)
        yield 5, rank, "write the rank file", "write", own, (*_WRITING, *silent)
        yield 6, rank, "fsync the rank file", "sync", own, (*_ALL, "disk full", *silent)
    word = layout.done_file(1, 2)
    part = str(Path(word).with_suffix(".part"))
    yield 7, 1, "create the rank's word", "create", part, (*_ALL, "disk full")
    yield 7, 1, "write the rank's word", "write", part, _WRITING
    yield 7, 1, "fsync the rank's word", "sync", part, _ALL
    yield 7, 1, "rename the rank's word", "rename", word, (*_ALL, "silent")
    for number, name in ((9, layout.TRAINER), (12, layout.MANIFEST)):
        yield number, 0, f"create {name}", "create", name, (*_ALL, "disk full")
        yield number, 0, f"write {name}", "write", name, _WRITING
        yield number, 0, f"fsync {name}", "sync", name, (*_ALL, "disk full")
        if number == 9:
            yield 10, 0, "remove the ranks' words", "remove", word, _ALL
    yield 13, 0, "fsync the folder", "sync_folder", ".tmp-*", _ALL
    yield 14, 0, "put a bad folder aside", "rename", "step-00000002-*", _ALL
    yield 15, 0, "rename the folder", "rename", "step-00000002", (*_ALL, "disk full")
    yield 16, 0, "fsync the root", "sync_folder", "checkpoints", _ALL
    yield 17, 0, "remove the old manifest", "remove", layout.MANIFEST, _ALL
    yield 17, 0, "fsync the old folder", "sync_folder", "step-00000001", _ALL
    yield 17, 0, "remove the old folder", "remove_tree", "step-00000001", _ALL


@dataclass(frozen=True)
class Found:
    """What was there after a fault.

    Attributes:
        step: of the checkpoint found.
        whole: whether it holds exactly the values saved at that step.
        told: on each rank, "saved", the error's first words, or how the process ended.
        next_saved: whether another save succeeded afterwards and is found.
    """

    step: int
    whole: bool
    told: tuple[str, str]
    next_saved: bool


def run_case(folder: Path, case: Case, asynchronous: bool = True) -> Found:
    """Run one case in an empty folder.

    Raises:
        TimeoutError: a rank did not end within half a minute.
    """
    root = folder / "checkpoints"
    told = two_ranks(lambda rank, end, report: _as_rank(root, rank, end, case, asynchronous, report))
    if case.damaged:
        _damage(root, case.damaged)
    manager = CheckpointManager(root, Alone(), CheckpointConfig(keep_last=1, keep_best=0))
    checkpoint = manager.newest()
    step = -1 if checkpoint is None else checkpoint.step
    whole = checkpoint is not None and checkpoint.trainer == {"step": step}
    whole = whole and torch.equal(checkpoint.read_full()["w"], values_of(step))  # type: ignore[union-attr]
    manager.save(Snapshot(3, [Fragment("w", "param", 0, (_NUMEL,), values_of(3))], {"step": 3}, {}), IDENTITY)
    after = manager.newest()
    return Found(step, whole, told, after is not None and after.step == 3 and not layout.leftovers(root))


def _damage(root: Path, pattern: str) -> None:
    """Change the last byte of rank 0's file; raises where there is not exactly one such folder with one."""
    (path,) = root.glob(f"{pattern}/{layout.rank_file(0, 2)}")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def values_of(step: int) -> torch.Tensor:
    """Return the values that are saved at a step."""
    return torch.arange(_NUMEL, dtype=torch.float32) + 1000.0 * step


def fragments_of(rank: int, step: int) -> list[Fragment]:
    """Return one of two ranks' half of them."""
    half = _NUMEL // 2
    return [Fragment("w", "param", rank * half, (_NUMEL,), values_of(step)[rank * half : (rank + 1) * half])]


class PairCollectives:
    """The collectives of two processes over a pair of sockets; a peer that is gone is an error at once."""

    def __init__(self, rank: int, end: socket.socket) -> None:
        self.ranks = RankInfo(rank, 2, rank, 2)
        self._told, self._heard = end.makefile("w"), end.makefile("r")

    def barrier(self) -> None:
        """See Collectives."""
        self.gather_json(None)

    def gather_json(self, value: Any) -> list[Any]:
        """See Collectives."""
        self._told.write(json.dumps(value) + "\n")
        self._told.flush()
        line = self._heard.readline()
        if not line:
            raise ConnectionError("the other rank is gone")
        answers = [json.loads(json.dumps(value)), json.loads(line)]
        return answers if self.ranks.is_main else answers[::-1]

    def broadcast_json(self, value: Any) -> Any:
        """See Collectives."""
        return self.gather_json(value)[0]


def two_ranks(be: Callable[[int, socket.socket, int], NoReturn]) -> tuple[str, str]:
    """Fork two ranks and return how each ended.

    Args:
        be: is a rank: is given its number, its end of a pair of sockets, and where to write how it ended; does not
            return.
    """
    ends = socket.socketpair()
    children, pipes = [], []
    for rank in (0, 1):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            ends[1 - rank].close()
            os.close(read)
            be(rank, ends[rank], write)
        os.close(write)
        children.append(pid)
        pipes.append(read)
    for end in ends:
        end.close()
    try:
        first, second = (_outcome(pid, pipe) for pid, pipe in zip(children, pipes, strict=True))
    finally:
        for pipe in pipes:
            os.close(pipe)
    return first, second


def _outcome(pid: int, pipe: int) -> str:
    limit = time.monotonic() + 30
    text = b""
    while select.select([pipe], [], [], max(0.0, limit - time.monotonic()))[0]:
        part = os.read(pipe, 4096)
        text += part
        if not part:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            return text.decode() if code == 0 else "killed" if code == -signal.SIGKILL else f"exit code {code}"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError("a rank did not end")


def _as_rank(root: Path, rank: int, end: socket.socket, case: Case, asynchronous: bool, report: int) -> NoReturn:
    """Be one rank: save 1, prepare the ground for the fault, save 2, say how it went, end."""
    text = "failed before the fault"
    try:
        never_heard = case.rank == 1 and case.fault.kind in ("silent", "killed")
        patience = 0.005 if never_heard else 0.5  # minutes
        config = CheckpointConfig(keep_last=1, keep_best=0, asynchronous=asynchronous, write_timeout_minutes=patience)
        disk = FaultyDisk() if rank == case.rank else Disk()
        manager = CheckpointManager(root, PairCollectives(rank, end), config, disk)
        manager.save(Snapshot(1, fragments_of(rank, 1), {"step": 1}, {}), IDENTITY)
        if rank == 0:
            (root / ".tmp-step-00000002-dead").mkdir()
            (root / "step-00000002").mkdir()
            (root / "step-00000002" / layout.MANIFEST).write_text("{}")
        manager._comm.barrier()
        fragments = fragments_of(rank, 2)
        if isinstance(disk, FaultyDisk):
            disk.fault = case.fault
            if case.fault.operation == "copy":
                fragments = [Fragment("w", "param", 0, (1,), torch.zeros(1, dtype=torch.complex64))]
        try:
            manager.begin(Snapshot(2, fragments, {"step": 2}, {}), IDENTITY)
            manager.finish(last=True)
            text = "saved"
        except (CheckpointError, ConnectionError) as error:
            text = f"{type(error).__name__}: {error}"
            manager.close()
        if isinstance(disk, FaultyDisk) and not disk.hits and case.fault.operation != "copy":
            text = "the fault did not happen"
    except Exception:  # noqa: BLE001 — the parent shows it
        text = f"failed before the fault: {traceback.format_exc()}"
    finally:
        os.write(report, text.encode()[:4000])
        os._exit(0)
