"""The checkpoints of a run whose hosts have a disk each (`checkpoint.replicas`); spread.py says how a save proceeds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import layout
from checkpoints.beside import Beside, Names
from checkpoints.commit import Attempt, Payload, Save, delete_checkpoint, describe, put_aside
from checkpoints.config import CheckpointConfig
from checkpoints.copies import list_copies, step_of_copy
from checkpoints.digest import Seen
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError, MisplacedError, StorageError
from checkpoints.fetch import fetched
from checkpoints.manager import CheckpointManager
from checkpoints.manifest import FileRecord, Manifest, examine_files, read_manifest
from checkpoints.objects import Objects
from checkpoints.policy import Candidate, State, steps_to_delete
from checkpoints.rankfile import write_bytes
from checkpoints.reader import Checkpoint, Skipped, check_rank_files
from checkpoints.spread import SpreadSave, places_of, receive_file, send_file
from checkpoints.together import Together
from checkpoints.verdicts import Accept
from setformer_dist.core.comm import Alone, Exchange
from setformer_dist.core.errors import CheckpointError, SetformerError
from setformer_dist.core.store import CopyEvent

log = logging.getLogger(__name__)

_TOKEN = ".host-"


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint that hosts know of.

    Attributes:
        manifest: its manifest, on one of them.
        folders: by host, the names of the folders that have this manifest.
    """

    manifest: Manifest
    folders: Mapping[int, Sequence[str]]


