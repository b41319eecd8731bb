"""Small files that are either whole or as they were before, and that say whether their bytes are those written.

A state file (guard.json, config.json, summary.json of a run) is a JSON object with the sha256 of all the rest next to
it, under the key "sha256". Those of earlier versions have none and are still read; their reader learns that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from setformer_dist.core import strictjson
from setformer_dist.core.errors import ConfigError

log = logging.getLogger(__name__)

DIGEST_KEY = "sha256"
LONGEST_LINE = 1 << 20  # bytes of a line of a record
LARGEST_RECORD = 4 << 30  # bytes that are read of one
MAX_STATE = 16 << 20  # bytes


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside another one, whose place it takes when it is written; if it cannot be, nothing is left of it.

    Raises:
        OSError: naming the file of the caller.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        aside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise


def check_new(folder: Path) -> None:
    """Refuse a destination that is there and not empty, before anything is read.

    Raises:
        ConfigError: naming it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists: name a new or an empty folder")


def write_text(path: Path, text: str) -> None:
    """Write a file aside, make it durable and rename it into place."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: object) -> object:
    """Return a JSON-able value with None for each number that JSON does not have (NaN and the infinities)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def write_state(path: Path, value: dict[str, object]) -> None:
    """Write an object with its digest, whole or not at all."""
    body = json.loads(json.dumps(finite(value)))
    write_json(path, {**body, DIGEST_KEY: _digest(body)})


def read_state(path: Path) -> tuple[dict[str, object], bool]:
    """Return what `write_state` wrote, and whether a digest vouches for it (none does for those of earlier versions).

    Raises:
        ValueError: it is damaged; the message ends a sentence that names the file.
        OSError: it cannot be read.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_STATE:
            raise ValueError(f"has {size} bytes, more than the {MAX_STATE} that such a file can have")
        value = strictjson.parse(file.read(MAX_STATE + 1))
    if not isinstance(value, dict):
        raise ValueError("is not an object")
    digest = value.pop(DIGEST_KEY, None)
    if digest is not None and digest != _digest(value):
        raise ValueError("does not match its own digest")
    return value, digest is not None


def read_plain(path: Path, largest: int = MAX_STATE) -> bytes:
    """Return a file that a user has named; nothing that waits, never ends, or is larger than its kind can be.

    Args:
        path: of the file.
        largest: bytes.

    Raises:
        ValueError: it is larger.
        OSError: it cannot be read, or is no plain file.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return data


def open_plain(path: Path, flags: int) -> int:
    """Open a file in a run's folder that anybody may have put there: never waits, as the open of a pipe would.

    Args:
        path: of the file.
        flags: of os.open.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number, said = (errno.EISDIR, "is a folder") if stat.S_ISDIR(mode) else (errno.EINVAL, "is not a plain file")
        raise OSError(number, said, str(path))
    return descriptor


def open_record(path: Path) -> int:
    """Open, or make, a file to which a run appends lines; a link to another user's file is not followed.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    return open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a record without their ends; none where it is missing or cannot be read.

    A line longer than `LONGEST_LINE` is nothing that a run wrote, and comes in pieces.
    """
    try:
        descriptor = open_plain(path, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.ENOENT:
            log.warning("%s cannot be read and counts as empty: %s", path, error.strerror)
        return
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > LARGEST_RECORD:
            log.warning("%s has %d bytes, of which the first %d are read", path, size, LARGEST_RECORD)
        while file.tell() < LARGEST_RECORD and (line := file.readline(LONGEST_LINE)):
            yield line.rstrip(b"\r\n")


def _digest(body: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
