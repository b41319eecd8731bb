"""The commit protocol: how the files of all ranks become one checkpoint, or nothing.

Training waits for steps 1 to 3 only. The rest runs in one thread per rank without collectives, so it cannot interfere
with those of training. The ranks' threads communicate through small files in the folder that is being written. At every
instant, even if any process dies, the folder `step-…` is absent, the old one, or complete:

     1  rank 0  removes what killed attempts left; makes `.tmp-step-…-<attempt>`; broadcasts the attempt's name
     2  all     agree that the step is the same and that every rank sees that folder (else: storage is not shared)
     3  each    copies its fragments to host memory; from here on training may change the originals
     4  each    creates `rank-….safetensors`
     5  each    writes it, and computes the digest of the bytes on the way
     6  each    makes it durable
     7  each    renames `rank-….done.json` into place, its completion record: size and digest, or the error
     8  rank 0  waits for all completion records, up to a timeout; an error or a missing record fails the attempt
     9  rank 0  writes `trainer.json`, durable
    10  rank 0  removes the completion records
    11  rank 0  compares all files with the records, and the headers with each other
    12  rank 0  writes `manifest.json`, durable, and reads it again: from here on the folder describes itself completely
    13  rank 0  makes the names in the folder durable
    14  rank 0  moves a folder that has the final name out of the way: aside if it does not verify; if it does, and is
                to be replaced, to a name under which a later process finds it again: that process deletes it only
                after the folder which has the final name by then has verified
    15  rank 0  renames the folder to `step-…`: the commit
    16  rank 0  makes the rename durable
    17  rank 0  deletes what retention does not keep, manifest first; a failure here only costs space

An attempt that fails before 15 removes its folder; step 1 of the next attempt removes that of a killed one. After a
failure at 16 the new checkpoint is complete, though a power failure may still bring back the old one.

Damage after a kill costs no more than damage alone. Where both folders of a step exist (14 to 17), the one that
verifies stays. Where no checkpoint verifies, a folder that was complete when its writer was killed (13 to 15) and
verifies is given its final name (`adopt_complete`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from checkpoints import layout
from checkpoints.digest import read_small
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError, StorageError
from checkpoints.manifest import FileRecord, Manifest, read_manifest, size_faults
from checkpoints.rankfile import write_bytes, write_rank_file
from checkpoints.reader import check_rank_files, verify
from checkpoints.strictjson import parse
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.ranks import RankInfo

log = logging.getLogger(__name__)

_LOOK_EVERY_S = (0.002, 0.1)  # first and longest pause between two looks for completion records
_MAX_WORD = 1 << 20  # bytes

# System errors that need a repair; of all others (an input/output error, a stale handle) some are transient.
_LASTING = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    )
)


@dataclass(frozen=True)
class Failure:
    """Why a save failed on this rank.

    Attributes:
        step: that was being saved.
        text: the reason, with the rank that failed in front.
        disk_full: there was no room.
        transient: a later attempt may succeed.
    """

    step: int
    text: str
    disk_full: bool
    transient: bool = False


@dataclass(frozen=True)
class Attempt:
    """One attempt to save a step, the same on all ranks.

    Attributes:
        root: the `checkpoints` folder.
        step: optimizer steps done.
        name: random, new for each attempt.
        ranks: this process's place.
        replaces: whether it replaces a checkpoint of this step that verifies.
        replaces: takes the place of a checkpoint of this step that verifies.
        copied: a copy in the object store is made of it (mirror.py).
    """

    root: Path
    step: int
    name: str
    ranks: RankInfo
    replaces: bool = False
    copied: bool = False

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return layout.temporary_folder(self.root, self.step, self.name)

    @property
    def final(self) -> Path:
        """Where it goes."""
        return layout.step_folder(self.root, self.step)


@dataclass(frozen=True)
class Payload:
    """What one rank writes.

    Attributes:
        header: of its rank file.
        parts: the bytes of its tensors, in pieces.
        trainer: bytes of trainer.json; rank 0's.
        manifest: all but the files; rank 0's.
    """

    header: bytes
    parts: Iterable[memoryview]
    trainer: bytes
    manifest: Manifest


class Save:
    """Steps 4 to 17 on one rank; one save at a time works, in the order in which they were begun.

    Args:
        attempt: which one.
        payload: what to write, or why there is nothing to write: a copy that failed on this rank alone.
        disk: the disk.
        patience_s: how long to wait for the other ranks.
        before: the save that must have ended first.
        after_commit: rank 0: step 17.
        after_word: other ranks: what follows step 7.
        free: called when the payload's memory is no longer needed.

    Attributes:
        failure: why it failed on this rank; None while it runs, and where it did not.
    """

    def __init__(
        self,
        attempt: Attempt,
        payload: Payload | Exception,
        disk: Disk,
        patience_s: float,
        before: Save | None,
        after_commit: Callable[[Attempt], None],
        free: Callable[[], None],
        after_word: Callable[[Attempt], None] = lambda attempt: None,
    ) -> None:
        self.attempt = attempt
        self.failure: Failure | None = None
        self._payload: Payload | Exception | None = payload
        self._disk = disk
        self._patience_s = patience_s
        self._before = before
        self._after_commit = after_commit
        self._after_word = after_word
        self._free = free
        self._last_moment = math.inf
        self._thread: threading.Thread | None = None

    def start(self, in_background: bool) -> None:
        """Do the work, in a thread of its own or in this one."""
        if not in_background:
            self._run()
            return
        self._thread = threading.Thread(target=self._run, name=f"save-{self.attempt.step}")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread still works."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the work has ended."""
        if self._thread is not None:
            self._thread.join()

    def hurry(self, seconds: float) -> None:
        """Wait at most this long from now for ranks that have not said their word: one of them may be gone."""
        self._last_moment = time.monotonic() + seconds

    def _run(self) -> None:
        if self._before is not None:
            self._before.wait()
            self._before = None
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 — raised on all ranks, see CheckpointManager.finish
            self.failure = self._failure(error)
            log.warning(
                "saving the checkpoint of step %d failed and is abandoned: %s", self.attempt.step, self.failure.text
            )
            self._say_error(self.failure)
            self._drop()
        except BaseException:
            self._drop()
            raise

    def _work(self) -> None:
        payload, self._payload = self._payload, None
        try:
            if not isinstance(payload, Payload):
                assert payload is not None  # a save is started once
                raise payload
            record = self._write(payload)
        finally:
            self._free()
        if self.attempt.ranks.is_main:
            self._commit(payload, [record, *self._others()])
            self._after_commit(self.attempt)
        else:
            self._say({"record": record.model_dump()})
            self._after_word(self.attempt)

    def _write(self, payload: Payload) -> FileRecord:
        ranks = self.attempt.ranks
        path = self.attempt.folder / layout.rank_file(ranks.rank, ranks.world_size)
        return write_rank_file(self._disk, path, payload.header, payload.parts)

    def _drop(self) -> None:
        discard(self.attempt, self._disk)

    # The ranks' words.

    def _say(self, word: dict[str, object]) -> None:
        """Leave a word for rank 0."""
        ranks = self.attempt.ranks
        path = self.attempt.folder / layout.done_file(ranks.rank, ranks.world_size)
        aside = path.with_suffix(".part")
        self._disk.remove(aside)
        write_bytes(self._disk, aside, json.dumps(word).encode())
        self._disk.rename(aside, path)

    def _say_error(self, failure: Failure) -> None:
        """Tell rank 0 of a failure on this rank, if need be with an empty word, which takes no room on a full disk."""
        ranks = self.attempt.ranks
        if ranks.is_main:
            return
        discard(self.attempt, self._disk)  # room for the word
        try:
            self._say({"error": failure.text, "disk_full": failure.disk_full, "transient": failure.transient})
        except OSError:
            with contextlib.suppress(OSError):
                (self.attempt.folder / layout.done_file(ranks.rank, ranks.world_size)).touch()

    def _others(self) -> list[FileRecord]:
        """Wait for all other ranks' words.

        Raises:
            PeerFailedError: a rank says that it failed.
            StorageError: a rank says nothing in time.
        """
        ranks = self.attempt.ranks
        limit = time.monotonic() + self._patience_s
        pause, longest = _LOOK_EVERY_S
        records: dict[int, FileRecord] = {}
        while len(records) < ranks.world_size - 1:
            for rank in range(1, ranks.world_size):
                if rank not in records and (record := self._word_of(rank)) is not None:
                    records[rank] = record
            if len(records) == ranks.world_size - 1:
                break
            if time.monotonic() > min(limit, self._last_moment):
                missing = ", ".join(str(rank) for rank in range(1, ranks.world_size) if rank not in records)
                raise StorageError(
                    f"rank {missing} did not finish its file in time ({self._patience_s:.0f} s): see its log, or raise "
                    "checkpoint.write_timeout_minutes"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, longest)
        return [records[rank] for rank in sorted(records)]

    def _word_of(self, rank: int) -> FileRecord | None:
        path = self.attempt.folder / layout.done_file(rank, self.attempt.ranks.world_size)
        if not path.exists():
            return None
        data = read_small(path, _MAX_WORD)
        if not data:
            # The reason is in its own failure, see `CheckpointManager.finish`.
            raise PeerFailedError(
                f"rank {rank}: could not write its file, and gave no reason", disk_full=False, transient=True
            )
        word = parse(data, str(path))
        if "record" not in word:
            raise PeerFailedError(str(word["error"]), bool(word["disk_full"]), bool(word["transient"]))
        return FileRecord.model_validate(word["record"])

    # Rank 0.

    def _commit(self, payload: Payload, records: list[FileRecord]) -> None:
        attempt, disk = self.attempt, self._disk
        world_size = attempt.ranks.world_size
        trainer = write_bytes(disk, attempt.folder / layout.TRAINER, payload.trainer)
        for rank in range(1, world_size):
            disk.remove(attempt.folder / layout.done_file(rank, world_size))
        manifest = dataclasses.replace(payload.manifest, files=(*records, trainer))
        faults = size_faults(attempt.folder, manifest)
        if faults:
            raise DamagedError(f"{attempt.folder} is not as it was written: {'; '.join(faults)}")
        check_rank_files(attempt.folder, world_size)
        write_bytes(disk, attempt.folder / layout.MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())
        read_manifest(attempt.folder)  # the one file whose size nothing else states
        disk.sync_folder(attempt.folder)
        if not self._make_way():
            return
        try:
            disk.rename(attempt.folder, attempt.final)
        except OSError:
            restore_replaced(attempt.root, disk)
            raise
        disk.sync_folder(attempt.root)
        log.info("checkpoint %s", attempt.final)
        if attempt.replaces:
            restore_replaced(attempt.root, disk)

    def _make_way(self) -> bool:
        """Step 14; return False if a checkpoint that verifies has the name and is to keep it."""
        attempt, disk = self.attempt, self._disk
        if not attempt.final.exists():
            return True
        if attempt.replaces:
            disk.rename(attempt.final, layout.replaced_folder(attempt.root, attempt.step, attempt.name))
            return True
        try:
            verify(attempt.final)
        except CheckpointError as error:
            sound = not isinstance(error, DamagedError)
            put_aside(disk, attempt.root, attempt.final, attempt.name, f"{error}; it was saved again", keep=sound)
            return True
        log.warning("checkpoint %s verifies now and is kept", attempt.final)
        discard(attempt, disk)
        return False

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, PeerFailedError):
            return Failure(self.attempt.step, str(error), error.disk_full, error.transient)
        text = f"rank {self.attempt.ranks.rank}: {describe(error)}"
        return Failure(self.attempt.step, text, disk_full(error), is_transient(error))


