"""FFCV's .beton files as a source of samples, without FFCV: `read(i)` is one `pread`, checked.

Opening holds all tables against each other (`dataloaders.beton.format`), so a file that is cut short or has a
flipped bit in a table is refused before the first step. Reading compares each image with its checksum where there is
a sidecar (`dataloaders.beton.sidecar`); without one, a JPEG's header must at least agree with the record. Files are
read by `pread` and not through a memory map, which would save 0.01 ms of a raw image and end the process by a signal
when the storage fails or the file shrinks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.beton.format import RAW, BetonTable, read_table
from dataloaders.beton.sidecar import Sidecar, checksum, read_sidecar, sidecar_path, write_sidecar
from dataloaders.beton.writer import BetonSample, write_beton
from dataloaders.pixels.decode import UndecodableError, image_size
from dataloaders.source import DamagedSampleError, Stored
from dataloaders.sources.files import open_regular
from dataloaders.sources.index import fingerprint_of
from setformer_dist.core.errors import DataError

__all__ = ["BetonDataset", "BetonSample", "index_beton", "open_beton", "write_beton"]

_log = logging.getLogger(__name__)

# Waits in seconds before each further try of a read that failed (network storage hiccups), about 8 s in all.
_RETRY_WAITS = (0.1, 0.5, 2.0, 5.0)

# Classes of a file that does not name them: more than any data set has, few enough to be held.
_MAX_NAMELESS = 1 << 20


class BetonDataset:
    """A .beton file's samples by number (`Source`). Sent to another process, it reopens the file there.

    Attributes:
        path: of the file.
        table: what its tables say.
        sidecar: what the file next to it says, or None.
    """

    def __init__(
        self,
        path: Path,
        table: BetonTable,
        sidecar: Sidecar | None,
        classes: tuple[str, ...],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = path
        self.table = table
        self.sidecar = sidecar
        self._classes = classes
        self._sleep = sleep
        self._file = -1
        self._lock = threading.Lock()
        self._fingerprint = sidecar.fingerprint if sidecar else _bare_fingerprint(table, classes)
        pages = (table.place // table.page_size).astype(np.int32)
        # Where FFCV's own writer ran several processes, samples near in number are far in the file: one stretch.
        self._shards = pages - pages.min() if (np.diff(pages) >= 0).all() else np.zeros_like(pages)

    @property
    def num_samples(self) -> int:
        """Samples in the file."""
        return len(self.table)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in it."""
        return self._classes

    @property
    def fingerprint(self) -> str:
        """Identity of the file: of all checksums with a sidecar, else of its tables and size."""
        return self._fingerprint

    @property
    def name(self) -> str:
        """The file."""
        return str(self.path)

    @property
    def parts(self) -> frozenset[str]:
        """Nothing besides image and label."""
        return frozenset()

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(N,) number of the page that holds each sample; all 0 where pages and samples are not in the same order."""
        return self._shards

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (N, 2) stored heights and widths."""
        return np.stack([self.table.height, self.table.width], axis=1)

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width), each number over all samples independently."""
        height, width = self.table.height, self.table.width
        return (int(height.min()), int(width.min())), (int(height.max()), int(width.max()))

    def key(self, sample: int) -> str:
        """Return a sample's key: the sidecar's, or its number."""
        if self.sidecar is None:
            return f"{sample:09d}"
        padded: bytes = self.sidecar.keys[sample].tobytes()
        return padded.rstrip(b"\0").decode("ascii")

    def size(self, sample: int) -> tuple[int, int]:
        """Return a sample's stored (height, width) in pixels."""
        return int(self.table.height[sample]), int(self.table.width[sample])

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        return torch.from_numpy(np.where(samples >= 0, self.table.label[samples], 0))

    def place(self, sample: int) -> str:
        """Name a sample for a message: number, key, file."""
        return f"sample {sample} ({self.key(sample)}) of {self.path}"

    def read(self, sample: int) -> Stored:
        """Return a sample: a JPEG file's bytes, or (H, W, 3) pixels.

        Raises:
            DamagedSampleError: it does not have the checksum of the sidecar, or is another image than the record says.
            DataError: the file cannot be read, or is shorter than when it was opened.
        """
        image: bytes | npt.NDArray[np.uint8]
        if self.table.mode[sample] == RAW:
            pixels = np.empty((*self.size(sample), 3), np.uint8)
            self._fill(sample, pixels.data.cast("B"))
            image = pixels
        else:
            image = self._bytes(sample)
        if self.sidecar is None:
            self._check_header(sample, image)
        elif checksum(image) != int(self.sidecar.checks[sample]):
            raise DamagedSampleError(f"{self.place(sample)}: it does not have the checksum of the index")
        return Stored(image)

    def _check_header(self, sample: int, image: bytes | npt.NDArray[np.uint8]) -> None:
        if not isinstance(image, bytes):
            return
        try:
            found = image_size(image)
        except UndecodableError as error:
            raise DamagedSampleError(f"{self.place(sample)} is damaged ({error})") from None
        if found != self.size(sample):
            raise DamagedSampleError(
                f"{self.place(sample)} is an image of {found[0]} x {found[1]}, its record says {{}} x {{}}".format(
                    *self.size(sample)
                )
            )

    def _bytes(self, sample: int) -> bytes:
        place, size = int(self.table.place[sample]), int(self.table.size[sample])
        data: list[bytes] = []

        def read(file: int) -> int:
            data[:] = [os.pread(file, size, place)]
            return len(data[0])

        self._retried(sample, size, read)
        return data[0]

    def _fill(self, sample: int, room: memoryview) -> None:
        place = int(self.table.place[sample])
        self._retried(sample, len(room), lambda file: os.preadv(file, [room], place))

    def _retried(self, sample: int, size: int, read: Callable[[int], int]) -> None:
        """Read with retries: a failing disk or network is not the sample's fault, so it never substitutes."""
        problem = ""
        for wait in (*_RETRY_WAITS, None):
            try:
                count = read(self._open_file())
                if count == size:
                    return
                problem = f"{count} of {size} bytes"
            except OSError as error:
                problem = str(error)
            if wait is not None:
                self._sleep(wait)
        raise DataError(
            f"{self.place(sample)} cannot be read after {len(_RETRY_WAITS) + 1} tries ({problem}): check the "
            "storage, or restore the file"
        )

    def _open_file(self) -> int:
        if self._file < 0:
            with self._lock:
                if self._file < 0:
                    self._file = open_regular(self.path)
        return self._file

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self._lock:
            file, self._file = self._file, -1
            if file >= 0:
                os.close(file)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "classes": self._classes, "fingerprint": self._fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        table = read_table(state["path"])
        sidecar = read_sidecar(sidecar_path(state["path"]), table)
        self.__init__(state["path"], table, sidecar, state["classes"])  # type: ignore[misc]
        if self._fingerprint != state["fingerprint"]:
            raise DataError(f"data file {self.path} was rewritten while it was in use: start again")


