"""`data.engine = "ffcv"`: our order, our crops and our rules for damage, decoded by FFCV.

    plan (pure) -> requests -> FFCV's thread: bytes checked, crops filled in -> FFCV's threads: decode, crop, resize
                                                  -> micro batches, in the order of the requests

Which samples, crops and mirrorings a step has is what the native engine would give it, and so are the cursor, the
resumption at any step, the epochs' ends and the steps at which the image size changes. What differs is the resize:
OpenCV's area interpolation, whatever `data.interpolation` says, in evaluation too. An image that FFCV cannot decode is
read by the native engine, which knows whether it is damaged, and what then takes its place.

Not offered: containers other than one .beton file, crop = "pad", RandAugment and other policies, colour jitter,
erasing, augmentations of the user's own. Mixup, cutmix and smoothing happen on the device and work as ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.beton.reader import BetonDataset
from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.ffcv.pipeline import GOOD, Pipeline, Run
from dataloaders.pixels.depth import MAX_PIXELS
from dataloaders.pixels.transforms import draw_choices, mirrored
from dataloaders.pixels.view import View, centre_view, random_view, scaled
from dataloaders.reading.loading import EvalLoading, Loaded, Loading, Request, TrainLoading, answer, mix_of
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.source import DamagedSampleError, Source
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.ranks import RankInfo

# Samples that FFCV is given at once. Between two such stretches its threads wait for one batch.
_STRETCH = 1 << 15

Making = Callable[[], Iterator[Request]]


class FfcvTrainStream(ShardTrainStream):
    """Endless augmented training samples of one rank (`TrainStream`), decoded by FFCV; else as `ShardTrainStream`.

    Raises:
        ConfigError: also for what this engine does not offer.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        seed: int,
        ranks: RankInfo,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        super().__init__(source, config, seed, ranks, global_batch, micro_batch)
        beton = _only_beton(source)
        _check_offered(config)
        augment = config.augment

        def views(request: Request) -> list[View]:
            assert request.epochs is not None
            sizes = [beton.size(sample) for sample in request.samples.tolist()]
            if augment.crop == "none":
                found = [centre_view(stored, request.shape, config.eval_crop) for stored in sizes]
            choices = draw_choices(augment, seed, request.epochs, request.samples)
            if augment.crop == "resized":
                found = [
                    random_view(s, request.shape, scaled(augment, request.scale), c.crop)
                    for s, c in zip(sizes, choices, strict=True)
                ]
            return [mirrored(view, augment, c) for view, c in zip(found, choices, strict=True)]

        def mix(request: Request) -> Any:
            return mix_of(request, augment, seed)

        # One sample by itself has nobody to mix with; all of its micro batch is mixed below.
        unmixed = config.model_copy(update={"augment": augment.model_copy(update={"mix_prob": 0.0})})
        native = TrainLoading(beton, unmixed, seed)
        self._readers = _FfcvReaders(beton, config, micro_batch, views, native, mix)  # type: ignore[assignment]


class FfcvEvalStream(ShardEvalStream):
    """Each sample of a split exactly once over all ranks (`EvalStream`), decoded by FFCV; else as `ShardEvalStream`.

    Raises:
        ConfigError: also for what this engine does not offer.
    """

    def __init__(self, source: Source, config: DataConfig, ranks: RankInfo, micro_batch: int) -> None:
        super().__init__(source, config, ranks, micro_batch)
        beton = _only_beton(source)
        _check_offered(config)
        shape = config.shape

        def views(request: Request) -> list[View]:
            return [centre_view(beton.size(sample), shape, config.eval_crop) for sample in request.samples.tolist()]

        native = EvalLoading(beton, config, 1)
        self._readers = _FfcvReaders(beton, config, micro_batch, views, native)  # type: ignore[assignment]


def _only_beton(source: Source) -> BetonDataset:
    if not isinstance(source, BetonDataset):
        raise ConfigError(
            f'data.engine = "ffcv" reads one .beton file, which {source.name} is not: convert it with `setformer data '
            'convert`, or set the engine to "native"'
        )
    return source


def _check_offered(config: DataConfig) -> None:
    augment: AugmentConfig = config.augment
    wrong = [
        text
        for text, used in (
            *((f'augment.crop = "{crop}"', augment.crop == crop) for crop in ("pad", "scale_jitter")),
            (f"augment.randaugment_ops = {augment.randaugment_ops}", augment.randaugment_ops > 0),
            (f'augment.policy = "{augment.policy}"', augment.policy != "none"),
            (f"augment.color_jitter = {augment.color_jitter}", augment.color_jitter > 0),
            (f"augment.erasing = {augment.erasing}", augment.erasing > 0),
            (f"augment.own = {list(augment.own)}", bool(augment.own)),
            (f"workers = {config.workers} (its threads are data.threads)", config.workers > 0),
        )
        if used
    ]
    if wrong:
        raise ConfigError(f'data.engine = "ffcv" does not offer {", ".join(wrong)}: leave it out, or use "native"')


