"""An ImageFolder as it is: `<class>/…/image.jpg`, one file per image, without packing.

    <cache>/indexes/<folder>/<digits>/files.json, files.safetensors

Indexed when it is first seen: names, sizes, heights and widths. The index lies in `data.cache` or the user's cache
folder, not next to the images, where other readers of class folders would take it for a class. The digits are of the
names and times of all folders, so an image that comes, goes or is renamed makes a new index; one that is replaced in
place is noticed when it is read, by its size. Two processes that see it first wait for each other, and half an index
is never seen.

The folders are listed at every opening, and an index is believed only if its names and labels are those of the
listing; its sizes are compared when an image is read, and the fingerprint is computed from all of it again. So whoever
could write into the cache changes no label and no path.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.pixels.decode import ANY_SIZE, UndecodableError, image_size
from dataloaders.source import DamagedSampleError, Stored
from dataloaders.sources.arrays import file_digest, map_arrays, write_arrays
from dataloaders.sources.class_folders import Tree, files_below
from dataloaders.sources.classes import UNLABELLED, out_of_place
from dataloaders.sources.files import LARGEST_SAMPLE, LARGEST_TABLE, OddFileError, open_regular, parse_json, read_whole
from dataloaders.sources.index import durable_write, fingerprint_of
from dataloaders.sources.passed import Passed
from dataloaders.storage.base import RetriableError, UnreadableError, insist
from dataloaders.storage.cache import locked
from dataloaders.storage.homes import own_folder, trusted
from setformer_dist.core.errors import DataError

_log = logging.getLogger(__name__)

TABLE_NAME = "files.json"
ARRAYS_NAME = "files.safetensors"
FORMAT = 3
_DTYPES: dict[str, np.dtype[Any]] = {
    "names": np.dtype(np.uint8),
    **dict.fromkeys(("end", "label", "size", "first"), np.dtype(np.int64)),
    **dict.fromkeys(("shard", "height", "width"), np.dtype(np.int32)),
}

# Heads of images that are read for height and width; if the longest says nothing, the whole file is.
_HEADS = (4096, 1 << 16)

# Files between two signs of life to those who wait for the index.
_PROGRESS_EVERY = 100


class ImageFolderDataset:
    """The images of a folder by number (`Source`).

    Args:
        folder: of the class folders.
        index: folder of the index.
        table: what it says, checked.
    """

    def __init__(self, folder: Path, index: Path, table: _Table) -> None:
        self._folder = os.path.join(folder, "")  # noqa: PTH118  (joined with a name at every read)
        self._index = index
        self._seal = table.seal
        self._classes = table.classes
        arrays = table.arrays
        self._fingerprint = _identity(table.classes, arrays)
        self._names, self._ends = arrays["names"], arrays["end"]
        self._label, self._size, self._shard = arrays["label"], arrays["size"], arrays["shard"]
        self._height, self._width = arrays["height"], arrays["width"]

    @property
    def num_samples(self) -> int:
        """Images in the folder."""
        return len(self._label)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders, sorted."""
        return self._classes

    @property
    def fingerprint(self) -> str:
        """Identity of the images: of names, sizes, heights, widths and the first bytes of each."""
        return self._fingerprint

    @property
    def name(self) -> str:
        """The folder."""
        return self._folder.rstrip("/")

    @property
    def parts(self) -> frozenset[str]:
        """Nothing besides image and label."""
        return frozenset()

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(N,) number of the folder that holds each image, never falling."""
        return self._shard

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        return torch.from_numpy(np.where(samples >= 0, self._label[samples], 0))

    def size(self, sample: int) -> tuple[int, int]:
        """Return an image's (height, width) in pixels."""
        return int(self._height[sample]), int(self._width[sample])

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (N, 2) heights and widths."""
        return np.stack([self._height, self._width], axis=1)

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width), each number over all images independently."""
        small = int(self._height.min()), int(self._width.min())
        return small, (int(self._height.max()), int(self._width.max()))

    def key(self, sample: int) -> str:
        """Return an image's path within the folder."""
        start = int(self._ends[sample - 1]) if sample else 0
        path: bytes = self._names[start : int(self._ends[sample])].tobytes()
        return os.fsdecode(path)

    def place(self, sample: int) -> str:
        """Name an image for a message."""
        return f"sample {sample} ({self._folder}{self.key(sample)})"

    def read(self, sample: int) -> Stored:
        """Return an image's bytes.

        Raises:
            DataError: the file cannot be read, or was changed since it was indexed.
        """
        path, said = self._folder + self.key(sample), int(self._size[sample])
        if said > LARGEST_SAMPLE:
            raise DamagedSampleError(f"{self.place(sample)} has {said} bytes, more than any image that is read")

        def attempt() -> bytes:
            try:
                # A byte more than the index says: a file that grew is noticed without being read whole.
                with os.fdopen(open_regular(path), "rb", buffering=0) as file:
                    return file.read(said + 1) or b""
            except OddFileError as error:
                raise UnreadableError(path, f"cannot be read ({error.strerror}): restore it") from None
            except OSError as error:
                raise RetriableError(str(error)) from None

        try:
            data = insist(path, attempt)
        except UnreadableError as error:
            raise DataError(f"{self.place(sample)} {error.what}") from None
        if len(data) != said:
            now = f"{len(data)} bytes" if len(data) < said else "more bytes"
            raise DataError(
                f"{self.place(sample)} has {now}, {said} when it was indexed: restore it, or remove {self._index} to "
                "index the folder again"
            )
        return Stored(data)

    def close(self) -> None:
        """Nothing is open between reads."""

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self._folder, "index": self._index, "seal": self._seal}

    def __setstate__(self, state: dict[str, Any]) -> None:
        table = _read_index(state["index"])
        if (
            table is None or table.seal != state["seal"]
        ):  # the seal covers every byte that was checked when it was opened
            raise DataError(f"image folder {state['folder']} was changed while it was in use: start again")
        self.__init__(state["folder"], state["index"], table)  # type: ignore[misc]


