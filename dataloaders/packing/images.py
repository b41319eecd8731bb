"""The files of a source: a directory, a tar, or a compressed tar; and which of them are images of which class.

An ImageFolder is `<class>/…/image.jpg`; a label is the place of the class folder's name in the class map. A file is
found as a stretch of bytes in a file (a file of its own, or the tar), so whoever packs reads both alike, from
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
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from dataloaders.sources.index import IMAGE_SUFFIXES
from setformer_dist.core.errors import DataError

# Folder names that are splits by custom: several of them side by side are no classes.
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})

# Folder names that hold masks by custom; beside `images` they are no classes.
MASK_FOLDERS = frozenset({"annotations", "masks", "labels"})

# Names kept of each level of folders: enough to see whether they are splits, and for a message.
_KEPT_NAMES = 11


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes [offset, offset + size) of `file`, which are the file `name` (path within the source).

    Attributes:
        file: path.
        offset: in bytes.
        size: in bytes.
        name: with / between folders.
        stamp: when the file was last changed, in ns; 0 where it is not known.
    """

    file: str
    offset: int
    size: int
    name: str
    stamp: int = 0


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


def find_images(source: Path, split: str | None, scratch: Path, on_file: Callable[[], None] = lambda: None) -> Found:
    """Find the images of an ImageFolder that is small enough to be listed in memory.

    Args:
        source: directory, tar, or tar compressed by gzip, bzip2 or xz.
        split: take the sub-folder of this name; None takes all, descending into lone enclosing folders.
        scratch: existing folder for an unpacked tar.
        on_file: called for each file that is found, and each image that is sorted.

    Raises:
        DataError: there is no such source, split or image, or the source holds several splits and none is named.
    """
    tree, images = Tree(source), []
    for stretch in list_files(source, plain_source(source, scratch)):
        on_file()
        if tree.add(stretch.name):
            images.append(stretch)
    depth = tree.class_depth(split)
    labelled = []
    for image in sorted(images, key=lambda stretch: stretch.name):
        on_file()
        if (class_name := tree.class_of(image.name, depth, split)) is not None:
            labelled.append(LabelledImage(image, class_name))
    return Found(labelled, tree.closing_notes(len(labelled)))


@dataclass
class Tree:
    """The shape of a source's folders, told one file after the other: enough to find the class folders.

    Attributes:
        source: for messages.
        notes: what was chosen or passed over.
    """

    source: Path
    notes: list[str] = field(default_factory=list)
    _levels: list[dict[str, bool]] = field(default_factory=list)  # names of folders, and whether class folders follow
    _example: tuple[str, ...] = ()
    _files: int = 0
    _images: int = 0
    _loose: int = 0
    _shortest: int = 1 << 30

    def add(self, name: str) -> bool:
        """Take note of a file; return whether its name is an image's."""
        self._files += 1
        path = PurePosixPath(name)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            return False
        self._images += 1
        parts = path.parts
        self._example = self._example or parts
        self._shortest = min(self._shortest, len(parts))
        for depth, folder in enumerate(parts[:-1]):
            if depth == len(self._levels):
                self._levels.append({})
            level = self._levels[depth]
            if folder in level or len(level) < _KEPT_NAMES or folder in SPLIT_NAMES:
                level[folder] = level.get(folder, False) or len(parts) > depth + 2
        return True

    def class_depth(self, split: str | None) -> int:
        """Return how many folders lie above the class folders.

        Raises:
            DataError: there are no images, or no such split, or several splits and none is named.
        """
        self.check_images()
        if self._images < self._files:
            self.notes.append(f"{self._files - self._images} files that are no images were passed over")
        if split is not None:
            return self._below_split(split)
        depth = 0
        while self._shortest >= depth + 3 and len(self._levels[depth]) == 1:
            depth += 1
        tops = self._levels[depth].keys() if depth < len(self._levels) else set()
        if depth < self._shortest and len(tops) > 1 and tops <= SPLIT_NAMES:
            raise DataError(
                f"source {self.source} holds several splits ({self._names(depth)}): choose one with --split"
            )
        if len(tops) > 1 and "images" in tops and (masks := sorted(tops & MASK_FOLDERS)):
            raise DataError(
                f"source {self.source} holds images and masks side by side, not class folders: name the folder of "
                f"the masks with --masks {masks[0]}"
            )
        if depth:
            self.notes.append(f"class folders were found in {'/'.join(self._example[:depth])}")
        return depth

    def check_images(self) -> None:
        """Refuse a source without images."""
        if not self._images:
            raise DataError(
                f"source {self.source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) among {self._files} files"
            )

    def _below_split(self, split: str) -> int:
        for depth, level in enumerate(self._levels):
            if level.get(split):
                return depth + 1
            if len(level) > 1:
                break  # only lone enclosing folders may lie above the splits
        raise DataError(
            f"source {self.source} has no folder {split!r} with class folders in it: it has {self._names(0)}"
        )

    def class_of(self, name: str, depth: int, split: str | None) -> str | None:
        """Return the name of an image's class; None if it is of no class or of another split."""
        parts = PurePosixPath(name).parts
        if split is not None and (len(parts) <= depth or parts[depth - 1] != split):
            return None
        if len(parts) < depth + 2:
            self._loose += 1
            return None
        return parts[depth]

    def closing_notes(self, labelled: int) -> list[str]:
        """Return all notes, once every image has been given its class.

        Raises:
            DataError: no image has one.
        """
        if not labelled:
            raise DataError(
                f"source {self.source} holds {self._loose} images but none in a class folder: make it "
                "<class>/image.jpg, or name its boxes with --coco or its masks with --masks"
            )
        if self._loose:
            self.notes.append(f"{self._loose} images outside class folders were passed over")
        return self.notes

    def _names(self, depth: int) -> str:
        names = sorted(self._levels[depth]) if self._levels else ["no folders"]
        return ", ".join(names[:10]) + (" …" if len(names) > 10 else "")


