"""A disk that fails at one chosen operation, for tests and benchmarks of the commit protocol."""

from __future__ import annotations

import errno
import fnmatch
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from checkpoints.disk import Disk

_SLOW_S = 0.2


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where.

    Attributes:
        operation: name of the disk's method.
        pattern: of the name of the file or folder (for a rename, of the new name), as a shell's.
        kind: "exception" (an input/output error), "disk full", "short write" (half of the bytes, without a word),
            "killed" (SIGKILL of this process), "slow" (a pause), or "silent" (until the folder of the file is gone).
    """

    operation: str
    pattern: str
    kind: str


class FaultyDisk(Disk):
    """A disk of which one operation fails.

    Attributes:
        fault: what goes wrong; None lets everything pass.
        hits: how often it went wrong.
    """

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.hits = 0

    def _meets(self, operation: str, path: Path) -> str | None:
        """Let what goes wrong here happen; return its kind where the operation itself must do it."""
        fault = self.fault
        if fault is None or operation != fault.operation or not fnmatch.fnmatch(path.name, fault.pattern):
            return None
        self.hits += 1
        if fault.kind == "exception":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path.name)
        if fault.kind == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path.name)
        if fault.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "slow":
            time.sleep(_SLOW_S)
        if fault.kind == "silent":
            limit = time.monotonic() + 60
            while path.parent.exists() and time.monotonic() < limit:
                time.sleep(0.01)
        return fault.kind

    def make_folder(self, path: Path) -> None:
        """See Disk."""
        self._meets("make_folder", path)
        super().make_folder(path)

    def create(self, path: Path) -> BinaryIO:
        """See Disk."""
        self._meets("create", path)
        return super().create(path)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """See Disk."""
        kind = self._meets("write", Path(file.name))
        super().write(file, memoryview(data)[: len(data) // 2] if kind == "short write" else data)

    def sync(self, file: BinaryIO) -> None:
        """See Disk."""
        self._meets("sync", Path(file.name))
        super().sync(file)

    def sync_folder(self, folder: Path) -> None:
        """See Disk."""
        self._meets("sync_folder", folder)
        super().sync_folder(folder)

    def rename(self, old: Path, new: Path) -> None:
        """See Disk."""
        self._meets("rename", new)
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        """See Disk."""
        self._meets("remove", path)
        super().remove(path)

    def remove_tree(self, folder: Path) -> None:
        """See Disk."""
        self._meets("remove_tree", folder)
        super().remove_tree(folder)
