"""The only class of this package that the engine sees: save, find the newest that verifies, load.

Saving is a short protocol over all ranks. Each phase ends with every rank knowing whether every other one
succeeded, so that an error anywhere is raised everywhere, nobody waits for a rank that has given up, and
nothing half-written stays:

    rank 0   sweep leftovers; is the step there already and sound? -> all
    each     write rank file into .tmp-step-*, fsync, size and sha256 -> all
    rank 0   trainer.json, manifest.json, fsync, rename into place    -> all
    rank 0   delete what the policy lets go, manifest first
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity, digest_json
from checkpoints.manifest import FileRecord, Manifest, hash_faults, read_manifest, size_faults
from checkpoints.policy import Candidate, best_first, steps_to_delete
from checkpoints.reader import Checkpoint, Entry, Skipped, list_checkpoints, verify
from checkpoints.writer import delete_checkpoint, fragment_key, publish, sync_folder, write_json, write_rank_file
from setformer_dist.core.comm import Collectives
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment

_log = logging.getLogger(__name__)


class CheckpointManager:
    """Keeps the checkpoints of one run in one folder. All ranks call each method, in the same order.

    Attributes:
        skipped: what the last search passed over, with reasons.
    """

    def __init__(self, root: Path, comm: Collectives, config: CheckpointConfig) -> None:
        self.root = root
        self.skipped: list[Skipped] = []
        self._comm = comm
        self._config = config

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        trainer: dict[str, Any],
        identity: Identity,
        metrics: Mapping[str, float],
        tags: Sequence[str] = (),
    ) -> Path:
        """Write a checkpoint; when this returns it is durable and visible, on every rank.

        A checkpoint of this step that verifies already is left as it is.

        Args:
            step: optimizer steps done.
            fragments: this rank's share, or everything on every rank (then each writes an equal part of it).
            trainer: JSON-able state besides tensors; rank 0's counts.
            identity: what writes; its world size is taken from the ranks.
            metrics: latest evaluation, for the listing and for `keep_best`.
            tags: words for the manifest; `policy.KEEP_TAG` protects from deletion.

        Raises:
            CheckpointError: on every rank, if any of them could not write.
        """
        folder = layout.step_folder(self.root, step)
        if self._on_main("prepare", lambda: self._prepare(step)):
            return folder
        try:
            mine = self._collect(step, fragments)
            records = self._everywhere("write", lambda: self._write_mine(step, mine).model_dump())
            identity = identity.model_copy(update={"world_size": self._comm.ranks.world_size})
            manifest = Manifest(step, _now(), identity, tuple(_records(records)), dict(metrics), tuple(tags))
            self._on_main("commit", lambda: self._commit(manifest, trainer))
        except BaseException:  # a peer's death in the middle of a collective included
            self._discard(step)
            raise
        self._apply_policy(step)
        return folder

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies, the same on every rank, or None.

        Every rank hashes its share of the files; rank 0 decides. What does not verify is warned of, kept on
        disk, and listed in `skipped`.
        """
        return self._first_sound(lambda entries: entries)

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the best value of the configured metric that verifies, or None."""

        def ranked(entries: Sequence[Entry]) -> Sequence[Entry]:
            by_step = {e.manifest.step: e for e in entries if e.manifest is not None}
            return [by_step[c.step] for c in best_first(_candidates(entries), self._config)]

        return self._first_sound(ranked)

    def load(self, checkpoint: Checkpoint, fragments: Iterable[Fragment]) -> None:
        """Fill this rank's fragments; an error on one rank is raised on all, so that nobody trains on alone.

        Raises:
            CheckpointError: see `Checkpoint.load_into`.
        """
        self._everywhere("load", lambda: checkpoint.load_into(fragments))

    def list(self) -> Sequence[Entry]:
        """Return what is in the folder, newest first, checked by manifest and sizes; no communication."""
        return list_checkpoints(self.root)

    # Saving, phase by phase.

    def _prepare(self, step: int) -> bool:
        """Rank 0: make room; tell whether the step is there already and sound."""
        if not self.root.exists():
            self.root.mkdir(parents=True)
            sync_folder(self.root.parent)
        for leftover in layout.leftovers(self.root):
            shutil.rmtree(leftover)
        folder = layout.step_folder(self.root, step)
        if not folder.exists():
            return False
        try:
            verify(folder)
        except CheckpointError as error:
            _log.warning("checkpoint is written anew: %s", error)
            return False
        _log.info("checkpoint %s is there already and verifies", folder)
        return True

    def _collect(self, step: int, fragments: Iterable[Fragment]) -> Sequence[Fragment]:
        """Materialise this rank's fragments; where all ranks hold the same, take this rank's cut of each."""
        mine: list[Fragment] = []

        def describe() -> dict[str, Any]:
            mine.extend(fragments)
            return {"step": step, "keys": digest_json(sorted(fragment_key(f) for f in mine))}

        answers = self._everywhere("collect", describe)
        if any(answer["step"] != step for answer in answers):
            raise CheckpointError(f"ranks save different steps: {[answer['step'] for answer in answers]}")
        replicated = all(answer["keys"] == answers[0]["keys"] for answer in answers)
        ranks = self._comm.ranks
        return [_cut(f, ranks.rank, ranks.world_size) for f in mine] if replicated else mine

    def _write_mine(self, step: int, fragments: Sequence[Fragment]) -> FileRecord:
        folder = layout.temporary_folder(self.root, step)
        # Every rank makes the folder: over NFS another host may not see rank 0's for a while.
        folder.mkdir(parents=True, exist_ok=True)
        ranks = self._comm.ranks
        return write_rank_file(folder / layout.rank_file(ranks.rank, ranks.world_size), fragments)

    def _commit(self, manifest: Manifest, trainer: dict[str, Any]) -> None:
        """Rank 0: trainer state, then the manifest, then the rename that makes it a checkpoint."""
        folder = layout.temporary_folder(self.root, manifest.step)
        record = write_json(folder / layout.TRAINER, trainer)
        manifest = dataclasses.replace(manifest, files=(*manifest.files, record))
        faults = size_faults(folder, manifest)
        if faults:
            raise CheckpointError(
                f"rank 0 does not see what the ranks wrote to {folder} ({'; '.join(faults)}): "
                "the run folder must be on storage that all hosts share"
            )
        write_json(folder / layout.MANIFEST, manifest.to_json())
        publish(folder, layout.step_folder(self.root, manifest.step))

    def _discard(self, step: int) -> None:
        """Remove what was begun. No waiting: all ranks have ended their part, and a peer may be gone by now."""
        folder = layout.temporary_folder(self.root, step)
        ranks = self._comm.ranks
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            return
        # Where storage turns out not to be shared, rank 0 cannot reach this.
        with contextlib.suppress(OSError):
            (folder / layout.rank_file(ranks.rank, ranks.world_size)).unlink(missing_ok=True)
            folder.rmdir()

    def _apply_policy(self, step: int) -> None:
        """Rank 0: delete what may go. A failure costs space, not the run, so it only warns."""
        if not self._comm.ranks.is_main:
            return
        for old in steps_to_delete(_candidates(self.list()), step, self._config):
            try:
                delete_checkpoint(layout.step_folder(self.root, old))
            except OSError as error:
                _log.warning("old checkpoint of step %d could not be deleted: %s", old, error)

    # Finding.

    def _first_sound(self, choose: Callable[[Sequence[Entry]], Sequence[Entry]]) -> Checkpoint | None:
        self.skipped = []
        for name in self._on_main("list", lambda: [entry.path.name for entry in choose(self.list())]):
            folder = self.root / name
            manifest, fault = self._examine(folder)
            if manifest is not None and fault is None:
                return Checkpoint(folder, manifest)
            self.skipped.append(Skipped(folder, fault or "no manifest"))
            if self._comm.ranks.is_main:
                _log.warning("checkpoint %s is passed over: %s", name, fault)
        return None

    def _examine(self, folder: Path) -> tuple[Manifest | None, str | None]:
        """Verify one folder, all ranks together: rank 0 reads the manifest, each hashes its share of files."""

        def read() -> dict[str, Any]:
            try:
                manifest = read_manifest(folder)
            except CheckpointError as error:
                return {"fault": str(error)}
            return {"manifest": manifest.to_json(), "fault": "; ".join(size_faults(folder, manifest)) or None}

        found = self._on_main("examine", read)
        if found["fault"] is not None:
            return None, found["fault"]
        manifest = Manifest.from_json(found["manifest"], str(folder / layout.MANIFEST))
        ranks = self._comm.ranks
        share = manifest.files[ranks.rank :: ranks.world_size]
        by_rank = self._everywhere("verify", lambda: hash_faults(folder, share))
        return manifest, "; ".join(fault for faults in by_rank for fault in faults) or None

    # Telling everyone.

    def _everywhere(self, what: str, work: Callable[[], Any]) -> Sequence[Any]:
        """Do something on every rank, return all results on all, or raise on all if it failed on any."""
        cause: Exception | None = None
        try:
            answer = {"value": work()}
        except Exception as error:  # noqa: BLE001 — whatever it is, the other ranks must hear of it
            cause, answer = error, {"error": _describe(error)}
        answers = self._comm.gather_json(answer)
        failed = [f"rank {r}: {a['error']}" for r, a in enumerate(answers) if "error" in a]
        if failed:
            raise CheckpointError(f"could not {what} the checkpoint in {self.root}: {'; '.join(failed)}") from cause
        return [a["value"] for a in answers]

    def _on_main(self, what: str, work: Callable[[], Any]) -> Any:
        """Do something on rank 0 alone and tell all its result, or raise on all if it failed."""
        answer: dict[str, Any] = {}
        cause: Exception | None = None
        if self._comm.ranks.is_main:
            try:
                answer = {"value": work()}
            except Exception as error:  # noqa: BLE001 — whatever it is, the other ranks must hear of it
                cause, answer = error, {"error": _describe(error)}
        answer = self._comm.broadcast_json(answer)
        if "error" in answer:
            raise CheckpointError(f"could not {what} the checkpoint in {self.root}: {answer['error']}") from cause
        return answer["value"]


def _describe(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    repair = " (make room there, or lower checkpoint.keep_last and checkpoint.keep_best)" if full else ""
    return f"{type(error).__name__}: {error}{repair}"


def _records(values: Iterable[Any]) -> list[FileRecord]:
    return [FileRecord.model_validate(value) for value in values]


def _candidates(entries: Iterable[Entry]) -> list[Candidate]:
    found = []
    for entry in entries:
        step = layout.step_of(entry.path)
        assert step is not None
        manifest = entry.manifest
        if manifest is None:
            found.append(Candidate(step, sound=False))
        else:
            found.append(Candidate(step, entry.fault is None, manifest.metrics, manifest.tags))
    return found


def _cut(fragment: Fragment, rank: int, world_size: int) -> Fragment:
    numel = fragment.tensor.numel()
    first, last = numel * rank // world_size, numel * (rank + 1) // world_size
    tensor = fragment.tensor.reshape(-1)[first:last]
    return dataclasses.replace(fragment, start=fragment.start + first, tensor=tensor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