@dataclass(frozen=True)
class _Table:
    """An index in memory.

    Attributes:
        classes: names of the class folders.
        arrays: names (bytes of all paths), end of each, label, shard, size, height, width, and the crc32 of each
            image's first bytes.
        seal: digest of all of it.
    """

    classes: tuple[str, ...]
    arrays: dict[str, npt.NDArray[Any]]
    seal: str


@dataclass(frozen=True)
class _Listing:
    """What lies in the folders, without a look into any file.

    Attributes:
        paths: of the images within the folder, sorted.
        classes: names of the class folders, sorted.
        label: (N,) of each image.
        signature: digest of the names and times of all folders.
        passed: what is not read.
    """

    paths: list[bytes]
    classes: tuple[str, ...]
    label: npt.NDArray[np.int64]
    signature: str
    passed: Passed

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what of the index follows from the listing alone."""
        return {
            "names": np.frombuffer(b"".join(self.paths), np.uint8),
            "end": np.cumsum([len(name) for name in self.paths], dtype=np.int64),
            "label": self.label,
            "shard": _folders(self.paths),
        }


def open_image_folder(
    folder: Path, cache: Path, timeout: float, allow_empty: bool = False, labels: bool = True
) -> ImageFolderDataset:
    """Open a folder of class folders; a log line says what in it is skipped.

    Args:
        folder: of the class folders.
        cache: folder for the index.
        timeout: seconds to wait for another process that makes the index, without a sign of life.
        allow_empty: class folders may hold no image that is read.
        labels: false takes the images of all folders, at any depth, as one class.

    Raises:
        DataError: there are no images in class folders, one holds none that is read, or a file cannot be read.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  (keep links as they are)
    listing = _listed(folder, allow_empty, labels)
    if line := listing.passed.line():
        _log.warning("%s: skipped %s", folder, line)
    if (at := out_of_place(listing.classes)) is not None:
        _log.warning(
            "%s: label %d is class folder '%s', as folders are sorted as text; predictions give the folder's name. "
            "Another order: setformer data pack --classes FILE",
            folder,
            at,
            listing.classes[at],
        )
    home = cache / "indexes" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    target = home / listing.signature
    if (found := _believed(target, listing)) is not None:  # perhaps where nothing can be written
        return ImageFolderDataset(folder, target, found)
    home = own_folder([home], str(folder))
    lock = home / ".lock"
    with locked(lock, timeout, lambda: lock.stat().st_mtime_ns) as got:
        if not got:
            raise DataError(
                f"the index of {folder} is being made by another process, which has shown no progress for {timeout:g} "
                "s: end that process, or raise data.read_timeout"
            )
        if (found := _believed(target, listing)) is None:
            _remove_old(home, folder)
            _write_index(folder, listing, target, lambda: os.utime(lock))
            found = _believed(target, listing)
    if found is None:
        raise DataError(f"image folder {folder} changes while it is indexed: start again when it does not")
    return ImageFolderDataset(folder, target, found)


