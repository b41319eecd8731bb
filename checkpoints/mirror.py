"""Copies of a run's checkpoints in an object store: made behind training, complete when their manifest is there.

    <checkpoint.mirror>/<run>/
      step-00001200-5f0c21aa/            the copy of a checkpoint, if and only if its manifest is there and verifies
        rank-00000-of-00002.safetensors  the files of the local checkpoint, byte for byte
        trainer.json
        manifest.json                    put last, removed first
        rank-00001-of-00002.done.json    while it is made: a rank's word that its files are there and verify

An object store renames nothing, so the name of a copy holds that of its attempt: two attempts never mix, and an old
copy of a step is whole until the new one is. One copy is made at a time, by one thread per rank and without a
collective; the ranks' threads speak through small objects in the copy's folder. Training waits for no part of it:

     1  rank 0  says, as a save begins, whether it is copied: not while the copy of another is made
     2  each    waits until the checkpoint is committed locally, and opens its share of the files
     3  each    puts them into the store
     4  each    reads them back and compares their digests with the manifest's
     5  each    says so in `rank-….done.json`
     6  rank 0  waits for every rank's word
     7  rank 0  removes the words
     8  rank 0  puts `manifest.json` and reads it again: from here on the copy counts
     9  rank 0  deletes what retention lets go, copies of later steps (a branch that the run has left) and what killed
                attempts left, each with its manifest first; a failure here costs space alone

What fails may pass and is tried again, up to `checkpoint.mirror_minutes`; then the copy is given up, which is told, and
the next save begins another. A process that dies leaves objects without a manifest, which are no copy.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.copies import (
    checked,
    copy_name,
    copy_named,
    delete_copy,
    list_copies,
    manifest_of,
    step_of_copy,
    tried,
)
from checkpoints.digest import opened
from checkpoints.errors import DamagedError, StorageError
from checkpoints.manifest import FileRecord, Manifest, read_manifest
from checkpoints.objects import Objects
from checkpoints.policy import Candidate, steps_to_delete
from checkpoints.strictjson import parse
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.store import CopyEvent

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_S = 0.2  # between looks for the local commit
_WORDS_S = (0.2, 5.0)  # first and longest pause between two looks for the words
_READ = 4 << 20
_MAX_WORD = 1 << 20


class Mirror:
    """This rank's part in the copies of a run's checkpoints.

    Args:
        objects: the run's folder in the store.
        root: the `checkpoints` folder.
        ranks: this process's place.
        config: how long a copy may take, and which stay.
    """

    def __init__(self, objects: Objects, root: Path, ranks: RankInfo, config: CheckpointConfig) -> None:
        self.objects = objects
        self.root = root
        self.ranks = ranks
        self.config = config
        self.newest_copied: int | None = None  # step; rank 0's
        self._job: _Job | None = None
        self._events: queue.SimpleQueue[CopyEvent] = queue.SimpleQueue()

    @property
    def busy(self) -> bool:
        """Whether this rank makes a copy."""
        return self._job is not None and self._job.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait at most so long for the copy that this rank makes."""
        if self._job is not None:
            self._job.join(seconds)

    def start(self, step: int, attempt: str, writing: Path | None = None) -> None:
        """Begin this rank's part of a copy; one that still goes on is given up.

        Args:
            step: of a checkpoint that is committed locally, or will be.
            attempt: makes the copy's name, the same on all ranks.
            writing: the folder that is gone once the checkpoint is committed.
        """
        self._start(_Job(self, step, attempt, writing, self.ranks.rank, self.ranks.world_size))

    def catch_up(self, step: int) -> None:
        """Rank 0: copy a committed checkpoint without the other ranks, unless it is in the store."""
        if not self.busy:
            self._start(_Job(self, step, secrets.token_hex(4), None, 0, 1, look_first=True))

    def give_up(self) -> None:
        """Let the copy that is being made end as soon as it can."""
        if self._job is not None:
            self._job.wanted = False

    def events(self) -> Sequence[CopyEvent]:
        """Return what happened since the last call; rank 0 alone knows. Does not wait."""
        return [self._events.get() for _ in range(self._events.qsize())]

    def tell(self, event: CopyEvent) -> None:
        """Note what happened."""
        self._events.put(event)

    def _start(self, job: _Job) -> None:
        self.give_up()
        self._job = job
        job.start()


