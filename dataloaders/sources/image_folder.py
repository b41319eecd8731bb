"""An ImageFolder as it is: `<class>/…/image.jpg`, one file per image, without packing.

    <cache>/indexes/<folder>/<digits>/files.json, files.safetensors

Indexed when it is first seen: names, sizes, heights and widths. The index lies in `data.cache` or the user's cache
folder, not beside the images, where others that read class folders would take it for a class. The digits are of the
names and times of all folders, so an image that comes, goes or is renamed makes a new index; one that is replaced in
place is noticed when it is read, by its size. Two processes that see it first wait for each other, and half an index
is never seen.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.packing.images import LabelledImage, find_images
from dataloaders.pixels.decode import UndecodableError, image_size
from dataloaders.source import Stored
from dataloaders.sources.arrays import file_digest, map_arrays, write_arrays
from dataloaders.sources.cache import locked
from dataloaders.sources.foreign import own_folder
from dataloaders.sources.index import durable_write, fingerprint_of
from dataloaders.sources.storage import PassingError, UnreadableError, insist
from setformer_dist.core.errors import DataError

_log = logging.getLogger(__name__)

TABLE_NAME = "files.json"
ARRAYS_NAME = "files.safetensors"
FORMAT = 1

# Heads of images that are read for height and width; if the longest says nothing, the whole file is.
_HEADS = (4096, 1 << 16)

# Files between two signs of life to those who wait for the index.
_TOLD = 100


class ImageFolderDataset:
    """The images of a folder by number (`Source`).

    Args:
        folder: of the class folders.
        index: folder of the index.
    """

    def __init__(self, folder: Path, index: Path) -> None:
        self._folder = os.path.join(folder, "")  # noqa: PTH118  (joined with a name at every read)
        self._index = index
        table, arrays = _read_index(index)
        self._classes = tuple(table["classes"])
        self._fingerprint = str(table["identity"])
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
        """Return the smallest and the largest (height, width), each number over all images by itself."""
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
        path = self._folder + self.key(sample)

        def attempt() -> bytes:
            try:
                with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                    return file.readall()
            except OSError as error:
                raise PassingError(str(error)) from None

        try:
            data = insist(path, attempt)
        except UnreadableError as error:
            raise DataError(f"{self.place(sample)} {error.what}") from None
        if len(data) != self._size[sample]:
            raise DataError(
                f"{self.place(sample)} has {len(data)} bytes, {self._size[sample]} when it was indexed: restore it, or "
                f"remove {self._index} to index the folder anew"
            )
        return Stored(data)

    def close(self) -> None:
        """Nothing is open between reads."""

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self._folder, "index": self._index, "fingerprint": self._fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["index"])  # type: ignore[misc]
        if self._fingerprint != state["fingerprint"]:
            raise DataError(f"image folder {self.name} was changed while it was in use: start again")


def open_image_folder(folder: Path, cache: Path, timeout: float) -> ImageFolderDataset:
    """Open a folder of class folders.

    Args:
        folder: of the class folders.
        cache: folder for the index.
        timeout: seconds to wait for another process that makes the index, without a sign of life.

    Raises:
        DataError: there are no images in class folders, or a file cannot be read.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  (keep links as they are)
    signature = _signature(folder)
    home = cache / "indexes" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    if (home / signature / TABLE_NAME).is_file():  # perhaps where nothing can be written
        return ImageFolderDataset(folder, home / signature)
    own_folder([home], str(folder))
    lock = home / ".lock"
    with locked(lock, timeout, lambda: lock.stat().st_mtime_ns) as got:
        if not got:
            raise DataError(
                f"the index of {folder} is being made by another process, of which nothing was seen for {timeout:g} s: "
                "end that process, or raise data.read_timeout"
            )
        target = home / signature
        if not (target / TABLE_NAME).is_file():
            _remove_others(home, folder)
            _write_index(folder, target, lambda: os.utime(lock))
    return ImageFolderDataset(folder, target)


def _signature(folder: Path) -> str:
    """Return a digest of the names and times of all folders: they change when a file comes, goes or is renamed."""
    digest = hashlib.sha256()
    for path, folders, _ in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        digest.update(os.fsencode(f"{os.path.relpath(path, folder)}\0{os.stat(path).st_mtime_ns}\0"))  # noqa: PTH116
    return digest.hexdigest()[:32]