def _listed(folder: Path, allow_empty: bool, labelled: bool) -> _Listing:
    """List all folders: as `dataloaders.sources.class_folders.find_images`, but for sizes."""
    tree = Tree(folder)
    digest = hashlib.sha256(f"{FORMAT}\0".encode() if labelled else f"{FORMAT}\0{UNLABELLED}\0".encode())

    def on_folder(inside: str) -> None:
        times = os.stat(folder / inside).st_mtime_ns  # noqa: PTH116
        digest.update(os.fsencode(f"{inside}\0{times}\0"))

    names = sorted(name for name, _ in files_below(folder, tree.passed, on_folder) if tree.add(name))
    if not labelled:
        tree.check_images()
        paths, zeros = [os.fsencode(name) for name in names], np.zeros(len(names), np.int64)
        return _Listing(paths, (UNLABELLED,), zeros, digest.hexdigest()[:32], tree.passed)
    depth = tree.class_depth(None)
    named = [(name, class_name) for name in names if (class_name := tree.class_of(name, depth, None)) is not None]
    tree.closing_notes(len(named))
    classes = tuple(sorted({class_name for _, class_name in named}))
    tree.check_classes(classes, depth, None, allow_empty)
    labels = {name: label for label, name in enumerate(classes)}
    label = np.array([labels[class_name] for _, class_name in named], np.int64)
    paths = [os.fsencode(name) for name, _ in named]
    return _Listing(paths, classes, label, digest.hexdigest()[:32], tree.passed)


def _believed(target: Path, listing: _Listing) -> _Table | None:
    """Return the index in a folder if its names and labels are those of the listing; None for another, or none."""
    if not (target / TABLE_NAME).exists() or not trusted(target):
        return None
    found, wanted = _read_index(target), listing.arrays()
    if found is None or found.classes != listing.classes:
        return None
    arrays = found.arrays
    count = len(listing.paths)
    facts = (arrays["size"], arrays["height"], arrays["width"], arrays["first"])
    sound = all(np.array_equal(arrays[name], array) for name, array in wanted.items()) and all(
        len(column) == count for column in facts
    )
    if sound and arrays["size"].min() >= 0 and min(arrays["height"].min(), arrays["width"].min()) > 0:
        return found
    return None


