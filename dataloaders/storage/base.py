"""Where bytes are: files by name under a root. Here the protocol, its errors and the local folder.

What may pass (a reset, a time-out, a short read, a disk that hiccups) is tried again with growing waits; what will not
is not. Each failure is one sentence that names the file. URLs are in `dataloaders.storage.remote`.
"""

from __future__ import annotations

import glob
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from dataloaders.sources.files import OddFileError, check_regular, open_regular
from setformer_dist.core.errors import DataError

T = TypeVar("T")

# Open files kept per process; the usual limit of a process is 1024, and ImageNet has more shards than that.
_MAX_OPEN = 128

# Waits in seconds before each further try of a read that failed (network storage hiccups), about 8 s in all.
_RETRY_WAITS = (0.1, 0.5, 2.0, 5.0)

# Bytes per piece of a file that is read from end to end.
BLOCK = 1 << 20

# Bytes per second below which the files of an index do not come.
_SLOWEST = 1 << 14

# Questions that a remote storage is asked at a time.
_ASKED_AT_ONCE = 16


class UnreadableError(DataError):
    """A file that storage does not deliver.

    Args:
        shown: the file.
        what: what is wrong with it and what to do; follows its name in the message.
    """

    def __init__(self, shown: str, what: str) -> None:
        super().__init__(shown, what)
        self.shown = shown
        self.what = what

    def __str__(self) -> str:
        return f"{self.shown} {self.what}"


class MissingError(UnreadableError):
    """A file that is not there."""


class DeniedError(UnreadableError):
    """A file that may not be read, or that a server hides by saying so."""


class NoRangesError(UnreadableError):
    """A file that can only be read from end to end."""


class RetriableError(Exception):
    """A failure that another try may not meet; never leaves this package.

    Args:
        reason: for the message, should it not pass.
        wait: seconds that the storage asks to be left alone.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class FileFacts:
    """A file's size in bytes, -1 where the storage does not say, and what changes when it is rewritten, or ""."""

    size: int
    version: str


class Storage(Protocol):
    """Files by name under a root. May be pickled, and used by several threads at once."""

    @property
    def name(self) -> str:
        """The root, for messages."""
        ...

    def shown(self, name: str) -> str:
        """Name a file for a message."""
        ...

    def facts(self, name: str) -> FileFacts:
        """Return a file's size and version; raises `MissingError`, `UnreadableError`."""
        ...

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return just `size` bytes from `offset` on; raises `UnreadableError`."""
        ...

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes from end to end; raises `UnreadableError`."""
        ...

    def names(self, pattern: str) -> list[str]:
        """Return the names that match a pattern with * and ?, sorted; raises `UnreadableError`."""
        ...

    def close(self) -> None:
        """Close files and connections; a later read opens them again."""
        ...


