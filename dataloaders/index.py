"""The index beside a split's shards: where each sample is, and what it must look like.

    train/
      shard-000000.tar     plain WebDataset: <key>.jpg (or .png …) and <key>.cls for each sample
      shard-000001.tar
      index.safetensors    one value per sample: shard, offset, size, label, width, height, crc32, key
      index.json           written last: format, classes, shards with size and sha256, fingerprint

A folder without a whole `index.json` is not a packed split: an interrupted packing leaves none. The fingerprint
is the sha256 of everything else in `index.json`, which holds the sha256 of every other file; so it is the
identity of the split, and a flipped bit in the index itself is found. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from setformer_dist.core.errors import DataError

INDEX_FORMAT = 1
INDEX_NAME = "index.json"
ARRAYS_NAME = "index.safetensors"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"})

# Column -> dtype. `key` is an extra (N, L) uint8 column: ASCII, padded with zero bytes.
COLUMNS: dict[str, np.dtype[Any]] = {
    "shard": np.dtype(np.int32),
    "offset": np.dtype(np.int64),
    "size": np.dtype(np.int64),
    "label": np.dtype(np.int64),
    "width": np.dtype(np.int32),
    "height": np.dtype(np.int32),
    "crc32": np.dtype(np.uint32),
}


@dataclass(frozen=True)
class ShardFacts:
    """One shard file: its name, size in bytes, sha256 and number of samples."""

    name: str
    size: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Index:
    """A split's index in memory.

    Attributes:
        classes: class names; a label is a position in it.
        shards: the shard files, in order.
        columns: (N,) arrays by the names of `COLUMNS`, offsets and sizes in bytes.
        keys: (N, L) uint8, ASCII keys padded with zeros.
        fingerprint: identity of the split.
        options: how it was packed, for people.
    """

    classes: tuple[str, ...]
    shards: tuple[ShardFacts, ...]
    columns: dict[str, npt.NDArray[Any]]
    keys: npt.NDArray[np.uint8]
    fingerprint: str
    options: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["label"])

    def key(self, sample: int) -> str:
        """Return the key of a sample, as it is in the shard."""
        padded: bytes = self.keys[sample].tobytes()
        return padded.rstrip(b"\0").decode("ascii")


def fingerprint_of(table: dict[str, Any]) -> str:
    """Return the sha256 of an index table without its own fingerprint."""
    rest = {key: value for key, value in table.items() if key != "fingerprint"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_index(
    folder: Path,
    classes: tuple[str, ...],
    shards: tuple[ShardFacts, ...],
    columns: dict[str, npt.NDArray[Any]],
    keys: list[str],
    options: dict[str, Any],
) -> Index:
    """Write both index files into a folder that already holds the shards; `index.json` last."""
    width = max(map(len, keys))
    key_matrix = np.frombuffer(b"".join(k.encode("ascii").ljust(width, b"\0") for k in keys), np.uint8)
    key_matrix = key_matrix.reshape(len(keys), width)
    arrays = {name: np.ascontiguousarray(columns[name], dtype) for name, dtype in COLUMNS.items()}
    data = safetensors.numpy.save({**arrays, "key": key_matrix})
    durable_write(folder / ARRAYS_NAME, data)
    table: dict[str, Any] = {
        "format": INDEX_FORMAT,
        "samples": len(keys),
        "classes": list(classes),
        "shards": [vars(shard) for shard in shards],
        "arrays": {"name": ARRAYS_NAME, "sha256": hashlib.sha256(data).hexdigest()},
        "options": options,
    }
    table["fingerprint"] = fingerprint_of(table)
    durable_write(folder / INDEX_NAME, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    return Index(classes, shards, arrays, key_matrix, str(table["fingerprint"]), options)


def durable_write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, fsync it, give it its name."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_index(folder: Path) -> Index:
    """Read and check a split's index.

    Raises:
        DataError: the folder is no packed split, or its index is damaged or of another version.
    """
    table = read_table(folder)
    arrays = _read_arrays(folder, table)
    keys = arrays.pop("key")
    shards = tuple(ShardFacts(**shard) for shard in table["shards"])
    index = Index(
        classes=tuple(table["classes"]),
        shards=shards,
        columns=arrays,
        keys=keys,
        fingerprint=table["fingerprint"],
        options=table["options"],
    )
    _check_ranges(folder, index)
    return index


def read_table(folder: Path) -> dict[str, Any]:
    """Read `index.json` and check it against its fingerprint.

    Raises:
        DataError: as `read_index`.
    """
    path = folder / INDEX_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_why_not_a_split(folder)) from None
    except OSError as error:
        raise DataError(f"data index {path} cannot be read: {error}") from None
    try:
        table = json.loads(text)
        version, said = table["format"], table["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"data index {path} is damaged: restore the file or pack the split again") from None
    if version != INDEX_FORMAT:
        raise DataError(
            f"data index {path} has format {version!r}, this version of setformer_dist reads {INDEX_FORMAT}: "
            "pack the split again"
        )
    if fingerprint_of(table) != said:
        raise DataError(
            f"data index {path} does not agree with its own fingerprint, so it was damaged or edited: restore "
            "the file or pack the split again"
        )
    assert isinstance(table, dict)
    return table


def _why_not_a_split(folder: Path) -> str:
    """Say what is in a folder without an index, and what to do about it."""
    pack = f"`setformer data pack SOURCE {folder}`"
    if not folder.exists():
        return f"data folder {folder} does not exist: set data.root, or make it with {pack}"
    if not folder.is_dir():
        return f"data folder {folder} is a file, not a folder of shards: pack it with `setformer data pack`"
    entries = list(folder.iterdir())
    if not entries:
        return f"data folder {folder} is empty: fill it with {pack}"
    if any(entry.name.endswith(".tar") for entry in entries):
        return f"data folder {folder} has shards but no {INDEX_NAME}, so it is not whole: make it anew with {pack}"
    if any((entry / INDEX_NAME).is_file() for entry in entries):
        names = ", ".join(sorted(entry.name for entry in entries if (entry / INDEX_NAME).is_file()))
        return f"data folder {folder} holds no shards itself, but packed splits ({names}): name one of them"
    if _has_images(folder):
        return (
            f"data folder {folder} holds images, not shards: pack it with "
            f"`setformer data pack {folder} {folder.with_name(folder.name + '-packed')}`"
        )
    return f"data folder {folder} has no {INDEX_NAME}: make it with {pack}"


def _has_images(folder: Path, depth: int = 3) -> bool:
    for entry in folder.iterdir():
        if entry.suffix.lower() in IMAGE_SUFFIXES:
            return True
        if depth > 1 and entry.is_dir() and _has_images(entry, depth - 1):
            return True
    return False


def _read_arrays(folder: Path, table: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    path = folder / str(table["arrays"]["name"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data index {path} cannot be read ({error.strerror}): restore the file or pack the split again"
        ) from None
    if hashlib.sha256(data).hexdigest() != table["arrays"]["sha256"]:
        raise DataError(
            f"data index {path} does not have the sha256 that {INDEX_NAME} says: restore the file or pack the "
            "split again"
        )
    arrays: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(data)
    return arrays


def _check_ranges(folder: Path, index: Index) -> None:
    """Refuse an index that agrees with its hashes but could not have come from our packing."""
    columns, count = index.columns, len(index)
    sizes = np.array([shard.size for shard in index.shards], np.int64)
    sound = (
        count > 0
        and set(columns) == set(COLUMNS)
        and all(len(column) == count for column in (*columns.values(), index.keys))
        and columns["label"].min() >= 0
        and columns["label"].max() < len(index.classes)
        and columns["shard"].min() >= 0
        and columns["shard"].max() < len(sizes)
        and columns["offset"].min() >= 0
        and columns["size"].min() > 0
        and bool((columns["offset"] + columns["size"] <= sizes[columns["shard"]]).all())
    )
    if not sound:
        raise DataError(f"data index in {folder} describes samples outside its shards: pack the split again")
