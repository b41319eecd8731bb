"""Texts become a token split, with the tokenizer beside it, so that a split says by itself what its ids mean."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataloaders.text.corpus import check_running, files_of, suffix_of, windows_of
from dataloaders.text.samples import cut_to, packed
from dataloaders.text.tables import SUFFIXES as TABLES
from dataloaders.text.tables import Columns, Row, rows_of
from dataloaders.text.tokenizer import TextTokenizer, read_tokenizer
from dataloaders.tokens import TokenFacts, TokenSample, TokenSplit, open_token_split, write_token_split
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.text_ids import FIRST
from setformer_dist.core.words import counted

_ROWS = 1_000  # encoded at once
_SHORTEST = 8  # tokens of a window


@dataclass
class Counts:
    """What packing met, for people.

    Attributes:
        tokens: written, without special ones.
        cut: texts that lost tokens, as they were too long.
        unknown: tokens that the tokenizer does not know.
    """

    tokens: int = 0
    cut: int = 0
    unknown: int = 0


@dataclass(frozen=True)
class TextOptions:
    """How to pack texts.

    Attributes:
        tokenizer: makes ids.
        length: most tokens of a sample, special ones included.
        columns: of a table; None for running text.
        classes: names in the order of their numbers; None for those that occur, sorted.
        column: the key of running text in JSON lines.
        force: replace a packed split.
    """

    tokenizer: TextTokenizer
    length: int = 128
    columns: Columns | None = None
    classes: tuple[str, ...] | None = None
    column: str = "text"
    force: bool = False

    def __post_init__(self) -> None:
        if self.length < _SHORTEST:
            raise ConfigError(f"--length {self.length} must be at least {_SHORTEST} tokens")


def pack_texts(
    source: Path, destination: Path, options: TextOptions, on_sample: Callable[[], None] = lambda: None
) -> tuple[TokenSplit, Counts]:
    """Pack a corpus or a table; it appears whole or not at all.

    Args:
        source: a file, or a folder of such.
        destination: folder of the split.
        options: how.
        on_sample: called with each sample.

    Raises:
        DataError: a source cannot be read, or a row of it has something that the options do not allow.
    """
    counts, columns = Counts(), options.columns
    classes: tuple[str, ...] = ()
    if columns is None:
        files = files_of(source)
        check_running(files)
        samples = windows_of(files, options.tokenizer, options.length, options.column)
    else:
        files = files_of(source, TABLES)
        classes = _classes(files, columns, options)
        samples = _rows(files, columns, classes, options, counts)
    facts = TokenFacts(
        task="text", classes=classes, vocabulary=options.tokenizer.vocabulary, length=options.length,
        tokenizer=options.tokenizer.sha256, numbers=columns is not None and bool(columns.number),
        pairs=columns is not None and len(columns.texts) == 2,
    )  # fmt: skip

    def told() -> dict[str, object]:
        said: dict[str, object] = {"files": [path.name for path in files], **vars(counts)}
        return {**said, "column": options.column} if columns is None else {**said, **vars(columns)}

    told_of = _counted(source, samples, options.tokenizer, counts, on_sample)
    split = write_token_split(destination, facts, told_of, told, options.force, tokenizer=options.tokenizer.data)
    return split, counts


def _classes(files: Sequence[Path], columns: Columns, options: TextOptions) -> tuple[str, ...]:
    """Return the class names: given, or those that occur, numbers by their value."""
    if not columns.label:
        return ()
    if options.classes is not None:
        return options.classes
    found = {row.label for path in files for row in rows_of(path, columns)}
    with contextlib.suppress(ValueError):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _rows(
    files: Iterable[Path], columns: Columns, classes: tuple[str, ...], options: TextOptions, counts: Counts
) -> Iterator[TokenSample]:
    held: list[Row] = []
    numbers = {name: i for i, name in enumerate(classes)}

    def encoded() -> Iterator[TokenSample]:
        parts = [options.tokenizer.encode([row.texts[i] for row in held]) for i in range(len(columns.texts))]
        for row, *ids in zip(held, *parts, strict=True):
            yield _sample(row, ids, numbers, options, counts)
        held.clear()

    for path in files:
        for row in rows_of(path, columns):
            if row.label and row.label not in numbers:
                raise DataError(
                    f"{row.place} has class {row.label!r}, which is none of {', '.join(classes)}: repair the line"
                )
            held.append(row)
            if len(held) == _ROWS:
                yield from encoded()
    yield from encoded()


def _sample(
    row: Row, ids: list[npt.NDArray[np.int64]], numbers: dict[str, int], options: TextOptions, counts: Counts
) -> TokenSample:
    """Return a row's tokens, at most as many as a sample has room for."""
    fitting = cut_to(ids, options.length)
    counts.cut += sum(map(len, fitting)) < sum(map(len, ids))
    number = None if np.isnan(row.number) else row.number
    return dataclasses.replace(packed(*fitting), label=numbers.get(row.label, 0), number=number)


