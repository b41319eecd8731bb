"""Mounts that end with the process that made them, even when it is killed: a mount namespace of its own."""

from __future__ import annotations

import ctypes
import sys

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18


def keep_mounts_private() -> bool:
    """Give this process, and what it starts from now on, mounts of its own; return whether that was allowed (as root).

    The kernel undoes them when the last process of the namespace has ended. To be called from the main thread, before
    anything is mounted or started that is to see the mounts.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    # Otherwise what is mounted here would show in the namespace that this one was copied from.
    return bool(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) == 0)
