"""The token of a queue's page: from the environment, or from a file that its user alone may read.

It is never part of a URL, and never printed, logged or shown.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from setformer_dist.core.errors import LaunchError
from setformer_dist.core.files import open_plain

VARIABLE = "SETFORMER_QUEUE_TOKEN"
FILE_VARIABLE = "SETFORMER_QUEUE_TOKEN_FILE"
_SHORTEST, _LONGEST = 16, 512
_REPAIR = "make one with (umask 077; openssl rand -hex 32 > FILE)"


def find(file: Path | None = None) -> str | None:
    """Return the token that SETFORMER_QUEUE_TOKEN holds, or a file; None where neither is given.

    Args:
        file: with the token; by default the one that SETFORMER_QUEUE_TOKEN_FILE names.

    Raises:
        LaunchError: it cannot be used; the message says why.
    """
    if file is None and (value := os.environ.get(VARIABLE)):
        return checked(value, VARIABLE)
    named = file or (Path(path) if (path := os.environ.get(FILE_VARIABLE)) else None)
    return None if named is None else _read(named)


def forget() -> None:
    """Take the token out of this process's environment, so that jobs do not inherit it."""
    os.environ.pop(VARIABLE, None)


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the token."""
    return {name: value for name, value in environment.items() if name != VARIABLE}


def _read(path: Path) -> str:
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_IMODE(status.st_mode) & 0o077:
                raise LaunchError(f"others may read or change the token file {path}: chmod 600 {path}")
            data = file.read(_LONGEST + 2)
    except OSError as error:
        raise LaunchError(f"the token file {path} cannot be read ({error.strerror}): {_REPAIR}") from None
    return checked(data.decode("ascii", "replace").strip(), f"the token file {path}")


def checked(value: str, source: str) -> str:
    """Return a token that can be used.

    Raises:
        LaunchError: it is too short to be secret, or holds what a header cannot carry.
    """
    if not _SHORTEST <= len(value) <= _LONGEST or not value.isascii() or not value.isprintable() or " " in value:
        raise LaunchError(
            f"{source} holds no token: it takes {_SHORTEST} to {_LONGEST} letters, digits and signs without spaces; "
            f"{_REPAIR}"
        )
    return value
