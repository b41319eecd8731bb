"""Writes of files that survive a crash, with the hash taken of the bytes as they go out.

`write_rank_file` needs host tensors or device tensors, a path, and nothing else: no ranks, no collectives, no
manager. It may therefore run in any thread. It writes the safetensors format itself, because the library's
own writer wants a second copy of all bytes in memory and leaves hashing to a second pass.

    8 bytes  length of the header, little endian
    header   JSON: {"__metadata__": {"shapes": ...}, key: {"dtype", "shape", "data_offsets"}}, padded by spaces
    tensors  one after the other, widest element type first, so that each is aligned
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from checkpoints import layout
from checkpoints.manifest import FileRecord
from setformer_dist.core.fragments import Fragment

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def fragment_key(fragment: Fragment) -> str:
    """Return the key of a fragment in a rank file."""
    return f"{fragment.name}|{fragment.state}|{fragment.start}|{fragment.end}"


def write_rank_file(path: Path, fragments: Sequence[Fragment]) -> FileRecord:
    """Write one rank's fragments and return what was written.

    Args:
        path: file to make; the folder exists.
        fragments: tensors on any device; at most one is copied to the host at a time.

    Raises:
        ValueError: two fragments have one key, a fragment leaves its parameter, or a dtype cannot be stored.
        OSError: the file could not be written in full.
    """
    _check(fragments)
    full = [f for f in fragments if f.tensor.numel()]
    full.sort(key=lambda f: (-f.tensor.element_size(), fragment_key(f)))
    with path.open("xb") as file:
        hasher = hashlib.sha256()
        size = _write_hashed(file, hasher, _header(fragments, full))
        for fragment in full:
            size += _write_hashed(file, hasher, _host_bytes(fragment.tensor))
        _sync(file)
    return FileRecord(name=path.name, size=size, sha256=hasher.hexdigest())


def _check(fragments: Iterable[Fragment]) -> None:
    seen: set[str] = set()
    for fragment in fragments:
        key = fragment_key(fragment)
        if key in seen:
            raise ValueError(f"fragment {key} was given twice")
        seen.add(key)
        if fragment.start < 0 or fragment.end > fragment.full_numel:
            raise ValueError(f"fragment {key} leaves its parameter of shape {fragment.shape}")
        if fragment.tensor.dtype not in DTYPES:
            raise ValueError(f"fragment {key} has dtype {fragment.tensor.dtype}, which cannot be stored")


def _header(fragments: Iterable[Fragment], full: Iterable[Fragment]) -> bytes:
    # Shapes of empty fragments count too: a reader must know each parameter that the writer had.
    shapes = {f.name: list(f.shape) for f in fragments}
    header: dict[str, Any] = {"__metadata__": {"shapes": json.dumps(shapes)}}
    offset = 0
    for fragment in full:
        numel = fragment.tensor.numel()
        end = offset + numel * fragment.tensor.element_size()
        dtype = DTYPES[fragment.tensor.dtype]
        header[fragment_key(fragment)] = {"dtype": dtype, "shape": [numel], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _host_bytes(tensor: torch.Tensor) -> memoryview:
    host = tensor.detach().to("cpu").contiguous().reshape(-1)
    return host.view(torch.uint8).numpy().data


def _write_hashed(file: BinaryIO, hasher: hashlib._Hash, data: bytes | memoryview) -> int:
    file.write(data)
    hasher.update(data)
    return len(data)


def write_json(path: Path, value: Any) -> FileRecord:
    """Write a JSON value in Python's dialect (NaN and infinity come back as they were).

    Raises:
        TypeError: the value cannot be JSON.
        OSError: the file could not be written in full.
    """
    data = json.dumps(value, indent=1).encode()
    with path.open("xb") as file:
        file.write(data)
        _sync(file)
    return FileRecord(name=path.name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: without this a rename may be undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, folder: Path) -> None:
    """Rename a complete folder into place; whatever was there before is deleted first."""
    sync_folder(temporary)
    if folder.exists():
        delete_checkpoint(folder)
    temporary.rename(folder)
    sync_folder(folder.parent)


def delete_checkpoint(folder: Path) -> None:
    """Delete a folder, its manifest first: at no instant is there a manifest with files missing."""
    (folder / layout.MANIFEST).unlink(missing_ok=True)
    sync_folder(folder)
    shutil.rmtree(folder)