class SpreadManager(CheckpointManager):
    """Keeps the checkpoints of one run on the disks of all its hosts. All ranks call each method, in the same order.

    Args:
        root: the `checkpoints` folder, on each host its own.
        comm: of the ranks.
        background: the same ranks, for the threads that write.
        config: see `CheckpointConfig`.
        disk: of this host.
        objects: the run's folder in an object store, if it has one.
        beside: files of the run's folder that every host follows.

    Raises:
        CheckpointError: hosts share the folder, or the ranks are not numbered host by host.
    """

    def __init__(
        self,
        root: Path,
        comm: Exchange,
        background: Exchange,
        config: CheckpointConfig,
        disk: Disk | None = None,
        objects: Objects | None = None,
        beside: Names | None = None,
    ) -> None:
        super().__init__(root, comm, config, disk, objects)
        self._exchange = comm
        self._background = background
        self._hosts = places_of(comm)
        self._host = self._hosts.host_of(comm.ranks.rank)
        self._leads = comm.ranks.local_rank == 0
        self._beside = Beside(root.parent, beside or Names(), self._hosts, self._disk)
        self._check_own_disks()
        count = len(self._hosts.leaders)
        if comm.ranks.is_main and config.replicas >= count:
            log.warning(
                "checkpoint.replicas = %d takes %d hosts, and this run has %d: %d replicas are kept",
                config.replicas,
                config.replicas + 1,
                count,
                count - 1,
            )

    def _check_own_disks(self) -> None:
        """Refuse a folder that hosts share: they would write one over the other's files."""
        token = f"{_TOKEN}{secrets.token_hex(6)}"
        root = self.root

        def mark() -> str:
            if self._leads:
                self._disk.make_folder(root)
                (root / token).touch()
            return token

        def look() -> list[str]:
            return [path.name for path in root.glob(f"{_TOKEN}*")] if self._leads else []

        tokens = self._together.everywhere("prepare", mark)
        try:
            seen = self._together.everywhere("prepare", look)
        finally:
            if self._leads:
                with contextlib.suppress(OSError):
                    self._disk.remove(root / token)
        for leader in self._hosts.leaders:
            others = [tokens.index(name) for name in seen[leader] if name in tokens and name != tokens[leader]]
            if others:
                raise CheckpointError(
                    f"checkpoint.replicas is for hosts with a disk each, but the hosts of ranks {leader} and "
                    f"{others[0]} share {root}: remove the key, or set run.out to a local disk"
                )

    # Saving.

    def _prepare(self, step: int, trainer: Mapping[str, object], replace: bool) -> dict[str, object]:
        told: dict[str, object] = {"attempt": None, "replaces": False, "full": None, "copied": False}
        if not replace and self._is_here(step):
            return told
        return {**told, "attempt": secrets.token_hex(4), "replaces": replace, "copied": self._may_copy()}

    def _is_here(self, step: int) -> bool:
        """Whether this host has the manifest of a step: after the first of them the checkpoint counts."""
        with contextlib.suppress(CheckpointError):
            return read_manifest(layout.step_folder(self.root, step)).step == step
        return False

    def _sees(self, attempt: Attempt) -> bool:
        return True

    def _new_save(self, attempt: Attempt, payload: Payload | Exception, before: Save | None, free: Any) -> Save:
        patience_s = 60 * self._config.write_timeout_minutes
        return SpreadSave(
            attempt, payload, self._disk, patience_s, before, self._after_commit, free,
            comm=self._background, hosts=self._hosts, replicas=self._config.replicas,
            follow=functools.partial(self._beside.follow, self._background),
        )  # fmt: skip

    def _after_commit(self, attempt: Attempt) -> None:
        if self._comm.ranks.is_main:
            self._committed.put(attempt.step)
            self._newest = attempt.step
        self._copy(attempt)
        if self._leads:
            self._apply_policy(attempt.step)

    def _apply_policy(self, step: int) -> None:
        """Delete what may go on this host; a failure costs space alone."""
        try:
            known = []
            for folder in layout.step_folders(self.root):
                try:
                    manifest = read_manifest(folder)
                except CheckpointError as error:  # one that was being deleted, for instance
                    state: State = "damaged" if isinstance(error, DamagedError) else "unknown"
                    known.append(Candidate(layout.step_of(folder) or 0, state))
                else:
                    known.append(Candidate(manifest.step, metrics=manifest.metrics, tags=manifest.tags))
            for old in steps_to_delete(known, step, self._config):
                delete_checkpoint(layout.step_folder(self.root, old), self._disk)
            for leftover in layout.leftovers(self.root):
                self._disk.remove_tree(leftover)
            self._thin_aside()
        except (OSError, CheckpointError) as error:
            log.warning("old checkpoints in %s could not all be deleted: %s", self.root, error)

    def save_renumbered(self, snapshot: Any, identity: Any) -> Path:
        """See CheckpointManager."""
        reason = "its number is of another count of steps: the run goes on with another global batch or other data"
        self._supersede_everywhere(lambda old: old == snapshot.step, reason)
        folder = self.save(snapshot, identity)
        self._supersede_everywhere(lambda old: old > snapshot.step, reason)
        return folder

    def _supersede_everywhere(self, which: Callable[[int], bool], reason: str) -> None:
        def work() -> None:
            if self._leads:
                self._supersede(which, reason)
                for leftover in layout.leftovers(self.root):
                    self._disk.remove_tree(leftover)

        self._together.everywhere("put aside", work)

    # Finding.

    def agree(self) -> None:
        """See CheckpointManager."""
        self._beside.agree(self._exchange, self._together)

    def newest(self, accept: Accept | None = None) -> Checkpoint | None:
        """See CheckpointManager; every host has all files when this returns."""
        if self._comm.gather_json(bool(self._saves)).count(True):
            self.finish()
        if self._objects is not None:
            self._together.on_main("copy", self._probe)
        found = self._search(lambda step: True, accept)
        if found is None and self._objects is not None and self._fetched_everywhere(self._objects):
            found = self._search(lambda step: True, accept)
        elif self._mirror is not None and found is not None and self._comm.ranks.is_main:
            self._mirror.catch_up(found.step)
        if found is None and self.skipped:  # the hosts that have the rest may come back
            raise StorageError(
                f"no checkpoint in {self.root} is complete on the hosts that answer ({self.skipped[0].reason}): bring "
                "the other hosts back, or move the folder away on all hosts to begin anew"
            )
        return found

    def newest_before(self, step: int, reason: str, accept: Accept | None = None) -> Checkpoint | None:
        """See CheckpointManager."""
        if self._comm.gather_json(bool(self._saves)).count(True):
            self.finish()
        found = self._search(lambda old: old < step, accept)
        if found is not None:
            self._supersede_everywhere(lambda old: old >= step, reason)
        return found

    def best(self) -> Checkpoint | None:
        """See CheckpointManager: a run on several hosts takes the newest."""
        return self.newest()

    def _fetched_everywhere(self, objects: Objects) -> bool:
        """Fetch the newest copy that verifies to every host; return whether there is one."""

        def usable() -> list[str]:
            return [copy.name for copy in list_copies(objects) if copy.manifest is not None]

        names = self._together.on_main("look for a copy of", usable)
        alone = Together(Alone(), self.root)
        for name in names:

            def work(name: str = name) -> bool:
                wanted = fetched(objects, self.root, alone, self._disk, lambda copy: copy.name == name)
                return not self._leads or next(wanted, None) is not None

            if all(self._together.everywhere("fetch a copy of", work)):
                if self._mirror is not None and self._comm.ranks.is_main:
                    step = step_of_copy(name) or 0
                    self._mirror.tell(CopyEvent(step, objects.shown, step, fetched=True))
                return True
        return False

    def _search(self, wanted: Callable[[int], bool], accept: Accept | None) -> Checkpoint | None:
        self.skipped = []
        left: list[tuple[int, str]] = []
        refused = ""
        for candidate in self._candidates():
            step = candidate.manifest.step
            if not wanted(step):
                continue
            fault = self._completed(candidate)
            if fault is None:
                found = self._checkpoint(candidate.manifest)
                fault = self._together.on_main("examine", functools.partial(_asked, accept, found))
                if fault is None:
                    self._leave(left, step)
                    return found
                refused = refused or fault
            else:
                self.skipped.append(Skipped(layout.step_folder(self.root, step), fault))
                if self._comm.ranks.is_main:
                    log.warning("checkpoint of step %d is skipped: %s", step, fault)
            left.append((step, fault))
        if refused:
            raise CheckpointError(refused)
        return None

    def _leave(self, left: Sequence[tuple[int, str]], step: int) -> None:
        """Put aside for good what a search has passed over: the run saves under these names anew."""
        for old, fault in left:
            if old != step:
                reason = f"{fault}; the run went on from step {step}"
                self._supersede_everywhere(functools.partial(int.__eq__, old), reason)

    def _candidates(self) -> list[_Candidate]:
        """Ask every host for its manifests; return them newest first, the same on all ranks."""
        by_rank = self._together.everywhere("list", lambda: self._manifests() if self._leads else {})
        found: dict[str, tuple[Manifest, dict[int, list[str]]]] = {}
        for host, leader in enumerate(self._hosts.leaders):
            for folder, value in by_rank[leader].items():
                manifest = Manifest.from_json(value, folder)
                _, folders = found.setdefault(str(value["sha256"]), (manifest, {}))
                folders.setdefault(host, []).append(folder)
        ordered = sorted(found.values(), key=lambda pair: (pair[0].step, pair[0].created), reverse=True)
        return [_Candidate(manifest, folders) for manifest, folders in ordered]

    def _manifests(self) -> dict[str, Any]:
        """Return this host's manifests by the names of their folders, committed or complete but for the rename."""
        found = {}
        for folder in (*layout.step_folders(self.root), *layout.leftovers(self.root)):
            if folder.is_symlink():
                continue
            try:
                manifest = read_manifest(folder)
            except (DamagedError, MisplacedError) as error:
                log.warning("%s is passed over: %s", folder, error)
                continue
            final = layout.final_of(folder)
            if final is None or layout.step_of(final) == manifest.step:
                found[folder.name] = manifest.to_json()
        return found

    def complete(self) -> None:
        """Bring all files of the newest checkpoint to rank 0's host; what fails is told, and costs nothing else."""
        self._beside.follow(self._exchange)
        folder = layout.step_folder(self.root, self._begun)

        def lacking() -> bool:
            return any(not (folder / record.name).exists() for record in read_manifest(folder).files)

        try:
            if self._begun < 0 or not self._together.on_main("complete", lacking):
                return
            candidate = next(found for found in self._candidates() if found.manifest.step == self._begun)
            fault = self._completed(candidate, only_main=True)
        except CheckpointError as error:
            fault = str(error)
        if fault is not None and self._comm.ranks.is_main:
            log.warning("the last checkpoint could not be brought together in %s: %s", folder, fault)

    def _completed(self, candidate: _Candidate, only_main: bool = False) -> str | None:
        """Give every host, or rank 0's, all files of a checkpoint under its name; return why that is impossible."""
        manifest = candidate.manifest
        mine = [*candidate.folders.get(self._host, ()), *self._without_manifest(manifest.step)]
        by_rank = self._together.everywhere("verify", lambda: self._sound(manifest, mine) if self._leads else {})
        have = [by_rank[leader] for leader in self._hosts.leaders]
        absent = [r.name for r in manifest.files if not any(r.name in files for files in have)]
        if absent:
            return f"{', '.join(absent[:3])} of it is damaged or missing on every host"
        self._together.everywhere("prepare", lambda: self._place(manifest, have[self._host]) if self._leads else None)
        faults: list[Exception] = []
        target = layout.step_folder(self.root, manifest.step)
        for record, source, to in self._missing(manifest.files, have, only_main):
            if self._leads and self._host == source:
                send_file(self._exchange, target, record, self._hosts.leaders[to])
            elif self._leads and self._host == to:
                try:
                    receive_file(self._exchange, self._disk, target, record, self._hosts.leaders[source])
                    log.warning("%s of step %d is taken from host %d", record.name, manifest.step, source)
                except (OSError, CheckpointError) as error:
                    faults.append(error)
        self._together.everywhere("complete", lambda: self._finish_folder(target, manifest, faults))
        return None

    def _without_manifest(self, step: int) -> list[str]:
        """Return this host's folders of a step whose manifests are damaged: their files may be sound all the same."""
        found = []
        for folder in (layout.step_folder(self.root, step), *layout.leftovers(self.root)):
            if not folder.is_dir() or folder.is_symlink() or layout.step_of(layout.final_of(folder) or folder) != step:
                continue
            try:
                read_manifest(folder)
            except (DamagedError, MisplacedError):
                found.append(folder.name)
        return found

    def _missing(
        self, records: Iterable[FileRecord], have: Sequence[Mapping[str, str]], only_main: bool
    ) -> list[tuple[FileRecord, int, int]]:
        """Return (file, host that has it, host that lacks it) for all that must be sent."""
        return [
            (record, next(at for at, files in enumerate(have) if record.name in files), to)
            for record in records
            for to, files in enumerate(have)
            if record.name not in files and (to == 0 or not only_main)
        ]

    def _sound(self, manifest: Manifest, folders: Sequence[str]) -> dict[str, str]:
        """Return this host's files that are as the manifest says, with their folders."""
        found: dict[str, str] = {}
        for folder in folders:
            lacking = [record for record in manifest.files if record.name not in found]
            examined = examine_files(self.root / folder, manifest, lacking)
            found |= dict.fromkeys(examined.seen, folder)
            damaged = set(examined.faults) - {f"{name} is missing" for name in examined.missing}
            for fault in [*damaged, *examined.unread]:
                log.warning("%s: %s", self.root / folder, fault)
        return found

    def _place(self, manifest: Manifest, have: Mapping[str, str]) -> None:
        """Bring this host's sound files together under the checkpoint's name; other things of that name go aside."""
        target, disk = layout.step_folder(self.root, manifest.step), self._disk
        chosen = target.name if target.name in have.values() else next(iter(have.values()), None)
        if target.exists() and chosen != target.name:
            put_aside(disk, self.root, target, secrets.token_hex(4), "another host has a later one of this step")
        if chosen is None:
            disk.make_folder(target)
        elif chosen != target.name:
            disk.rename(self.root / chosen, target)
        for name, folder in have.items():
            if folder != chosen:
                disk.rename(self.root / folder / name, target / name)
        listed = set(have)
        with contextlib.suppress(DamagedError, MisplacedError):
            if read_manifest(target).to_json() == manifest.to_json():
                listed.add(layout.MANIFEST)
        for path in target.iterdir():
            if path.name in listed:
                continue
            if path.is_dir() and not path.is_symlink():
                disk.remove_tree(path)
            else:
                disk.remove(path)

    def _finish_folder(self, target: Path, manifest: Manifest, faults: Sequence[Exception]) -> None:
        if faults:
            raise faults[0]
        if not self._leads:
            return
        if not (target / layout.MANIFEST).exists():
            text = json.dumps(manifest.to_json(), indent=1)
            write_bytes(self._disk, target / layout.MANIFEST, text.encode())
        self._disk.sync_folder(target)
        self._disk.sync_folder(self.root)

    def _checkpoint(self, manifest: Manifest) -> Checkpoint:
        """Verify a folder that every host has now."""
        target = layout.step_folder(self.root, manifest.step)

        def work() -> dict[str, Any]:
            if not self._leads:
                return {}
            examined = examine_files(target, manifest, manifest.files)
            if examined.faults or examined.unread:
                raise StorageError(f"{target}: {'; '.join([*examined.faults, *examined.unread])}")
            check_rank_files(target, manifest.identity.world_size)
            return {name: dataclasses.asdict(seen) for name, seen in examined.seen.items()}

        by_rank = self._together.everywhere("verify", work)
        seen = by_rank[self._hosts.leaders[self._host]]
        return Checkpoint(target, manifest, {name: Seen(**values) for name, values in seen.items()})


def _asked(accept: Accept | None, found: Checkpoint) -> str | None:
    """Return why a run cannot go on from a checkpoint."""
    try:
        if accept is not None:
            accept(found)
    except SetformerError as error:
        return str(error)
    except Exception as error:
        log.warning("checkpoint %s could not be checked", found.path, exc_info=True)
        return f"{found.path} is not as a run of this program saves it: {describe(error)}"
    return None
