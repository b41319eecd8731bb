"""What the index will say of each shard: written next to a shard when it is whole, gathered when all are.

The file of rows also holds a digest of all that decided the shard, by which a later packing knows it again.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from dataloaders.packing.intake import Intake, Taken, encode_boxes, encode_soft, take_in, tiles_of
from dataloaders.packing.origins import Raw
from dataloaders.packing.shard_file import ShardFile
from dataloaders.pixels.decode import UndecodableError, suffix_for
from dataloaders.source import DamagedSampleError
from dataloaders.sources.index import COLUMNS, PART_COLUMNS, PARTS, ShardFacts, durable_write, key_matrix_of
from dataloaders.sources.tiles import TABLE_SUFFIX, encode_table

_ROW_NAMES = [*list(COLUMNS)[1:], *PART_COLUMNS]
_PART_NAMES = ("offset", "size", "crc32")


@dataclass(frozen=True)
class PackedShard:
    """A shard on the disk; its rows are in a file next to it.

    Attributes:
        facts: of the shard.
        rejected: (path, reason) of what was left out.
        rewritten: images whose bytes are not those of the source.
        top_class: largest class of the masks, -1 without.
        kept: it was there already.
    """

    facts: ShardFacts
    rejected: list[tuple[str, str]] = field(default_factory=list)
    rewritten: int = 0
    top_class: int = -1
    kept: bool = False


def rows_of(shard: Path) -> Path:
    """Return the file that holds a finished shard's rows."""
    return shard.with_suffix(".rows")


def finished(shard: Path, identity: str) -> PackedShard | None:
    """Return a shard that an earlier packing finished, if it is what this one wants and whole."""
    try:
        with safetensors.safe_open(rows_of(shard), "numpy") as file:
            said = file.metadata() or {}
        if said.get("identity") != identity:
            return None
        facts = ShardFacts(**json.loads(said["facts"]))
        with shard.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                return None
        rejected = [(name, reason) for name, reason in json.loads(said["rejected"])]
        return PackedShard(facts, rejected, int(said["rewritten"]), int(said["top_class"]), kept=True)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None  # nothing there, or not whole: the shard is written again


class ShardRows:
    """What the index will say of a shard being written."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.rejected: list[tuple[str, str]] = []
        self.rewritten = 0
        self.top_class = -1
        self._rows: list[tuple[int, ...]] = []

    def add(self, shard: ShardFile, sample: Raw, how: Intake) -> None:
        """Append a sample to the shard, or reject it."""
        key, before = key_of(sample.number, sample.name), shard.mark()
        try:
            taken = take_in(sample.stored, how)
            row = _add_sample(shard, key, sample, taken, how)
        except (UndecodableError, DamagedSampleError) as error:
            shard.back_to(before)  # tiles that were written before one could not be
            self.rejected.append((sample.name, str(error)))
            return
        self._rows.append(row)
        self.keys.append(key)
        self.rewritten += taken.rewritten
        self.top_class = max(self.top_class, taken.top_class)

    def write(self, path: Path, packed: PackedShard, identity: str) -> None:
        """Write the rows, durably; once they are next to the shard it is finished."""
        said = {
            "identity": identity,
            "facts": json.dumps(vars(packed.facts)),
            "rejected": json.dumps(packed.rejected),
            "rewritten": str(packed.rewritten),
            "top_class": str(packed.top_class),
        }
        table = np.array(self._rows, np.int64).reshape(len(self._rows), len(_ROW_NAMES))
        keys = key_matrix_of(self.keys) if self.keys else np.empty((0, 0), np.uint8)
        durable_write(path, safetensors.numpy.save({"rows": table, "key": keys}, said))


def _add_sample(shard: ShardFile, key: str, sample: Raw, taken: Taken, how: Intake) -> tuple[int, ...]:
    """Append a sample's members; return its row, values in the order of `_ROW_NAMES`."""
    image = taken.image
    if taken.grid is None:
        offset = shard.add_member(f"{key}.{suffix_for(image, PurePosixPath(sample.name).suffix)}", image)
    else:
        tiles = [
            (shard.add_member(f"{key}.{name}", data), len(data), zlib.crc32(data))
            for name, data in tiles_of(sample.stored, taken.grid, how)
        ]
        image = encode_table(taken.grid, tiles)
        offset = shard.add_member(f"{key}.{TABLE_SUFFIX}", image)
    shard.add_member(f"{key}.cls", b"%d" % sample.label)
    row = [offset, len(image), sample.label, taken.width, taken.height, zlib.crc32(image)]
    boxes = None if taken.boxes is None else encode_boxes(taken.boxes)
    soft = None if taken.soft is None else encode_soft(taken.soft)
    for name, data in (("mask.png", taken.mask), ("boxes.json", boxes), ("soft.json", soft)):
        if data is None:
            row += [0, 0, 0]
        else:
            row += [shard.add_member(f"{key}.{name}", data), len(data), zlib.crc32(data)]
    return tuple(row)


def key_of(number: int, name: str) -> str:
    """Return a sample's key: unique by its number, short and without dots (WebDataset cuts names at the first).

    The number that an earlier packing put before a key is left out, so that repacking keeps keys.
    """
    stem = re.sub(r"^\d{9}-", "", PurePosixPath(name).stem)
    return f"{number:09d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:40]}"


def gathered(
    files: list[Path], counts: list[int], parts: frozenset[str]
) -> tuple[dict[str, npt.NDArray[np.generic]], npt.NDArray[np.uint8]]:
    """Return the columns and keys of all shards, in arrays set aside once: some 100 bytes per sample."""
    wanted = [*list(COLUMNS)[1:], *(f"{part}_{name}" for part in PARTS if part in parts for name in _PART_NAMES)]
    total, widest = sum(counts), max(map(_key_width, files))
    columns = {name: np.empty(total, {**COLUMNS, **PART_COLUMNS}[name]) for name in wanted}
    columns["shard"] = np.repeat(np.arange(len(counts), dtype=COLUMNS["shard"]), counts)
    keys = np.zeros((total, widest), np.uint8)
    start = 0
    for path, count in zip(files, counts, strict=True):
        arrays = safetensors.numpy.load_file(path)
        for at, name in enumerate(_ROW_NAMES):
            if name in wanted:
                columns[name][start : start + count] = arrays["rows"][:, at]
        keys[start : start + count, : arrays["key"].shape[1]] = arrays["key"]
        start += count
    return columns, keys


def _key_width(path: Path) -> int:
    with safetensors.safe_open(path, "numpy") as file:
        return int(file.get_slice("key").get_shape()[1])
