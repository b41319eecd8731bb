"""The files of a source: a directory, a tar, or a compressed tar; and which of them are images of which class.

An ImageFolder is `<class>/…/image.jpg`; a label is the place of the class folder's name in the class map. A file is
found as a stretch of bytes in a file (a file of its own, or the tar), so the packer reads both alike, from
any process. A compressed tar has no stretches: it is unpacked to a plain tar aside first.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from dataloaders.pixels.formats import suffixes_read
from dataloaders.sources.classes import LARGEST_CLASS_FILE, parse_class_map
from dataloaders.sources.files import LARGEST_SAMPLE, check_size, open_regular, read_whole, walk
from dataloaders.sources.passed import Passed, is_ignored, is_image, is_visible
from setformer_dist.core.errors import DataError

# Folder names that are splits by custom: several of them side by side are no classes.
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})

# Folder names that hold masks by custom; next to `images` they are no classes.
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
        notes: what was chosen or skipped, one sentence each.
    """

    images: list[LabelledImage]
    notes: list[str]
    passed: Passed = field(default_factory=Passed)


def find_images(
    source: Path,
    split: str | None,
    scratch: Path,
    on_file: Callable[[], None] = lambda: None,
    allow_empty: bool = False,
) -> Found:
    """Find the images of an ImageFolder that is small enough to be listed in memory.

    Args:
        source: directory, tar, or tar compressed by gzip, bzip2 or xz.
        split: take the sub-folder of this name; None takes all, descending into lone enclosing folders.
        scratch: existing folder for an unpacked tar.
        on_file: called for each file that is found, and each image that is sorted.
        allow_empty: class folders may hold no image that is read; they are left out of the classes.

    Raises:
        DataError: there is no such source, split or image, the source holds several splits and none is named, or a
            class folder holds no image that is read.
    """
    tree, images = Tree(source), []
    for stretch in list_files(source, plain_source(source, scratch), tree.passed):
        on_file()
        if tree.add(stretch.name):
            images.append(stretch)
    depth = tree.class_depth(split)
    labelled = []
    for image in sorted(images, key=lambda stretch: stretch.name):
        on_file()
        if (class_name := tree.class_of(image.name, depth, split)) is not None:
            labelled.append(LabelledImage(image, class_name))
    notes = tree.closing_notes(len(labelled))
    tree.check_classes({image.class_name for image in labelled}, depth, split, allow_empty)
    return Found(labelled, notes, tree.passed)


@dataclass
class Tree:
    """The shape of a source's folders, fed one file after the other: enough to find the class folders.

    Attributes:
        source: for messages.
        notes: what was chosen.
        passed: what was skipped.
    """

    source: Path
    notes: list[str] = field(default_factory=list)
    passed: Passed = field(default_factory=Passed)
    _levels: list[dict[str, bool]] = field(default_factory=list)  # names of folders, and whether class folders follow
    _example: tuple[str, ...] = ()
    _files: int = 0
    _images: int = 0
    _loose: int = 0
    _shortest: int = 1 << 30

    def add(self, name: str) -> bool:
        """Take note of a file; return whether its name is an image's."""
        self._files += 1
        if not is_image(name):
            self.passed.not_read(name)
            return False
        self._images += 1
        parts = PurePosixPath(name).parts
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
        if split is not None:
            return self._below_split(split)
        depth = 0
        while self._shortest >= depth + 3 and len(self._levels[depth]) == 1:
            depth += 1
        tops = self._levels[depth].keys() if depth < len(self._levels) else set()
        if depth < self._shortest and len(tops) > 1 and tops <= SPLIT_NAMES:
            raise DataError(
                f"source {self.source} holds several splits ({self._names(depth)}): choose one with --split, "
                "in a run config with data.train and data.val"
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
                f"source {self.source} holds no images ({suffixes_read()}) among {self._files} files"
                + (f"; skipped: {line}" if (line := self.passed.line()) else "")
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
                "<class>/image.jpg, name its boxes with --coco or its masks with --masks, or read it without labels "
                "(data.labels = false, pack --no-labels)"
            )
        if self._loose:
            self.passed.others["images outside class folders"] = self._loose
        return self.notes

    def check_classes(self, classes: Collection[str], depth: int, split: str | None, allow: bool) -> None:
        """Refuse class folders that hold nothing that is read: their classes would vanish silently.

        Args:
            classes: those with images.
            depth: folders above the class folders.
            split: the split that is taken.
            allow: count them instead.

        Raises:
            DataError: naming them, and what they hold.
        """
        empty: dict[str, set[str]] = {}
        above = self._example[:depth]
        for folder, suffixes in self.passed.folders.items():
            parts = PurePosixPath(folder).parts
            if len(parts) <= depth or parts[depth] in classes:
                continue
            if parts[depth - 1] == split if split is not None and depth else parts[:depth] == above:
                empty.setdefault(parts[depth], set()).update(suffixes)
        if not empty:
            return
        self.passed.others["class folders without images"] = len(empty)
        if allow:
            return
        first, held = min(empty.items())
        what = f"only {', '.join(sorted(held))}" if held else "nothing"
        more = f", and so do {len(empty) - 1} more" if len(empty) > 1 else ""
        raise DataError(
            f"class folder {first!r} of {self.source} holds {what}, no image that is read ({suffixes_read()}){more}: "
            "its class would be missing; convert or remove it, or allow it (data.allow_empty_classes = true, or "
            "--allow-empty-classes)"
        )

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


