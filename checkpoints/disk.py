"""Every change that saving makes on disk, as one small class: the seam at which tests make each of them fail.

The commit protocol (commit.py) and retention touch files through a `Disk` alone. What it promises is what POSIX
promises: a file is durable after `sync`, a name after `sync_folder` of the folder that holds it, a rename is seen
whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO

_BUFFER = 1 << 20  # joins small tensors into one system call; larger pieces pass it by


class Disk:
    """The real one. Each method raises OSError where the system refuses."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and those above it; one that is there already is fine."""
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> BinaryIO:
        """Open a file that must not exist yet."""
        return path.open("xb", buffering=_BUFFER)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Write all of the bytes; the system's short writes are continued."""
        file.write(data)

    def sync(self, file: BinaryIO) -> None:
        """Make the bytes of a file durable."""
        file.flush()
        os.fsync(file.fileno())

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable: without this a rename may be undone by a power cut."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name; a file of that name is replaced."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Remove a file; none is fine."""
        path.unlink(missing_ok=True)

    def remove_tree(self, folder: Path) -> None:
        """Remove a folder and all in it."""
        shutil.rmtree(folder)
