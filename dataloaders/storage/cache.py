"""Shards and .beton files fetched from a URL, kept in a bounded local folder that all processes of a host share.

    cache/
      .room                        locked while room is made and taken
      3f2a…-shard-000000.tar       a whole shard; the digits are of its URL, size and sha256 or version
      3f2a…-shard-000000.tar.lock  locked by the process that fetches it; never removed
      3f2a…-shard-000000.tar.partial
      77b0…-train.beton            a .beton file, and its sidecar: locked, shared, by each process that has it open
      77b0…-train.beton.index.safetensors

A shard is fetched once per host: who comes second waits for the first. Its bytes are written aside, compared with
size and sha256 where the index knows them, synced and renamed, so what has a shard's name is whole. Room is taken
on the disk before a byte is fetched, after the files used longest ago have gone; none goes while it is being read.
A killed process leaves at most a `.partial` that no process holds locked: the next one to make room removes it.

The folder is this user's alone (`dataloaders.storage.homes`), links in it are never followed, and a shard whose
sha256 the index knows is compared with it once by each process that reads it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dataloaders.sources.files import OddFileError, open_new, open_regular
from dataloaders.storage.base import FileFacts, Storage, UnreadableError
from dataloaders.storage.homes import make_private
from setformer_dist.core.errors import DataError

_log = logging.getLogger(__name__)

_GIB = 1 << 30

# Seconds that closing waits for a fetch that is no longer needed.
_CLOSE_S = 10.0

# Seconds between looks at what another process holds, and between notes of when a shard was last used.
_POLL = 0.02
_TOUCH = 1.0

_BLOCK = 1 << 20

# Bytes of room that a file of unknown size takes at a time.
_STRETCH = 1 << 26

# Names of cached shards; nothing else in the folder is ever counted or removed.
_OURS = re.compile(r"[0-9a-f]{16}-")


@dataclass(frozen=True)
class Known:
    """What is known of a shard beforehand: size in bytes (-1: nothing), sha256 and version, "" where unknown."""

    size: int
    sha256: str = ""
    version: str = ""


class ShardCache:
    """A bounded folder of whole shards.

    Args:
        folder: of the cache; made where it is missing.
        gib: GiB that it may hold.
        timeout: seconds to wait for another process, or for room, without anything moving.

    Attributes:
        moved: changes whenever bytes come, here or in a process that is waited for.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, gib: float, timeout: float) -> None:
        self.folder = Path(folder)
        self.limit = int(gib * _GIB)
        self.moved = 0
        self._timeout = timeout
        self._lock = threading.Lock()
        self._sound: dict[str, tuple[int, ...]] = {}  # sha256 -> the state of the file that has it
        with self._explained():
            make_private(self.folder)
        with self._explained(), self._room():
            self._sweep()

    def read(self, path: Path, size: int, offset: int, length: int, sha256: str = "") -> bytes | None:
        """Return bytes of a cached shard; None where it is not there whole.

        Args:
            path: of the cached shard.
            size: that the shard must have, -1 if unknown.
            offset: of the bytes.
            length: of the bytes; 0 only looks and marks as used.
            sha256: that the shard must have, "" if unknown; compared once, and whenever the file is another.

        Raises:
            DataError: another process holds it for as long as the time-out.
        """
        try:
            file = open_regular(path, follow=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            if not _is_odd(error):
                raise
            return None  # a link, or no file: what is fetched takes its place
        try:
            # Who makes room holds it exclusively, and only to remove it; but it may be stopped just then.
            if not _acquired(file, self._timeout, _nothing, fcntl.LOCK_SH):
                raise DataError(
                    f"cached shard {path} was locked by another process for {self._timeout:g} s: end that process, or "
                    "raise data.read_timeout"
                )
            found = os.fstat(file)
            if not found.st_nlink or size not in (found.st_size, -1):
                return None
            if sha256 and not self._has_digest(file, found, sha256):
                _log.warning("cached shard %s does not have the sha256 of the index and is fetched again", path)
                return None
            if time.time() - found.st_atime > _TOUCH:
                os.utime(path, (time.time(), found.st_mtime))
            return os.pread(file, length, offset)
        except FileNotFoundError:
            return None
        finally:
            os.close(file)

    def _has_digest(self, file: int, found: os.stat_result, sha256: str) -> bool:
        """Return whether a cached shard has a sha256: it is read whole once in each process, and when it changes."""
        # The time of the inode's change is no part of it: every read that marks the file as used changes it.
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        with self._lock:
            if self._sound.get(sha256) == state:
                return True
            digest, place = hashlib.sha256(), 0
            while block := os.pread(file, _BLOCK, place):
                digest.update(block)
                place += len(block)
                self._note()
            if digest.hexdigest() != sha256:
                return False
            self._sound[sha256] = state
            return True

    def drop(self, path: Path) -> None:
        """Remove a shard that proved damaged; who reads it just now reads on."""
        with self._explained():
            path.unlink(missing_ok=True)

    def fetch(
        self, storage: Storage, name: str, path: Path, known: Known, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Bring a shard into the cache, or wait until another process has.

        Args:
            storage: where it comes from.
            name: of the shard there.
            path: of the shard in the cache.
            known: what the index says of it.
            wanted: asked at times; False gives up.

        Raises:
            DataError: it cannot be fetched, is not what the index says, or there is no room.
        """
        with self._explained(), self._turn(storage, name, path):
            self._note()
            if self.read(path, known.size, 0, 0, known.sha256) is not None:
                return
            path.unlink(missing_ok=True)  # not whole: damaged behind our back
            facts = storage.facts(name)
            self._note()
            if known.size >= 0 and facts.size not in (known.size, -1):
                raise UnreadableError(
                    storage.shown(name), f"has {facts.size} bytes, the index says {known.size}: make the index again"
                )
            size = known.size if known.size >= 0 else facts.size
            partial = path.with_name(path.name + ".partial")
            try:
                with os.fdopen(open_new(partial), "wb") as file:

                    def take(room: int) -> None:
                        self._take_room(storage.shown(name), file.fileno(), room, path)
                        self._note()

                    _download(storage, name, file, Known(size, known.sha256), wanted, self._note, take)
                    file.flush()
                    os.fsync(file.fileno())
                with self._room():  # who counts what is here must find it under one name or the other
                    partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def hold(self, storage: Storage, name: str, path: Path, known: Known) -> int:
        """Bring a file into the cache and return a descriptor: as long as it is open, the file stays there.

        Args and errors are those of `fetch`.
        """
        while True:  # at most again: it may go between its arrival and the lock
            self.fetch(storage, name, path, known)
            try:
                file = open_regular(path, follow=False)
            except FileNotFoundError:
                continue
            if _acquired(file, self._timeout, _nothing, fcntl.LOCK_SH) and os.fstat(file).st_nlink:
                return file
            os.close(file)

    def _note(self) -> None:
        self.moved += 1

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"the disk of cache folder {self.folder} is full: free it, set data.cache to another disk, or "
                    "lower data.cache_gib"
                ) from None
            raise DataError(
                f"cache folder {self.folder} cannot be written ({error.strerror}): set data.cache to a folder of yours"
            ) from None

    @contextmanager
    def _turn(self, storage: Storage, name: str, path: Path) -> Iterator[None]:
        """Wait until no other process fetches this shard; as long as bytes come, however long that takes."""
        partial = path.with_name(path.name + ".partial")
        before: object = None

        def seen() -> Any:
            nonlocal before
            try:
                now: object = partial.stat().st_mtime_ns
            except FileNotFoundError:
                now = path.exists()
            if now != before:
                before = now
                self._note()
            return now

        with locked(path.with_name(path.name + ".lock"), self._timeout, seen) as got:
            if not got:
                raise UnreadableError(
                    storage.shown(name),
                    f"is being fetched into {self.folder} by another process, from which nothing came for "
                    f"{self._timeout:g} s: end that process, or raise data.read_timeout",
                )
            yield

    @contextmanager
    def _room(self) -> Iterator[None]:
        with locked(self.folder / ".room", self._timeout) as got:
            if not got:
                raise DataError(
                    f"cache folder {self.folder} was locked by another process for {self._timeout:g} s: end that "
                    "process, or raise data.read_timeout"
                )
            yield

    def _take_room(self, shown: str, file: int, size: int, path: Path) -> None:
        """Allocate a file's bytes on the disk, once those used longest ago have gone."""
        if size > self.limit:
            raise UnreadableError(
                shown,
                f"has {size / _GIB:.3g} GiB, the cache no more than data.cache_gib = {self.limit / _GIB:.3g}: raise it",
            )
        if not size:
            return
        deadline = time.monotonic() + self._timeout
        while True:
            with self._room():
                if self._make_room(size, path):
                    os.posix_fallocate(file, 0, size)
                    return
            if time.monotonic() > deadline:
                raise DataError(
                    f"cache folder {self.folder} has no room for {shown}: all of its {self.limit / _GIB:.3g} GiB are "
                    "being fetched or in use, so raise data.cache_gib"
                )
            time.sleep(_POLL)

    def _make_room(self, size: int, keep: Path) -> bool:
        """Remove shards until `size` bytes fit; return whether they do."""
        held = self._sweep(keep.name + ".partial")
        total = sum(one.st_size for _, one in held)
        for path, facts in sorted(held, key=lambda one: max(one[1].st_atime_ns, one[1].st_mtime_ns)):
            if total + size <= self.limit:
                break
            if not path.name.endswith(".partial") and _removed(path):
                total -= facts.st_size
        return total + size <= self.limit

    def _sweep(self, own: str = "") -> list[tuple[Path, os.stat_result]]:
        """Return the shards and those in the making, without what killed processes left, which goes."""
        held = []
        for path in list(self.folder.iterdir()):
            if path.name == own or path.name.endswith(".lock") or not _OURS.match(path.name):
                continue  # what others put here is none of our business
            if path.name.endswith(".partial"):
                with locked(path.with_name(path.name.removesuffix(".partial") + ".lock"), 0.0) as got:
                    if got:
                        path.unlink(missing_ok=True)
            try:
                held.append((path, path.lstat()))
            except FileNotFoundError:
                continue
        return held


class CachedStorage:
    """A storage whose shards are read from a cache, where they are fetched whole (`Storage`).

    Args:
        storage: where they come from.
        cache: where they are kept.
        known: what the index says of each shard.
    """

    def __init__(self, storage: Storage, cache: ShardCache, known: dict[str, Known]) -> None:
        self._storage = storage
        self._cache = cache
        self._known = known
        self._paths: dict[str, Path] = {}
        self._ahead = Ahead(self._ready)
        self._again: set[str] = set()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The URL."""
        return self._storage.name

    def shown(self, name: str) -> str:
        """Return the URL of a file."""
        return self._storage.shown(name)

    def facts(self, name: str) -> FileFacts:
        """Return what the origin says."""
        return self._storage.facts(name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of the cached shard, which is fetched first where it is missing."""
        path, known = self._path(name), self._known.get(name, Known(-1))
        while True:  # at most again: a shard may go between its arrival and this look at it
            data = self._cache.read(path, known.size, offset, size, known.sha256)
            if data is None:
                self._cache.fetch(self._storage, name, path, known)
            elif len(data) == size:
                return data
            else:
                raise UnreadableError(
                    self.shown(name), f"has {len(data)} of {size} bytes at offset {offset}: restore the file"
                )

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a shard's bytes from the cache, into which it is fetched; those of other files from their origin."""
        known = self._known.get(name)
        if known is None or known.size < 0:
            yield from self._storage.blocks(name)
            return
        for offset in range(0, known.size, _BLOCK):
            yield self.read(name, offset, min(_BLOCK, known.size - offset))

    def names(self, pattern: str) -> list[str]:
        """Return what the origin has."""
        return self._storage.names(pattern)

    def read_again(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a shard that is fetched once more, as those in the cache proved damaged; but not twice."""
        with self._lock:
            if name not in self._again:
                self._again.add(name)
                self._cache.drop(self._path(name))
        return self.read(name, offset, size)

    @property
    def moved(self) -> int:
        """A number that changes as long as bytes come."""
        return self._cache.moved

    def expect(self, names: list[str], share: float = 1.0) -> None:
        """Fetch shards in the background, in this order: as many as that share of the cache holds."""
        self._ahead.expect(fitting(names, self._known, int(self._cache.limit * share)))

    def close(self) -> None:
        """Stop fetching ahead; close connections."""
        self._ahead.close()
        self._storage.close()

    def _ready(self, name: str) -> None:
        """Have a shard in the cache."""
        known = self._known.get(name, Known(-1))
        if self._cache.read(self._path(name), known.size, 0, 0, known.sha256) is None:
            self._cache.fetch(self._storage, name, self._path(name), known, lambda: self._ahead.wanted)

    def _path(self, name: str) -> Path:
        path = self._paths.get(name)
        if path is None:
            known = self._known.get(name, Known(-1))
            words = (self._storage.shown(name), str(known.size), known.sha256 or known.version)
            digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
            path = self._paths[name] = self._cache.folder / f"{digest}-{PurePosixPath(name).name}"
        return path

    def __reduce__(self) -> tuple[object, ...]:
        return _cached_again, (self._storage, self._cache.folder, self._cache.limit, self._cache._timeout, self._known)


class Ahead:
    """A thread that does to names, one after the other, what reads would have to wait for.

    Args:
        work: done to each name; an error of it is left to the read that comes to the name.

    Attributes:
        wanted: False once what is under way is given up.
    """

    NAME = "shards ahead"

    def __init__(self, work: Callable[[str], object]) -> None:
        self._work = work
        self.wanted = True
        self._names: list[str] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def expect(self, names: list[str]) -> None:
        """Go on with these names, in place of those named before."""
        with self._lock:
            self.wanted = True
            self._names = names[::-1]
            if self._thread is None and self._names:
                self._thread = threading.Thread(target=self._run, name=self.NAME, daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Give up what is under way."""
        with self._lock:
            self.wanted, self._names, thread = False, [], self._thread
        if thread is not None:
            thread.join(_CLOSE_S)
            if thread.is_alive():
                _log.warning("fetching a shard in advance is abandoned: no data arrived for %g s", _CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._names:
                    self._thread = None
                    return
                name = self._names.pop()
            try:
                self._work(name)
            except (DataError, OSError):
                continue


def fitting(names: list[str], known: Mapping[str, Known], limit: int) -> list[str]:
    """Return the first of some shards, as many as `limit` bytes hold."""
    fit = []
    for name in names:
        limit -= max(known.get(name, Known(-1)).size, 0)
        if limit < 0:
            break
        fit.append(name)
    return fit


def _cached_again(storage: Storage, folder: Path, limit: int, timeout: float, known: dict[str, Known]) -> CachedStorage:
    return CachedStorage(storage, ShardCache(folder, limit / _GIB, timeout), known)


def _nothing() -> None:
    """No progress is seen."""


@contextmanager
def locked(path: Path, timeout: float, progress: Callable[[], object] = _nothing) -> Iterator[bool]:
    """Hold an exclusive lock on a file, which is made where it is missing; it ends with the process.

    Args:
        path: of the file.
        timeout: seconds to wait while `progress()` stays the same.
        progress: what changes while the holder is at work.

    Yields:
        Whether the lock is held.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        yield _acquired(file, timeout, progress)
    finally:
        os.close(file)


def _acquired(file: int, timeout: float, progress: Callable[[], object], kind: int = fcntl.LOCK_EX) -> bool:
    seen, since = progress(), time.monotonic()
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            now = progress()
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since >= timeout:
                return False
            time.sleep(_POLL)
        else:
            return True


def _download(
    storage: Storage,
    name: str,
    file: Any,
    known: Known,
    wanted: Callable[[], bool],
    came: Callable[[], None],
    take: Callable[[int], None],
) -> None:
    """Write a file's bytes, for which room is taken first, and compare them with what is known of them."""
    sha256, done, taken = hashlib.sha256(), 0, max(known.size, 0)
    take(taken)
    for block in storage.blocks(name):
        if not wanted():
            raise UnreadableError(storage.shown(name), "is no longer needed")
        came()
        if done + len(block) > known.size >= 0:
            raise UnreadableError(
                storage.shown(name), f"has more than the {known.size} bytes that were announced: restore the file"
            )
        if done + len(block) > taken:  # also where more comes than was said
            taken = done + max(len(block), _STRETCH)
            take(taken)
        file.write(block)
        sha256.update(block)
        done += len(block)
    file.truncate(done)
    if known.size >= 0 and done != known.size:
        raise UnreadableError(storage.shown(name), f"has {done} bytes, the index says {known.size}: restore the file")
    if known.sha256 and sha256.hexdigest() != known.sha256:
        raise UnreadableError(
            storage.shown(name),
            "does not have the sha256 that the index says: restore the file or make the index again",
        )


def _is_odd(error: OSError) -> bool:
    """Return whether what has a cached file's name is none: a link, a pipe, a folder."""
    return isinstance(error, OddFileError) or error.errno == errno.ELOOP


def _removed(path: Path) -> bool:
    """Remove a shard unless a process is reading it."""
    try:
        file = open_regular(path, follow=False)
    except FileNotFoundError:
        return True
    except OSError as error:
        if _is_odd(error):  # a link goes, what it leads to stays
            path.unlink(missing_ok=True)
            return True
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(file)