def discard(attempt: Attempt, disk: Disk) -> None:
    """Remove what this rank has begun. No waiting for anybody: a peer may be gone by now."""
    ranks = attempt.ranks
    with contextlib.suppress(OSError):
        if ranks.is_main:
            disk.remove_tree(attempt.folder)
        else:
            disk.remove(attempt.folder / layout.rank_file(ranks.rank, ranks.world_size))


class PeerFailedError(CheckpointError):
    """Another rank has said that it failed; the message is its own, and the rest as in `Failure`."""

    def __init__(self, message: str, disk_full: bool, transient: bool) -> None:
        super().__init__(message)
        self.disk_full = disk_full
        self.transient = transient


def put_aside(disk: Disk, root: Path, folder: Path, attempt: str, reason: str, keep: bool = False) -> None:
    """Move a folder to where it is never counted again, with the reason next to it.

    Args:
        disk: the disk.
        root: the `checkpoints` folder.
        folder: one of its folders.
        attempt: makes the new name unique.
        reason: why.
        keep: it may be sound, and is never deleted; otherwise retention lets all but the newest go.

    Raises:
        OSError: it could not be moved.
    """
    aside = (layout.superseded_folder if keep else layout.aside_folder)(root, folder.name, attempt)
    disk.make_folder(aside.parent)
    disk.rename(folder, aside)
    with contextlib.suppress(OSError):  # the reason is a courtesy; the move is what counts
        write_bytes(disk, layout.reason_file(aside), f"{reason}\n".encode(errors="backslashreplace"))


