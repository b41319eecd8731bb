"""What readers do: one request in, the pixels of one micro batch out.

A request names samples, epochs, positions and a size; the answer depends on it, the data and the config alone, so it
does not matter which process or thread answers. The work on a request falls into spans of some samples, which threads
do side by side, each writing to its own places of the batch. Errors that a user can repair travel back as values, and
are raised by the stream with their own sentence rather than with a reader's traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.order.mixture import set_of
from dataloaders.pixels.decode import check_shape, stored_shape
from dataloaders.pixels.depth import PixelFormat, UndecodableError
from dataloaders.pixels.mixing import MixArrays, draw_mix
from dataloaders.pixels.transforms import (
    Choices,
    Shown,
    TrainTransform,
    check_windows,
    classes_in_masks,
    draw_choices,
    evaluated_shape,
    show_for_eval,
)
from dataloaders.pixels.view import dtype_of
from dataloaders.reading.damage import candidates
from dataloaders.source import NO_BOXES, Boxes, DamagedSampleError, Fetching, Source
from setformer_dist.core.batch import VOID, Annotations
from setformer_dist.core.errors import DataError, SetformerError

# Samples that a thread takes at once: few enough that threads end together, enough that handing out costs nothing.
_SPAN = 8


@dataclass(frozen=True)
class Request:
    """Samples of one micro batch.

    Attributes:
        samples: (k,) int64, k <= m in evaluation, k = m in training.
        epochs: (k,) int64, the epoch that each sample is in of its set (training only).
        first_position: of `samples[0]` in the run: step x B + its place in the global batch.
        step: optimizer step since the start of the run.
        epoch: of the run.
        shape: (H, W) of the images.
        coming: files that this request and those after it need, for sources that fetch whole files.
        scale: share of the area of crops; None for that of the config.
        mixed: whether the step may mix its samples.
    """

    samples: npt.NDArray[np.int64]
    epochs: npt.NDArray[np.int64] | None = None
    first_position: int = 0
    step: int = -1
    epoch: int = 0
    shape: tuple[int, int] = (0, 0)
    coming: tuple[int, ...] = ()
    scale: tuple[float, float] | None = None
    mixed: bool = True


@dataclass(frozen=True)
class PackedBoxes:
    """The boxes of a micro batch in a few arrays, which cross processes by value.

    A tensor each would cross by a file descriptor each, of which a process has 1024.

    Attributes:
        counts: (m,) int64, boxes of each image.
        boxes: of all images, one after the other.
        sizes: (m, 2) int64, stored (height, width), where the boxes are as they are stored; else None.
    """

    counts: npt.NDArray[np.int64]
    boxes: Boxes
    sizes: npt.NDArray[np.int64] | None = None

    def annotations(self, masks: torch.Tensor | None) -> Annotations:
        """Return what a micro batch says of masks and boxes."""

        def of_each(column: npt.NDArray[Any]) -> tuple[torch.Tensor, ...]:
            return torch.from_numpy(column).split_with_sizes(self.counts.tolist())

        corners, labels = of_each(self.boxes.corners), of_each(self.boxes.labels)
        if self.sizes is None:
            return Annotations(masks, corners, labels)
        areas, crowds = of_each(self.boxes.areas), of_each(self.boxes.crowds)
        return Annotations(masks, corners, labels, areas, crowds, torch.from_numpy(self.sizes))


@dataclass(frozen=True)
class Loaded:
    """The answer to a request.

    Attributes:
        request: what was asked.
        images: (m, B, H, W) of the numbers that `data.pixels` names, B bands.
        samples: (m,) int64, what was really delivered; -1 is filling.
        bad: (place in the micro batch, line) of each damaged sample, places rising.
        mix: what `mix_of` drew.
        error: what stops the run, in place of pixels.
        masks: (m, H, W) uint8, for samples that have them; as stored where images are shown as a whole.
        boxes: for samples that have them.
        soft: (m, classes) float32, for samples that have soft labels; zeros for those of them that do not.
    """

    request: Request
    images: torch.Tensor
    samples: npt.NDArray[np.int64]
    bad: list[tuple[int, str]] = field(default_factory=list)
    mix: MixArrays | None = None
    error: SetformerError | None = None
    masks: torch.Tensor | None = None
    boxes: PackedBoxes | None = None
    soft: torch.Tensor | None = None

    @property
    def annotations(self) -> Annotations | None:
        """Masks and boxes of each image."""
        if self.boxes is None:
            return None if self.masks is None else Annotations(self.masks)
        return self.boxes.annotations(self.masks)


class Work(Protocol):
    """A request being answered. Spans may be filled in any order, by several threads at once."""

    @property
    def spans(self) -> Sequence[range]:
        """Stretches of the micro batch's places that make up all of the work."""
        ...

    def fill(self, span: range) -> None:
        """Do a part of the work."""
        ...

    def loaded(self) -> Loaded:
        """Return the answer, once all spans are filled."""
        ...


