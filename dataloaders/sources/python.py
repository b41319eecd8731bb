"""A data set in Python as a source: images with labels, with soft labels where it gives them, with masks or boxes.

    dataset[i] -> (image, label)            image (H, W, 3) uint8, an array or a tensor; label an integer
    dataset[i] -> (image, label, soft)      soft: a probability for each class in order, or a table by class name
    dataset[i] -> (image, mask)             mask (H, W) integers: the class of each pixel, 255 where it does not count
    dataset[i] -> (image, objects)          a table as torchvision's detection has it: "boxes" (k, 4) x0, y0, x1, y1 in
                                            pixels, "labels" (k,) integers, and if it likes "iscrowd" (k,), "area" (k,)

The same i must always give the same sample: order, augmentation and resume depend on it. All samples are read once at
the start, for their sizes and for the fingerprint that a resume compares. They may be read by several threads at once,
and with `data.workers` the data set is pickled to the readers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from dataloaders.pixels.depth import UndecodableError
from dataloaders.source import NO_BOXES, Boxes, DamagedSampleError, Stored
from dataloaders.sources.boxes import boxes_of, inside
from dataloaders.sources.classes import soft_label
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import DataError

# What boxes have, and torchvision's names of it.
_KEYS = {"boxes": "boxes", "labels": "labels", "crowds": "iscrowd", "areas": "area"}


class Dataset(Protocol):
    """A sequence of samples, such as a `torch.utils.data.Dataset` with a length."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def __getitem__(self, index: int) -> Sequence[object]:
        """Return sample `index`: image and label, and a soft label or None; or image and mask, or image and objects."""
        ...


