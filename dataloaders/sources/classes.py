"""Class names and labels as people write them: read for what they mean, or refused; never taken for something else.

    ["cat", "dog"]                     names in label order
    {"cat": 0, "dog": 1}               torchvision's class_to_idx, Hugging Face's label2id
    {"0": "cat", "1": "dog"}           id2label; these tables may lie below their name in a larger one
    cat / dog / # a comment            one name per line
    0,cat   cat,0   with or without    two columns, one of them the numbers 0 to n - 1, by comma, semicolon, tab
    a header                           or colon

A label is a whole number (3, 3.0 as pandas writes it), or a name. A soft label is a list of probabilities, or a table
of them by class name. Byte order marks are skipped.
"""

from __future__ import annotations

import codecs
import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dataloaders.source import UNLABELLED as UNLABELLED  # as this package names it
from dataloaders.sources.files import parse_json
from setformer_dist.core.errors import DataError

# Bytes of a file of class names: a million names.
LARGEST_CLASS_FILE = 1 << 24

# A soft label may sum to 1 but for this much; it is divided by its sum.
_SOFT_ROUNDING = 1e-3

_TABLES = ("id2label", "label2id", "class_to_idx", "idx_to_class")
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # control characters, half characters, separators of lines
_LONGEST_LINE = 1000
_LONGEST_SHOWN = 60
_HEADERS = frozenset({"class", "classes", "name", "names", "label", "labels", "class_name", "classname"})

_WHOLE = re.compile(r"([+-]?\d{1,18})(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan", re.IGNORECASE)
_NUMBERS = re.compile(r"[+-]?[\d.]+(?:[\s,;]+[+-]?[\d.]+)+")


class LabelError(ValueError):
    """A label that is neither a number nor a name."""


