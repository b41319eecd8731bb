"""From external shards to the columns of an index: each shard is scanned by itself, in any process.

A label is a number (`.cls`, or "label" in a `.json`), or a class name; numbers are named by `classes.txt` or
`classes.json` next to the shards, "0" to the largest without. All samples have labels of one kind, or none of them
any, which makes sense with masks or boxes alone, whose classes the class file must then name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dataloaders.sources.classes import LARGEST_CLASS_FILE, UNLABELLED, parse_class_map
from dataloaders.sources.files import open_regular
from dataloaders.sources.index import PARTS, Index, ShardFacts, key_matrix_of
from dataloaders.sources.passed import Passed
from dataloaders.sources.tar_headers import FileReader, StreamReader
from dataloaders.sources.tars import MASK_PART, Row, scan
from dataloaders.storage.base import (
    DeniedError,
    FileFacts,
    LocalFolder,
    MissingError,
    Storage,
    UnreadableError,
    read_small,
)
from setformer_dist.core.errors import DataError

log = logging.getLogger(__name__)

CLASS_FILES = ("classes.txt", "classes.json")

# Labels have names made for them up to here; a larger number is no class.
_MOST_CLASSES = 10_000_000

# Without class names no label may exceed this, or the number of samples: names are made for all numbers up to it.
_MOST_NAMELESS = 1 << 17

_NO_LABEL = "it has no label"

_Kind = Literal["no label", "a number for a label", "a name for a label"]


@dataclass(frozen=True)
class Scanned:
    """One shard's part of an index.

    Attributes:
        facts: of the shard.
        kind: of its labels.
        labels: the numbers, or the names, or zeros.
        columns: the other columns; those of all parts.
        keys: (n, L) uint8.
        headers: sha256 of its headers.
        unreadable: keys of images without a readable header.
        left_out: what is no whole sample, and why.
        passed: what is not read.
    """

    facts: ShardFacts
    kind: _Kind
    labels: npt.NDArray[np.int64] | list[str]
    columns: dict[str, npt.NDArray[Any]]
    keys: npt.NDArray[np.uint8]
    headers: str
    unreadable: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    passed: Passed = field(default_factory=Passed)

    def key(self, sample: int) -> str:
        """Return a key."""
        padded: bytes = self.keys[sample].tobytes()
        return padded.rstrip(b"\0").decode(errors="replace")


def scan_shard(
    storage: Storage,
    name: str,
    facts: FileFacts,
    whole: bool,
    on_progress: Callable[[int], None] = lambda members: None,
    skip_bad: bool = False,
) -> Scanned:
    """Scan one shard.

    Args:
        storage: where it is.
        name: of the shard.
        facts: its size.
        whole: read every byte, for crc32 and sha256.
        on_progress: called with the members found since the last call, now and then.
        skip_bad: as there; of samples with labels of several kinds those without any are left out.

    Raises:
        DataError: as `dataloaders.sources.tars.scan`, or its labels are of several kinds.
    """
    shown = storage.shown(name)
    if whole or not isinstance(storage, LocalFolder):
        stream = StreamReader(storage.blocks(name))
        found = scan(stream, shown, True, on_progress, skip_bad)
        digest, size = stream.digest(), stream.size
    else:
        try:
            with os.fdopen(open_regular(shown), "rb", buffering=0) as file:
                found = scan(FileReader(file.fileno()), shown, False, on_progress, skip_bad)
        except OSError as error:
            raise UnreadableError(shown, f"cannot be read ({error.strerror}): check the storage") from None
        digest, size = "", facts.size
    rows, left_out = found.rows, found.left_out
    if skip_bad and any(row.label is None for row in rows) and any(row.label is not None for row in rows):
        left_out = [*left_out, *((row.key, _NO_LABEL) for row in rows if row.label is None)]
        rows = [row for row in rows if row.label is not None]
    kind, labels = _labels(rows, shown)
    return Scanned(
        facts=ShardFacts(name, size, digest, len(rows)),
        kind=kind,
        labels=labels,
        columns=_columns(rows),
        keys=key_matrix_of([row.key for row in rows]),
        headers=found.headers,
        unreadable=found.unreadable,
        left_out=[(f"{name}: {key}", why) for key, why in left_out],
        passed=found.passed,
    )


def without_odd(shards: list[Scanned]) -> list[Scanned]:
    """Return the shards that have samples, and labels where others have some: what `skip_bad` leaves of them.

    Those that go are listed as left out by the first that stays.

    Raises:
        DataError: none stays.
    """
    labelled_kinds = {one.kind for one in shards if one.facts.samples} - {"no label"}
    kept, gone = [], []
    for one in shards:
        if not one.facts.samples:
            gone += [*one.left_out, (one.facts.name, "it holds no sample")]
        elif one.kind == "no label" and labelled_kinds:
            gone += [*one.left_out, *((f"{one.facts.name}: {one.key(i)}", _NO_LABEL) for i in range(len(one.keys)))]
        else:
            kept.append(one)
    if not kept:
        raise DataError(f"none of {len(shards)} shards holds a whole sample, the first being {shards[0].facts.name}")
    kept[0] = replace(kept[0], left_out=[*gone, *kept[0].left_out])
    return kept


def left_out_of(index: Index) -> list[tuple[str, str]]:
    """Return what an index says was left out, and why."""
    said = index.options.get("left_out", [])
    rows = said if isinstance(said, list) else []
    return [(str(row[0]), str(row[1])) for row in rows if isinstance(row, list) and len(row) == 2]


def _columns(rows: list[Row]) -> dict[str, npt.NDArray[np.generic]]:
    """Return the columns of rows, of which there may be none."""
    columns: dict[str, npt.NDArray[Any]] = {
        "height": np.array([row.height for row in rows], np.int32),
        "width": np.array([row.width for row in rows], np.int32),
    }
    for part, prefix in (("image", ""), ("mask", "mask_"), ("boxes", "boxes_"), ("soft", "soft_")):
        places = np.array([getattr(row, part) for row in rows], np.int64).reshape(-1, 3)
        columns[f"{prefix}offset"], columns[f"{prefix}size"] = places[:, 0], places[:, 1]
        columns[f"{prefix}crc32"] = places[:, 2].clip(0).astype(np.uint32)
    return columns


def _kind_of(row: Row) -> _Kind:
    if row.label is None:
        return "no label"
    return "a name for a label" if isinstance(row.label, str) else "a number for a label"


def _labels(rows: list[Row], shown: str) -> tuple[_Kind, npt.NDArray[np.int64] | list[str]]:
    if not rows:
        return "no label", np.empty(0, np.int64)
    kind = _kind_of(rows[0])
    other = next((row for row in rows if _kind_of(row) != kind), None)
    if other is not None:
        raise DataError(
            f"shard {shown} is mixed: its sample {rows[0].key!r} has {kind}, sample {other.key!r} {_kind_of(other)}; "
            "pack it again with labels of one kind; samples without any are left out by data.skip_bad = true, or "
            "--skip-bad"
        )
    if kind == "a name for a label":
        return kind, [str(row.label) for row in rows]
    numbers = [int(row.label or 0) for row in rows]
    worst = next((at for at, number in enumerate(numbers) if not 0 <= number < _MOST_CLASSES), None)
    if worst is not None:
        raise DataError(
            f"shard {shown}: sample {rows[worst].key!r} has label {numbers[worst]}, which is no class: repair it"
        )
    return kind, np.array(numbers, np.int64)


def joined(shards: list[Scanned], whole: bool) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.uint8]]:
    """Return the columns of all shards without labels, and their keys.

    Args:
        shards: in order.
        whole: whether checksums were computed.
    """
    columns = {name: np.concatenate([one.columns[name] for one in shards]) for name in shards[0].columns}
    columns["shard"] = np.repeat(np.arange(len(shards), dtype=np.int32), [one.facts.samples for one in shards])
    for part in PARTS:
        if not columns[f"{part}_size"].any():
            columns = {name: column for name, column in columns.items() if not name.startswith(f"{part}_")}
    if not whole:
        columns = {name: column for name, column in columns.items() if not name.endswith("crc32")}
    keys = np.zeros((len(columns["shard"]), max(one.keys.shape[1] for one in shards)), np.uint8)
    start = 0
    for one in shards:
        keys[start : start + len(one.keys), : one.keys.shape[1]] = one.keys
        start += len(one.keys)
    return columns, keys


def labelled(
    shards: list[Scanned], named: tuple[str, ...] | None, annotated: bool, root: str, needed: bool = True
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return every sample's label, and the class names.

    Args:
        shards: in order.
        named: the class names that are next to them.
        annotated: whether there are masks or boxes.
        root: of the shards, for messages.
        needed: false takes samples without labels as one class.

    Raises:
        DataError: labels of several kinds, none at all, or such as no class has.
    """
    first = shards[0]
    other = next((one for one in shards if one.kind != first.kind), None)
    if other is not None:
        raise DataError(
            f"the shards in {root} are mixed: {first.facts.name} has {first.kind} (sample {first.key(0)!r}), "
            f"{other.facts.name} {other.kind} (sample {other.key(0)!r}); name those of one kind alone"
        )
    if first.kind == "no label":
        if not annotated:
            if not needed:
                return np.zeros(sum(one.facts.samples for one in shards), np.int64), (UNLABELLED,)
            raise DataError(
                f"the shards in {root} have no labels (<key>.cls, or 'label' in <key>.json), the first being sample "
                f"{first.key(0)!r} of {first.facts.name}: pack them with "
                f"labels, or masks (<key>.{MASK_PART}), or set data.labels = false for a task without"
            )
        if named is None:
            raise DataError(
                f"the shards in {root} have masks or boxes, but their classes are unknown: put a {CLASS_FILES[0]} "
                "with one name per line next to them"
            )
        return np.zeros(sum(one.facts.samples for one in shards), np.int64), named
    if first.kind == "a name for a label":
        return _from_names(shards, named, root)
    most = max(int(np.max(one.labels)) for one in shards)
    total = sum(one.facts.samples for one in shards)
    if named is None and most >= max(_MOST_NAMELESS, total):
        raise DataError(
            f"a label in {root} is {most}, but there are {total} samples: put a {CLASS_FILES[0]} with the names of all "
            "classes next to the shards, or repair it"
        )
    least = min(int(np.min(one.labels)) for one in shards)
    if named is None and least > 0:
        log.warning(
            "labels in %s count from %d, so that there are classes 0 to %d without a sample: a %s with their names "
            "next to the shards says how many there are",
            root, least, least - 1, CLASS_FILES[0],
        )  # fmt: skip
    classes = named or tuple(map(str, range(most + 1)))
    for one in shards:
        numbers = np.asarray(one.labels)
        if numbers.max() >= len(classes):
            at = int(numbers.argmax())
            raise DataError(
                f"sample {one.key(at)!r} of {one.facts.name} in {root} has label {numbers[at]}, but the class file "
                f"names {len(classes)} classes: repair either"
                + (" (the labels count from 1, and must count from 0)" if least == 1 and most == len(classes) else "")
            )
    return np.concatenate([np.asarray(one.labels) for one in shards]), classes