class Loading(Protocol):
    """Answers requests, in any process."""

    def begin(self, request: Request) -> Work:
        """Return the work that a request means; quick, as it is done where requests are handed out."""
        ...

    def moved(self) -> int:
        """Return a number that changes with every sample done, and with what comes of a file that a read waits for."""
        ...


def answer(loading: Loading, request: Request) -> Loaded:
    """Answer a request here and now."""
    work = loading.begin(request)
    for span in work.spans:
        work.fill(span)
    return work.loaded()


def mix_of(request: Request, augment: AugmentConfig, seed: int) -> MixArrays | None:
    """Draw the mixing of a request's samples; None if its step mixes nothing."""
    if not request.mixed:
        return None
    return draw_mix(augment, request.shape, seed, request.first_position, len(request.samples))


def spans_of(count: int, length: int = _SPAN) -> list[range]:
    """Return the stretches of `count` places that are done at once."""
    return [range(start, min(start + length, count)) for start in range(0, count, length)]


class _Batch:
    """The micro batch that a request's spans are written into.

    Args:
        count: m.
        shape: (H, W) of the images.
        source: of the samples.
        form: of their pixels.
        of_masks: (H, W) of the masks; None for that of the images.
        as_stored: masks and boxes are put in as they are stored.
    """

    def __init__(
        self,
        count: int,
        shape: tuple[int, int],
        source: Source,
        form: PixelFormat,
        of_masks: tuple[int, int] | None = None,
        as_stored: bool = False,
    ) -> None:
        parts = source.parts
        self.images = torch.zeros((count, form.bands, *shape), dtype=dtype_of(form))
        masks = (count, *(of_masks or shape))
        self.masks = torch.full(masks, VOID, dtype=torch.uint8) if "mask" in parts else None
        self.boxes = [NO_BOXES] * count if "boxes" in parts else None
        self.sizes = np.zeros((count, 2), np.int64) if as_stored else None
        self.soft = torch.zeros((count, len(source.classes))) if "soft" in parts else None
        self.bad: dict[int, str] = {}
        self.errors: dict[int, SetformerError] = {}

    def given_up(self, place: int) -> bool:
        """Return whether a place need not be filled, because one before it cannot be."""
        return bool(self.errors) and min(self.errors) < place

    def put(self, place: int, shown: Shown) -> None:
        self.images[place] = shown.image
        if self.masks is not None and shown.mask is not None:
            self.masks[place] = shown.mask
        if self.boxes is not None and shown.boxes is not None:
            self.boxes[place] = shown.boxes
        if self.sizes is not None:
            self.sizes[place] = shown.stored
        if self.soft is not None and shown.soft is not None:
            self.soft[place] = torch.from_numpy(shown.soft)

    def loaded(self, request: Request, samples: npt.NDArray[np.int64], mix: MixArrays | None = None) -> Loaded:
        if self.errors:  # the first by place, no matter which thread met one first
            return Loaded(request, torch.empty(0), request.samples, error=self.errors[min(self.errors)])
        boxes = None if self.boxes is None else _packed(self.boxes, self.sizes)
        bad = sorted(self.bad.items())
        return Loaded(request, self.images, samples, bad, mix, masks=self.masks, boxes=boxes, soft=self.soft)


def _packed(boxes: list[Boxes], sizes: npt.NDArray[np.int64] | None) -> PackedBoxes:
    counts = np.array([len(one.labels) for one in boxes], np.int64)
    together = Boxes(
        np.concatenate([one.corners for one in boxes]),
        np.concatenate([one.labels for one in boxes]),
        np.concatenate([one.crowds for one in boxes]),
        np.concatenate([one.areas for one in boxes]),
    )
    return PackedBoxes(counts, together, sizes)


class _Sourced:
    """What answering any request has to do with the source.

    Attributes:
        source: of the samples.
        done: samples done; threads may lose a count among them, which does not matter.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.done = 0
        self._coming: tuple[int, ...] = ()

    def moved(self) -> int:
        """Return a number that changes while samples get done, or bytes come that they wait for."""
        return self.done + (self.source.moved() if isinstance(self.source, Fetching) else 0)

    def _expect(self, request: Request) -> None:
        if request.coming != self._coming and isinstance(self.source, Fetching):
            self._coming = request.coming
            self.source.expect(np.array(request.coming, np.int64))


class TrainLoading(_Sourced):
    """Answers training requests: reads, decodes, augments, replaces what is damaged."""

    def __init__(self, source: Source, config: DataConfig, seed: int) -> None:
        super().__init__(source)
        self.config = config
        self.seed = seed
        self.transform = TrainTransform(config, source)

    def begin(self, request: Request) -> Work:
        """Draw the random numbers of a request's samples."""
        self._expect(request)
        return _TrainWork(self, request)