def _counted(
    source: Path,
    samples: Iterable[TokenSample],
    tokenizer: TextTokenizer,
    counts: Counts,
    on_sample: Callable[[], None],
) -> Iterator[TokenSample]:
    any_of_it = False
    for sample in samples:
        ids = sample.sequences[0].astype(np.int64) + 1
        counts.tokens += int((ids >= FIRST).sum())
        counts.unknown += tokenizer.unknown(ids)
        on_sample()
        any_of_it = True
        yield sample
    if not any_of_it:
        raise DataError(f"{source} has no text: name a file with some")


@dataclass(frozen=True)
class Asked:
    """What a person asks of packing; what is not said is taken from a split that exists, or from defaults.

    Attributes:
        tokenizer: file or folder of the tokenizer.
        like: split whose tokenizer, length, columns and classes are taken.
        length: most tokens of a sample.
        texts: columns of the texts.
        label: column of the class.
        number: column of the number.
        header: whether the first line of a table names its columns.
        force: replace a packed split.
    """

    tokenizer: Path | None = None
    like: Path | None = None
    length: int | None = None
    texts: tuple[str, ...] = ()
    label: str = ""
    number: str = ""
    header: bool = True
    force: bool = False


def options_of(asked: Asked, source: Path) -> TextOptions:
    """Return how to pack.

    Raises:
        ConfigError: there is no tokenizer, or what is asked does not go together.
        DataError: the tokenizer or the split cannot be read.
    """
    if asked.like is None:
        if asked.tokenizer is None:
            raise ConfigError(
                "no tokenizer: give --tokenizer tokenizer.json (`setformer text tokenizer` makes one), or --like SPLIT"
            )
        if (asked.label or asked.number) and not asked.texts:
            raise ConfigError("--label and --number are of tables: name the column of the texts with --text")
        columns = Columns(asked.texts, asked.label, asked.number, asked.header) if _is_table(asked, source) else None
        column = asked.texts[0] if asked.texts else "text"
        length = 128 if asked.length is None else asked.length
        return TextOptions(read_tokenizer(asked.tokenizer), length, columns, None, column, asked.force)
    if asked.tokenizer or asked.length is not None or asked.texts or asked.label or asked.number or not asked.header:
        raise ConfigError("--like takes tokenizer, length and columns from a packed split: leave the other options out")
    split = _open_texts(asked.like)
    facts, said = split.facts, split.options
    columns = Columns(*_columns(said)) if "texts" in said else None
    column = str(said.get("column", "text"))
    classes = facts.classes or None
    return TextOptions(read_tokenizer(asked.like), facts.length, columns, classes, column, asked.force)


def _is_table(asked: Asked, source: Path) -> bool:
    """Return whether rows are wanted: not of running text in JSON lines, of which --text names the key."""
    if asked.label or asked.number or len(asked.texts) > 1:
        return True
    if not asked.texts:
        return False
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    if source.is_file() and suffix_of(source) not in TABLES:
        raise ConfigError(
            f"--text {asked.texts[0]}: {source} is none of {', '.join(TABLES)}, which have columns or keys"
        )
    return any(suffix_of(path) in (".tsv", ".csv") for path in files)


def _columns(said: dict[str, object]) -> tuple[tuple[str, ...], str, str, bool]:
    texts = said.get("texts")
    names = tuple(map(str, texts)) if isinstance(texts, list) else ()
    return names, str(said.get("label", "")), str(said.get("number", "")), bool(said.get("header", True))


def _open_texts(folder: Path) -> TokenSplit:
    split = open_token_split(folder)
    if not split.facts.tokenizer:
        raise DataError(
            f"{folder} holds no texts, but {split.facts.task}: name a split that `setformer text pack` wrote"
        )
    return split


def shown(folder: Path, samples: int) -> Iterator[str]:
    """Yield a line about a split, and one for each of its first samples: its class or number, and its text.

    Raises:
        DataError: it is no split of texts.
    """
    split = _open_texts(folder)
    tokenizer = read_tokenizer(folder)
    lengths = np.quantile(split.lengths, (0.5, 0.9, 1.0)).astype(int).tolist()
    yield (
        f"{counted(split.num_samples, 'sample')} of {', '.join(map(str, lengths))} tokens (median, 90 %, longest), "
        f"vocabulary {split.facts.vocabulary:,}"
    )
    for number in range(min(samples, split.num_samples)):
        which = np.array([number])
        text = tokenizer.decode(split.raw(number)[0].astype(np.int64) + 1)
        numbers = split.numbers(which)
        if numbers is not None:
            yield f"{float(numbers[0]):g}  {text}"
        elif split.classes:
            yield f"{split.classes[int(split.labels(which)[0])]}  {text}"
        else:
            yield text
