"""Whole-slide images in folders, by OpenSlide: what `setformer data pack --slides` reads.

    <class>/…/slide.svs     the class is the first folder; slides in no folder at all are of one class

A slide is a file of gigapixels in several resolutions, its levels. Only formats of one file are read: Aperio, Hamamatsu
NDPI, Leica, Ventana, Trestle, Philips and tiled TIFF, which all begin as a TIFF does. Others (MRXS, VMS, VMU, DICOM)
name further files, and nothing is opened here because a file says so. Where a scanner stored no pixels, the slide's
background colour is seen, white unless the file says another.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.pixels.tiff import is_tiff
from dataloaders.source import DamagedSampleError, Stored
from dataloaders.sources.class_folders import files_below
from dataloaders.sources.classes import UNLABELLED
from dataloaders.sources.files import open_regular
from dataloaders.sources.passed import Passed
from setformer_dist.core.errors import ConfigError, DataError

SUFFIXES = frozenset({".svs", ".ndpi", ".scn", ".bif", ".svslide", ".tif", ".tiff"})
_OF_SEVERAL_FILES = {".mrxs": "MIRAX", ".vms": "Hamamatsu VMS", ".vmu": "Hamamatsu VMU", ".dcm": "DICOM"}

_OPEN = 4  # slides that a process holds open


class SlideImage:
    """One level of a slide (`dataloaders.source.Tiled`): RGB pixels, read by windows.

    Args:
        path: of the file.
        level: of its resolutions; 0 is the finest.

    Raises:
        DamagedSampleError: it is no slide of one file, is damaged, or has no such level.
    """

    numbers = "uint8"

    def __init__(self, path: str, level: int) -> None:
        self._path = path
        self._level = level
        slide = _opened(path)
        if level >= slide.level_count:
            count = slide.level_count
            raise DamagedSampleError(f"{path} has no level {level}: its {count} are 0 to {count - 1}")
        width, height = slide.level_dimensions[level]
        self.shape = (height, width, 3)

    @property
    def content(self) -> bytes:
        """OpenSlide's digest of the slide; its path where there is none."""
        return f"{_opened(self._path).properties.get('openslide.quickhash-1', self._path)} {self._level}".encode()

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return Path(self._path).stat().st_size

    def window(self, box: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
        """Return the pixels of (top, left, height, width), (h, w, 3).

        Raises:
            DamagedSampleError: a tile of the slide is damaged.
        """
        top, left, height, width = box
        slide = _opened(self._path)
        scale_y = slide.dimensions[1] / self.shape[0]
        scale_x = slide.dimensions[0] / self.shape[1]
        place = (round(left * scale_x), round(top * scale_y))  # OpenSlide takes places of level 0
        try:
            seen = slide.read_region(place, self._level, (width, height))
        except _openslide().OpenSlideError as error:
            _opened.cache_clear()  # one that has failed answers nothing any more
            raise DamagedSampleError(f"{self._path} is damaged ({error})") from None
        pixels = np.asarray(seen)
        if (alpha := pixels[..., 3]).min() == 255:
            return np.ascontiguousarray(pixels[..., :3])
        share = (alpha / np.float32(255))[..., None]
        shown = pixels[..., :3] * share + _background(slide) * (1 - share)
        return np.rint(shown).astype(np.uint8)


class SlideFolder:
    """The slides of a folder by number (`Source`).

    Args:
        folder: searched at any depth.
        level: that is read of each.
        labels: false makes all of one class, whatever folders they lie in.

    Raises:
        DataError: there are no slides, or some lie in class folders and some in none.
    """

    def __init__(self, folder: Path, level: int, labels: bool = True) -> None:
        _openslide()
        self._folder, self._level = folder, level
        passed = Passed()
        self._keys = sorted(name for name, _ in files_below(folder, passed) if Path(name).suffix.lower() in SUFFIXES)
        if not self._keys:
            raise DataError(f"{folder} holds no slides ({', '.join(sorted(SUFFIXES))}){_others(folder)}")
        loose = [key for key in self._keys if "/" not in key]
        if labels and loose and len(loose) < len(self._keys):
            raise DataError(
                f"{loose[0]} in {folder} is in no class folder, and other slides are: move it into one, or pack the "
                "class folders alone"
            )
        of_each = [UNLABELLED if loose or not labels else key.split("/")[0] for key in self._keys]
        self.classes = tuple(sorted(set(of_each)))
        self._label = np.array([self.classes.index(name) for name in of_each], np.int64)
        self.parts: frozenset[str] = frozenset()
        self.name = str(folder)
        self.num_samples = len(self._keys)

    @property
    def fingerprint(self) -> str:
        """Identity of names, sizes and times of the files, and of the level."""
        facts = [(key, (at := (self._folder / key).stat()).st_size, at.st_mtime_ns) for key in self._keys]
        return hashlib.sha256(repr((self._level, facts)).encode()).hexdigest()

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(N,): each slide is a file of its own."""
        return np.arange(self.num_samples, dtype=np.int32)

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        return torch.from_numpy(np.where(samples >= 0, self._label[samples], 0))

    def size(self, sample: int) -> tuple[int, int]:
        """Return a slide's (height, width) in pixels of the level."""
        height, width, _ = self._image(sample).shape
        return height, width

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (N, 2) heights and widths."""
        return np.array([self.size(sample) for sample in range(self.num_samples)], np.int32)

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width), each number over all slides independently."""
        sizes = self.sizes()
        small, large = sizes.min(0).tolist(), sizes.max(0).tolist()
        return (small[0], small[1]), (large[0], large[1])

    def key(self, sample: int) -> str:
        """Return a slide's path within the folder."""
        return self._keys[sample]

    def place(self, sample: int) -> str:
        """Name a slide for a message."""
        return f"sample {sample} ({self._folder / self._keys[sample]})"

    def read(self, sample: int) -> Stored:
        """Return a slide, of which windows are read.

        Raises:
            DamagedSampleError: it is none, or has no such level.
        """
        return Stored(self._image(sample))

    def _image(self, sample: int) -> SlideImage:
        return SlideImage(str(self._folder / self._keys[sample]), self._level)

    def close(self) -> None:
        """Close the slides that are open."""
        _opened.cache_clear()


def _others(folder: Path) -> str:
    """Return what else lies there that some call slides; "" for nothing."""
    for name, _ in files_below(folder, Passed()):
        if (kind := _OF_SEVERAL_FILES.get(Path(name).suffix.lower())) is not None:
            return f"; {name} is {kind}, whose files name others, which are not opened: convert it to a tiled TIFF"
    return ""


def _openslide() -> Any:
    try:
        return importlib.import_module("openslide")
    except ImportError:
        raise ConfigError(
            'whole-slide images need OpenSlide, which is not installed: pip install "setformer_dist[slides]"'
        ) from None


@functools.lru_cache(maxsize=_OPEN)
def _opened(path: str) -> Any:
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            head = file.read(4) or b""
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): restore it") from None
    if not is_tiff(head):
        raise DamagedSampleError(f"{path} does not begin as a slide of one file does (a TIFF)")
    openslide = _openslide()
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise DamagedSampleError(f"{path} is not a whole slide ({error})") from None


def _background(slide: Any) -> npt.NDArray[np.float32]:
    said = slide.properties.get("openslide.background-color", "FFFFFF")
    return np.frombuffer(bytes.fromhex(said), np.uint8).astype(np.float32)