def _from_names(
    shards: list[Scanned], named: tuple[str, ...] | None, root: str
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    classes = named or tuple(sorted({str(name) for one in shards for name in one.labels}))
    numbers = {name: number for number, name in enumerate(classes)}
    for one in shards:
        at = next((at for at, name in enumerate(one.labels) if name not in numbers), None)
        if at is not None:
            raise DataError(
                f"sample {one.key(at)!r} of {one.facts.name} in {root} is of class {one.labels[at]!r}, which the class "
                "file does not name: add it there"
            )
    return np.array([numbers[str(name)] for one in shards for name in one.labels], np.int64), classes


def class_names(storage: Storage, shard: str, timeout: float) -> tuple[str, ...] | None:
    """Return the class names in a file next to a shard, if there is one; `timeout` as of `read_small`.

    Raises:
        DataError: it cannot be read, or holds no class names.
    """
    for name in CLASS_FILES:
        place = (PurePosixPath(shard).parent / name).as_posix()
        try:
            data = read_small(storage, place, LARGEST_CLASS_FILE, timeout)
        except (MissingError, DeniedError):
            continue
        return parse_class_map(data, storage.shown(place))
    return None


def shared_keys(
    shards: Sequence[str], number: npt.NDArray[np.int32], keys: npt.NDArray[np.uint8]
) -> tuple[int, str] | None:
    """Return how many samples have a key that one of another shard has too, and the first of them in words.

    Args:
        shards: their names, in order.
        number: (N,) of the shard that holds each sample.
        keys: (N, L) of all samples.
    """
    digest = np.zeros(len(keys), np.uint64)
    for column in keys.T:  # wraps; what agrees is compared byte by byte
        digest = (digest ^ column) * np.uint64(0x100000001B3)
    order = np.argsort(digest, kind="stable")
    near = np.flatnonzero(digest[order[1:]] == digest[order[:-1]])
    first, second = order[near], order[near + 1]
    same = (keys[first] == keys[second]).all(axis=1)
    if not same.any():
        return None
    at = int(np.argmin(np.where(same, second, len(keys))))
    one, other = shards[number[first[at]]], shards[number[second[at]]]
    key = keys[second[at]].tobytes().rstrip(b"\0").decode(errors="replace")
    return int(same.sum()), f"{key!r} in {one} and {other}"


def identity_of(shards: list[Scanned], columns: dict[str, npt.NDArray[np.generic]], classes: tuple[str, ...]) -> str:
    """Return the fingerprint: of all but checksums, which may come later, and times, which a copy changes.

    Headers hold the times at which members were written; they are part of it.
    """
    said = [[one.facts.name, one.facts.size, one.headers] for one in shards]
    return identity_by(said, columns, classes)


def identity_by(said: list[list[object]], columns: dict[str, npt.NDArray[np.generic]], classes: tuple[str, ...]) -> str:
    """Return the fingerprint by [name, size, digest of the headers] of each shard, columns and classes."""
    digest = hashlib.sha256(json.dumps([said, list(classes)]).encode())
    for name in sorted(columns):
        if not name.endswith("crc32"):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(columns[name], np.int64).data)
    return digest.hexdigest()