def restore_replaced(root: Path, disk: Disk) -> None:
    """Settle which of the two folders of a step stays, where a process was killed while one replaced the other.

    The old one gets its name back if the new one did not take it, or does not verify. Only after the new one has
    verified is the old one deleted. What cannot be read or moved stays where it is, with a warning: a later call tries
    again.
    """
    for old, final in layout.replaced(root):
        try:
            _settle(root, old, final, disk)
        except (OSError, CheckpointError) as error:
            log.warning(
                "%s could not be deleted and stays next to %s for now: %s", old.name, final.name, describe(error)
            )


def _settle(root: Path, old: Path, final: Path, disk: Disk) -> None:
    if not (final.exists() or final.is_symlink()):
        disk.rename(old, final)
        return
    fault = _damage(final)
    if fault is None:
        delete_checkpoint(old, disk)
        return
    _, _, attempt = old.name.rpartition("-")
    if (also := _damage(old, final.name)) is not None:  # which of the two is worth more is unknown: both are kept
        put_aside(disk, root, old, attempt, f"{also}; and the one that was to replace it: {fault}")
        return
    log.warning("checkpoint %s does not verify, so the one that it replaced is restored: %s", final, fault)
    put_aside(disk, root, final, attempt, f"{fault}; the checkpoint that it replaced verifies and has its name again")
    disk.rename(old, final)
    disk.sync_folder(root)