class PythonSource:
    """A data set in Python (`Source`).

    Args:
        dataset: its samples.
        classes: class names; a label is a position in it.
        name: for messages.

    Raises:
        DataError: it is empty or no sequence, its classes are no list of names, or a sample is not as this module says.
    """

    def __init__(self, dataset: Dataset, classes: Sequence[str], name: str = "the data set in Python") -> None:
        if isinstance(classes, str) or not isinstance(classes, Sequence):
            raise DataError(
                f"the classes of {name} must be a list of names, such as ['cat', 'dog'], not {classes!r:.40}"
            )
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(f"{name} is {type(dataset).__name__}, which has no length and no items: give a sequence")
        self._dataset = dataset
        self.classes = tuple(classes)
        self.name = name
        self.num_samples = len(dataset)
        if not self.num_samples:
            raise DataError(f"{name} is empty")
        digest = hashlib.sha256(repr(self.classes).encode())
        sizes, labels, soft, masks, boxes = [], [], False, 0, 0
        for number in range(self.num_samples):
            stored, label = self._sample(number)
            assert isinstance(stored.image, np.ndarray)
            sizes.append(stored.image.shape[:2])
            labels.append(label)
            soft, masks = soft or stored.soft is not None, masks + (stored.mask is not None)
            boxes += stored.boxes is not None
            digest.update(repr((stored.image.shape, label)).encode())
            digest.update(stored.image.tobytes())
            digest.update(b"" if stored.soft is None else stored.soft.tobytes())
            digest.update(stored.mask or b"")
            digest.update(_bytes_of(stored.boxes))
        if masks not in (0, self.num_samples):
            raise DataError(f"{masks} of the {self.num_samples} samples of {name} have masks: give all of them one")
        if boxes not in (0, self.num_samples):
            raise DataError(
                f"{boxes} of the {self.num_samples} samples of {name} have boxes: give all of them a table, "
                "empty where there is no object"
            )
        self._refuse_random(0)
        self._sizes = np.array(sizes, np.int32)
        self._labels = torch.tensor(labels)
        self.parts = frozenset({"boxes"} if boxes else {"mask"} if masks else {"soft"} if soft else ())
        self.fingerprint = digest.hexdigest()
        self.shards: npt.NDArray[np.int32] = np.zeros(self.num_samples, np.int32)

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (padding)."""
        numbers = torch.from_numpy(samples)
        return torch.where(numbers < 0, 0, self._labels[numbers.clamp(min=0)])

    def size(self, sample: int) -> tuple[int, int]:
        """Return a sample's (height, width) in pixels."""
        height, width = self._sizes[sample]
        return int(height), int(width)

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width), each number over all samples independently."""
        (low_h, low_w), (high_h, high_w) = self._sizes.min(axis=0), self._sizes.max(axis=0)
        return (int(low_h), int(low_w)), (int(high_h), int(high_w))

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (N, 2) heights and widths."""
        return self._sizes

    def key(self, sample: int) -> str:
        """Return the number of a sample, as text."""
        return str(sample)

    def place(self, sample: int) -> str:
        """Name a sample for a message."""
        return f"sample {sample} of {self.name}"

    def read(self, sample: int) -> Stored:
        """Return a sample.

        Raises:
            DamagedSampleError: it has another size or label than at the start.
            DataError: it is not as this module says.
        """
        stored, label = self._sample(sample)
        assert isinstance(stored.image, np.ndarray)
        if stored.image.shape[:2] != self.size(sample) or label != int(self._labels[sample]):
            raise DamagedSampleError(f"{self.place(sample)} is another one than at the start")
        return stored

    def close(self) -> None:
        """Nothing is open."""

    def _refuse_random(self, number: int) -> None:
        """Refuse a data set whose sample differs when it is read again, as one with a random transform."""
        (first, label), (again, label_again) = self._sample(number), self._sample(number)
        same = np.array_equal(np.asarray(first.image), np.asarray(again.image)) and first.mask == again.mask
        if label != label_again or not same or _bytes_of(first.boxes) != _bytes_of(again.boxes):
            raise DataError(
                f"{self.place(number)} differs when it is read again: leave random transforms to [data.augment], or "
                "derive them from the index"
            )

    def __getstate__(self) -> dict[str, object]:
        """Return what readers in processes of their own get (`data.workers`).

        Raises:
            DataError: they would not find the data set's class.
        """
        if type(self._dataset).__module__ == "__main__":
            raise DataError(
                f"{self.name} is a {type(self._dataset).__name__} of the main program, which the processes of "
                "data.workers do not import: define it in a module, or set data.workers = 0 and data.threads"
            )
        return self.__dict__

    def _sample(self, number: int) -> tuple[Stored, int]:
        try:
            found = self._dataset[number]
        except Exception as error:
            raise DataError(f"{self.place(number)} cannot be read: {type(error).__name__}: {error}") from error
        if not isinstance(found, tuple | list) or len(found) not in (2, 3):
            raise DataError(
                f"{self.place(number)} is not (image, label), (image, label, soft label), (image, mask) or "
                "(image, objects)"
            )
        image, label = np.asarray(found[0]), found[1]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(f"{self.place(number)}: its image is {image.dtype} {image.shape}, not uint8 (H, W, 3)")
        if len(found) == 2 and getattr(label, "ndim", 0) == 2:
            return Stored(np.ascontiguousarray(image), self._mask(number, np.asarray(label), image.shape[:2])), 0
        if len(found) == 2 and isinstance(label, dict):
            return Stored(np.ascontiguousarray(image), boxes=self._boxes(number, label, image.shape[:2])), 0
        if isinstance(label, bool) or not hasattr(label, "__index__") or not 0 <= int(label) < len(self.classes):
            raise DataError(
                f"{self.place(number)} has label {label!r:.40}: it must be from 0 to {len(self.classes) - 1}"
            )
        soft = found[2] if len(found) == 3 else None
        return Stored(np.ascontiguousarray(image), soft=None if soft is None else self._soft(number, soft)), int(label)

    def _mask(self, number: int, mask: npt.NDArray[Any], shape: tuple[int, ...]) -> bytes:
        """Return a mask as a PNG, as other sources have it."""
        if mask.dtype.kind not in "iu" or mask.shape != shape:
            raise DataError(f"{self.place(number)}: its mask is {mask.dtype} {mask.shape}, not integers {shape}")
        wrong = mask[(mask != VOID) & ((mask < 0) | (mask >= len(self.classes)))]
        if wrong.size:
            raise DataError(
                f"{self.place(number)}: its mask has class {int(wrong[0])}, which must be from 0 to "
                f"{len(self.classes) - 1}, or {VOID} for a pixel that does not count"
            )
        file = io.BytesIO()
        PIL.Image.fromarray(mask.astype(np.uint8)).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def _boxes(self, number: int, said: dict[str, Any], shape: tuple[int, int]) -> Boxes:
        """Return the boxes of an image of (height, width)."""
        if set(said) <= {"image_id"}:  # torchvision's word for an image without objects
            return NO_BOXES
        try:
            if (form := getattr(said["boxes"], "format", None)) is not None and form.value != "XYXY":
                raise ValueError(f"they are {form.value}, not x0, y0, x1, y1")
            corners, labels = np.asarray(said["boxes"]), np.asarray(said["labels"])
            if corners.size and (corners.ndim != 2 or corners.shape[1] != 4):
                raise ValueError(f"they are {corners.dtype} {corners.shape}, not (k, 4)")
            if labels.size and labels.dtype.kind not in "iu":
                raise ValueError(f"their labels are {labels.dtype}, not integers")
            table = {ours: said[theirs] for ours, theirs in _KEYS.items() if theirs in said}
            return inside(boxes_of(table), shape, len(self.classes))
        except (ValueError, KeyError, TypeError, OverflowError, UndecodableError) as error:
            why = f"there are no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{self.place(number)}: its boxes are none ({why})") from None

    def _soft(self, number: int, said: object) -> npt.NDArray[np.float32]:
        values = said if isinstance(said, dict) else np.asarray(said, np.float64).tolist()
        try:
            return soft_label(values, self.classes)
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.place(number)}: its soft label is none ({error})") from None


def _bytes_of(boxes: Boxes | None) -> bytes:
    """Return what tells boxes from others."""
    if boxes is None:
        return b""
    return b"".join(column.tobytes() for column in (boxes.corners, boxes.labels, boxes.crowds, boxes.areas))
