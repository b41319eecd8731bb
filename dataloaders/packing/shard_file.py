"""A shard being written: a tar whose bytes follow from its members alone, with its sha256."""

from __future__ import annotations

import hashlib
import tarfile
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK = tarfile.BLOCKSIZE


class ShardFile:
    """A file being written: its size and sha256 so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def mark(self) -> tuple[int, _Hash]:
        """Return what `back_to` takes to forget all that is written from here on."""
        return self.size, self.sha256.copy()

    def back_to(self, mark: tuple[int, _Hash]) -> None:
        """Forget what was written since `mark` returned this."""
        self.size, self.sha256 = mark
        self._file.seek(self.size)
        self._file.truncate()

    def add_member(self, name: str, data: bytes) -> int:
        """Append a tar member whose header holds nothing of this machine or moment; return its data's offset."""
        info = tarfile.TarInfo(name)  # mtime, uid, gid are 0, owner names empty
        info.size, info.mode = len(data), 0o644
        self.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self.write(data)
        self.write(b"\0" * (-len(data) % BLOCK))
        return offset
