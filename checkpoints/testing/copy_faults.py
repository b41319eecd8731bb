"""One fault at one step of making a copy in an object store, by two processes, and what is found afterwards.

As in `commit_faults` two forked processes are the two ranks; they hold checkpoint 1 and its copy, and save checkpoint
2, in whose copy the fault happens. Afterwards their disk is gone: a run with an empty folder must go on from copy 1 or
copy 2, whole, and be able to save and copy checkpoint 3 whatever was left in the store.
"""

from __future__ import annotations

import fnmatch
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.copies import list_copies, verify_copy
from checkpoints.errors import StorageError
from checkpoints.manager import CheckpointManager
from checkpoints.objects import Objects
from checkpoints.testing.commit_faults import IDENTITY, PairCollectives, fragments_of, two_ranks, values_of
from checkpoints.testing.disk_faults import Fault
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot

_MINUTES = 0.1  # that a copy may take
_ALL = ("passing", "refused", "killed", "slow")


class FaultyObjects(Objects):
    """A store of which one operation fails.

    Attributes:
        fault: what goes wrong: "passing" (an error, once), "refused" (an error, each time), "cut" (half of the bytes
            are put, without a word, once), "killed" (SIGKILL of this process) or "slow".
        hits: how often it went wrong.
    """

    fault: Fault | None = None
    hits = 0

    def _meets(self, operation: str, name: str) -> str:
        fault = self.fault
        if fault is None or operation != fault.operation or not fnmatch.fnmatch(name, fault.pattern):
            return ""
        self.hits += 1
        if fault.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "refused":
            raise CheckpointError(f"{name} is refused")
        if self.hits > 1:
            return ""
        if fault.kind == "passing":
            raise StorageError(f"{name} does not pass")
        if fault.kind == "slow":
            time.sleep(0.3)
        return fault.kind

    def put(self, name: str, parts: Iterable[bytes | memoryview], size: int) -> None:
        """See Objects."""
        if self._meets("put", name) == "cut":
            data = b"".join(parts)[: size // 2]
            parts, size = [data], len(data)
        super().put(name, parts, size)

    def read(self, name: str, limit: int) -> bytes:
        """See Objects."""
        self._meets("read", name)
        return super().read(name, limit)

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """See Objects."""
        self._meets("blocks", name)
        yield from super().blocks(name, size)

    def names(self, folder: str = "") -> list[str]:
        """See Objects."""
        self._meets("names", folder)
        return super().names(folder)

    def remove(self, name: str) -> None:
        """See Objects."""
        self._meets("remove", name)
        super().remove(name)


@dataclass(frozen=True)
class Case:
    """A fault of the table.

    Attributes:
        number: of the step in mirror.py's list.
        rank: on which it happens.
        what: the operation in words.
        fault: the operation and what goes wrong.
        found: the step that must be found in the store afterwards.
    """

    number: int
    rank: int
    what: str
    fault: Fault
    found: int


def cases() -> list[Case]:
    """Return the table: every operation of every step, with every kind of fault that it can meet."""
    return [
        Case(number, rank, what, Fault(operation, pattern, kind), _expected(complete, kind))
        for number, rank, what, operation, pattern, kinds, complete in _operations()
        for kind in kinds
    ]


def _expected(complete: bool, kind: str) -> int:
    return 2 if complete or kind in ("passing", "slow", "cut") else 1


def _operations() -> Iterator[tuple[int, int, str, str, str, tuple[str, ...], bool]]:
    new, old = "step-00000002-*", "step-00000001-*"
    for rank in (0, 1):
        own = f"{new}/{layout.rank_file(rank, 2)}"
        yield 3, rank, "put the rank file", "put", own, (*_ALL, "cut"), False
        yield 4, rank, "read the rank file back", "blocks", own, _ALL, False
    yield 3, 0, "put trainer.json", "put", f"{new}/{layout.TRAINER}", (*_ALL, "cut"), False
    word = f"{new}/{layout.done_file(1, 2)}"
    yield 5, 1, "put the rank's word", "put", word, ("passing", "killed", "slow"), False
    yield 6, 0, "look for the words", "names", new, _ALL, False
    yield 6, 0, "read the rank's word", "read", word, _ALL, False
    yield 7, 0, "remove the rank's word", "remove", word, _ALL, False
    manifest = f"{new}/{layout.MANIFEST}"
    yield 8, 0, "put the manifest", "put", manifest, (*_ALL, "cut"), False
    yield 8, 0, "read the manifest back", "read", manifest, _ALL, True
    yield 9, 0, "list the copies", "names", "", _ALL, True
    yield 9, 0, "remove the old manifest", "remove", f"{old}/{layout.MANIFEST}", _ALL, True
    yield 9, 0, "remove an old file", "remove", f"{old}/{layout.rank_file(0, 2)}", _ALL, True


@dataclass(frozen=True)
class Found:
    """What was in the store after a fault.

    Attributes:
        step: of the copy from which the run went on.
        whole: whether it holds exactly the values saved at that step.
        told: on each rank, what became of the copy, or how the process ended.
        next_copied: whether another checkpoint was saved and copied afterwards, and nothing else is left.
    """

    step: int
    whole: bool
    told: tuple[str, str]
    next_copied: bool


def run_case(folder: Path, url: str, case: Case) -> Found:
    """Run one case in an empty folder and with an empty place in a store.

    Raises:
        TimeoutError: a rank did not end within half a minute.
    """
    told = two_ranks(lambda rank, end, report: _as_rank(folder / "lost", url, rank, end, case, report))
    objects = Objects(url)
    config = CheckpointConfig(keep_last=1, keep_best=0, mirror_minutes=_MINUTES)
    manager = CheckpointManager(folder / "checkpoints", Alone(), config, objects=objects)
    checkpoint = manager.newest()
    step = -1 if checkpoint is None else checkpoint.step
    whole = checkpoint is not None and checkpoint.trainer == {"step": step}
    whole = whole and torch.equal(checkpoint.read_full()["w"], values_of(step))  # type: ignore[union-attr]
    fragment = Fragment("w", "param", 0, (len(values_of(3)),), values_of(3))
    manager.save(Snapshot(3, [fragment], {"step": 3}, {}), IDENTITY)
    finish(manager)
    copies = list_copies(objects)
    left = [copy.manifest.step if copy.manifest else -1 for copy in copies]
    sound = not any(fault for copy in copies for fault in verify_copy(objects, copy))
    return Found(step, whole, told, left == [3] and sound)


def finish(manager: CheckpointManager, seconds: float = 20.0) -> None:
    """Wait for the copies as a trainer does."""
    limit = time.monotonic() + seconds
    while not manager.finish_copies(0.1) and time.monotonic() < limit:
        pass


def _as_rank(root: Path, url: str, rank: int, end: socket.socket, case: Case, report: int) -> NoReturn:
    """Be one rank: save and copy 1, save 2 with the fault in its copy, say what became of it, end."""
    text = "failed before the fault"
    try:
        config = CheckpointConfig(keep_last=1, keep_best=0, mirror_minutes=_MINUTES)
        objects = FaultyObjects(url)
        manager = CheckpointManager(root, PairCollectives(rank, end), config, objects=objects)
        manager.begin(Snapshot(1, fragments_of(rank, 1), {"step": 1}, {}), IDENTITY)
        manager.finish(last=True)
        finish(manager)
        manager.copies()
        objects.fault = case.fault if rank == case.rank else None
        try:
            manager.begin(Snapshot(2, fragments_of(rank, 2), {"step": 2}, {}), IDENTITY)
            manager.finish(last=True)
            finish(manager)
            text = "; ".join(event.text for event in manager.copies()) or "nothing"
        except (CheckpointError, ConnectionError) as error:
            text = f"{type(error).__name__}: {error}"
            manager.close()
        if rank == case.rank and not objects.hits:
            text = "the fault did not happen"
    except Exception:  # noqa: BLE001 — the parent shows it
        text = f"failed before the fault: {traceback.format_exc()}"
    finally:
        os.write(report, text.encode()[:4000])
        os._exit(0)
