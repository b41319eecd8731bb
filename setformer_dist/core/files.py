"""Small files that are either whole or as they were before, and that say whether their bytes are those written.

A state file (guard.json, config.json, summary.json of a run) is a JSON object with the sha256 of all the rest beside
it, under the key "sha256". Those of earlier versions have none and are still read; their reader is told.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from setformer_dist.core import strictjson

DIGEST_KEY = "sha256"
MAX_STATE = 16 << 20  # bytes


def write_text(path: Path, text: str) -> None:
    """Write a file aside, make it durable and rename it into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: Any) -> Any:
    """Return a JSON-able value with None for each number that JSON does not have (NaN and the infinities)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def write_state(path: Path, value: dict[str, Any]) -> None:
    """Write an object with its digest, whole or not at all."""
    body = json.loads(json.dumps(finite(value)))
    write_json(path, {**body, DIGEST_KEY: _digest(body)})


def read_state(path: Path) -> tuple[dict[str, Any], bool]:
    """Return what `write_state` wrote, and whether a digest vouches for it (none does for those of earlier versions).

    Raises:
        ValueError: it is damaged; the message ends a sentence that names the file.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a plain file")
        if status.st_size > MAX_STATE:
            raise ValueError(f"has {status.st_size} bytes, more than the {MAX_STATE} that such a file can have")
        value = strictjson.parse(file.read(MAX_STATE + 1))
    if not isinstance(value, dict):
        raise ValueError("is not an object")
    digest = value.pop(DIGEST_KEY, None)
    if digest is not None and digest != _digest(value):
        raise ValueError("does not match its own digest")
    return value, digest is not None


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
