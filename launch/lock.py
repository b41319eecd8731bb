"""One run, one set of ranks: a lock on the run's folder that rank 0 holds while it runs.

Two that train in one folder would sweep each other's unfinished checkpoints and mix their metrics. The lock is the
kernel's (POSIX record lock): it is gone the moment the process is, however it ends, over NFS too; and the file stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from setformer_dist.core.comm import Collectives
from setformer_dist.core.errors import LaunchError

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
PATIENCE_S = 15.0  # for a predecessor that is about to end
_LOOK_EVERY_S = 0.2


@contextlib.contextmanager
def held(folder: Path, comm: Collectives, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock of a run's folder; make the folder if need be. Collective at its beginning.

    Where the storage knows no locks, rank 0 warns, and the run goes on without.

    Raises:
        LaunchError: on all ranks: another process holds it, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        fault: str | None = None
        if comm.ranks.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((folder / LOCK_FILE).open("ab"))
                fault = _wait_for(file, folder, patience_s)
            except OSError as error:
                fault = f"run folder {folder} cannot be written: {error}"
        fault = comm.broadcast_json(fault)
        if fault is not None:
            raise LaunchError(fault)
        yield


def _wait_for(file: BinaryIO, folder: Path, patience_s: float) -> str | None:
    """Take the lock; return why that was not possible."""
    limit = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("run folder %s is not locked against a second run: %s", folder, error)
                return None
            if time.monotonic() > limit:
                return (
                    f"another process trains in run folder {folder}: wait for it or stop it, or give this run another "
                    "run.name"
                )
            time.sleep(_LOOK_EVERY_S)
        else:
            return None