class _TrainWork:
    def __init__(self, loading: TrainLoading, request: Request) -> None:
        assert request.epochs is not None
        self._loading = loading
        self._source = loading.source
        self._transform = loading.transform
        self._config = loading.config
        self._seed = loading.seed
        self._request = request
        self._choices = draw_choices(loading.config.augment, loading.seed, request.epochs, request.samples)
        self._asked = list(zip(request.samples.tolist(), request.epochs.tolist(), strict=True))
        self._delivered = request.samples.copy()
        self._batch = _Batch(len(request.samples), request.shape, loading.source, loading.config.form)
        self.spans = spans_of(len(request.samples))

    def fill(self, span: range) -> None:
        for place in span:
            if self._batch.given_up(place):
                return
            try:
                self._fill_place(place)
            except SetformerError as error:
                self._batch.errors[place] = error
                return
            self._loading.done += 1

    def _fill_place(self, place: int) -> None:
        sample, epoch = self._asked[place]
        choices = self._choices[place]
        try:
            self._batch.put(place, self._show(sample, choices))
            return
        except (UndecodableError, DamagedSampleError) as error:
            reason = _reason(self._source, sample, error)
        # A stand-in takes the random choices of the sample whose place it fills, so that its own appearance in the
        # epoch looks different.
        for stand_in in candidates(set_of(self._source, sample), self._seed, epoch, sample):
            try:
                self._batch.put(place, self._show(stand_in, choices))
            except (UndecodableError, DamagedSampleError):
                continue
            self._delivered[place] = stand_in
            self._batch.bad[place] = f"{reason}; replaced by sample {stand_in} ({self._source.key(stand_in)})"
            return
        raise DataError(f"{reason}, and so is every stand-in tried: restore the shards")

    def _show(self, sample: int, choices: Choices) -> Shown:
        stored, request = self._source.size(sample), self._request
        return self._transform(self._source.read(sample), stored, request.shape, choices, request.scale)

    def loaded(self) -> Loaded:
        mix = mix_of(self._request, self._config.augment, self._seed)
        return self._batch.loaded(self._request, self._delivered, mix)


class EvalLoading(_Sourced):
    """Answers evaluation requests; fills up to `micro_batch` with black images."""

    def __init__(self, source: Source, config: DataConfig, micro_batch: int) -> None:
        super().__init__(source)
        if config.eval_view == "centre":
            check_windows(config, source, [config.shape])
        self.config = config
        self.micro_batch = micro_batch

    def shapes(self, request: Request) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (H, W) of the images and of the masks that answer a request."""
        if self.config.eval_view == "centre" or not len(request.samples):
            return self.config.shape, self.config.shape
        stored = self.source.size(int(request.samples[0]))  # of all of them (`ShardEvalStream`)
        return evaluated_shape(stored, self.config), stored

    def begin(self, request: Request) -> Work:
        """Begin."""
        self._expect(request)
        return _EvalWork(self, request)


class _EvalWork:
    def __init__(self, loading: EvalLoading, request: Request) -> None:
        self._loading = loading
        self._source = loading.source
        self._config = loading.config
        self._request = request
        self._samples = request.samples.tolist()
        images, masks = loading.shapes(request)
        as_stored = loading.config.eval_view == "whole"
        self._batch = _Batch(loading.micro_batch, images, loading.source, loading.config.form, masks, as_stored)
        self._delivered = np.full(loading.micro_batch, -1, dtype=np.int64)
        self._delivered[: len(self._samples)] = request.samples
        self.spans = spans_of(len(self._samples))

    def fill(self, span: range) -> None:
        for place in span:
            if self._batch.given_up(place):
                return
            try:
                self._batch.put(place, self._show(self._samples[place]))
            except (UndecodableError, DamagedSampleError) as error:
                line = _reason(self._source, self._samples[place], error)
                if self._config.bad_validation == "raise":
                    self._batch.errors[place] = DataError(
                        f'{line}: restore the shard, or set data.bad_validation = "zero_weight" to leave such samples '
                        "out of the count"
                    )
                    return
                self._batch.bad[place] = line
            except SetformerError as error:
                self._batch.errors[place] = error
                return
            self._loading.done += 1

    def _show(self, sample: int) -> Shown:
        stored = self._source.read(sample)
        if self._config.eval_view == "whole":  # whose batch is as large as the index says
            check_shape(stored_shape(stored.image, self._config.form), self._source.size(sample))
        return show_for_eval(stored, self._config, classes_in_masks(self._source))

    def loaded(self) -> Loaded:
        return self._batch.loaded(self._request, self._delivered)


def _reason(source: Source, sample: int, error: Exception) -> str:
    if isinstance(error, DamagedSampleError):
        return str(error)
    return f"{source.place(sample)} is damaged ({error})"
