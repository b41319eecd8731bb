"""Finding labelled images: an ImageFolder as a directory, a tar, or a compressed tar of one.

An ImageFolder is `<class>/…/image.jpg`; a label is the place of the class folder's name in the class map. An image
is found as a stretch of bytes in a file (a file of its own, or the tar), so whoever packs reads both alike, from
any process. A compressed tar has no stretches: it is unpacked to a plain tar aside first.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from dataloaders.index import IMAGE_SUFFIXES
from setformer_dist.core.errors import DataError

# Folder names that are splits by custom: several of them side by side are no classes.
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True)
class Stretch:
    """Bytes [offset, offset + size) of `file`, which are the image `name` (path within the source)."""

    file: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class's name."""

    stretch: Stretch
    class_name: str


@dataclass(frozen=True)
class Found:
    """What a source holds.

    Attributes:
        images: sorted by path.
        notes: what was chosen or passed over, one sentence each.
    """

    images: list[LabelledImage]
    notes: list[str]


def find_images(source: Path, split: str | None, scratch: Path) -> Found:
    """Find the images of an ImageFolder.

    Args:
        source: directory, tar, or tar compressed by gzip, bzip2 or xz.
        split: take the sub-folder of this name; None takes all, descending into lone enclosing folders.
        scratch: existing folder for an unpacked tar.

    Raises:
        DataError: there is no such source, split or image, or the source holds several splits and none is named.
    """
    if not source.exists():
        raise DataError(f"source {source} does not exist: name an image folder or a tar of one")
    stretches = sorted(_stretches(source, scratch), key=lambda stretch: stretch.name)
    images = [s for s in stretches if PurePosixPath(s.name).suffix.lower() in IMAGE_SUFFIXES]
    notes = []
    if len(images) < len(stretches):
        notes.append(f"{len(stretches) - len(images)} files that are no images were passed over")
    if not images:
        raise DataError(
            f"source {source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) among {len(stretches)} files"
        )
    depth, note = _class_depth(source, [PurePosixPath(s.name).parts for s in images], split)
    if note:
        notes.append(note)
    labelled, loose = [], 0
    for stretch in images:
        parts = PurePosixPath(stretch.name).parts
        if split is not None and (len(parts) <= depth or parts[depth - 1] != split):
            continue
        if len(parts) < depth + 2:
            loose += 1
            continue
        labelled.append(LabelledImage(stretch, parts[depth]))
    if not labelled:
        raise DataError(f"source {source} holds {loose} images but none in a class folder: make it <class>/image.jpg")
    if loose:
        notes.append(f"{loose} images outside class folders were passed over")
    return Found(labelled, notes)


def _class_depth(source: Path, paths: list[tuple[str, ...]], split: str | None) -> tuple[int, str]:
    """Return how many folders lie above the class folders, and what to say about it."""
    if split is not None:
        for depth in range(max(map(len, paths)) - 1):
            if any(parts[depth] == split and len(parts) > depth + 2 for parts in paths):
                return depth + 1, ""
            if len({parts[0] for parts in paths}) > 1:
                break  # only lone enclosing folders may lie above the splits
        raise DataError(f"source {source} has no folder {split!r} with class folders in it: it has {_names(paths, 0)}")
    depth = 0
    while all(len(parts) >= depth + 3 for parts in paths) and len({parts[depth] for parts in paths}) == 1:
        depth += 1
    if depth < min(map(len, paths)) and len(tops := {parts[depth] for parts in paths}) > 1 and tops <= _SPLIT_NAMES:
        raise DataError(f"source {source} holds several splits ({_names(paths, depth)}): choose one with --split")
    return depth, f"class folders were found in {'/'.join(paths[0][:depth])}" if depth else ""


def _names(paths: list[tuple[str, ...]], depth: int) -> str:
    names = sorted({parts[depth] for parts in paths if len(parts) > depth + 1})
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "")


def _stretches(source: Path, scratch: Path) -> Iterator[Stretch]:
    if source.is_dir():
        yield from _in_directory(source)
        return
    try:
        yield from _in_tar(_plain_tar(source, scratch))
    except (tarfile.TarError, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"source {source} is not a whole tar of images ({error}): fetch it again") from None


def _in_tar(path: Path) -> Iterator[Stretch]:
    seen: dict[str, tuple[int, int]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                seen[member.name] = member.offset_data, member.size
            elif not member.islnk() or member.linkname not in seen:
                continue
            # A hard link is an image that the tar holds once, under the first of its names.
            offset, size = seen[member.linkname if member.islnk() else member.name]
            if _is_visible(member.name):
                yield Stretch(str(path), offset, size, PurePosixPath(member.name.removeprefix("./")).as_posix())


def _in_directory(source: Path) -> Iterator[Stretch]:
    for folder, folders, names in os.walk(source, followlinks=True, onerror=_refuse):
        folders[:] = sorted(name for name in folders if _is_visible(name))
        for name in filter(_is_visible, names):
            path = Path(folder) / name
            try:
                facts = path.stat()
            except OSError as error:
                _refuse(error)
            if stat.S_ISREG(facts.st_mode):
                yield Stretch(str(path), 0, facts.st_size, path.relative_to(source).as_posix())


def _refuse(error: OSError) -> NoReturn:
    """Stop at what cannot be read: os.walk would pass over it in silence, and images would be missing."""
    raise DataError(f"{error.filename} in the source cannot be read ({error.strerror}): repair or remove it")


def _is_visible(name: str) -> bool:
    """Return whether no part of a path is hidden; macOS puts `._image.jpg` beside each image in its archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts if part != ".")


def _plain_tar(source: Path, scratch: Path) -> Path:
    """Return a tar that can be read at any offset: the source itself, or its contents unpacked."""
    with source.open("rb") as file:
        start = file.read(6)
    if start[:2] == b"\x1f\x8b":
        return _unpacked(gzip.open(source, "rb"), scratch)
    if start[:3] == b"BZh":
        return _unpacked(bz2.open(source, "rb"), scratch)
    if start == b"\xfd7zXZ\x00":
        return _unpacked(lzma.open(source, "rb"), scratch)
    return source


def _unpacked(packed: IO[bytes] | gzip.GzipFile, scratch: Path) -> Path:
    plain = scratch / "source.tar"
    with packed, plain.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return plain


def read_class_map(path: Path) -> tuple[str, ...]:
    """Read class names in label order: a JSON list, or one name per line.

    Raises:
        DataError: no such file, no names, or a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class map {path} cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise DataError(f"class map {path} is not a JSON list: {error}") from None
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"class map {path} must hold class names, one per line or as a JSON list of strings")
    double = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if double:
        raise DataError(f"class map {path} names {double[0]!r} twice: each line is one label")
    return tuple(names)
