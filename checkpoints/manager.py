"""The only class of this package that the engine sees: save, find the newest that verifies, load.

How a save proceeds is written down in commit.py. Every collective operation ends with each rank knowing whether
every other one succeeded, so that an error anywhere is raised everywhere, no rank waits for one that has given up,
and no rank trains on alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import queue
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
    adopt_complete,
    delete_checkpoint,
    describe,
    discard,
    disk_full,
    put_aside,
    restore_replaced,
)
from checkpoints.config import CheckpointConfig
from checkpoints.copies import Copy, step_of_copy
from checkpoints.digest import Seen
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError, StorageError
from checkpoints.fetch import fetched
from checkpoints.identity import Identity, digest_json
from checkpoints.manifest import Manifest, examine_files, read_manifest, size_faults
from checkpoints.mirror import Mirror
from checkpoints.objects import Objects
from checkpoints.policy import ASIDE_KEPT, best_first, steps_to_delete
from checkpoints.rankfile import Layout, fragment_key, host_memory, image_parts
from checkpoints.reader import Checkpoint, Entry, Skipped, candidates, check_rank_files, list_checkpoints, verify
from checkpoints.together import Together
from checkpoints.verdicts import Accept, Search, UnusableError, accepted, judged, usable
from setformer_dist.core.comm import Collectives
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import CopyEvent, Snapshot

_log = logging.getLogger(__name__)

_GRACE_S = 20.0  # for the other ranks' files when this rank ends with an error; a supervisor is quicker if one is dead


class CheckpointManager:
    """Keeps the checkpoints of one run in one folder. All ranks call each method, in the same order.

    Attributes:
        skipped: what the last search skipped, with reasons.
    """

    def __init__(
        self,
        root: Path,
        comm: Collectives,
        config: CheckpointConfig,
        disk: Disk | None = None,
        objects: Objects | None = None,
    ) -> None:
        self.root = root
        self.skipped: list[Skipped] = []
        self._comm = comm
        self._together = Together(comm, root)
        self._config = config
        self._disk = disk or Disk()
        self._saves: list[Save] = []
        self._failures: list[Failure] = []  # of saves that could not even begin
        self._images: list[torch.Tensor] = []
        self._tried_copy: int | None = None  # step of the last that was copied at the end
        self._newest: int | None = None  # step of the newest that is committed; rank 0's
        self._begun = -1  # step of the last save that was begun
        self._committed: queue.SimpleQueue[int] = queue.SimpleQueue()  # steps, from rank 0's writing threads
        self._objects = objects
        self._probed = False
        self._mirror = Mirror(objects, root, comm.ranks, config) if objects is not None else None

    # Saving.

    def save(self, snapshot: Snapshot, identity: Identity) -> Path:
        """Write a checkpoint; when this returns it is durable and visible, on every rank.

        Args and errors: as `begin`, and what `finish` raises.
        """
        folder = self._begin(snapshot, identity, asynchronous=False)
        self.finish(last=True)
        return folder

    def save_renumbered(self, snapshot: Snapshot, identity: Identity) -> Path:
        """Write the checkpoint from which on steps are counted in another way; durable when this returns.

        Folders of this step and of later ones were numbered by the old count, and would be taken for newer. They
        are put aside and stay there for good: the one whose name is needed before, the others after, so that there
        is one to resume from at every instant.

        Args and errors: as `save`.
        """
        reason = "its number is of another count of steps: the run continues with another global batch or other data"
        self._together.on_main("put aside", lambda: self._supersede(lambda old: old == snapshot.step, reason))
        folder = self.save(snapshot, identity)
        self._together.on_main("put aside", lambda: self._supersede(lambda old: old > snapshot.step, reason))
        return folder

    def _supersede(self, which: Callable[[int], bool], reason: str) -> None:
        """Put folders aside for good, durably."""
        going = [folder for folder in layout.step_folders(self.root) if which(layout.step_of(folder) or 0)]
        for folder in going:
            put_aside(self._disk, self.root, folder, secrets.token_hex(4), reason, keep=True)
            _log.warning("checkpoint %s is moved to %s: %s", folder.name, self.root / layout.ASIDE, reason)
        if going:
            self._disk.sync_folder(self.root / layout.ASIDE)
            self._disk.sync_folder(self.root)

    def begin(self, snapshot: Snapshot, identity: Identity, replace: bool = False) -> Path:
        """Copy the state of this step to host memory and return; threads write the checkpoint.

        With `asynchronous = false` it is written before this returns. A checkpoint of this step that verifies
        already is left as it is. Where `max_in_flight` copies wait to be written, this waits for the oldest. How
        the writing went, `failed` and `finish` report.

        Args:
            snapshot: the state; this rank's fragments.
            identity: what writes; its world size is taken from the ranks.
            replace: write a checkpoint of this step again although it verifies; the old one is valid until the new
                one takes its name.

        Raises:
            CheckpointError: on every rank, if any of them could not even begin.
        """
        return self._begin(snapshot, identity, self._config.asynchronous, replace)

    def failed(self) -> bool:
        """Return whether a save has failed on this rank since the last `finish`. No communication, no waiting."""
        return bool(self._failures) or any(save.failure is not None for save in self._saves)

    def committed(self) -> Sequence[tuple[int, Path]]:
        """Return the steps and folders that became durable since the last call; rank 0 alone knows. Does not wait."""
        steps = [self._committed.get() for _ in range(self._committed.qsize())]
        return [(step, layout.step_folder(self.root, step)) for step in steps]

    def agree(self) -> None:
        """Give every host what else the run's folder holds, where it is not one folder. Collective, before a search."""

    def complete(self) -> None:
        """Bring the whole newest checkpoint to rank 0's disk, where it is not. Collective."""

    def finish(self, last: bool = False) -> None:
        """Wait until all saves that were begun have ended, and hear how, on every rank.

        Args:
            last: no checkpoint will follow: then a failure of the last save is an error, and one before it no longer
                matters.

        Raises:
            StorageError: on every rank, if a save failed on any for what may pass.
            CheckpointError: likewise for what will not; a full disk is only warned of where the config says so and
                another save is to follow.
        """
        for save in self._saves:
            save.wait()
        mine = [*self._failures, *(save.failure for save in self._saves if save.failure is not None)]
        ended = list(self._saves)
        self._failures.clear()
        self._saves.clear()
        by_rank = self._comm.gather_json([dataclasses.asdict(failure) for failure in mine])
        failures = list(dict.fromkeys(Failure(**failure) for failures in by_rank for failure in failures))
        if not failures:
            return
        if self._comm.ranks.is_main:  # no rank is at it any more, so what a slow one wrote after all goes too
            for save in ended:
                if any(failure.step == save.attempt.step for failure in failures):
                    discard(save.attempt, self._disk)
        step = failures[0].step
        texts = "; ".join(dict.fromkeys(failure.text for failure in failures if failure.step == step))
        message = f"could not write the checkpoint of step {step} in {self.root}: {texts}"
        if last:
            tolerated = all(failure.step != self._begun for failure in failures)
        else:
            tolerated = any(failure.disk_full for failure in failures) and self._config.on_disk_full == "continue"
        if not tolerated:
            raise (StorageError if all(failure.transient for failure in failures) else CheckpointError)(message)
        if self._comm.ranks.is_main and last:
            _log.warning("%s; the last checkpoint, of step %d, exists", message, self._begun)
        elif self._comm.ranks.is_main:
            _log.warning("%s; training continues with the checkpoint before it (checkpoint.on_disk_full)", message)

    def copies(self) -> Sequence[CopyEvent]:
        """Return what became of copies in the object store since the last call; rank 0 alone knows. Does not wait."""
        return self._mirror.events() if self._mirror is not None else ()

    def finish_copies(self, seconds: float) -> bool:
        """Wait at most so long for the copy of the newest checkpoint, which begins here if it has not been copied.

        Collective. Return whether there is nothing left to wait for, the same on every rank.
        """
        mirror = self._mirror
        if mirror is None:
            return True

        def look() -> dict[str, object]:
            mirror.wait(seconds)
            if mirror.busy:
                return {"done": False, "attempt": None}
            if self._newest is None or self._newest in (mirror.newest_copied, self._tried_copy):
                return {"done": True, "attempt": None}
            return {"done": False, "attempt": secrets.token_hex(4), "step": self._newest}

        told = self._together.on_main("copy", look)
        if told["attempt"] is not None:
            self._tried_copy = told["step"]
            mirror.start(told["step"], told["attempt"])
        return bool(told["done"])

    def close(self) -> None:
        """Wait for this rank's threads after an error; no communication. For the other ranks' files not long."""
        for save in self._saves:
            save.hurry(_GRACE_S)
        for save in self._saves:
            save.wait()
        self._saves.clear()
        if self._mirror is not None:
            self._mirror.give_up()

    def _begin(self, snapshot: Snapshot, identity: Identity, asynchronous: bool, replace: bool = False) -> Path:
        step = snapshot.step
        self._wait_for_room()
        self._begun = step
        ranks = self._comm.ranks
        told = self._together.on_main("prepare", lambda: self._prepare(step, snapshot.trainer, replace))
        folder = layout.step_folder(self.root, step)
        if told["full"] is not None:
            self._failures.append(Failure(step, told["full"], disk_full=True))
            return folder
        if told["attempt"] is None:
            return folder
        identity = identity.model_copy(update={"world_size": ranks.world_size})
        manifest = Manifest(step, _now(), identity, (), dict(snapshot.metrics), tuple(snapshot.tags))
        attempt = Attempt(self.root, step, told["attempt"], ranks, told["replaces"], told["copied"])
        payload: Payload | Exception
        image: list[torch.Tensor] = []
        try:
            mine = self._collect(attempt, snapshot.fragments)
            try:
                payload = self._payload(mine, image if asynchronous else None, snapshot.trainer, manifest)
            except Exception as error:  # noqa: BLE001 — rank 0 learns of it by this rank's file, the others in `finish`
                payload = error
        except BaseException:  # a peer's death in the middle of a collective included
            discard(attempt, self._disk)
            raise
        before = self._saves[-1] if self._saves else None
        free = functools.partial(self._images.extend, image)
        self._saves.append(self._new_save(attempt, payload, before, free))
        self._saves[-1].start(in_background=asynchronous)
        return folder

    def _new_save(
        self, attempt: Attempt, payload: Payload | Exception, before: Save | None, free: Callable[[], None]
    ) -> Save:
        patience_s = 60 * self._config.write_timeout_minutes
        return Save(attempt, payload, self._disk, patience_s, before, self._after_commit, free, self._copy)

    def _wait_for_room(self) -> None:
        """Back-pressure: wait until at most `max_in_flight` − 1 copies are about; keep failures for `finish`."""
        running = [save for save in self._saves if save.running]
        for save in running[: max(0, len(running) - self._config.max_in_flight + 1)]:
            save.wait()
        self._saves = [save for save in self._saves if save.running or save.failure is not None]

    def _prepare(self, step: int, trainer: Mapping[str, object], replace: bool) -> dict[str, object]:
        """Rank 0: make room and a folder.

        Returns:
            "attempt": its name, or None if the step is there already and verifies; "replaces": whether it takes the
            place of one that verifies; "full": why there is no room.
        """
        json.dumps(trainer)  # what cannot be JSON is refused before anything is begun
        try:
            self._sweep()
            there = self._verifies(step)
            if there and not replace:
                _log.info("checkpoint %s is there already and verifies", layout.step_folder(self.root, step))
                return {"attempt": None, "full": None}
            name = secrets.token_hex(4)
            self._disk.make_folder(layout.temporary_folder(self.root, step, name))
        except OSError as error:
            if not disk_full(error):
                raise
            return {"attempt": None, "full": f"rank 0: {describe(error)}"}
        return {"attempt": name, "replaces": there, "full": None, "copied": self._may_copy()}

    def _may_copy(self) -> bool:
        """Whether nothing else is being copied, nor will be once it is committed."""
        soon = any(save.running and save.attempt.copied for save in self._saves)
        return self._mirror is not None and not self._mirror.busy and not soon

    def _sweep(self) -> None:
        """Make the root, and remove what killed attempts left in it."""
        if not self.root.exists():
            self._disk.make_folder(self.root)
            self._disk.sync_folder(self.root.parent)
        running = {save.attempt.folder for save in self._saves if save.running}
        for leftover in layout.leftovers(self.root):
            if leftover not in running:
                self._disk.remove_tree(leftover)
        if not running:
            restore_replaced(self.root, self._disk)

    def _verifies(self, step: int) -> bool:
        folder = layout.step_folder(self.root, step)
        if not folder.exists():
            return False
        try:
            verify(folder)
        except CheckpointError as error:
            _log.warning("checkpoint is written again: %s", error)
            return False
        return True

    def _collect(self, attempt: Attempt, fragments: Iterable[Fragment]) -> Sequence[Fragment]:
        """Materialise this rank's fragments; where all ranks hold the same, take this rank's cut of each."""
        mine: list[Fragment] = []

        def tell() -> dict[str, Any]:
            mine.extend(fragments)
            keys = digest_json(sorted(fragment_key(f) for f in mine))
            return {"step": attempt.step, "keys": keys, "sees": self._sees(attempt)}

        answers = self._together.everywhere("collect", tell)
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

    def _sees(self, attempt: Attempt) -> bool:
        """Whether this rank sees what rank 0 has made."""
        return attempt.folder.is_dir()

    def _payload(
        self,
        fragments: Sequence[Fragment],
        image: list[torch.Tensor] | None,
        trainer: Mapping[str, object],
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
        if pinned:
            return torch.empty(placed.nbytes, dtype=torch.uint8, pin_memory=True)
        return host_memory(placed.nbytes)

    def _after_commit(self, attempt: Attempt) -> None:
        """Rank 0, in the thread that wrote: note what became durable, and delete what may go."""
        self._committed.put(attempt.step)
        self._newest = attempt.step
        self._copy(attempt)
        self._apply_policy(attempt.step)

    def _copy(self, attempt: Attempt) -> None:
        """Begin this rank's part of the copy in the object store."""
        if attempt.copied and self._mirror is not None:
            self._mirror.start(attempt.step, attempt.name, attempt.folder)

    def _apply_policy(self, step: int) -> None:
        """Rank 0: delete what may go. A failure costs space, not the run, so it only warns."""
        try:
            for old in steps_to_delete(candidates(self.list()), step, self._config):
                delete_checkpoint(layout.step_folder(self.root, old), self._disk)
            self._thin_aside()
        except (OSError, CheckpointError) as error:
            _log.warning("old checkpoints in %s could not all be deleted: %s", self.root, error)

    def _thin_aside(self) -> None:
        for aside in layout.put_aside(self.root)[:-ASIDE_KEPT]:
            self._disk.remove_tree(aside)
            self._disk.remove(layout.reason_file(aside))

    # Finding.

    def newest(self, accept: Accept | None = None) -> Checkpoint | None:
        """Return the newest checkpoint that verifies and is accepted, the same on every rank, or None.

        Saves that were begun are waited for. Every rank hashes its share of the files; rank 0 decides. What does
        not verify is warned of, listed in `skipped`, and put aside, so that it is never counted again. What verifies
        and is not accepted is put aside for good where an older one is accepted; where none is, it is an error.

        Args:
            accept: raises a SetformerError where a run cannot resume from a checkpoint; asked on rank 0, about an
                object of its own.

        Raises:
            StorageError: nothing is left, and of what is there something could not be read.
            CheckpointError: a save that was begun failed, a rank does not see the files, or none is accepted.
        """
        if self._comm.gather_json(bool(self._saves)).count(True):
            self.finish()
        found = self._first_sound(lambda entries: entries, accept)
        if self._objects is None:
            return found
        self._together.on_main("copy", self._probe)
        found = self._fetched(self._objects, found, accept) or found
        if found is not None and self._mirror is not None and self._comm.ranks.is_main:
            self._mirror.catch_up(found.step)
        return found

    def _probe(self) -> None:
        """Rank 0: find out before training what nobody would see before the first copy, a bucket that is not there."""
        if self._objects is None or self._probed:
            return
        try:
            self._objects.probe()
        except StorageError as error:  # it may pass, and a copy is tried again
            _log.warning("%s; the run goes on", error)
        self._probed = True

    def _fetched(self, objects: Objects, found: Checkpoint | None, accept: Accept | None) -> Checkpoint | None:
        """Return a copy from the object store where the run's folder has no checkpoint, or lost a newer one to damage.

        What lies in the folder is preferred otherwise: the run may have gone back to it, and copies of later steps are
        then of a branch that it has left.
        """
        lost = {layout.step_of(skipped.path) for skipped in self.skipped} - {None}

        def wanted(copy: Copy) -> bool:
            step = step_of_copy(copy.name)
            return found is None or (step in lost and step is not None and step > found.step)

        if found is not None and not any(step > found.step for step in lost if step is not None):
            return None
        search = Search()
        for folder in fetched(objects, self.root, self._together, self._disk, wanted):
            taken = self._tried_folder(folder, accept, search)
            if taken is not None:
                if self._mirror is not None and self._comm.ranks.is_main:
                    self._mirror.tell(
                        CopyEvent(taken.step, objects.shown, taken.step, taken.manifest.size, fetched=True)
                    )
                return taken
            if search.refused:  # it is of another run; it stays in the store, and not here
                if self._comm.ranks.is_main:
                    delete_checkpoint(folder, self._disk)
                raise CheckpointError(f"{search.refused[0][1]} (it was fetched from {objects.shown})")
        return None

    def newest_before(self, step: int, reason: str, accept: Accept | None = None) -> Checkpoint | None:
        """Return the newest checkpoint below a step that verifies, the same on every rank, or None.

        Where there is one, those of this step and later are put aside for good, durably before this returns, so that
        no later search finds them; where there is none they stay.

        Args:
            step: of the oldest checkpoint that is not to be resumed from.
            reason: why, for the file next to what is put aside.
            accept: as in `newest`.

        Raises:
            CheckpointError: as `newest`, or something could not be put aside.
        """
        if self._comm.gather_json(bool(self._saves)).count(True):
            self.finish()
        found = self._first_sound(lambda entries: [e for e in entries if (layout.step_of(e.path) or 0) < step], accept)
        if found is not None:
            self._together.on_main("put aside", lambda: self._supersede(lambda old: old >= step, reason))
        return found

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the best value of the configured metric that verifies, or None."""

        def ranked(entries: Sequence[Entry]) -> Sequence[Entry]:
            by_step = {e.manifest.step: e for e in entries if e.manifest is not None}
            return [by_step[c.step] for c in best_first(candidates(entries), self._config)]

        return self._first_sound(ranked)

    def load(self, checkpoint: Checkpoint, fragments: Iterable[Fragment]) -> None:
        """Fill this rank's fragments; an error on one rank is raised on all, so that no rank trains on alone.

        Raises:
            CheckpointError: see `Checkpoint.load_into`.
        """
        self._together.everywhere("load", lambda: checkpoint.load_into(fragments))

    def list(self) -> Sequence[Entry]:
        """Return what is in the folder, newest first, checked by manifest and sizes; no communication."""
        return list_checkpoints(self.root)

    def _first_sound(
        self, choose: Callable[[Sequence[Entry]], Sequence[Entry]], accept: Accept | None = None
    ) -> Checkpoint | None:
        self.skipped = []
        search = Search()

        def names() -> list[str]:
            if not any(save.running for save in self._saves):
                restore_replaced(self.root, self._disk)
            return [entry.path.name for entry in choose(self.list())]

        def adopted() -> list[str]:
            if any(save.running for save in self._saves):
                return []
            new = {path.name for path in adopt_complete(self.root, self._disk)}
            return [entry.path.name for entry in choose(self.list()) if entry.path.name in new] if new else []

        for which in (names, adopted):
            for name in self._together.on_main("list", which):
                found = self._tried_folder(self.root / name, accept, search)
                if found is not None:
                    return found
        if self.skipped and self._comm.ranks.is_main:
            _log.warning("none of the %d checkpoints in %s can be used", len(self.skipped), self.root)
        if search.unread:  # to begin again because the storage does not answer would be worse than to wait for it
            raise StorageError(f"no checkpoint in {self.root} can be used, and not all could be read: {search.unread}")
        if search.refused:  # all belong to another run or config: the user must repair that
            raise CheckpointError(search.refused[0][1])
        return None

    def _tried_folder(self, folder: Path, accept: Accept | None, search: Search) -> Checkpoint | None:
        """Return the checkpoint in a folder, or note why it is not to be used and put it where it belongs."""
        try:
            found = self._examine(folder, accept)
        except UnusableError as error:
            fault, place = str(error), "stays where it is"
            self.skipped.append(Skipped(folder, fault))
            search.unread = search.unread or (fault if error.kind == "unread" else "")
            if error.kind == "refused":
                search.refused.append((folder, fault))
            if self._comm.ranks.is_main:
                if error.kind == "damaged":
                    place = self._put_aside(folder, fault)
                _log.warning("checkpoint %s is skipped and %s: %s", folder.name, place, fault)
            return None
        if self._comm.ranks.is_main:  # their steps will be saved again, under these names
            for refused, fault in search.refused:
                place = self._put_aside(refused, f"{fault}; the run resumed from {folder.name}", keep=True)
                _log.warning("checkpoint %s is %s", refused.name, place)
        return found

    def _examine(self, folder: Path, accept: Accept | None = None) -> Checkpoint:
        """Verify one folder, all ranks together: rank 0 reads the manifest, each hashes its share of files.

        Raises:
            UnusableError: it is not to be used.
            CheckpointError: a rank does not see what rank 0 sees.
        """

        def read() -> dict[str, Any]:
            if folder.is_symlink():
                raise CheckpointError(f"{folder} is a link, and links are not followed")
            manifest = read_manifest(folder)
            if faults := size_faults(folder, manifest):
                raise DamagedError("; ".join(faults))
            return manifest.to_json()

        told = self._together.on_main("examine", lambda: judged(read))
        manifest = Manifest.from_json(usable(told), str(folder / layout.MANIFEST))
        ranks = self._comm.ranks
        share = manifest.files[ranks.rank :: ranks.world_size]
        by_rank = self._together.everywhere(
            "verify", lambda: dataclasses.asdict(examine_files(folder, manifest, share))
        )
        self._check_shared(folder, by_rank)
        faults = [fault for told in by_rank for fault in told["faults"]]
        unread = [fault for told in by_rank for fault in told["unread"]]
        if faults or unread:
            raise UnusableError("; ".join([*faults, *unread]), "damaged" if faults else "unread")
        world_size = manifest.identity.world_size
        usable(self._together.on_main("examine", lambda: judged(lambda: check_rank_files(folder, world_size))))
        seen = {name: Seen(**values) for told in by_rank for name, values in told["seen"].items()}
        if accept is not None:
            usable(self._together.on_main("examine", lambda: accepted(accept, Checkpoint(folder, manifest, seen))))
        return Checkpoint(folder, manifest, seen)

    def _check_shared(self, folder: Path, by_rank: Sequence[dict[str, Any]]) -> None:
        """Refuse to continue where a file is missing for some rank that is there for rank 0: nothing is damaged then.

        Raises:
            CheckpointError: naming the ranks.
        """
        absent = {name: rank for rank, told in enumerate(by_rank) for name in told["missing"] if rank}
        if not absent:
            return
        there = self._together.on_main("examine", lambda: [name for name in absent if (folder / name).exists()])
        if there:
            blind = ", ".join(map(str, sorted({absent[name] for name in there})))
            raise CheckpointError(
                f"rank {blind} does not see {', '.join(there[:3])} in {folder}, which rank 0 sees: the run folder must "
                "be on storage that all hosts share"
            )

    def _put_aside(self, folder: Path, fault: str, keep: bool = False) -> str:
        try:
            put_aside(self._disk, self.root, folder, secrets.token_hex(4), fault, keep)
        except (OSError, ValueError) as error:  # any content: it must not stop a resume
            return f"could not be put aside ({error})"
        return f"moved to {self.root / layout.ASIDE}"


def _cut(fragment: Fragment, rank: int, world_size: int) -> Fragment:
    numel = fragment.tensor.numel()
    first, last = numel * rank // world_size, numel * (rank + 1) // world_size
    tensor = fragment.tensor.reshape(-1)[first:last]
    return dataclasses.replace(fragment, start=fragment.start + first, tensor=tensor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