class _Job(threading.Thread):
    """Steps 2 to 9 on one rank, or alone where `world_size` is 1."""

    def __init__(
        self,
        mirror: Mirror,
        step: int,
        attempt: str,
        writing: Path | None,
        rank: int,
        world_size: int,
        look_first: bool = False,
    ) -> None:
        super().__init__(name=f"copy-{step}", daemon=True)
        self.wanted = True
        self._mirror = mirror
        self._objects = mirror.objects
        self._step = step
        self._copy = copy_name(step, attempt)
        self._writing = writing
        self._rank = rank
        self._world_size = world_size
        self._look_first = look_first
        self._begun = time.monotonic()
        self._until = self._begun + 60 * mirror.config.mirror_minutes

    def run(self) -> None:
        """Make the copy, or tell why it could not be made."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 — it costs the copy, and is told
            if self.wanted:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        log.warning("the copy of step %d in %s is given up: %s", self._step, self._objects.shown, text)
        if self._rank == 0:
            self._mirror.tell(CopyEvent(self._step, self._objects.shown, self._mirror.newest_copied, failure=text))
            return
        word = json.dumps({"error": f"rank {self._rank}: {text}"}).encode()
        with contextlib.suppress(CheckpointError):
            self._objects.put(self._word(self._rank), [word], len(word))

    def _work(self) -> None:
        final = layout.step_folder(self._mirror.root, self._step)
        if not self._committed(final):
            return
        manifest = read_manifest(final)
        data = (final / layout.MANIFEST).read_bytes()
        if self._look_first and self._is_there(manifest):
            self._mirror.newest_copied = self._step
            return
        with ExitStack() as stack:
            share = manifest.files[self._rank :: self._world_size]
            # Held open: retention may delete the names while they are copied.
            held = [(record, stack.enter_context(opened(final / record.name))) for record in share]
            for record, descriptor in held:
                self._put_file(record, descriptor)
        if self._rank:
            word = json.dumps({"copied": [record.name for record in share]}).encode()
            self._insist(lambda: self._objects.put(self._word(self._rank), [word], len(word)))
            return
        self._complete(manifest, data)

    def _committed(self, final: Path) -> bool:
        """Wait until the checkpoint is committed; return False where it was abandoned."""
        while self._writing is not None and self._writing.exists():
            self._check_wanted()
            time.sleep(_LOOK_S)
        return (final / layout.MANIFEST).exists()

    def _is_there(self, manifest: Manifest) -> bool:
        names = [name for name in self._insist(self._objects.names) if step_of_copy(name) == self._step]
        copies = [self._insist(functools.partial(copy_named, self._objects, name)) for name in names]
        return any(copy.manifest is not None and copy.manifest.to_json() == manifest.to_json() for copy in copies)

    def _put_file(self, record: FileRecord, descriptor: int) -> None:
        """Steps 3 and 4."""

        def work() -> None:
            self._objects.put(f"{self._copy}/{record.name}", self._parts(descriptor), record.size)
            try:
                for _ in checked(self._objects, self._copy, record):
                    self._check_wanted()
            except DamagedError as error:  # on the way there, or there; or the local file
                raise StorageError(f"{self._objects.below(self._copy)} is not as it was put there: {error}") from None

        self._insist(work)

    def _parts(self, descriptor: int) -> Iterator[bytes]:
        position = 0
        while data := os.pread(descriptor, _READ, position):
            self._check_wanted()
            yield data
            position += len(data)

    # Rank 0.

    def _complete(self, manifest: Manifest, data: bytes) -> None:
        """Steps 6 to 9."""
        self._wait_for_words()
        for rank in range(1, self._world_size):
            self._insist(functools.partial(self._objects.remove, self._word(rank)))

        def put() -> None:
            self._check_wanted()
            self._objects.put(f"{self._copy}/{layout.MANIFEST}", [data], len(data))
            try:
                manifest_of(self._objects, self._copy)
            except DamagedError as error:
                raise StorageError(f"the manifest is not as it was put there: {error}") from None

        self._insist(put)
        self._mirror.newest_copied = self._step
        seconds = time.monotonic() - self._begun
        log.info("copy %s: %d bytes in %.1f s", self._objects.below(self._copy), manifest.size, seconds)
        self._mirror.tell(CopyEvent(self._step, self._objects.shown, self._step, manifest.size, seconds))
        try:
            self._clear()
        except CheckpointError as error:
            log.warning("old copies in %s could not all be deleted: %s", self._objects.shown, error)

    def _wait_for_words(self) -> None:
        waiting = {layout.done_file(rank, self._world_size) for rank in range(1, self._world_size)}
        pause, longest = _WORDS_S
        while waiting:
            self._check_wanted()
            for name in waiting & set(self._insist(lambda: self._objects.names(self._copy))):
                read = functools.partial(self._objects.read, f"{self._copy}/{name}", _MAX_WORD)
                word = parse(self._insist(read), name)
                if "error" in word:
                    raise StorageError(str(word["error"]))
                waiting.discard(name)
            if not waiting:
                return
            if time.monotonic() > self._until:
                raise StorageError(
                    f"{', '.join(sorted(waiting))} did not come within {self._mirror.config.mirror_minutes:g} minutes: "
                    "see the logs of those ranks, or raise checkpoint.mirror_minutes"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, longest)

    def _clear(self) -> None:
        """Step 9."""
        copies = list_copies(self._objects)
        sound: dict[int, Candidate] = {}
        for copy in copies:
            if copy.manifest is not None and copy.manifest.step <= self._step:
                found = Candidate(copy.manifest.step, metrics=copy.manifest.metrics, tags=copy.manifest.tags)
                sound.setdefault(copy.manifest.step, found)
        going = set(steps_to_delete(sound.values(), self._step, self._mirror.config))
        for copy in copies:
            step = step_of_copy(copy.name) or 0
            other = step == self._step and copy.name != self._copy
            if step > self._step or step in going or other or copy.begun:
                self._check_wanted()
                delete_copy(self._objects, copy.name)

    def _word(self, rank: int) -> str:
        return f"{self._copy}/{layout.done_file(rank, self._world_size)}"

    def _insist(self, work: Callable[[], T]) -> T:
        return tried(work, self._until, lambda: self.wanted)

    def _check_wanted(self) -> None:
        if not self.wanted:
            raise CheckpointError("it is no longer wanted")
