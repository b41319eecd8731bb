"""Rows of tables of texts: a sentence, or a pair of them, with a class or a number.

.tsv: columns are separated by tabs, and a quote is a character like any other, as in GLUE's files. .csv: as the format
wants it, with quoted columns. .jsonl: an object a line. The first line of .tsv and .csv names the columns, or with
`header = False` they are 1, 2, 3.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.text.corpus import check_characters, lines_of, object_of, suffix_of
from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError, DataError

SUFFIXES = (".tsv", ".csv", ".jsonl")

_LONGEST_CELL = 1 << 24
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 30  # characters of a name in messages


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read.

    Attributes:
        texts: one, or two.
        label: of the class; "" for none.
        number: of the number; "" for none.
        header: whether the first line names the columns.
    """

    texts: tuple[str, ...]
    label: str = ""
    number: str = ""
    header: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.texts) <= 2:
            raise ConfigError(f"--text names {len(self.texts)} columns: name one, or the two of a pair")
        if self.label and self.number:
            raise ConfigError("--label and --number exclude each other: a sample has a class or a number")

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.texts, *filter(None, (self.label, self.number)))


@dataclass(frozen=True)
class Row:
    """A sample.

    Attributes:
        place: of it, for messages.
        texts: one, or two.
        label: name of its class; "" for none.
        number: what it is compared with; NaN for none.
    """

    place: str
    texts: tuple[str, ...]
    label: str
    number: float


def rows_of(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a table, in order.

    Raises:
        DataError: the file cannot be read, has no such column, or a row has no text, label or number.
    """
    for number, cells in _cells(path, columns):
        place = f"{path}, line {number},"
        texts = tuple(cells[name] for name in columns.texts)
        if not all(text.strip() for text in texts):
            raise DataError(f"{place} has an empty text: remove the line, or give it a text")
        label = cells[columns.label].strip() if columns.label else ""
        if columns.label and not label:
            raise DataError(f"{place} has no {columns.label}: remove the line, or give it a class")
        yield Row(place, texts, label, _number(place, cells[columns.number]) if columns.number else math.nan)


def _number(place: str, text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _LARGEST:  # of numbers as they are packed; NaN is not either
        raise DataError(f"{place} has {text[:40]!r} where a number is wanted: repair it, or name another --number")
    return value


def _cells(path: Path, columns: Columns) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line's number and the cells that are read of each row."""
    if suffix_of(path) == ".jsonl":
        for number, line in lines_of(path):
            if (cells_here := _object(path, number, line, columns.all)) is not None:
                yield number, cells_here
        return
    if suffix_of(path) not in SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(SUFFIXES)}: tables of texts are read by their suffix")
    names: Sequence[str] = ()
    for number, cells in _separated(path):
        if not names:
            names = [name.strip() for name in cells] if columns.header else [str(i + 1) for i in range(len(cells))]
            places = {name: _place(path, names, name, columns.header) for name in columns.all}
            if columns.header:
                continue
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {number}, has {len(cells)} columns, and the first line {len(names)}: repair the line"
            )
        yield number, {name: cells[place] for name, place in places.items()}


def _place(path: Path, names: Sequence[str], name: str, header: bool) -> int:
    if names.count(name) == 1:
        return names.index(name)
    if names.count(name):
        raise DataError(f"{path} has {names.count(name)} columns {name!r}: name each once")
    hint = "its first line names them; --no-header numbers them" if header else "--no-header numbers them"
    known = [name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…" for name in names]
    raise DataError(f"{path} has no column {name!r} ({hint}): {nearest(name, known)}")


def _separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    if suffix_of(path) == ".tsv":
        for number, line in lines_of(path):
            if line:
                yield number, line.split("\t")
        return
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader((f"{line}\n" for _, line in lines_of(path)), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.rstrip("\n") for cell in cells]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}, is not CSV ({error}): repair it, or name it .tsv") from None


def _object(path: Path, number: int, line: str, wanted: Sequence[str]) -> dict[str, str] | None:
    row = object_of(path, number, line)
    if row is None:
        return None
    for name in wanted:
        if name not in row:
            raise DataError(f"{path}, line {number}, has no key {name!r}: {nearest(name, list(row))}")
        if not isinstance(row[name], str | int | float):
            raise DataError(f"{path}, line {number}: {name!r} is neither a text nor a number")
    return {name: check_characters(str(row[name]), f"{path}, line {number},") for name in wanted}
