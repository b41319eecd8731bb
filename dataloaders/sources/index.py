"""The index next to a split's shards: where each sample is, and what it must look like.

    train/
      shard-000000.tar     plain WebDataset: <key>.jpg (or .png …), <key>.cls and, for data that have them,
                           <key>.mask.png and <key>.boxes.json for each sample
      shard-000001.tar
      index.safetensors    one value per sample: shard, offset, size, label, width, height, crc32, key; offset, size
                           and crc32 of the further parts
      index.json           written last: format, classes, shards with size and sha256, fingerprint

A folder without a whole `index.json` is not a packed split: an interrupted packing leaves none. The fingerprint
is the sha256 of everything else in `index.json`, which holds the sha256 of every other file; so it is the
identity of the split, and a flipped bit in the index itself is found. Nothing here unpickles.

The arrays are mapped, not read. Up to `_READ_AT_ONCE` bytes they are checked whole on opening; beyond that chunk by
chunk at the first touch, so that a hundred million samples open at once. Keys of so large an index are for messages
alone and unchecked but by `setformer data verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from dataloaders.pixels.formats import IMAGE_SUFFIXES
from dataloaders.sources.arrays import CHUNK_SHIFT, chunk_digest, file_digest, map_arrays, num_chunks, write_arrays
from dataloaders.sources.files import LARGEST_SAMPLE, LARGEST_TABLE, is_plain_name, open_new, parse_json, read_whole
from setformer_dist.core.errors import DataError

# Format 1 had no chunks, extent and further parts; it is still read.
INDEX_FORMAT = 2
_READABLE = (1, 2)
INDEX_NAME = "index.json"
ARRAYS_NAME = "index.safetensors"

# Bytes of arrays that are read and checked whole on opening: 3 million samples, a quarter of a second.
_READ_AT_ONCE = 256 << 20

_NAMED = 4  # folders that a message names

# Bytes of a sample in the arrays, its key included, and of their header.
_LARGEST_ROW = 1 << 10
_LARGEST_HEADER = 1 << 20

# Column -> dtype. `key` is an extra (N, L) uint8 column: UTF-8, padded with zero bytes. `crc32` is missing from the
# index of external shards that were not read whole.
COLUMNS: dict[str, np.dtype[Any]] = {
    "shard": np.dtype(np.int32),
    "offset": np.dtype(np.int64),
    "size": np.dtype(np.int64),
    "label": np.dtype(np.int64),
    "width": np.dtype(np.int32),
    "height": np.dtype(np.int32),
    "crc32": np.dtype(np.uint32),
}

# Parts that a sample may have besides image and label; size 0 is a sample without.
PARTS = ("mask", "boxes", "soft")
PART_COLUMNS: dict[str, np.dtype[Any]] = {
    f"{part}_{name}": COLUMNS[name] for part in PARTS for name in ("offset", "size", "crc32")
}


@dataclass(frozen=True)
class ShardFacts:
    """One shard file: its name, size in bytes, sha256 and number of samples."""

    name: str
    size: int
    sha256: str
    samples: int


class ArraysTable(TypedDict):
    """What index.json says of the arrays; format 1 had no chunks."""

    name: str
    sha256: str
    chunks: NotRequired[list[str]]


class IndexTable(TypedDict):
    """index.json. Format 1 had no extent, and the tables of packed splits have no identity of their own."""

    format: int
    samples: int
    classes: list[str]
    shards: list[dict[str, Any]]
    arrays: ArraysTable
    extent: NotRequired[list[list[int]]]
    options: dict[str, Any]
    identity: NotRequired[str]
    fingerprint: str


@dataclass(frozen=True)
class Index:
    """A split's index in memory.

    Attributes:
        classes: class names; a label is a position in it.
        shards: the shard files, in order.
        columns: (N,) arrays by the names of `COLUMNS` (and those of `PART_COLUMNS` that there are), offsets and
            sizes in bytes; read-only.
        keys: (N, L) uint8, UTF-8 keys padded with zeros.
        fingerprint: identity of the split.
        options: how it was packed, for people.
        extent: smallest and largest (height, width), each number over all samples independently.
        chunks: sha256 of each chunk that is still to be checked at its first touch; empty: all is checked.
        place: the folder, for messages.
    """

    classes: tuple[str, ...]
    shards: tuple[ShardFacts, ...]
    columns: dict[str, npt.NDArray[Any]]
    keys: npt.NDArray[np.uint8]
    fingerprint: str
    options: dict[str, Any]
    extent: tuple[tuple[int, int], tuple[int, int]]
    chunks: tuple[str, ...] = ()
    place: str = ""

    def __len__(self) -> int:
        return len(self.columns["label"])

    @property
    def parts(self) -> frozenset[str]:
        """What samples have besides image and label."""
        return frozenset(part for part in PARTS if f"{part}_size" in self.columns)

    def key(self, sample: int) -> str:
        """Return the key of a sample, as it is in the shard."""
        padded: bytes = self.keys[sample].tobytes()
        return padded.rstrip(b"\0").decode(errors="replace")

    def check_chunk(self, chunk: int) -> None:
        """Check the rows of one chunk.

        Raises:
            DataError: they are not what was written, or could not have been.
        """
        if self.chunks and chunk_digest(self.columns, chunk) != self.chunks[chunk]:
            raise DataError(
                f"data index in {self.place} does not have the sha256 that {INDEX_NAME} says: restore "
                f"{ARRAYS_NAME} or make the index again"
            )
        rows = slice(chunk << CHUNK_SHIFT, (chunk + 1) << CHUNK_SHIFT)
        _check_ranges(self.place, {name: column[rows] for name, column in self.columns.items()}, self)


def fingerprint_of(table: Mapping[str, object]) -> str:
    """Return the sha256 of an index table without its own fingerprint."""
    rest = {key: value for key, value in table.items() if key != "fingerprint"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_index(
    folder: Path,
    classes: tuple[str, ...],
    shards: tuple[ShardFacts, ...],
    columns: dict[str, npt.NDArray[Any]],
    keys: list[str] | npt.NDArray[np.uint8],
    options: dict[str, Any],
    identity: str = "",
) -> Index:
    """Write both index files into a folder that already holds the shards; `index.json` last.

    Args:
        folder: of the shards.
        classes: class names in label order.
        shards: the shard files, in order.
        columns: as `Index.columns`; those of a part in `PARTS` are given as those of the image are, or
                not at all.
        keys: the samples' keys, or the (N, L) matrix of them.
        options: how it was packed, JSON-able.
        identity: fingerprint of the split where it is to be another than that of the index.
    """
    key_matrix = keys if isinstance(keys, np.ndarray) else key_matrix_of(keys)
    dtypes = {**COLUMNS, **PART_COLUMNS}
    arrays = {name: np.ascontiguousarray(columns[name], dtype) for name, dtype in dtypes.items() if name in columns}
    digest = write_arrays(folder / ARRAYS_NAME, {**arrays, "key": key_matrix})
    extent = _extent_of(arrays)
    table: dict[str, object] = {
        "format": INDEX_FORMAT,
        "samples": len(key_matrix),
        "classes": list(classes),
        "shards": [vars(shard) for shard in shards],
        "arrays": {
            "name": ARRAYS_NAME,
            "sha256": digest,
            "chunks": [chunk_digest(arrays, chunk) for chunk in range(num_chunks(len(key_matrix)))],
        },
        "extent": extent,
        "options": options,
    }
    if identity:
        table["identity"] = identity
    table["fingerprint"] = fingerprint_of(table)
    durable_write(folder / INDEX_NAME, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    fingerprint = identity or str(table["fingerprint"])
    return Index(classes, shards, arrays, key_matrix, fingerprint, options, extent, place=str(folder))


def key_matrix_of(keys: list[str]) -> npt.NDArray[np.uint8]:
    """Return keys as the (N, L) matrix that an index holds."""
    encoded = [key.encode(errors="surrogateescape") for key in keys]
    width = max(map(len, encoded), default=0)
    matrix = np.frombuffer(b"".join(key.ljust(width, b"\0") for key in encoded), np.uint8)
    return matrix.reshape(len(keys), width)


def durable_write(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, whole or in blocks, under a temporary name, fsync it, give it its name."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with os.fdopen(open_new(aside), "wb") as file:
            for block in (data,) if isinstance(data, bytes) else data:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_index(folder: Path, *, named: Collection[str] | None = None) -> Index:
    """Read and check a split's index.

    Args:
        folder: of the index.
        named: the names that its shards may have, for external shards; else these must be plain ones.

    Raises:
        DataError: the folder is no packed split, or its index is damaged or of another version.
    """
    table = read_table(folder)
    names = [shard["name"] for shard in table["shards"]]
    odd = next((name for name in names if not (is_plain_name(name) if named is None else name in named)), None)
    if odd is not None:
        what = "no plain name" if named is None else "none of those that were named"
        raise DataError(f"data index {folder / INDEX_NAME} says that a shard is {odd!r}, {what}: pack the split again")
    columns, checked = _map_arrays(folder, table)
    keys = columns.pop("key", np.empty((0, 0), np.uint8))
    _check_columns(folder, columns, keys, table["samples"])
    extent = table.get("extent")
    index = Index(
        classes=tuple(table["classes"]),
        shards=tuple(ShardFacts(**shard) for shard in table["shards"]),
        columns=columns,
        keys=keys,
        fingerprint=table.get("identity") or table["fingerprint"],
        options=table["options"],
        extent=_extent_of(columns) if extent is None else (_pair(extent[0]), _pair(extent[1])),
        chunks=() if checked else tuple(table["arrays"]["chunks"]),
        place=str(folder),
    )
    if checked:
        _check_ranges(str(folder), columns, index)
    return index


def read_table(folder: Path) -> IndexTable:
    """Read `index.json` and check it against its fingerprint.

    Raises:
        DataError: as `read_index`.
    """
    path = folder / INDEX_NAME
    try:
        text = read_whole(path, LARGEST_TABLE)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_why_not_a_split(folder)) from None
    except OSError as error:
        raise DataError(f"data index {path} cannot be read ({error.strerror}): restore it") from None
    try:
        table: IndexTable = parse_json(text)
        version, said = table["format"], table["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"data index {path} is damaged, or not one of setformer_dist's: restore the file, pack the split again, or "
            "name the external shards by a pattern such as *.tar"
        ) from None
    if isinstance(version, bool) or not isinstance(version, int) or version not in _READABLE:
        readable = " and ".join(map(str, _READABLE))
        raise DataError(
            f"data index {path} has format {version!r}, this version of setformer_dist reads {readable}: "
            "pack the split again"
        )
    if fingerprint_of(table) != said:
        raise DataError(
            f"data index {path} does not agree with its own fingerprint, so it was damaged or edited: restore "
            "the file or pack the split again"
        )
    if (wrong := _wrong_field(table)) is not None:
        raise DataError(f"data index {path} says {wrong}, which no packing writes: pack the split again")
    return table


def _wrong_field(table: Mapping[str, Any]) -> str | None:
    """Return in words what of a table is not as `write_index` writes it; None if all is."""
    arrays, shards, extent = table.get("arrays"), table.get("shards"), table.get("extent")
    if not (isinstance(table.get("classes"), list) and all(isinstance(name, str) for name in table["classes"])):
        return "no list of class names"
    if not _is_count(table.get("samples")) or not isinstance(table.get("options"), dict):
        return "no number of samples, or no options"
    if not isinstance(arrays, dict) or not isinstance(arrays.get("sha256"), str):
        return "nothing of its arrays"
    if not is_plain_name(arrays.get("name")):
        return f"that its arrays are in {arrays.get('name')!r}, which is no plain name"
    if not isinstance(arrays.get("chunks", []), list) or not isinstance(table.get("identity", ""), str):
        return "chunks or an identity of another kind"
    if not isinstance(shards, list) or not shards or not all(map(_is_shard, shards)):
        return "no list of shards with name, size, sha256 and samples"
    if extent is not None:
        pairs = [pair for pair in extent if isinstance(pair, list)] if isinstance(extent, list) else []
        if len(pairs) != 2 or not all(len(pair) == 2 and all(map(_is_count, pair)) for pair in pairs):
            return "an extent that is no smallest and largest height and width"
    return None


def largest_arrays(table: IndexTable) -> int:
    """Return the most bytes that the arrays of an index can have whose table says this."""
    return _LARGEST_HEADER + table["samples"] * _LARGEST_ROW


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_shard(shard: object) -> bool:
    return (
        isinstance(shard, dict)
        and set(shard) == {"name", "size", "sha256", "samples"}
        and isinstance(shard["name"], str)
        and isinstance(shard["sha256"], str)
        and _is_count(shard["size"])
        and _is_count(shard["samples"])
    )


def _why_not_a_split(folder: Path) -> str:
    """Say what is in a folder without an index, and what to do about it."""
    pack = f"`setformer data pack SOURCE {folder}`"
    if not folder.exists():
        return f"data folder {folder} does not exist: set data.root{_beside(folder)}, or make it with {pack}"
    if not folder.is_dir():
        return f"data folder {folder} is a file, not a folder of shards: pack it with `setformer data pack`"
    entries = list(folder.iterdir())
    if not entries:
        return f"data folder {folder} is empty: fill it with {pack}"
    if any(entry.name.endswith(".tar") for entry in entries):
        return f"data folder {folder} has shards but no {INDEX_NAME}, so it is not whole: rebuild it with {pack}"
    if any((entry / INDEX_NAME).is_file() for entry in entries):
        names = ", ".join(sorted(entry.name for entry in entries if (entry / INDEX_NAME).is_file()))
        return f"data folder {folder} holds no shards itself, but packed splits ({names}): name one of them"
    if _has_images(folder):
        return (
            f"data folder {folder} holds images and no shards: make it class folders (CLASS/image.jpg), which train as "
            f"they are, or pack those with `setformer data pack {folder} "
            f"{folder.with_name(folder.name + '-packed')}`"
        )
    return f"data folder {folder} has no {INDEX_NAME}: make it with {pack}"


def _beside(folder: Path) -> str:
    """Return what folders there are in its place, as a part of a sentence; nothing where there are none."""
    parent = folder.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return ""
    more = " …" if len(names) > _NAMED else ""
    return f" or data.train and data.val (in {parent} there are {', '.join(names[:_NAMED])}{more})" if names else ""


def _has_images(folder: Path, depth: int = 3) -> bool:
    for entry in folder.iterdir():
        if entry.suffix.lower() in IMAGE_SUFFIXES:
            return True
        if depth > 1 and entry.is_dir() and _has_images(entry, depth - 1):
            return True
    return False


def _map_arrays(folder: Path, table: IndexTable) -> tuple[dict[str, npt.NDArray[Any]], bool]:
    """Return the arrays, and whether all of them were checked."""
    path, said = folder / table["arrays"]["name"], table["arrays"]
    need = num_chunks(table["samples"])
    if "chunks" in said and len(said["chunks"]) != need:
        raise DataError(
            f"data index in {folder} has {len(said['chunks'])} digests for {need} chunks: pack the split again"
        )
    try:
        at_once = path.stat().st_size <= _READ_AT_ONCE or "chunks" not in said
        if at_once and file_digest(path) != said["sha256"]:
            raise DataError(
                f"data index {path} does not have the sha256 that {INDEX_NAME} says: restore the file or pack the "
                "split again"
            )
        return map_arrays(path), at_once
    except OSError as error:
        raise DataError(
            f"data index {path} cannot be read ({error.strerror}): restore the file or pack the split again"
        ) from None
    except ValueError as error:
        raise DataError(f"data index {path} is damaged ({error}): restore the file or pack the split again") from None


def _check_columns(
    folder: Path, columns: dict[str, npt.NDArray[Any]], keys: npt.NDArray[np.generic], count: int
) -> None:
    """Refuse an index whose columns are not those that we write."""
    names = set(columns)
    of_image = {"offset", "size", "crc32"} & names
    whole = all(
        {name.partition("_")[2] for name in names if name.startswith(f"{part}_")} in (set(), of_image) for part in PARTS
    )
    sound = (
        count > 0
        and whole
        and set(COLUMNS) - {"crc32"} <= names <= {*COLUMNS, *PART_COLUMNS}
        and all(column.shape == (count,) for column in columns.values())
        and all(columns[name].dtype == dtype for name, dtype in {**COLUMNS, **PART_COLUMNS}.items() if name in names)
        and keys.ndim == 2
        and len(keys) == count
    )
    if not sound:
        raise DataError(f"data index in {folder} does not have the columns of an index: pack the split again")


def _pair(numbers: list[int]) -> tuple[int, int]:
    first, second = numbers
    return first, second


def _extent_of(columns: dict[str, npt.NDArray[Any]]) -> tuple[tuple[int, int], tuple[int, int]]:
    height, width = columns["height"], columns["width"]
    return (int(height.min()), int(width.min())), (int(height.max()), int(width.max()))


def _check_ranges(place: str, columns: dict[str, npt.NDArray[Any]], index: Index) -> None:
    """Refuse rows that agree with their hashes but could not have come from our packing."""
    sizes = np.array([shard.size for shard in index.shards], np.int64)
    shard, label = columns["shard"], columns["label"]
    sound = (
        0 <= label.min() <= label.max() < len(index.classes)
        and 0 <= shard.min() <= shard.max() < len(sizes)
        and bool((shard[1:] >= shard[:-1]).all())
    )
    for part in ("", *(f"{part}_" for part in sorted(index.parts))):
        offset, size = columns[f"{part}offset"], columns[f"{part}size"]
        # In this order no sum overflows; a sample larger than any is one of a forged index or a sparse file.
        sound = bool(sound) and min(offset.min(), size.min()) >= 0 and int(size.max()) <= LARGEST_SAMPLE
        sound = bool(sound) and bool((offset <= sizes[shard] - size).all())
    if not sound:
        raise DataError(f"data index in {place} describes samples outside its shards: pack the split again")
