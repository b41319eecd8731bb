"""Running text as windows of tokens, for masked language modelling.

A document ends with its file, or at an empty line; of a .jsonl file each line is one. A document's tokens are cut into
windows that the model sees whole, each between a start and an end token. No window has tokens of two documents, and
no token is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dataloaders.sources.files import parse_json
from dataloaders.text.samples import packed
from dataloaders.text.tokenizer import TextTokenizer
from dataloaders.tokens import TokenSample
from setformer_dist.core.errors import DataError

SUFFIXES = (".txt", ".jsonl")

_LINES = 2_000  # encoded at once
LONGEST_LINE = 1 << 26  # characters: bounds memory


def files_of(source: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return a file, or those below a folder with a suffix, in the order of their names.

    Raises:
        DataError: there is none.
    """
    if source.is_file():
        return [source]
    found = sorted(path for path in source.rglob("*") if path.suffix in suffixes and path.is_file())
    if not found:
        what = f"has no {' or '.join(suffixes)} file" if source.is_dir() else "does not exist"
        raise DataError(f"{source} {what}: name a file, or a folder with such files")
    return found


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line of a UTF-8 file, without its end.

    Raises:
        DataError: it cannot be read, is not UTF-8, or has a line that is too long.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{path}, line {number}, has more than {LONGEST_LINE:,} characters: is it text?")
                yield number, line.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, after line {number}, is not UTF-8 ({error.reason}): convert it, such as with iconv -t UTF-8"
        ) from None


def documents_of(path: Path, column: str) -> Iterator[list[str]]:
    """Yield parts of documents, in order: some lines, and an empty list where a document ends.

    Args:
        path: of text, or of JSON lines.
        column: the key of the text in JSON lines.

    Raises:
        DataError: the file cannot be read.
    """
    held: list[str] = []
    for number, line in lines_of(path):
        if path.suffix == ".jsonl":
            yield [text_of(path, number, line, column)]
            yield []
        elif line.strip():
            held.append(line)
            if len(held) == _LINES:
                yield held
                held = []
        else:
            if held:
                yield held
                held = []
            yield []
    if held:
        yield held
    yield []


def text_of(path: Path, number: int, line: str, column: str) -> str:
    """Return the text of a JSON line; raises DataError."""
    try:
        row = parse_json(line.encode())
    except ValueError as error:
        raise DataError(f"{path}, line {number}, is not JSON ({error})") from None
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else "no object"
        raise DataError(f"{path}, line {number}, has no text {column!r} ({keys}): name its key with --text")
    return value


def windows_of(files: Sequence[Path], tokenizer: TextTokenizer, length: int, column: str) -> Iterator[TokenSample]:
    """Yield the windows of files, in order.

    Args:
        files: as `documents_of` reads them.
        tokenizer: makes ids.
        length: most tokens of a window, its start and end included.
        column: the key of the text in JSON lines.

    Raises:
        DataError: a file cannot be read.
    """
    room = length - 2
    for path in files:
        held = np.zeros(0, np.int64)
        for part in documents_of(path, column):
            held = np.concatenate([held, *tokenizer.encode(part)]) if part else held
            whole = len(held) // room * room if part else len(held)
            for start in range(0, whole, room):
                yield packed(held[start : min(start + room, whole)])
            held = held[whole:]