class _FfcvReaders:
    """Has requests answered in order by FFCV (in the place of `dataloaders.reading.readers.Readers`).

    Args:
        beton: the file.
        config: gives threads, prefetch and read_timeout.
        micro_batch: m.
        views: how each sample of a request is seen.
        native: answers for samples that FFCV cannot decode, one at a time.
        mix: what mixes a request's samples, if anything does.
    """

    def __init__(
        self,
        beton: BetonDataset,
        config: DataConfig,
        micro_batch: int,
        views: Callable[[Request], list[View]],
        native: Loading,
        mix: Callable[[Request], Any] = lambda request: None,
    ) -> None:
        self._beton = beton
        self._micro_batch = micro_batch
        self._views = views
        self._native = native
        self._mix = mix
        self._timeout = config.read_timeout
        self._shape = config.shape
        self._pipeline = Pipeline(str(beton.path), micro_batch, max(1, config.threads), config.prefetch)
        self._run: Run | None = None
        self._call = 0

    def answers(self, make_requests: Making) -> Iterator[Loaded]:
        """Yield the answers; the ones being made for an earlier call are given up.

        Raises:
            DataError: FFCV's thread died or hung, the file cannot be read, or a sample stops the run.
        """
        self.close()
        call = self._call
        try:
            for stretch in stretches(make_requests(), _STRETCH):
                self.close_run()
                yield from self._answers(stretch, call)
                if self._call != call:
                    return
        finally:
            if self._call == call:
                self.close()

    def _answers(self, stretch: list[Request], call: int) -> Iterator[Loaded]:
        count = sum(len(request.samples) for request in stretch)
        shape = stretch[0].shape if stretch[0].epochs is not None else self._shape
        if count:
            self._run = self._pipeline.run(count, shape, lambda batch, records: self._fill(stretch[batch], records))
        for request in stretch:
            if self._call != call:
                return
            loaded = self._loaded(request, shape)
            if loaded.error is not None:
                raise loaded.error
            yield loaded

    def _fill(self, request: Request, records: npt.NDArray[Any]) -> None:
        """Give FFCV a batch's positions and crops, in FFCV's thread; check their bytes."""
        table, samples = self._beton.table, request.samples
        records["place"], records["raw"] = table.place[samples], table.mode[samples]
        records["height"], records["width"] = table.height[samples], table.width[samples]
        for place, view in enumerate(self._views(request)):
            top, left, height, width = seen_part(view)
            record = records[place]
            record["top"], record["left"], record["crop_height"], record["crop_width"] = top, left, height, width
            record["flip"], record["upside_down"] = view.mirrored, view.upside_down
            if self._is_whole(int(samples[place])):
                record["size"] = table.size[samples[place]]
            # Else its size stays 0, so FFCV passes it by, and the native engine says what is wrong.

    def _is_whole(self, sample: int) -> bool:
        height, width = self._beton.size(sample)
        if height * width > MAX_PIXELS:
            return False
        try:
            self._beton.read(sample)
        except DamagedSampleError:
            return False
        return True

    def _loaded(self, request: Request, shape: tuple[int, int]) -> Loaded:
        count = len(request.samples)
        delivered = np.full(self._micro_batch, -1, np.int64)
        delivered[:count] = request.samples
        pixels = np.zeros((self._micro_batch, shape[0] + 1, shape[1], 3), np.uint8)  # a copy: FFCV reuses its slots
        if count:
            assert self._run is not None
            pixels[:count] = self._run.next(self._timeout)
        images = torch.from_numpy(pixels[:, :-1]).permute(0, 3, 1, 2)  # channels last in memory, as FFCV makes them
        bad: list[tuple[int, str]] = []
        for place in np.flatnonzero(pixels[:count, -1, 0, 0] != GOOD).tolist():
            one = self._by_native(request, place)
            if one.error is not None:
                return one
            images[place], delivered[place] = one.images[0], one.samples[0]
            bad += [(place, line) for _, line in one.bad]
        return Loaded(request, images, delivered, bad, self._mix(request))

    def _by_native(self, request: Request, place: int) -> Loaded:
        here = slice(place, place + 1)
        epochs = None if request.epochs is None else request.epochs[here]
        return answer(self._native, dataclasses.replace(request, samples=request.samples[here], epochs=epochs))

    def close_run(self) -> None:
        """End FFCV's thread."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def close(self) -> None:
        """End FFCV's thread, and every iterator of answers."""
        self._call += 1
        self.close_run()


def stretches(requests: Iterator[Request], limit: int) -> Iterator[list[Request]]:
    """Yield lists of requests that follow each other and are of one shape: `limit` samples at most, or one request."""
    found: list[Request] = []
    count = 0
    for request in requests:
        if found and (request.shape != found[0].shape or count + len(request.samples) > limit):
            yield found
            found, count = [], 0
        found.append(request)
        count += len(request.samples)
    if found:
        yield found


def seen_part(view: View) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the stored image that a view shows, in whole pixels.

    Views that look beyond the image cannot be shown so.
    """
    sides: list[tuple[int, int]] = []
    pairs: Sequence[tuple[int, int, int, int, int]] = [
        (view.box[axis], view.box[axis + 2], view.resized[axis], view.offset[axis], view.shape[axis]) for axis in (0, 1)
    ]
    for start, length, resized, offset, shown in pairs:
        first = start + round(offset * length / resized)
        sides.append((first, max(1, min(round(shown * length / resized), start + length - first))))
    (top, height), (left, width) = sides
    return top, left, height, width
