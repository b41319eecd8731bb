"""Digests of files: which algorithm, and how bytes on disk are held against what was written.

A digest is text that names its algorithm, `xxh3_128:9f…`. New checkpoints use XXH3 with 128 bits: it finds every
accident (a flipped, lost or swapped byte passes with a chance of 2⁻¹²⁸) at some 30 GB/s per core, above what storage
delivers, where sha256 takes 2 GB/s. It is no seal against a forger, nor need it be: anyone who can change a file can
change the manifest too, and a forged file can run no code (rankfile.py). Checkpoints of format version 1 carry
sha256 and continue verifying.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from checkpoints.errors import DamagedError, MissingError

ALGORITHM = "xxh3_128"
_MAKERS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
_CHUNK = 4 << 20


class Digest:
    """A digest that grows with the bytes it is given."""

    def __init__(self, algorithm: str = ALGORITHM) -> None:
        self._algorithm = algorithm
        self._state = _MAKERS[algorithm]()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take more bytes in."""
        self._state.update(data)

    def text(self) -> str:
        """Return `algorithm:hexadecimal` of all bytes so far."""
        return f"{self._algorithm}:{self._state.hexdigest()}"


def digest_of(data: bytes, algorithm: str = ALGORITHM) -> str:
    """Return the digest of bytes in memory."""
    digest = Digest(algorithm)
    digest.update(data)
    return digest.text()


def algorithm_of(digest: str) -> str | None:
    """Return the algorithm that a digest names, or None if it is none that we know."""
    name, _, value = digest.partition(":")
    if name not in _MAKERS or len(value) != 2 * _MAKERS[name]().digest_size or value.strip("0123456789abcdef"):
        return None
    return name


@dataclass(frozen=True)
class Seen:
    """What a file was when its bytes were checked; another value later means that it was replaced or written to.

    The time of change (ctime) is the kernel's own: who writes into a file can put mtime back, but not that. The device
    is left out: the same storage has another one on another host.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Seen:
        """Return it for an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a plain file for reading: links are not followed, pipes and devices are not waited for.

    Raises:
        MissingError: it is not there.
        DamagedError: it is no plain file.
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MissingError(f"{path.name} is missing") from None
    except OSError:
        if path.is_symlink():
            raise DamagedError(f"{path.name} is a link, and links are not followed") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedError(f"{path.name} is not a plain file")
        yield descriptor
    finally:
        os.close(descriptor)


def file_digest(
    path: Path, algorithm: str, size: int, advance: Callable[[int], None] | None = None
) -> tuple[str, Seen]:
    """Read a file once and return its digest, and what it was.

    Args:
        path: the file.
        algorithm: one of those that `algorithm_of` returns.
        size: bytes that it must have; one of another size is not read, as it may take hours.
        advance: called with the number of bytes after each piece read.

    Raises:
        DamagedError: it is missing, no plain file, of another size, or changed while it was read.
        OSError: it cannot be read.
    """
    digest = Digest(algorithm)
    buffer = memoryview(bytearray(_CHUNK))
    with opened(path) as descriptor:
        before = Seen.of(descriptor)
        if before.size != size:
            raise DamagedError(f"{path.name} has {before.size} bytes, not {size}")
        position = 0
        while count := os.preadv(descriptor, [buffer], position):
            digest.update(buffer[:count])
            position += count
            if advance is not None:
                advance(count)
        if Seen.of(descriptor) != before:
            raise DamagedError(f"{path.name} changed while it was read")
    return digest.text(), before


def read_small(path: Path, limit: int) -> bytes:
    """Read a whole file that may not be larger than `limit` bytes.

    Raises:
        DamagedError: it is missing, no plain file, or larger.
        OSError: it cannot be read.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise DamagedError(f"{path.name} has {size} bytes, more than the {limit} that such a file can have")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read(limit + 1)