def open_beton(path: Path, classes: tuple[str, ...] | None = None) -> BetonDataset:
    """Open a .beton file, FFCV's or ours.

    Args:
        path: of the file.
        classes: class names; without them the sidecar's, and without that "0", "1", … to the largest label.

    Raises:
        DataError: as `read_table` and `read_sidecar`, or a label has no class.
    """
    path = Path(path)
    table = read_table(path)
    if table.passed:
        _log.warning("%s: skipped the fields %s", path, ", ".join(table.passed))
    sidecar = read_sidecar(sidecar_path(path), table)
    if sidecar is not None and classes not in (None, sidecar.classes):
        raise DataError(
            f"the class names given for {path} are not those in {sidecar_path(path)}: leave one of them out"
        )
    return BetonDataset(path, table, sidecar, _classes(path, table, sidecar.classes if sidecar else classes))


def _classes(path: Path, table: BetonTable, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the class names, or numbers in their place, after holding the labels against them."""
    high = int(table.label.max())
    count = len(classes) if classes is not None else min(high + 1, _MAX_NAMELESS)
    wrong = (table.label < 0) | (table.label >= count)
    if wrong.any():
        sample = int(np.argmax(wrong))
        raise DataError(
            f"data file {path} has label {int(table.label[sample])} at sample {sample}, but labels go from 0 to "
            f"{count - 1}: write it again with the right class map"
        )
    return classes if classes is not None else tuple(map(str, range(count)))


def index_beton(
    path: Path, classes: tuple[str, ...] | None = None, on_progress: Callable[[int], None] = lambda done: None
) -> None:
    """Make the sidecar of a .beton file that others wrote: reads every image once, at the speed of the storage.

    Args:
        path: of the file.
        classes: class names; without them those of the sidecar that is replaced, if it is whole, else numbers.
        on_progress: called with the number of samples done since the last call.

    Raises:
        DataError: as `open_beton`, or an image is not what its record says.
    """
    path = Path(path)
    table = read_table(path)
    bare = BetonDataset(path, table, None, _classes(path, table, classes or _classes_so_far(path, table)))
    checks = np.zeros(len(table), np.uint64)
    for sample in range(len(table)):
        checks[sample] = checksum(cast("bytes", bare.read(sample).image))
        on_progress(1)
    bare.close()
    write_sidecar(sidecar_path(path), table, bare.classes, checks, [bare.key(i) for i in range(len(table))])


def _classes_so_far(path: Path, table: BetonTable) -> tuple[str, ...] | None:
    try:
        sidecar = read_sidecar(sidecar_path(path), table)
    except DataError:
        return None
    return sidecar.classes if sidecar else None


def _bare_fingerprint(table: BetonTable, classes: tuple[str, ...]) -> str:
    return fingerprint_of({"tables": table.sha256, "size": table.file_size, "classes": list(classes)})