def decoded(data: bytes) -> str:
    """Return text without its byte order mark, which also reveals UTF-16; raises UnicodeDecodeError."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def label_of(said: object) -> int | str | None:
    """Return the label that a text or a JSON value means; None for none.

    Raises:
        LabelError: it is neither a whole number nor one name.
    """
    if said is None or (isinstance(said, int) and not isinstance(said, bool)):
        return said
    if isinstance(said, float) and said.is_integer() and abs(said) < 1 << 53:
        return int(said)
    if not isinstance(said, str) or not said.strip():
        raise LabelError
    text = said.strip()
    if whole := _WHOLE.fullmatch(text):
        return int(whole[1])
    if text[0] in "[{(" or "\n" in text or _NUMBER.fullmatch(text) or _NUMBERS.fullmatch(text):
        raise LabelError
    return text


def parse_class_map(data: bytes, shown: str) -> tuple[str, ...]:
    """Return the class names, in label order, that a file's bytes hold.

    Args:
        data: the file.
        shown: its name, for messages.

    Raises:
        DataError: it holds none, one twice, or numbers that are not 0 to n - 1.
    """
    try:
        text = decoded(data)
    except UnicodeDecodeError as error:
        raise DataError(f"class map {shown} cannot be read: {error}") from None
    _check_format(text, shown)
    if text.lstrip().startswith(("[", "{")) or shown.lower().endswith(".json"):
        names = _from_json(text, shown)
    else:
        names = _from_lines(text, shown)
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(f"class map {shown} names {_short(name)} twice: each line is one label")
        if any(unicodedata.category(sign) in _UNSEEN for sign in name):
            raise DataError(
                f"class map {shown} has the name {_short(name)}, which holds control characters: save it as UTF-8, one "
                "name per line"
            )
    check_numbers_in_place(names, f"class map {shown}", "sort them as numbers, or give the classes names")
    return tuple(names)


def out_of_place(names: Sequence[str]) -> int | None:
    """Return the first label that is not its class's number where the names are 0 to n - 1 in another order.

    Sorting numbers as text makes such an order: label 2 is then class "10".
    """
    if not all(re.fullmatch(r"\d{1,18}", name) for name in names):
        return None
    numbers = [int(name) for name in names]
    if sorted(numbers) != list(range(len(numbers))):
        return None
    return next((at for at, number in enumerate(numbers) if at != number), None)


def check_numbers_in_place(names: Sequence[str], where: str, repair: str) -> None:
    """Refuse names that are the numbers 0 to n - 1 in another order.

    Args:
        names: in label order.
        where: they stand, for the message.
        repair: for the message.

    Raises:
        DataError: they are.
    """
    if (at := out_of_place(names)) is not None:
        raise DataError(
            f"{where} has number {names[at]!r} at label {at}, as if numbers had been sorted as text: {repair}"
        )


def _check_format(text: str, shown: str) -> None:
    """Refuse what is neither JSON nor lines of names: text of other encodings, YAML, the text form of protobuf."""
    if "\0" in text:
        raise DataError(f"class map {shown} is text of another encoding (it has zero bytes): save it as UTF-8")
    found = re.search(r"^[ \t]*[\w-]+[ \t]*(?::|\{)[ \t]*$", text, re.MULTILINE)
    if found and not text.lstrip().startswith(("[", "{")):
        what = "YAML" if found[0].rstrip().endswith(":") else "protobuf's text"
        raise DataError(
            f"class map {shown} has the line {_short(found[0].strip())}, as {what} has them, which is not read: give "
            "one name per line, or a JSON list of names"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")


def _from_json(text: str, shown: str) -> list[str]:
    try:
        said = parse_json(text.encode())
    except ValueError as error:
        raise DataError(f"class map {shown} is not JSON: {error}") from None
    if isinstance(said, dict):
        inner = next((said[name] for name in _TABLES if isinstance(said.get(name), dict)), said)
        return _from_table(inner, shown)
    if not isinstance(said, list) or not said or not all(isinstance(name, str) and name for name in said):
        raise DataError(
            f"class map {shown} must hold class names, one per line, or as a JSON list of strings or table of names "
            "and numbers"
        )
    return list(said)


def _from_table(table: dict[str, Any], shown: str) -> list[str]:
    """Return the names of a table from names to numbers, or from numbers to names."""
    numbers = [_number(value) for value in table.values()]
    keys = [_number(key) for key in table]
    if table and all(number is not None for number in numbers) and not all(isinstance(v, str) for v in table.values()):
        return _numbered(list(zip(numbers, table, strict=True)), shown)
    if table and all(number is not None for number in keys) and all(isinstance(v, str) for v in table.values()):
        if all(number is not None for number in numbers) and keys != numbers:
            raise DataError(
                f"class map {shown} maps numbers to numbers, both as text, so it is unclear which are the labels: "
                "make it a JSON list of names in label order"
            )
        return _numbered(list(zip(keys, table.values(), strict=True)), shown)
    if table and all(number is not None for number in numbers):  # texts of numbers: {"cat": "0"}
        return _numbered(list(zip(numbers, table, strict=True)), shown)
    raise DataError(
        f'class map {shown} must be a table of names and numbers ({{"cat": 0}} or {{"0": "cat"}}), or a list of names'
    )


def _number(value: object) -> int | None:
    try:
        label = label_of(value)
    except LabelError:
        return None
    return label if isinstance(label, int) else None


def _numbered(pairs: list[tuple[int | None, str]], shown: str) -> list[str]:
    """Return names by their numbers, which must be 0 to n - 1."""
    names: dict[int, str] = {}
    for number, name in pairs:
        assert number is not None  # the callers have looked
        if number in names:
            raise DataError(f"class map {shown} gives number {number} to {names[number]!r} and {name!r}: repair it")
        names[number] = name.strip()
    lacking = next((number for number in range(len(names)) if number not in names), None)
    if lacking is not None:
        raise DataError(f"class map {shown} has {len(names)} classes but none of number {lacking}: number them from 0")
    if "" in names.values():
        raise DataError(f"class map {shown} has a class without a name: name it")
    return [names[number] for number in range(len(names))]


def _from_lines(text: str, shown: str) -> list[str]:
    lines = []
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        stripped = line.strip()
        if not stripped or re.match(r"#(\s|$|#|!)", stripped):
            continue
        if len(stripped) > _LONGEST_LINE:
            raise DataError(
                f"class map {shown} has {len(stripped)} characters in line {number} {_short(stripped)}: a name has at "
                f"most {_LONGEST_LINE}; give one per line"
            )
        if stripped.startswith('"') and stripped.count('"') % 2:
            raise DataError(f"class map {shown} has a quote that does not end in line {number} {_short(stripped)}")
        if stripped.startswith("#") or re.search(r"\s#\s", stripped):
            raise DataError(
                f"class map {shown} has line {number} {stripped[:60]!r}, which may be a comment or a name: write "
                "comments as lines of their own that begin with '# ', or make the map a JSON list"
            )
        lines.append(stripped)
    if not lines:
        raise DataError(f"class map {shown} must hold class names, one per line or as JSON: it holds none")
    for mark in ",;\t:":
        if (found := _from_columns(lines, mark, shown)) is not None:
            return found
    if shown.lower().endswith(".csv") and any("," in line for line in lines):
        raise DataError(
            f"class map {shown} has columns, but none holds the numbers 0 to n - 1: keep only the column of names"
        )
    if len(lines) > 1 and any(
        len(cells := lines[0].lower().split(mark)) > 1 and _HEADERS & {cell.strip() for cell in cells}
        for mark in ",;\t"
    ):
        raise DataError(
            f"class map {shown} begins with {_short(lines[0])}, a header of columns of which none holds the numbers 0 "
            "to n - 1: keep only the column of names"
        )
    if len(lines) > 1 and lines[0].lower() in _HEADERS:
        raise DataError(f"class map {shown} begins with {lines[0]!r}, which may be a header or a class: make it JSON")
    _check_spaced(lines, shown)
    return lines


def _from_columns(lines: list[str], mark: str, shown: str) -> list[str] | None:
    """Return the names of two columns, one of them numbers; None where it is not so."""
    rows = [line.split(mark, 1) for line in lines] if mark == ":" else list(csv.reader(lines, delimiter=mark))
    if not rows or not all(len(row) == 2 for row in rows):
        return None
    for at in (0, 1):
        body = rows if _number(rows[0][at]) is not None else rows[1:]  # a header has no number
        numbers = [_number(row[at].strip()) for row in body]
        if numbers and all(number is not None for number in numbers):
            return _numbered([(number, row[1 - at]) for number, row in zip(numbers, body, strict=True)], shown)
    return None


def _check_spaced(lines: list[str], shown: str) -> None:
    """Refuse `cat 1`, `dog 0`: names with numbers that are not those of their lines."""
    for pattern in (r"(?P<name>.*\S)\s+(?P<number>\d{1,9})", r"(?P<number>\d{1,9}):?\s+(?P<name>.*\S)"):
        found = [re.fullmatch(pattern, line) for line in lines]
        numbers = [int(one["number"]) for one in found if one is not None]
        names = {one["name"] for one in found if one is not None}
        if not len(numbers) == len(lines) == len(names) > 1:
            continue
        if sorted(numbers) == list(range(len(lines))) != numbers:
            raise DataError(
                f"class map {shown} has line {lines[0][:60]!r} at label 0: put a comma between names and numbers, or "
                "sort the lines"
            )
        if sorted(numbers) == list(range(1, len(lines) + 1)):
            raise DataError(
                f"class map {shown} numbers its classes from 1, as in {lines[0][:60]!r}, and labels count from 0: "
                "number them from 0, with a comma between, or keep only the names"
            )


def soft_label(said: object, classes: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return how probable each class is, (classes,) float32, summing to 1.

    Args:
        said: a number for each class, in order; or a table from class names to numbers, 0 for those not named.
        classes: their names.

    Raises:
        ValueError: it is neither, names no class, or is no distribution.
        TypeError: a number is none.
    """
    if isinstance(said, dict):
        place = {name: at for at, name in enumerate(classes)}
        values = np.zeros(len(classes))
        for name, value in said.items():
            if name not in place:
                raise ValueError(f"{name!r:.40} is no class")
            values[place[name]] = _probability(value)
    elif isinstance(said, list):
        if len(said) != len(classes):
            raise ValueError(f"it has {len(said)} numbers for {len(classes)} classes")
        values = np.array([_probability(value) for value in said])
    else:
        raise ValueError("it is neither a list of numbers nor a table of classes")
    total = float(values.sum())
    if abs(total - 1) > _SOFT_ROUNDING:
        raise ValueError(f"it sums to {total:.6g} and not to 1")
    return np.asarray(values / total, np.float32)


def _probability(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1 + _SOFT_ROUNDING:
        raise ValueError(f"{value!r:.40} is no probability")
    return float(value)