def _remove_others(home: Path, folder: Path) -> None:
    old = [path for path in home.iterdir() if path.is_dir() and (path / TABLE_NAME).is_file()]
    if old:
        _log.warning("the index of %s is older than its images and is made anew", folder)
    for path in [*old, *home.glob(".*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def _write_index(folder: Path, target: Path, alive: Callable[[], None]) -> None:
    """Look into every image; write the index aside and rename it."""
    passed = itertools.count(1)

    def on_file() -> None:
        if not next(passed) % _TOLD:
            alive()

    images = find_images(folder, None, target, on_file).images
    classes = tuple(sorted({image.class_name for image in images}))
    labels = {name: label for label, name in enumerate(classes)}
    rows, unreadable = _rows(images, alive)
    names = [os.fsencode(os.path.relpath(image.stretch.file, folder)) for image in images]
    arrays: dict[str, npt.NDArray[Any]] = {
        "names": np.frombuffer(b"".join(names), np.uint8),
        "end": np.cumsum([len(name) for name in names], dtype=np.int64),
        "label": np.array([labels[image.class_name] for image in images], np.int64),
        "shard": _folders(names),
        "size": np.array([image.stretch.size for image in images], np.int64),
        "height": rows[:, 0].astype(np.int32),
        "width": rows[:, 1].astype(np.int32),
    }
    if unreadable:
        _log.warning("%d images in %s have no readable header, the first %s", len(unreadable), folder, unreadable[0])
    alive()
    identity = hashlib.sha256(json.dumps(classes).encode())
    for name in sorted(arrays):
        identity.update(arrays[name].data)
    identity.update(rows[:, 2].tobytes())
    work = target.with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    table: dict[str, Any] = {"format": FORMAT, "classes": list(classes), "identity": identity.hexdigest()}
    table["sha256"] = write_arrays(work / ARRAYS_NAME, arrays)
    table["fingerprint"] = fingerprint_of(table)
    durable_write(work / TABLE_NAME, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    work.rename(target)


def _rows(images: list[LabelledImage], alive: Callable[[], None]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return (N, 3) height, width and crc32 of the first bytes; and the images that do not say their size."""
    rows = np.zeros((len(images), 3), np.int64)
    unreadable = []
    for number, image in enumerate(images):
        if not number % _TOLD:
            alive()
        size, rows[number, 2] = _look(image.stretch.file)
        if size is None:
            unreadable.append(image.stretch.name)
        else:
            rows[number, :2] = size
    if len(unreadable) == len(images):
        raise DataError(f"none of {len(images)} images can be read, the first being {images[0].stretch.file}")
    # Such an image is found damaged when it is read; till then it counts as large as the first whole one.
    rows[rows[:, 0] == 0, :2] = rows[rows[:, 0] > 0, :2][0]
    return rows, unreadable


def _look(path: str) -> tuple[tuple[int, int] | None, int]:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            head = file.read(_HEADS[0])
            first = zlib.crc32(head)
            for length in (*_HEADS[1:], -1):
                try:
                    return image_size(head), first
                except UndecodableError:
                    head += file.read(length - len(head)) if length > 0 else file.readall()
            try:
                return image_size(head), first
            except UndecodableError:
                return None, first
    except OSError as error:
        raise UnreadableError(path, f"cannot be read ({error.strerror}): repair or remove it") from None


def _folders(names: list[bytes]) -> npt.NDArray[np.int32]:
    """Return the number of each name's folder, names being sorted: a new one wherever it changes."""
    folders = [name.rpartition(b"/")[0] for name in names]
    changes = [0, *(int(one != other) for one, other in itertools.pairwise(folders))]
    return np.cumsum(changes, dtype=np.int32)


def _read_index(index: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    try:
        table = json.loads((index / TABLE_NAME).read_bytes())
        sound = (
            table["format"] == FORMAT
            and table["fingerprint"] == fingerprint_of(table)
            and table["sha256"] == file_digest(index / ARRAYS_NAME)
        )
        arrays = map_arrays(index / ARRAYS_NAME)
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"index {index} of an image folder is damaged or of another version: remove it")
    return table, arrays
