"""The only class of this package that the engine sees: save, find the newest that verifies, load.

How a save proceeds is written down in commit.py. Whatever takes several ranks ends with every rank knowing whether
every other one succeeded, so that an error anywhere is raised everywhere, nobody waits for a rank that has given up,
and nobody trains on alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from checkpoints import layout
from checkpoints.commit import (
    Attempt,
    Failure,
    Payload,
    Save,
    delete_checkpoint,
    describe,
    discard,
    disk_full,
    put_aside,
)
from checkpoints.config import CheckpointConfig
from checkpoints.digest import Seen
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError
from checkpoints.identity import Identity, digest_json
from checkpoints.manifest import Manifest, examine_files, read_manifest, size_faults
from checkpoints.policy import ASIDE_KEPT, best_first, steps_to_delete
from checkpoints.rankfile import Layout, fragment_key, image_parts
from checkpoints.reader import Checkpoint, Entry, Skipped, candidates, check_rank_files, list_checkpoints, verify
from setformer_dist.core.comm import Collectives
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment

_log = logging.getLogger(__name__)

_GRACE_S = 20.0  # for the other ranks' files when this rank ends with an error; a supervisor is quicker if one is dead


class CheckpointManager:
    """Keeps the checkpoints of one run in one folder. All ranks call each method, in the same order.

    Attributes:
        skipped: what the last search passed over, with reasons.
    """

    def __init__(self, root: Path, comm: Collectives, config: CheckpointConfig, disk: Disk | None = None) -> None:
        self.root = root
        self.skipped: list[Skipped] = []
        self._comm = comm
        self._config = config
        self._disk = disk or Disk()
        self._saves: list[Save] = []
        self._failures: list[Failure] = []  # of saves that could not even begin
        self._images: list[torch.Tensor] = []

    # Saving.

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

        Args and errors: as `begin`, and what `finish` raises.
        """
        folder = self._begin(step, fragments, trainer, identity, metrics, tags, asynchronous=False)
        self.finish(last=True)
        return folder

    def begin(
        self,
        step: int,
        fragments: Iterable[Fragment],
        trainer: dict[str, Any],
        identity: Identity,
        metrics: Mapping[str, float],
        tags: Sequence[str] = (),
    ) -> Path:
        """Copy the state of this step to host memory and return; threads write the checkpoint.

        With `asynchronous = false` it is written before this returns. A checkpoint of this step that verifies
        already is left as it is. Where `max_in_flight` copies wait to be written, this waits for the oldest. How
        the writing went, `failed` and `finish` tell.

        Args:
            step: optimizer steps done.
            fragments: this rank's share, or everything on every rank (then each writes an equal part of it).
            trainer: JSON-able state besides tensors; rank 0's counts.
            identity: what writes; its world size is taken from the ranks.
            metrics: latest evaluation, for the listing and for `keep_best`.
            tags: words for the manifest; `policy.KEEP_TAG` protects from deletion.

        Raises:
            CheckpointError: on every rank, if any of them could not even begin.
        """
        return self._begin(step, fragments, trainer, identity, metrics, tags, self._config.asynchronous)

    def failed(self) -> bool:
        """Return whether a save has failed on this rank since the last `finish`. No communication, no waiting."""
        return bool(self._failures) or any(save.failure is not None for save in self._saves)

    def finish(self, last: bool = False) -> None:
        """Wait until all saves that were begun have ended, and hear how, on every rank.

        Args:
            last: no checkpoint will follow, so that a full disk cannot be borne.

        Raises:
            CheckpointError: on every rank, if a save failed on any; a full disk is only warned of where the config
                says so and another save is to follow.
        """
        for save in self._saves:
            save.wait()
        mine = [*self._failures, *(save.failure for save in self._saves if save.failure is not None)]
        self._failures.clear()
        self._saves.clear()
        by_rank = self._comm.gather_json([dataclasses.asdict(failure) for failure in mine])
        failures = list(dict.fromkeys(Failure(**failure) for failures in by_rank for failure in failures))
        if not failures:
            return
        step = failures[0].step
        texts = "; ".join(dict.fromkeys(failure.text for failure in failures if failure.step == step))
        message = f"could not write the checkpoint of step {step} in {self.root}: {texts}"
        full = any(failure.disk_full for failure in failures)
        if not full or last or self._config.on_disk_full == "stop":
            raise CheckpointError(message)
        if self._comm.ranks.is_main:
            _log.warning("%s; training goes on with the checkpoint before it (checkpoint.on_disk_full)", message)

    def close(self) -> None:
        """Wait for this rank's threads after an error; no communication. For the other ranks' files not long."""
        for save in self._saves:
            save.hurry(_GRACE_S)
        for save in self._saves:
            save.wait()
        self._saves.clear()

    def _begin(
        self,
        step: int,
        fragments: Iterable[Fragment],
        trainer: dict[str, Any],
        identity: Identity,
        metrics: Mapping[str, float],
        tags: Sequence[str],
        asynchronous: bool,
    ) -> Path:
        self._wait_for_room()
        ranks = self._comm.ranks
        told = self._on_main("prepare", lambda: self._prepare(step, trainer))
        folder = layout.step_folder(self.root, step)
        if told["full"] is not None:
            self._failures.append(Failure(step, told["full"], disk_full=True))
            return folder
        if told["attempt"] is None:
            return folder
        identity = identity.model_copy(update={"world_size": ranks.world_size})
        manifest = Manifest(step, _now(), identity, (), dict(metrics), tuple(tags))
        attempt = Attempt(self.root, step, told["attempt"], ranks)
        payload: Payload | Exception
        image: list[torch.Tensor] = []
        try:
            mine = self._collect(attempt, fragments)
            try:
                payload = self._payload(mine, image if asynchronous else None, trainer, manifest)
            except Exception as error:  # noqa: BLE001 — this rank's word tells rank 0, and `finish` all
                payload = error
        except BaseException:  # a peer's death in the middle of a collective included
            discard(attempt, self._disk)
            raise
        patience_s = 60 * self._config.write_timeout_minutes
        before = self._saves[-1] if self._saves else None
        free = functools.partial(self._images.extend, image)
        self._saves.append(Save(attempt, payload, self._disk, patience_s, before, self._apply_policy, free))
        self._saves[-1].start(in_background=asynchronous)
        return folder

    def _wait_for_room(self) -> None:
        """Back-pressure: wait until at most `max_in_flight` − 1 copies are about; keep failures for `finish`."""
        running = [save for save in self._saves if save.running]
        for save in running[: max(0, len(running) - self._config.max_in_flight + 1)]:
            save.wait()
        self._saves = [save for save in self._saves if save.running or save.failure is not None]

    def _prepare(self, step: int, trainer: dict[str, Any]) -> dict[str, Any]:
        """Rank 0: make room and a folder.

        Returns:
            "attempt": its name, or None if the step is there already and verifies; "full": why there is no room.
        """
        json.dumps(trainer)  # what cannot be JSON is refused before anything is begun
        try:
            return {"attempt": self._make_folder(step), "full": None}
        except OSError as error:
            if not disk_full(error):
                raise
            return {"attempt": None, "full": f"rank 0: {describe(error)}"}

    def _make_folder(self, step: int) -> str | None:
        if not self.root.exists():
            self._disk.make_folder(self.root)
            self._disk.sync_folder(self.root.parent)
        running = {save.attempt.folder for save in self._saves if save.running}
        for leftover in layout.leftovers(self.root):
            if leftover not in running:
                self._disk.remove_tree(leftover)
        folder = layout.step_folder(self.root, step)
        if folder.exists():
            try:
                verify(folder)
            except CheckpointError as error:
                _log.warning("checkpoint is written anew: %s", error)
            else:
                _log.info("checkpoint %s is there already and verifies", folder)
                return None
        name = secrets.token_hex(4)
        self._disk.make_folder(layout.temporary_folder(self.root, step, name))
        return name

    def _collect(self, attempt: Attempt, fragments: Iterable[Fragment]) -> Sequence[Fragment]:
        """Materialise this rank's fragments; where all ranks hold the same, take this rank's cut of each."""
        mine: list[Fragment] = []

        def tell() -> dict[str, Any]:
            mine.extend(fragments)
            keys = digest_json(sorted(fragment_key(f) for f in mine))
            return {"step": attempt.step, "keys": keys, "sees": attempt.folder.is_dir()}

        answers = self._everywhere("collect", tell)
        if any(answer["step"] != attempt.step for answer in answers):
            raise CheckpointError(f"ranks save different steps: {[answer['step'] for answer in answers]}")
        blind = [rank for rank, answer in enumerate(answers) if not answer["sees"]]
        if blind:
            raise CheckpointError(
                f"rank {', '.join(map(str, blind))} does not see {attempt.folder}, which rank 0 has made: the run "
                "folder must be on storage that all hosts share"
            )
        ranks = attempt.ranks
        if ranks.world_size > 1 and all(answer["keys"] == answers[0]["keys"] for answer in answers):
            return [_cut(f, ranks.rank, ranks.world_size) for f in mine]
        return mine

    def _payload(
        self,
        fragments: Sequence[Fragment],
        image: list[torch.Tensor] | None,
        trainer: dict[str, Any],
        manifest: Manifest,
    ) -> Payload:
        """Lay the fragments out; where an image is wanted, copy them into one, which goes into the list."""
        placed = Layout(fragments)
        text = json.dumps(trainer, indent=1).encode() if self._comm.ranks.is_main else b""
        if image is None:
            return Payload(placed.header, placed.live(), text, manifest)
        image.append(self._image(placed))
        placed.copy_to(image[0])
        return Payload(placed.header, image_parts(image[0], placed.nbytes), text, manifest)

    def _image(self, placed: Layout) -> torch.Tensor:
        """Return host memory for a rank's file: that of an earlier save where it is free and fits."""
        pinned = any(fragment.tensor.device.type == "cuda" for _, fragment in placed.placed)
        while self._images:
            image = self._images.pop()
            if image.numel() >= placed.nbytes and image.is_pinned() == pinned:
                return image
        return torch.empty(placed.nbytes, dtype=torch.uint8, pin_memory=pinned)

    def _apply_policy(self, step: int) -> None:
        """Rank 0: delete what may go. A failure costs space, not the run, so it only warns."""
        for old in steps_to_delete(candidates(self.list()), step, self._config):
            try:
                delete_checkpoint(layout.step_folder(self.root, old), self._disk)
            except OSError as error:
                _log.warning("old checkpoint of step %d could not be deleted: %s", old, error)
        for aside in layout.put_aside(self.root)[:-ASIDE_KEPT]:
            try:
                self._disk.remove_tree(aside)
                self._disk.remove(layout.reason_file(aside))
            except OSError as error:
                _log.warning("%s could not be deleted: %s", aside, error)

    # Finding.

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies, the same on every rank, or None.

        Saves that were begun are waited for. Every rank hashes its share of the files; rank 0 decides. What does
        not verify is warned of, listed in `skipped`, and put aside, so that it is never counted again.

        Raises:
            CheckpointError: a save that was begun failed.
        """
        if self._comm.gather_json(bool(self._saves)).count(True):
            self.finish()
        return self._first_sound(lambda entries: entries)

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the best value of the configured metric that verifies, or None."""

        def ranked(entries: Sequence[Entry]) -> Sequence[Entry]:
            by_step = {e.manifest.step: e for e in entries if e.manifest is not None}
            return [by_step[c.step] for c in best_first(candidates(entries), self._config)]

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

    def _first_sound(self, choose: Callable[[Sequence[Entry]], Sequence[Entry]]) -> Checkpoint | None:
        self.skipped = []
        for name in self._on_main("list", lambda: [entry.path.name for entry in choose(self.list())]):
            folder = self.root / name
            found, fault, damaged = self._examine(folder)
            if found is not None:
                return found
            self.skipped.append(Skipped(folder, fault))
            if self._comm.ranks.is_main:
                place = self._put_aside(folder, fault) if damaged else "stays where it is"
                _log.warning("checkpoint %s is passed over and %s: %s", name, place, fault)
        if self.skipped and self._comm.ranks.is_main:
            _log.warning("none of the %d checkpoints in %s can be used", len(self.skipped), self.root)
        return None

    def _examine(self, folder: Path) -> tuple[Checkpoint | None, str, bool]:
        """Verify one folder, all ranks together: rank 0 reads the manifest, each hashes its share of files.

        Returns:
            The checkpoint, or None with what is wrong and whether that is damage.
        """

        def read() -> dict[str, Any]:
            try:
                if folder.is_symlink():
                    raise CheckpointError(f"{folder} is a link, and links are not followed")
                manifest = read_manifest(folder)
                faults = size_faults(folder, manifest)
            except CheckpointError as error:
                return {"fault": str(error), "damaged": isinstance(error, DamagedError)}
            return {"manifest": manifest.to_json(), "fault": "; ".join(faults), "damaged": bool(faults)}

        told = self._on_main("examine", read)
        if told["fault"]:
            return None, str(told["fault"]), bool(told["damaged"])
        manifest = Manifest.from_json(told["manifest"], str(folder / layout.MANIFEST))
        ranks = self._comm.ranks
        share = manifest.files[ranks.rank :: ranks.world_size]

        def examine() -> dict[str, Any]:
            examined = examine_files(folder, manifest, share)
            return {"faults": examined.faults, "seen": {n: dataclasses.astuple(s) for n, s in examined.seen.items()}}

        by_rank = self._everywhere("verify", examine)
        fault = "; ".join(fault for told in by_rank for fault in told["faults"])
        if not fault:
            fault = self._on_main("examine", lambda: _header_fault(folder, manifest))
        seen = {name: Seen(*values) for told in by_rank for name, values in told["seen"].items()}
        return (None, fault, True) if fault else (Checkpoint(folder, manifest, seen), "", False)

    def _put_aside(self, folder: Path, fault: str) -> str:
        try:
            put_aside(self._disk, self.root, folder, secrets.token_hex(4), fault)
        except OSError as error:
            return f"could not be put aside ({error})"
        return f"put into {self.root / layout.ASIDE}"

    # Telling everyone.

    def _everywhere(self, what: str, work: Callable[[], Any]) -> Sequence[Any]:
        """Do something on every rank, return all results on all, or raise on all if it failed on any."""
        cause: Exception | None = None
        try:
            answer = {"value": work()}
        except Exception as error:  # noqa: BLE001 — whatever it is, the other ranks must hear of it
            cause, answer = error, {"error": describe(error)}
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
                cause, answer = error, {"error": describe(error)}
        answer = self._comm.broadcast_json(answer)
        if "error" in answer:
            raise CheckpointError(f"could not {what} the checkpoint in {self.root}: {answer['error']}") from cause
        return answer["value"]


def _header_fault(folder: Path, manifest: Manifest) -> str:
    """Return what is wrong with the headers of rank files whose digests are right, or nothing."""
    try:
        check_rank_files(folder, manifest.identity.world_size)
    except DamagedError as error:
        return str(error)
    return ""


def _cut(fragment: Fragment, rank: int, world_size: int) -> Fragment:
    numel = fragment.tensor.numel()
    first, last = numel * rank // world_size, numel * (rank + 1) // world_size
    tensor = fragment.tensor.reshape(-1)[first:last]
    return dataclasses.replace(fragment, start=fragment.start + first, tensor=tensor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