def plain_source(source: Path, scratch: Path) -> Path:
    """Return what can be read at any offset: the source's folder, its tar, or the tar unpacked into `scratch`.

    Raises:
        DataError: there is no such source, or it cannot be read whole.
    """
    if source.is_dir():
        return source
    try:
        return _plain_tar(source, scratch)
    except FileNotFoundError:
        raise DataError(f"source {source} does not exist: name an image folder or a tar of one") from None
    except PermissionError as error:
        raise DataError(f"source {source} cannot be read ({error.strerror}): repair its permissions") from None
    except (EOFError, lzma.LZMAError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; those of gzip and bz2 have no number
            raise
        raise DataError(f"source {source} is not a whole tar of images ({error}): fetch it again") from None


def list_files(source: Path, plain: Path) -> Iterator[Stretch]:
    """Yield every visible file of a source, in no particular order.

    Args:
        source: as the user named it.
        plain: what `plain_source` made of it.

    Raises:
        DataError: it cannot be read whole.
    """
    if plain.is_dir():
        yield from _in_directory(plain)
        return
    try:
        yield from _in_tar(plain, source.stat().st_mtime_ns)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"source {source} is not a whole tar of images ({error}): fetch it again") from None


def _in_tar(path: Path, stamp: int) -> Iterator[Stretch]:
    links: dict[str, list[str]] = {}  # a hard link is a file that the tar holds once, under the first of its names
    for member in _members(path):
        if member.isfile():
            yield from _visible(path, member, member.name, stamp)
        elif member.islnk():
            links.setdefault(member.linkname, []).append(member.name)
    if links:
        for member in _members(path):
            for name in links.get(member.name, ()) if member.isfile() else ():
                yield from _visible(path, member, name, stamp)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise: half a GB for a million images
            yield member


def _visible(path: Path, member: tarfile.TarInfo, name: str, stamp: int) -> Iterator[Stretch]:
    if _is_visible(name):
        plain = PurePosixPath(name.removeprefix("./")).as_posix()
        yield Stretch(str(path), member.offset_data, member.size, plain, stamp)


def _in_directory(source: Path) -> Iterator[Stretch]:
    top = str(source)
    for folder, folders, names in os.walk(top, followlinks=True, onerror=_refuse):
        folders[:] = sorted(name for name in folders if _is_visible(name))
        inside = "" if folder == top else PurePosixPath(os.path.relpath(folder, top)).as_posix() + "/"
        for name in names:
            if not _is_visible(name):
                continue
            path = os.path.join(folder, name)  # noqa: PTH118  (a million times)
            try:
                facts = os.stat(path)  # noqa: PTH116
            except OSError as error:
                _refuse(error)
            if stat.S_ISREG(facts.st_mode):
                yield Stretch(path, 0, facts.st_size, inside + name, facts.st_mtime_ns)


def _refuse(error: OSError) -> NoReturn:
    """Stop at what cannot be read: os.walk would pass over it in silence, and images would be missing."""
    raise DataError(f"{error.filename} in the source cannot be read ({error.strerror}): repair or remove it")


def _is_visible(name: str) -> bool:
    """Return whether no part of a path is hidden; macOS puts `._image.jpg` beside each image in its archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part != ".")


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


def read_stretch(stretch: Stretch) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it cannot be read, or is shorter than when it was found.
    """
    try:
        with open(stretch.file, "rb") as file:  # noqa: PTH123  (a million times)
            file.seek(stretch.offset)
            data = file.read(stretch.size)
    except OSError as error:
        raise DataError(f"{stretch.name} in the source cannot be read: {error}") from None
    if len(data) != stretch.size:
        raise DataError(
            f"{stretch.name} in the source has {len(data)} bytes, {stretch.size} when it was found: pack again"
        )
    return data


def check_class_names(names: Iterable[str], classes: tuple[str, ...], origin: object) -> None:
    """Refuse class names that are not in a class map.

    Raises:
        DataError: naming the first.
    """
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise DataError(
            f"class folder {unknown[0]!r} is not in the class map of {origin}"
            + (f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else "")
        )


def read_class_map(path: Path) -> tuple[str, ...]:
    """Read class names in label order: a JSON list, or one name per line.

    Raises:
        DataError: no such file, no names, or a name twice.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"class map {path} cannot be read: {error}") from None
    return parse_class_map(data, str(path))


def parse_class_map(data: bytes, shown: str) -> tuple[str, ...]:
    """Return the class names that a file's bytes hold; `shown` names it in messages. Raises as `read_class_map`."""
    try:
        text = data.decode()
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"class map {shown} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"class map {shown} is not a JSON list: {error}") from None
    if not text.lstrip().startswith("["):
        names = [line.strip() for line in names if line.strip()]
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"class map {shown} must hold class names, one per line or as a JSON list of strings")
    double = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if double:
        raise DataError(f"class map {shown} names {double[0]!r} twice: each line is one label")
    return tuple(names)
