"""Memory that is full, shared or not: how the system and torch say so, and how we do."""

from __future__ import annotations

import errno
import re

NO_SHARED_MEMORY = (
    "/dev/shm, the memory that reader processes share, is full: remove what other programs left there (`setformer "
    "doctor` lists ours), give the container more of it (docker run --shm-size=8g), or set data.workers = 0"
)
_NO_ROOM = re.compile(r"No space left on device|unable to (write|mmap|resize|allocate shared memory)", re.I)


def is_no_room(error: Exception) -> bool:
    """Return whether an error says that there is no room left; torch's is a RuntimeError with the system's words."""
    return getattr(error, "errno", None) == errno.ENOSPC or _NO_ROOM.search(str(error)) is not None


_NO_MEMORY = re.compile(r"out of memory|can(?:no|')t allocate memory", re.I)


def no_memory(error: BaseException) -> str | None:
    """Return a sentence where an error says that memory is full, the device's or the machine's, None for any other."""
    if not isinstance(error, MemoryError | OSError | RuntimeError):
        return None
    if not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
        return None
    said = " ".join(str(error).split())[:160] or "MemoryError"
    return (
        f"memory is full ({said}): lower batch.micro, data.workers or data.image_size, end what else uses it, or raise "
        "the limit (ulimit -v, or the container's)"
    )
