"""What is to be packed, as a table on disk: a million images are listed in the memory of a few thousand.

SQLite sorts, joins and counts in files of its own; the processes that pack open the table to read, each its own
part. The table lives in the work folder of a packing and goes with it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataloaders.sources.class_folders import Stretch
from setformer_dist.core.errors import DataError

# KiB that SQLite may hold of a table in each process.
_CACHE_KIB = 16 << 10

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE found (name BLOB, start INTEGER, size INTEGER, stamp INTEGER);
CREATE TABLE files (name BLOB, label INTEGER, partner BLOB, start INTEGER, size INTEGER, stamp INTEGER);
CREATE TABLE masks (stem BLOB PRIMARY KEY, name BLOB, start INTEGER, size INTEGER, stamp INTEGER) WITHOUT ROWID;
CREATE TABLE boxes (name BLOB PRIMARY KEY, text TEXT) WITHOUT ROWID;
CREATE TABLE samples (
    number INTEGER PRIMARY KEY, label INTEGER, name BLOB, start INTEGER, size INTEGER, stamp INTEGER,
    mask_name BLOB, mask_start INTEGER, mask_size INTEGER, mask_stamp INTEGER, boxes TEXT
);
"""
_SORTED = """
SELECT f.label, f.name, f.start, f.size, f.stamp, m.name, m.start, m.size, m.stamp, b.text
FROM files f LEFT JOIN masks m ON m.stem = f.partner LEFT JOIN boxes b ON b.name = f.partner
ORDER BY f.name
"""


@dataclass(frozen=True, slots=True)
class Listed:
    """One sample of the table.

    Attributes:
        number: its place in the packed split.
        label: of the image; 0 for samples with a mask or boxes.
        image: where its bytes are.
        mask: where its mask's are, or None.
        boxes: JSON list of the image's size and its boxes (`CocoBoxes.boxes`), or None.
    """

    number: int
    label: int
    image: Stretch
    mask: Stretch | None
    boxes: str | None


