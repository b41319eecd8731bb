"""What a .beton file cannot say of itself: checksums, class names and keys, in a file next to it.

    train.beton                     as FFCV reads it
    train.beton.index.safetensors   one checksum and one key per sample; class names; which .beton file it is of

The sidecar is written by our packer, and by `setformer data index` for files that others made. Without one, such a
file is read too, but flipped bits within an image are then found only where it no longer decodes.

A JPEG's checksum is crc32. Raw pixels, ten times as many bytes, get the sum of their 64-bit words, wrapping: on the
machine this was written on 0.010 ms for a 500 x 400 image where crc32 takes 0.086 ms, of 0.38 ms for the whole
sample. It too finds every single changed word.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from dataloaders.beton.format import BetonTable
from dataloaders.sources.files import open_regular, parse_json
from dataloaders.sources.index import durable_write, fingerprint_of
from setformer_dist.core.errors import DataError

FORMAT = 1
SUFFIX = ".index.safetensors"
_ENTRY = "beton-index"
_REPAIR = "rebuild it with `setformer data index`"


# Bytes of the longest key.
_WIDEST = 1 << 12


class _OfAnotherError(Exception):
    """A sidecar's arrays are not of so many samples."""


@dataclass(frozen=True)
class Sidecar:
    """What the sidecar says.

    Attributes:
        classes: class names; a label is a position in it.
        checks: (N,) uint64, `checksum` of each image.
        keys: (N, L) uint8, ASCII keys padded with zeros.
        fingerprint: identity of the .beton file and its classes.
    """

    classes: tuple[str, ...]
    checks: npt.NDArray[np.uint64]
    keys: npt.NDArray[np.uint8]
    fingerprint: str


def checksum(image: bytes | npt.NDArray[np.uint8]) -> int:
    """Return crc32 of a file's bytes, or the sum of raw pixels' 64-bit words (the last padded with zeros)."""
    if isinstance(image, bytes):
        return zlib.crc32(image)
    flat = image.reshape(-1)
    whole = len(flat) // 8 * 8
    total = int(np.add.reduce(flat[:whole].view("<u8"), dtype=np.uint64))
    return (total + int.from_bytes(flat[whole:].tobytes(), "little")) % (1 << 64)


def sidecar_path(beton: Path) -> Path:
    """Return the sidecar's path."""
    return beton.with_name(beton.name + SUFFIX)


def write_sidecar(
    path: Path, table: BetonTable, classes: tuple[str, ...], checks: npt.NDArray[np.uint64], keys: list[str]
) -> None:
    """Write a sidecar, whole or not at all."""
    width = max(map(len, keys))
    matrix = np.frombuffer(b"".join(key.encode("ascii").ljust(width, b"\0") for key in keys), np.uint8)
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "check": np.ascontiguousarray(checks, np.uint64),
        "key": matrix.reshape(len(keys), width),
    }
    said: dict[str, object] = {
        "format": FORMAT,
        "classes": list(classes),
        "tables": table.sha256,
        "size": table.file_size,
        "arrays": _digest(arrays),
    }
    said["fingerprint"] = fingerprint_of(said)
    # One entry alone: the library writes several in an order that changes from call to call.
    durable_write(path, safetensors.numpy.save(arrays, {_ENTRY: json.dumps(said, sort_keys=True)}))


def _digest(arrays: dict[str, npt.NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name in ("check", "key"):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def read_sidecar(path: Path, table: BetonTable) -> Sidecar | None:
    """Read the sidecar of the .beton file that has this table; None where there is none.

    Raises:
        DataError: it is damaged, of another version, or of another .beton file.
    """
    if not path.exists():
        return None
    try:
        os.close(open_regular(path))
        with safetensors.safe_open(path, "numpy") as file:
            said: dict[str, Any] = parse_json((file.metadata() or {})[_ENTRY].encode())
            rows, width = file.get_slice("key").get_shape()
            if file.get_slice("check").get_shape() != [len(table)] or rows != len(table) or width > _WIDEST:
                raise _OfAnotherError
            arrays = {name: file.get_tensor(name) for name in ("check", "key")}
        sound = fingerprint_of(said) == said["fingerprint"] and _digest(arrays) == said["arrays"]
    except _OfAnotherError:
        raise DataError(f"data index {path} is of another .beton file than the one next to it: {_REPAIR}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"data index {path} cannot be read ({why}): {_REPAIR}") from None
    if not sound:
        raise DataError(f"data index {path} does not agree with its own digests, so it was damaged: {_REPAIR}")
    if said["format"] != FORMAT:
        raise DataError(f"data index {path} has format {said['format']}, this version reads {FORMAT}: {_REPAIR}")
    if not isinstance(said["classes"], list) or not all(isinstance(name, str) for name in said["classes"]):
        raise DataError(f"data index {path} has no list of class names: {_REPAIR}")
    if said["tables"] != table.sha256 or said["size"] != table.file_size:
        raise DataError(f"data index {path} is of another .beton file than the one next to it: {_REPAIR}")
    return Sidecar(tuple(said["classes"]), arrays["check"], arrays["key"], said["fingerprint"])
