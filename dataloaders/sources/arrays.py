"""Arrays in a safetensors file, written once and then mapped: all processes of a host share one copy in memory.

The library of that name reads a file by copying it, per process; an index of 100 million samples has 5 GB, of which
a rank touches little when it starts. The format is a length, a JSON header and the bytes, so a view of the mapped
file is an array. Files are written under a temporary name and renamed, so a mapped one is never changed in place.

    digest of the file      checked when the file is small enough to be read at once
    digests of its chunks   `CHUNK_ROWS` rows of all columns together: checked at the first touch of a chunk
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataloaders.sources.files import open_new, open_regular, parse_json

# Rows whose columns have one digest together: 160 kB, 0.2 ms to check. A random batch touches as many as samples.
CHUNK_SHIFT = 12
CHUNK_ROWS = 1 << CHUNK_SHIFT

_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Beyond this a header is damaged: ours has some hundred bytes.
_LARGEST_HEADER = 1 << 20

_BLOCK = 1 << 24


def write_arrays(path: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> str:
    """Write arrays under a temporary name, fsync, rename; return the file's sha256."""
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))  # each aligned to its own size
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        array = arrays[name]
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    aside = path.with_name(f".{path.name}.partial")
    parts = [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes_of(arrays[name]) for name in order)]
    with os.fdopen(open_new(aside), "wb") as file:
        for data in parts:
            for start in range(0, len(data), _BLOCK):
                sha256.update(data[start : start + _BLOCK])
                file.write(data[start : start + _BLOCK])
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return sha256.hexdigest()


def map_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Return read-only views of the arrays in a file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not such a file.
    """
    file = open_regular(path)
    try:
        data = mmap.mmap(file, 0, access=mmap.ACCESS_READ)  # ValueError where it is empty
    finally:
        os.close(file)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_LARGEST_HEADER, len(data) - 8):
        raise ValueError("its header has no sensible length")
    header = parse_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    header.pop("__metadata__", None)
    try:
        return {name: _view(data, 8 + length, facts) for name, facts in header.items()}
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its header is damaged ({error})") from None


def file_digest(path: Path) -> str:
    """Return a file's sha256."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def chunk_digest(columns: dict[str, npt.NDArray[np.generic]], chunk: int) -> str:
    """Return the sha256 of one chunk's rows: column after column, by name."""
    sha256 = hashlib.sha256()
    for name in sorted(columns):
        sha256.update(_bytes_of(columns[name][chunk << CHUNK_SHIFT : (chunk + 1) << CHUNK_SHIFT]))
    return sha256.hexdigest()


def num_chunks(rows: int) -> int:
    """Return the chunks that hold so many rows."""
    return -(-rows >> CHUNK_SHIFT)


def _view(data: mmap.mmap, base: int, facts: dict[str, Any]) -> npt.NDArray[Any]:
    dtype, shape = _DTYPES[facts["dtype"]], tuple(facts["shape"])
    start, end = facts["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError("its header has numbers that are no sizes")
    count = math.prod(shape)
    if min(start, count) < 0 or end - start != count * dtype.itemsize or base + end > len(data):
        raise ValueError("an array in it does not have the size its header says")
    return np.frombuffer(data, dtype, count, base + start).reshape(shape)


def _bytes_of(array: npt.NDArray[np.generic]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