def _remove_old(home: Path, folder: Path) -> None:
    """Remove indexes of an earlier state of the folder, and what killed processes left; nothing else is touched."""
    old = [
        path
        for path in home.iterdir()
        if re.fullmatch(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.partial", path.name) and path.is_dir()
    ]
    if any(not path.name.startswith(".") for path in old):
        _log.warning("the index of %s is older than its images or this version, or damaged; it is made again", folder)
    for path in old:
        if not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _write_index(folder: Path, listing: _Listing, target: Path, alive: Callable[[], None]) -> None:
    """Look into every image; write the index aside and rename it."""
    rows, unreadable = _rows(folder, listing.paths, alive)
    arrays = {
        **listing.arrays(),
        "size": rows[:, 3].copy(),
        "height": rows[:, 0].astype(np.int32),
        "width": rows[:, 1].astype(np.int32),
        "first": rows[:, 2].copy(),
    }
    if unreadable:
        _log.warning("%d images in %s have no readable header, the first %s", len(unreadable), folder, unreadable[0])
    alive()
    work = target.with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    table: dict[str, Any] = {"format": FORMAT, "classes": list(listing.classes)}
    table["sha256"] = write_arrays(work / ARRAYS_NAME, arrays)
    table["fingerprint"] = fingerprint_of(table)
    durable_write(work / TABLE_NAME, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    shutil.rmtree(target, ignore_errors=True)  # one that is not believed
    work.rename(target)


def _identity(classes: tuple[str, ...], arrays: dict[str, npt.NDArray[np.generic]]) -> str:
    """Return the fingerprint of the images, from all that is known of them."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    for name in sorted(arrays):
        if name != "first":
            digest.update(np.ascontiguousarray(arrays[name]).data)
    digest.update(np.ascontiguousarray(arrays["first"]).data)
    return digest.hexdigest()


def _rows(folder: Path, paths: list[bytes], alive: Callable[[], None]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return (N, 4) height, width, crc32 of the first bytes and size; and the images that do not say their size."""
    rows = np.zeros((len(paths), 4), np.int64)
    unreadable = []
    for number, name in enumerate(paths):
        if not number % _PROGRESS_EVERY:
            alive()
        size, rows[number, 2], rows[number, 3] = _look(os.path.join(os.fsencode(folder), name))  # noqa: PTH118
        if size is None:
            unreadable.append(os.fsdecode(name))
        else:
            rows[number, :2] = size
    if len(unreadable) == len(paths):
        raise DataError(f"none of {len(paths)} images can be read, the first being {folder / unreadable[0]}")
    # Such an image is found damaged when it is read; till then it counts as large as the first whole one.
    rows[rows[:, 0] == 0, :2] = rows[rows[:, 0] > 0, :2][0]
    return rows, unreadable


def _look(path: bytes) -> tuple[tuple[int, int] | None, int, int]:
    """Return an image's (height, width) if it says them, the crc32 of its first bytes, and its size in bytes."""
    try:
        with os.fdopen(open_regular(os.fsdecode(path)), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEADS[0]) or b""
            first = zlib.crc32(head)
            for length in (*_HEADS[1:], size):
                try:
                    return _checked(image_size(head, ANY_SIZE)), first, size
                except UndecodableError:
                    if length > LARGEST_SAMPLE:
                        return None, first, size
                    file.seek(0)
                    head = file.read(length) or b""
            try:
                return _checked(image_size(head, ANY_SIZE)), first, size
            except UndecodableError:
                return None, first, size
    except OSError as error:
        raise UnreadableError(os.fsdecode(path), f"cannot be read ({error.strerror}): repair or remove it") from None


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    if min(size) < 1:
        raise UndecodableError("it has no pixels")
    return size


def _folders(names: list[bytes]) -> npt.NDArray[np.int32]:
    """Return the number of each name's folder, names being sorted: a new one wherever it changes."""
    folders = [name.rpartition(b"/")[0] for name in names]
    changes = [0, *(int(one != other) for one, other in itertools.pairwise(folders))]
    return np.cumsum(changes, dtype=np.int32)


def _read_index(index: Path) -> _Table | None:
    """Return the index in a folder; None where there is none, or one that is damaged or of another version."""
    try:
        table = parse_json(read_whole(index / TABLE_NAME, LARGEST_TABLE, follow=False))
        sound = (
            table["format"] == FORMAT
            and table["fingerprint"] == fingerprint_of(table)
            and table["sha256"] == file_digest(index / ARRAYS_NAME)
            and all(isinstance(name, str) for name in table["classes"])
        )
        arrays = map_arrays(index / ARRAYS_NAME)
        sound = sound and {name: array.dtype for name, array in arrays.items()} == _DTYPES
        sound = sound and all(array.ndim == 1 for array in arrays.values())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _Table(tuple(table["classes"]), arrays, str(table["fingerprint"])) if sound else None
