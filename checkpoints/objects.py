"""A folder of an object store behind fsspec: whole objects put, ranges read, names listed.

The seam at which tests make each operation fail, as `disk.Disk` is for disks. Credentials are the client's own (for S3
the AWS_… variables or files); nothing here shows a URL with user, password or query.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import fsspec

from checkpoints.errors import DamagedError, MissingError, StorageError
from setformer_dist.core.bounded import bounded
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.secrets import redacted

T = TypeVar("T")

_CALL_S = 120.0  # seconds after which an answer of the client is waited for no longer
_BLOCK = 8 << 20  # bytes of one read
_PART = 16 << 20  # bytes that a write collects before it sends them
_MAX_PARTS = 9000  # S3 takes 10,000
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Objects:
    """One folder of a store.

    Args:
        url: of the folder.

    Attributes:
        shown: the URL as messages have it.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.shown = redacted(self._url)
        self._opened: tuple[Any, str] | None = None

    def below(self, folder: str) -> str:
        """Return the URL of a folder of this one, for messages."""
        return f"{self.shown}/{folder}"

    def put(self, name: str, parts: Iterable[bytes | memoryview], size: int) -> None:
        """Write an object, from its first byte to its last.

        Args:
            name: its path below the folder.
            parts: its bytes.
            size: how many they are.

        Raises:
            StorageError: it could not be written, and another try may go better.
            CheckpointError: likewise, but somebody must mend it.
        """
        part_size = max(_PART, -(-size // _MAX_PARTS))
        file = self._do(name, "written", lambda files, path: self._open(files, path, part_size))
        try:
            for data in parts:
                self._do(name, "written", functools.partial(_append, file, data))
        except BaseException:
            _drop(file)
            raise
        self._do(name, "written", lambda files, path: file.close())

    def probe(self) -> None:
        """Put a small object, read it back and remove it; raises as these do."""
        name = f"probe-{secrets.token_hex(4)}"
        self.put(name, [name.encode()], len(name))
        self.read(name, len(name))
        self.remove(name)

    def read(self, name: str, limit: int) -> bytes:
        """Return a whole small object.

        Raises:
            MissingError: it is not there.
            DamagedError: it has more bytes than the limit.
            StorageError: it cannot be read now.
        """
        data: bytes = self._do(name, "read", lambda files, path: files.cat_file(path, start=0, end=limit + 1))
        if len(data) > limit:
            raise DamagedError(f"{self.below(name)} has more than the {limit} bytes that such a file can have")
        return data

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """Yield an object's first `size` bytes, and one more where it has more; raises as `read` does."""
        position = 0
        while position <= size:
            end = min(position + _BLOCK, size + 1)
            data = self._range(name, position, end)
            if data:
                yield data
            if len(data) < end - position:  # its end
                return
            position = end

    def names(self, folder: str = "") -> list[str]:
        """Return the plain names directly below a folder, sorted; none where it is not there."""

        def listed(files: Any, path: str) -> list[str]:
            try:
                return [str(entry) for entry in files.ls(path, detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []

        found = self._do(folder, "listed", listed)
        return sorted({name for entry in found if _PLAIN.fullmatch(name := entry.rstrip("/").rpartition("/")[2])})

    def remove(self, name: str) -> None:
        """Remove an object; none is fine."""

        def gone(files: Any, path: str) -> None:
            try:
                files.rm_file(path)
            except FileNotFoundError:
                return

        self._do(name, "deleted", gone)

    def remove_folder(self, folder: str) -> None:
        """Remove all objects directly below a folder, and the folder where the store has such a thing."""
        for name in self.names(folder):
            self.remove(f"{folder}/{name}")

        def gone(files: Any, path: str) -> None:
            if "file" in files.protocol and files.isdir(path):
                files.rmdir(path)

        self._do(folder, "deleted", gone)

    def _range(self, name: str, start: int, end: int) -> bytes:
        def work(files: Any, path: str) -> bytes:
            try:
                return bytes(files.cat_file(path, start=start, end=end))
            except OSError as error:
                if "range" in str(error).lower() and not isinstance(error, FileNotFoundError):
                    return b""  # what S3 says of a range that begins at the end
                raise

        return self._do(name, "read", work)

    @staticmethod
    def _open(files: Any, path: str, part_size: int) -> Any:
        if "file" in files.protocol:
            files.makedirs(path.rpartition("/")[0], exist_ok=True)
        return files.open(path, "wb", block_size=part_size)

    def _files(self) -> tuple[Any, str]:
        if self._opened is None:
            try:
                # What another process puts there must be seen.
                files, path = fsspec.core.url_to_fs(self._url, use_listings_cache=False, skip_instance_cache=True)
            except ImportError as error:
                raise CheckpointError(
                    f"{self.shown} needs a package that is not installed ({error}): for s3:// it is "
                    "pip install 'setformer_dist[s3]'"
                ) from None
            except ValueError as error:
                raise CheckpointError(f"{self.shown} cannot be opened: {redacted(str(error))}") from None
            self._opened = files, str(path).rstrip("/")
        return self._opened

    def _do(self, name: str, what: str, work: Callable[[Any, str], T]) -> T:
        """Do something to an object, within the limit, and sort what may go wrong."""
        where = self.below(name) if name else self.shown

        def call() -> T:
            files, root = self._files()
            return work(files, f"{root}/{name}" if name else root)

        try:
            return bounded(_CALL_S, call)
        except CheckpointError:
            raise
        except FileNotFoundError:
            if what == "read":
                raise MissingError(f"{where} is not there") from None
            raise CheckpointError(f"{where} cannot be {what}: there is no such bucket; create it") from None
        except PermissionError as error:
            raise CheckpointError(
                f"{where} may not be {what} ({reason_of(error)}): check the credentials that the client finds"
            ) from None
        except Exception as error:  # noqa: BLE001 — each client has errors of its own, few of them told apart
            raise StorageError(f"{where} cannot be {what} ({reason_of(error)})") from None


def reason_of(error: Exception) -> str:
    """Return what failed, in one line and without secrets."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else ""
    if isinstance(error, TimeoutError):
        text = str(error)
    return redacted(" ".join(f"{type(error).__name__} {text}".split()))[:160]


def _append(file: Any, data: bytes | memoryview, _files: Any, _path: str) -> None:
    file.write(data)


def _drop(file: Any) -> None:
    """Give a half-written object up: closing it would complete it."""
    try:
        file.closed = True
        if hasattr(file, "discard"):
            bounded(_CALL_S, file.discard)
    except Exception:  # noqa: BLE001 — what is left without a manifest counts for nothing
        return