@runtime_checkable
class WholeStorage(Protocol):
    """What a storage has besides that fetches files whole, of which reads then take their bytes."""

    @property
    def moved(self) -> int:
        """A number that changes as long as bytes of a file come, here or where another process fetches it for us."""
        ...

    def expect(self, names: list[str], share: float = 1.0) -> None:
        """Fetch files in the background, in this order: those in use first, as many as `share` of the room holds."""
        ...

    def read_again(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a file whose copy proved damaged: it is fetched once more, but not twice."""
        ...


def insist(
    shown: str, attempt: Callable[[], T], sleep: Callable[[float], None] = time.sleep, limit: float = float("inf")
) -> T:
    """Return what an attempt returns, trying again while it raises `RetriableError`.

    Args:
        shown: the file, for the message.
        attempt: the work.
        sleep: waits so many seconds.
        limit: seconds after which no further try begins.

    Raises:
        UnreadableError: it did not pass.
    """
    begun, tries = time.monotonic(), 0
    for wait in (*_RETRY_WAITS, None):
        tries += 1
        try:
            return attempt()
        except RetriableError as error:
            problem, asked = str(error), error.wait
        if wait is None or time.monotonic() - begun + max(wait, asked) >= limit:
            break
        sleep(max(wait, asked))
    raise UnreadableError(
        shown,
        f"cannot be read after {tries} {'try' if tries == 1 else 'tries'} ({problem}): check the storage, or restore "
        "the file",
    )


class _OpenFile:
    """A file descriptor that is closed when the last user lets go of it."""

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = open_regular(path)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class LocalFolder:
    """A folder of this machine, or one that is mounted (`Storage`).

    Args:
        folder: the root.
        sleep: waits so many seconds between tries.
    """

    def __init__(self, folder: Path, sleep: Callable[[float], None] = time.sleep) -> None:
        self.folder = Path(folder)
        self._root = os.path.join(folder, "")  # noqa: PTH118  (joined with a name at every opening)
        self._sleep = sleep
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    def shown(self, name: str) -> str:
        """Return the path of a file."""
        return self._root + name

    def facts(self, name: str) -> FileFacts:
        """Return a file's size and time of last change."""
        try:
            found = os.stat(self._root + name)  # noqa: PTH116  (50,000 shards at every start)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingError(self.shown(name), f"cannot be opened ({error.strerror})") from None
        except OSError as error:
            raise UnreadableError(self.shown(name), f"cannot be opened ({error.strerror})") from None
        try:
            check_regular(found, self._root + name)
        except OddFileError as error:
            raise UnreadableError(self.shown(name), f"cannot be read ({error.strerror})") from None
        return FileFacts(found.st_size, str(found.st_mtime_ns))

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes by one pread, or several tries at it."""

        def attempt() -> bytes:
            try:
                file = self._file(
                    name
                )  # held by this name while it is read, no matter which thread drops it from the set
                data = os.pread(file.fd, size, offset)
            except OddFileError as error:
                raise UnreadableError(self.shown(name), f"cannot be read ({error.strerror})") from None
            except OSError as error:
                self._forget(name)
                raise RetriableError(str(error)) from None
            if len(data) != size:
                self._forget(name)
                raise RetriableError(f"{len(data)} of {size} bytes at offset {offset}")
            return data

        return insist(self.shown(name), attempt, self._sleep)

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes from end to end."""
        try:
            with os.fdopen(open_regular(self._root + name), "rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    yield block
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingError(self.shown(name), f"cannot be opened ({error.strerror})") from None
        except OSError as error:
            raise UnreadableError(self.shown(name), f"cannot be read ({error.strerror}): check the storage") from None

    def names(self, pattern: str) -> list[str]:
        """Return the files that match a pattern below the folder; one that is there under just this name is it."""
        folder, _, last = pattern.rpartition("/")
        if folder and glob.has_magic(folder) and Path(self._root, folder).is_dir():
            pattern = f"{glob.escape(folder)}/{last}"  # brackets in the names of folders
        return sorted(glob.glob(pattern, root_dir=self._root))  # noqa: PTH207  (relative names)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._files.clear()

    def _file(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                if len(self._files) >= _MAX_OPEN:
                    self._files.popitem(last=False)
                file = self._files[name] = _OpenFile(self._root + name)
            else:
                self._files.move_to_end(name)
            return file

    def _forget(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)

    def __reduce__(self) -> tuple[object, ...]:
        return LocalFolder, (self.folder, self._sleep)


def read_small(storage: Storage, name: str, limit: int, timeout: float) -> bytes:
    """Return a whole file; arguments and errors are those of `read_blocks`."""
    return b"".join(read_blocks(storage, name, limit, timeout))


def read_blocks(storage: Storage, name: str, limit: int, timeout: float) -> Iterator[bytes]:
    """Yield a file of which nothing vouches for the size: at most `limit` bytes, and no dripping for ever.

    Args:
        storage: where it is.
        name: of the file.
        limit: bytes.
        timeout: seconds after which it must have come at `_SLOWEST` on average.

    Raises:
        UnreadableError: it is larger, or comes more slowly.
    """
    got, begun = 0, time.monotonic()
    for block in storage.blocks(name):
        got += len(block)
        if got > limit:
            raise UnreadableError(
                storage.shown(name), f"has more than the {limit} bytes that are read: restore the file"
            )
        if time.monotonic() - begun > timeout + got / _SLOWEST:
            raise UnreadableError(
                storage.shown(name), f"arrives too slowly ({got} bytes in {timeout:g} s): check the server"
            )
        yield block


def all_facts(storage: Storage, names: Sequence[str]) -> list[FileFacts]:
    """Return size and version of many files; a remote storage is asked for several at a time."""
    if isinstance(storage, LocalFolder):
        return [storage.facts(name) for name in names]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return list(pool.map(storage.facts, names))