def list_files(source: Path, plain: Path, passed: Passed) -> Iterator[Stretch]:
    """Yield every visible file of a source, in no particular order.

    Args:
        source: as the user named it.
        plain: what `plain_source` made of it.
        passed: counts what is not yielded.

    Raises:
        DataError: it cannot be read whole.
    """
    if plain.is_dir():
        yield from _in_directory(plain, passed)
        return
    try:
        yield from _in_tar(plain, source.stat().st_mtime_ns, passed)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"source {source} is not a whole tar of images ({error}): fetch it again") from None


def _in_tar(path: Path, stamp: int, passed: Passed) -> Iterator[Stretch]:
    links: dict[str, list[str]] = {}  # a hard link is a file that the tar holds once, under the first of its names
    for member in _members(path):
        if member.isfile():
            yield from _visible(path, member, member.name, stamp, passed)
        elif member.islnk():
            links.setdefault(member.linkname, []).append(member.name)
    if links:
        for member in _members(path):
            for name in links.get(member.name, ()) if member.isfile() else ():
                yield from _visible(path, member, name, stamp, passed)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise: half a GB for a million images
            yield member


def _visible(path: Path, member: tarfile.TarInfo, name: str, stamp: int, passed: Passed) -> Iterator[Stretch]:
    if not is_visible(name):
        passed.ignore(next(part for part in name.split("/") if part not in ("", ".") and is_ignored(part)))
    else:
        plain = PurePosixPath(name.removeprefix("./")).as_posix()
        yield Stretch(str(path), member.offset_data, member.size, plain, stamp)


def _in_directory(source: Path, passed: Passed) -> Iterator[Stretch]:
    for name, entry in files_below(source, passed):
        try:
            facts = entry.stat()
        except OSError as error:
            raise _unreadable(entry, error) from None
        yield Stretch(entry.path, 0, facts.st_size, name, facts.st_mtime_ns)


def files_below(
    source: Path, passed: Passed, on_folder: Callable[[str], None] = lambda inside: None
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (path within the source, entry) of every visible file of a directory, without looking at most of them.

    Args:
        source: the directory.
        passed: counts what is not yielded.
        on_folder: called with each visible folder's path within the source, "" for the source itself.

    Raises:
        DataError: a folder or a link cannot be read.
    """
    for inside, folders, others in walk(str(source)):
        on_folder(inside)
        for entry in (*folders, *others):
            if is_ignored(entry.name):
                passed.ignore(entry.name)
        folders[:] = [entry for entry in folders if not is_ignored(entry.name)]
        for folder in folders:
            passed.hold(f"{inside}/{folder.name}" if inside else folder.name)
        for entry in others:
            if is_ignored(entry.name):
                continue
            try:
                is_file = entry.is_file() or not entry.stat()  # which says what is wrong with a link
            except OSError as error:
                raise _unreadable(entry, error) from None
            if is_file:
                yield f"{inside}/{entry.name}" if inside else entry.name, entry
            else:
                passed.odd[Path(entry.name).suffix or entry.name] += 1


def _unreadable(entry: os.DirEntry[str], error: OSError) -> DataError:
    return DataError(f"{entry.path} in the source cannot be read ({error.strerror}): repair or remove it")


def _plain_tar(source: Path, scratch: Path) -> Path:
    """Return a tar that can be read at any offset: the source itself, or its contents unpacked."""
    with os.fdopen(open_regular(source), "rb") as file:
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


def read_stretch(stretch: Stretch, limit: int = LARGEST_SAMPLE) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it cannot be read, is larger than the limit, or shorter than when it was found.
    """
    try:
        check_size(stretch.size, limit, stretch.file)
        with os.fdopen(open_regular(stretch.file), "rb", buffering=0) as file:
            file.seek(stretch.offset)
            data = file.read(stretch.size)
    except OSError as error:
        raise DataError(
            f"{stretch.name} in the source cannot be read ({error.strerror}): repair or remove it"
        ) from None
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
            f"class {unknown[0]!r} is not in the class map of {origin}"
            + (f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else "")
        )


def read_class_map(path: Path) -> tuple[str, ...]:
    """Read class names in label order, as `dataloaders.sources.classes` does.

    Raises:
        DataError: no such file, no names, or a name twice.
    """
    try:
        data = read_whole(path, LARGEST_CLASS_FILE)
    except OSError as error:
        raise DataError(f"class map {path} cannot be read: {error.strerror}") from None
    return parse_class_map(data, str(path))
