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
from setformer_dist.core.errors import ConfigError, DataError

SUFFIXES = (".txt", ".jsonl")

_LINES = 2_000  # encoded at once
LONGEST_LINE = 1 << 26  # bytes: bounds memory
_GZIP = b"\x1f\x8b"  # with which its files begin
_MARK = "\ufeff".encode()  # with which some files begin


def suffix_of(path: Path) -> str:
    """Return the suffix of a file, in small letters."""
    return path.suffix.lower()


def check_running(files: Sequence[Path]) -> None:
    """Refuse tables in the place of running text; raises ConfigError."""
    for path in files:
        if suffix_of(path) in (".tsv", ".csv"):
            raise ConfigError(
                f"{path} is a table, and running text is wanted: `text pack` reads it with --text COLUMN, and "
                "`text tokenizer` reads .txt and .jsonl files"
            )


def files_of(source: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return a file, or those below a folder with a suffix, in the order of their names.

    Raises:
        DataError: there is none.
    """
    if source.is_file():
        return [source]
    found = sorted(path for path in source.rglob("*") if suffix_of(path) in suffixes and path.is_file())
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
        with path.open("rb") as file:
            if file.peek(2)[:2] == _GZIP:
                raise DataError(f"{path} is compressed with gzip: unpack it, such as with gunzip")
            while line := file.readline(LONGEST_LINE):
                number += 1
                if b"\0" in line:
                    raise DataError(
                        f"{path}, line {number}, has a NUL byte, which is no text: convert the file to UTF-8, such as "
                        "with iconv -f UTF-16 -t UTF-8, or name another file"
                    )
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{path}, line {number}, has more than {LONGEST_LINE:,} bytes: is it text?")
                yield number, line.removeprefix(_MARK if number == 1 else b"").decode().rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}, is not UTF-8 ({error.reason}): convert the file, such as with iconv -t UTF-8"
        ) from None


def object_of(path: Path, number: int, line: str) -> dict[str, object] | None:
    """Return the object of a JSON line; None for an empty line; raises DataError."""
    if not line.strip():
        return None
    try:
        row = parse_json(line.encode())
    except ValueError as error:
        raise DataError(f"{path}, line {number}, is not JSON ({str(error)[:80]}): repair or remove the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}, is not an object with keys: repair or remove the line")
    return row


def check_characters(text: str, place: str) -> str:
    """Return a text of whole characters; raises DataError for one with half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{place} has {half}, which is half a character: repair the text") from None
    return text


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
        if suffix_of(path) == ".jsonl":
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
    """Return the text of a JSON line, "" of an empty one; raises DataError."""
    row = object_of(path, number, line)
    if row is None:
        return ""
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(
            f"{path}, line {number}, has no text {column!r} ({', '.join(map(str, row))}): name its key with --text"
        )
    return check_characters(value, f"{path}, line {number},")


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