class Catalog:
    """The samples of a source on disk.

    Args:
        path: of the table.
        base: what names are relative to: the source's folder, or the (plain) tar that holds all.
        new: make an empty table; else read what is there.
    """

    def __init__(self, path: Path, base: Path, new: bool = False) -> None:
        self._base = str(base)
        self._is_folder = base.is_dir()
        # Threads take turns at most: each packing process reads its own part from one thread.
        self._sql = sqlite3.connect(f"{path.absolute().as_uri()}?mode={'rwc' if new else 'ro'}", uri=True)
        self._sql.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._sql.execute("PRAGMA temp_store = FILE")
        if new:
            self._sql.executescript(_TABLES)

    def close(self) -> None:
        """Close the table's file."""
        self._sql.close()

    # ------------------------------------------------------------------------------------------------- filling

    def add_found(self, files: Iterable[Stretch]) -> None:
        """Put files aside that may be images or masks."""
        rows = ((os.fsencode(file.name), *_place(file)) for file in files)
        self._sql.executemany("INSERT INTO found VALUES (?, ?, ?, ?)", rows)

    def found(self) -> Iterator[Stretch]:
        """Yield the files put aside."""
        for row in self._sql.cursor().execute("SELECT * FROM found"):
            yield self._stretch(*row)

    def add_files(self, files: Iterable[tuple[Stretch, int, str | None]]) -> None:
        """Add images in any order: where, label, and the stem of its mask or the name of its boxes."""
        rows = (
            (os.fsencode(file.name), label, None if partner is None else os.fsencode(partner), *_place(file))
            for file, label, partner in files
        )
        self._sql.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

    def add_masks(self, masks: Iterable[tuple[str, Stretch]]) -> None:
        """Add masks by the stem that image and mask share.

        Raises:
            DataError: two masks have one.
        """
        for stem, file in masks:
            key, name = os.fsencode(stem), os.fsencode(file.name)
            row = (key, name, *_place(file))
            if not self._sql.execute("INSERT OR IGNORE INTO masks VALUES (?, ?, ?, ?, ?)", row).rowcount:
                (there,) = self._sql.execute("SELECT name FROM masks WHERE stem = ?", (key,)).fetchone()
                raise DataError(f"{os.fsdecode(there)} and {file.name} are masks of the same image: remove one of them")

    def add_boxes(self, boxes: Iterable[tuple[str, str]]) -> None:
        """Add the boxes of images: the image's name as the annotations give it, and `Listed.boxes`."""
        rows = ((os.fsencode(name), text) for name, text in boxes)
        self._sql.executemany("INSERT OR REPLACE INTO boxes VALUES (?, ?)", rows)

    def boxes_name(self, image: str) -> str | None:
        """Return the name by which the annotations know an image, whose own may have more leading folders."""
        parts = image.split("/")
        for skipped in range(len(parts)):
            name = "/".join(parts[skipped:])
            if self._sql.execute("SELECT 1 FROM boxes WHERE name = ?", (os.fsencode(name),)).fetchone():
                return name
        return None

    def shared_partner(self) -> tuple[str, str] | None:
        """Return two images that claim the same mask or boxes, if there are any."""
        row = self._sql.execute(
            "SELECT min(name), max(name) FROM files WHERE partner NOT NULL GROUP BY partner HAVING count(*) > 1"
        ).fetchone()
        return (os.fsdecode(row[0]), os.fsdecode(row[1])) if row else None

    def without_image(self, table: str) -> list[str]:
        """Return the keys of `masks` or `boxes` that no image has, sorted."""
        key = {"masks": "stem", "boxes": "name"}[table]
        rows = self._sql.execute(
            f"SELECT {key} FROM {table} WHERE {key} NOT IN (SELECT partner FROM files WHERE partner NOT NULL) "
            f"ORDER BY {key}"
        )
        return [os.fsdecode(row[0]) for row in rows]

    def settle(self, order: npt.NDArray[np.int64] | None, labels: list[int] | None = None) -> None:
        """Number the samples: sorted by name, of which sample k is the order[k]-th; None keeps them sorted.

        Args:
            order: a permutation.
            labels: the label that each label given to `add_files` becomes.
        """
        place: npt.NDArray[np.int64] | None = None
        if order is not None:
            place = np.empty_like(order)
            place[order] = np.arange(len(order))
        rows = self._sql.cursor().execute(_SORTED)
        numbered = (
            (k if place is None else int(place[k]), label if labels is None else labels[label], *row)
            for k, (label, *row) in enumerate(rows)
        )
        self._sql.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", numbered)
        self._sql.execute("DROP TABLE files")
        self._sql.execute("DROP TABLE found")
        self._sql.commit()

    # ------------------------------------------------------------------------------------------------- reading

    def num_files(self) -> int:
        """Return the number of images added so far."""
        return int(self._sql.execute("SELECT count(*) FROM files").fetchone()[0])

    def num_found(self) -> int:
        """Return the number of files put aside."""
        return int(self._sql.execute("SELECT count(*) FROM found").fetchone()[0])

    def sizes(self) -> Iterator[int]:
        """Yield the bytes of each sample, its mask included, in the order of their numbers."""
        for row in self._sql.execute("SELECT size + ifnull(mask_size, 0) FROM samples ORDER BY number"):
            yield int(row[0])

    def samples(self, first: int, end: int) -> Iterator[Listed]:
        """Yield samples first to end - 1."""
        query = "SELECT * FROM samples WHERE number >= ? AND number < ? ORDER BY number"
        for number, label, *image_and_mask, boxes in self._sql.execute(query, (first, end)):
            image, mask = self._stretch(*image_and_mask[:4]), None
            if image_and_mask[4] is not None:
                mask = self._stretch(*image_and_mask[4:])
            yield Listed(number, label, image, mask, boxes)

    def _stretch(self, name: bytes, start: int, size: int, stamp: int) -> Stretch:
        text = os.fsdecode(name)
        return Stretch(f"{self._base}/{text}" if self._is_folder else self._base, start, size, text, stamp)


def _place(file: Stretch) -> tuple[object, ...]:
    return file.offset, file.size, file.stamp