def _damage(folder: Path, named: str | None = None) -> str | None:
    """Return why a folder does not verify, None where it does; `named` is the name that its manifest must fit.

    Raises:
        CheckpointError: nothing is known of its bytes (it cannot be read, is a link, or of a later format).
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link, and links are not followed")
    try:
        step = verify(folder).step
    except DamagedError as error:
        return str(error)
    if named is not None and layout.step_of(folder.with_name(named)) != step:
        return f"its manifest is of step {step}"
    return None


def adopt_complete(root: Path, disk: Disk) -> list[Path]:
    """Give folders whose writer was killed between their completion and the commit their names; return those.

    For a search that has found nothing else: they verify in full, and no folder of their step is there.
    """
    adopted = []
    for leftover in layout.leftovers(root):
        final = layout.final_of(leftover)
        if final is None or final.exists() or final.is_symlink() or not (leftover / layout.MANIFEST).exists():
            continue
        try:
            if _damage(leftover, final.name) is not None:
                continue
            disk.rename(leftover, final)
            disk.sync_folder(root)
        except (OSError, CheckpointError) as error:
            log.warning("%s is left where it is: %s", leftover, describe(error))
            continue
        log.warning(
            "checkpoint %s was complete when its writer was killed, and is taken as nothing else is left", final
        )
        adopted.append(final)
    return sorted(adopted, key=lambda path: layout.step_of(path) or 0, reverse=True)


def delete_checkpoint(folder: Path, disk: Disk | None = None) -> None:
    """Delete a folder, its manifest first: at no instant is there a manifest with files missing.

    Raises:
        OSError: it could not be deleted in full.
    """
    disk = disk or Disk()
    disk.remove(folder / layout.MANIFEST)
    disk.sync_folder(folder)
    disk.remove_tree(folder)


def describe(error: Exception) -> str:
    """Return an error as the end of a sentence, with the repair for a full disk."""
    if isinstance(error, CheckpointError):
        return str(error)
    repair = " (make room there, or lower checkpoint.keep_last and checkpoint.keep_best)" if disk_full(error) else ""
    return f"{type(error).__name__}: {error}{repair}"


def disk_full(error: Exception) -> bool:
    """Return whether an error says that there is no room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_transient(error: Exception) -> bool:
    """Return whether the same may go well another time: the storage failed, or what it holds changed meanwhile."""
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return isinstance(error, (DamagedError, StorageError))
