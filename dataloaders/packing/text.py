"""Labelled texts become a token split: each byte is a token, so there is no vocabulary to keep.

A TSV file has one text and one label per line, separated by a tab; a first line that reads `sentence<TAB>label` (or
text, review) is a header. Labels are any words; numbered in sorted order, or as the class map says.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dataloaders.sources.class_folders import check_class_names, read_class_map
from dataloaders.tokens import TokenFacts, TokenSample, TokenSplit, open_token_split, write_token_split
from setformer_dist.core.errors import ConfigError, DataError

SUFFIXES = frozenset({".tsv", ".txt"})
_HEADERS = frozenset({"sentence", "text", "review"})

# What a damaged tar raises, with any compression.
_DAMAGED = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class TextOptions:
    """How to pack texts.

    Attributes:
        length: bytes to which longer texts are cut; 0 keeps all.
        split: in a tar, the file of this name (without suffix).
        classes_file: class map to use, in place of the sorted labels.
        classes_from: packed token split whose class map to use.
        force: replace a packed split at the destination.

    Raises:
        ConfigError: the length is below 0.
    """

    length: int = 0
    split: str | None = None
    classes_file: Path | None = None
    classes_from: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ConfigError(f"--length {self.length} must be at least 0, which keeps all of a text")


def holds_text(source: Path) -> bool:
    """Return whether a source is a file of texts, or a tar of such.

    Raises:
        DataError: it is a damaged tar.
    """
    if source.suffix.lower() in SUFFIXES:
        return source.is_file()
    try:
        if not source.is_file() or not tarfile.is_tarfile(source):
            return False
        with tarfile.open(source) as tar:
            return (first := next((m for m in tar if m.isfile()), None)) is not None and _is_text(first.name)
    except _DAMAGED as error:
        raise DataError(f"source {source} is damaged ({error}): fetch it again") from None


def pack_text(
    source: Path, destination: Path, options: TextOptions, on_progress: Callable[[int], None] = lambda done: None
) -> TokenSplit:
    """Pack a file of labelled texts.

    Args:
        source: TSV file, or a tar (also compressed) of some.
        destination: folder of the token split.
        options: how.
        on_progress: called with the number of texts packed since the last call.

    Raises:
        DataError: no such file, a line without a label, a label without a class, or a destination in use.
    """
    name, lines = _lines(source, options.split)
    longest, labels = 0, set[str]()
    for text, label in _rows(name, lines):
        longest = max(longest, len(text.encode()))
        labels.add(label)
    if not labels:
        raise DataError(f"{name} holds no texts: nothing was packed")
    classes = _classes(labels, options)
    facts = TokenFacts(str(source.name), classes, 257, min(longest, options.length) if options.length else longest)
    numbers = {label: number for number, label in enumerate(classes)}

    def samples() -> Iterator[TokenSample]:
        for text, label in _rows(name, lines):
            on_progress(1)
            yield TokenSample((np.frombuffer(text.encode(), np.uint8)[: facts.length],), numbers[label])

    return write_token_split(destination, facts, samples(), lambda: {"source": name}, options.force)


def _classes(labels: set[str], options: TextOptions) -> tuple[str, ...]:
    if options.classes_from is not None:
        classes = open_token_split(options.classes_from).classes
        check_class_names(labels, classes, options.classes_from)
        return classes
    if options.classes_file is not None:
        classes = read_class_map(options.classes_file)
        check_class_names(labels, classes, options.classes_file)
        return classes
    return tuple(sorted(labels))


def _is_text(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _lines(source: Path, split: str | None) -> tuple[str, list[str]]:
    """Return the name of the chosen file and its lines."""
    try:
        if _is_text(source.name):
            return source.name, source.read_text(encoding="utf-8").split("\n")
        with tarfile.open(source) as tar:
            files = {m.name: m for m in tar if m.isfile() and _is_text(m.name)}
            chosen = [name for name in files if split in (None, PurePosixPath(name).stem)]
            if len(chosen) != 1:
                names = ", ".join(sorted(PurePosixPath(name).stem for name in files))
                raise DataError(f"source {source} holds the texts {names}: choose one with --split")
            file = tar.extractfile(files[chosen[0]])
            assert file is not None
            return chosen[0], file.read().decode("utf-8").split("\n")
    except (*_DAMAGED, UnicodeDecodeError) as error:
        raise DataError(f"source {source} cannot be read as text ({error}): fetch it again") from None


def _rows(name: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of each line that is not empty."""
    for number, line in enumerate(lines, 1):
        text, tab, label = line.rstrip("\r").rpartition("\t")
        if number == 1 and text.strip().lower() in _HEADERS:
            continue
        if not line.strip():
            continue
        if not tab or not text.strip() or not label.strip():
            raise DataError(f"line {number} of {name} is not a text, a tab and a label: {line[:60]!r}")
        yield text, label.strip()
