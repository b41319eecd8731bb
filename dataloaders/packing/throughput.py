"""How fast this data loads on this machine, where the time of an image goes, and what would help.

    read          the container's `read`, by the wall clock: waiting for a disk counts
      checksum    the part of it that comparing checksums takes
    decode        the bare decoder, whole images: what no loader is faster than, unless it decodes less
    crop, resize  random resized crop and flip, beyond decoding
    augment       what the recipe adds to that
    hand over     the copy into the batch

All but `read` are measured in seconds of the processor, so other programs on the machine do not count. What would
help is measured as well, on some of the images, shrunk or as raw pixels, and not guessed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.packing.intake import Intake, shrunk_pixels, take_in
from dataloaders.pixels.decode import decode
from dataloaders.reading.loading import Request, TrainLoading, answer
from dataloaders.source import DamagedSampleError, Source, Stored, Tiled, spread_evenly
from setformer_dist.core.errors import ConfigError, DataError

# Images held in memory while they are measured, and those of them on which something else is tried.
_HELD, _HELD_BYTES, _TRIED = 256, 1 << 29, 32

# Images that are shrunk keep this many times the model's side: crops of a fifth of the area are still at full size.
_ROOM = 2.2
_SIDE_STEP = 64

# A part of the time beyond which it is named as what limits.
_LARGE_SHARE = 0.4


@dataclass(frozen=True)
class Part:
    """A part of an image's time: what, and seconds per image."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Option:
    """What something else would give: what it is, images per second and core, bytes of an image relative to now."""

    name: str
    rate: float
    bytes_ratio: float


@dataclass(frozen=True)
class Throughput:
    """What was measured.

    Attributes:
        name: of the data.
        images: how many different images were measured.
        image_bytes: of one, on average.
        megapixels: of one, on average.
        image_size: of what the model sees.
        parts: of an image's time; their sum is all of it.
        checksum: seconds per image, contained in "read".
        rate: images per second of one core, with everything.
        bare_rate: images per second of one core, decoding whole images alone; 0 for raw pixels.
        threads: (threads, images per second by the wall clock).
        options: what would be faster.
        advice: one or two sentences.
    """

    name: str
    images: int
    image_bytes: float
    megapixels: float
    image_size: int
    parts: tuple[Part, ...]
    checksum: float
    rate: float
    bare_rate: float
    threads: tuple[tuple[int, float], ...]
    options: tuple[Option, ...]
    advice: tuple[str, ...]


class _Held:
    """Some samples of a source in memory, as a source of their own."""

    def __init__(self, source: Source, stored: list[Stored], numbers: list[int], sizes: list[tuple[int, int]]) -> None:
        self._source, self._stored, self._numbers, self._sizes = source, stored, numbers, sizes
        self.num_samples = len(stored)
        self.classes, self.fingerprint, self.name = source.classes, source.fingerprint, source.name
        self.parts: frozenset[str] = source.parts
        self.shards = np.zeros(len(stored), np.int32)

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.zeros(len(samples), dtype=torch.int64)

    def size(self, sample: int) -> tuple[int, int]:
        return self._sizes[sample]

    def sizes(self) -> npt.NDArray[np.int32]:
        return np.array(self._sizes, np.int32)

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        table = self.sizes()
        low, high = table.min(0).tolist(), table.max(0).tolist()
        return (low[0], low[1]), (high[0], high[1])

    def key(self, sample: int) -> str:
        return self._source.key(self._numbers[sample])

    def place(self, sample: int) -> str:
        return self._source.place(self._numbers[sample])

    def read(self, sample: int) -> Stored:
        return self._stored[sample]

    def close(self) -> None:
        pass

    def __getstate__(self) -> object:
        return self.__dict__


def measure(
    source: Source,
    config: DataConfig,
    threads: tuple[int, ...] = (1, 2),
    seconds: float = 2.0,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Throughput:
    """Measure how fast a data set loads.

    Args:
        source: opened data.
        config: image size and augmentation, as training would have them.
        threads: numbers of threads to try.
        seconds: of each measurement.
        on_progress: called with what is measured next.

    Raises:
        DataError: no sample is whole.
    """
    with _one_torch_thread():
        return _measure(source, config, threads, seconds, on_progress)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Measure as readers work: each thread for itself, none helped by torch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(
    source: Source, config: DataConfig, threads: tuple[int, ...], seconds: float, on_progress: Callable[[str], None]
) -> Throughput:
    on_progress("read")
    held, read_seconds = _read(source)
    stored = [held.read(sample) for sample in range(held.num_samples)]
    images = [sample.image for sample in stored]
    on_progress("decode")
    checksum = _timed(lambda at: zlib.crc32(_view(images[at])), len(images), seconds / 4)
    decoding = _timed(lambda at: decode(images[at]), len(images), seconds)
    on_progress("crop and resize")
    geometry = _timed(_loader(held, _geometry_only(config)), held.num_samples, seconds)
    on_progress("augment")
    full = _timed(_loader(held, config), held.num_samples, seconds)
    hand_over = _copying(config.image_size, seconds / 4)
    # A loader that decodes a large photograph at a fraction of its size spends less than the bare decoder.
    decoded = min(decoding, geometry)
    parts = (
        Part("read", read_seconds),
        Part("decode", decoded),
        Part("crop, resize", max(0.0, geometry - decoded - hand_over)),
        Part("augment", max(0.0, full - geometry)),
        Part("hand over", hand_over),
    )
    on_progress("threads")
    rates = tuple((count, _threaded(held, config, count, seconds)) for count in threads)
    on_progress("what would help")
    total = sum(part.seconds for part in parts)
    mean_bytes = float(np.mean([len(_view(image)) for image in images]))
    options = _options(held, config, read_seconds, seconds / 2)
    sizes = held.sizes().astype(np.float64)
    return Throughput(
        name=source.name,
        images=held.num_samples,
        image_bytes=mean_bytes,
        megapixels=float((sizes[:, 0] * sizes[:, 1]).mean() / 1e6),
        image_size=config.image_size,
        parts=parts,
        checksum=min(checksum, read_seconds),
        rate=1 / total,
        bare_rate=1 / decoding if isinstance(images[0], bytes) else 0.0,
        threads=rates,
        options=options,
        advice=tuple(_advice(parts, total, options)),
    )


def _read(source: Source) -> tuple[_Held, float]:
    """Return some samples, and the seconds by the wall clock that reading one took."""
    stored, numbers, sizes = [], [], []
    spent, held_bytes = 0.0, 0
    for sample in spread_evenly(source.num_samples, _HELD):
        start = time.perf_counter()
        try:
            one = source.read(sample)
        except DamagedSampleError:
            continue
        spent += time.perf_counter() - start
        stored.append(one)
        numbers.append(sample)
        sizes.append(source.size(sample))
        held_bytes += len(_view(one.image))
        if held_bytes > _HELD_BYTES:
            break
    if not stored:
        raise DataError(f"no sample of {source.name} is whole: see `setformer data verify`")
    return _Held(source, stored, numbers, sizes), spent / len(stored)


def _view(image: bytes | npt.NDArray[Any] | Tiled) -> bytes | memoryview:
    if isinstance(image, Tiled):
        raise ConfigError("images packed as tiles are read by windows, which this does not measure: name other data")
    return image if isinstance(image, bytes) else np.ascontiguousarray(image).reshape(-1).data


def _timed(work: Callable[[int], object], count: int, seconds: float) -> float:
    """Return the processor's seconds per call, over whole rounds of `count` calls."""
    work(0)
    calls, start, begin = 0, time.thread_time(), time.perf_counter()
    while time.perf_counter() - begin < seconds or not calls:
        for at in range(count):
            work(at)
            if time.perf_counter() - begin > 4 * seconds:  # images so large that a round takes too long
                return (time.thread_time() - start) / (calls + at + 1)
        calls += count
    return (time.thread_time() - start) / calls


def _loader(held: Source, config: DataConfig) -> Callable[[int], object]:
    loading = TrainLoading(held, config, seed=0)
    shape = (config.image_size, config.image_size)

    def load(sample: int) -> None:
        epoch, place = divmod(sample, held.num_samples)
        loaded = answer(loading, Request(np.array([place]), np.array([epoch]), shape=shape))
        if loaded.error is not None:
            raise loaded.error

    return load


def _geometry_only(config: DataConfig) -> DataConfig:
    kept = config.augment
    geometry = {name: getattr(kept, name) for name in ("crop", "pad", "scale", "ratio", "flip", "vflip")}
    plain = AugmentConfig(**geometry)
    return config.model_copy(update={"augment": plain})


def _copying(size: int, seconds: float) -> float:
    batch, image = torch.empty((16, 3, size, size), dtype=torch.uint8), torch.zeros((3, size, size), dtype=torch.uint8)
    return _timed(lambda at: batch[at].copy_(image), 16, seconds)


def _threaded(held: Source, config: DataConfig, threads: int, seconds: float) -> float:
    """Return images per second of several threads, by the wall clock."""
    load = _loader(held, config)
    stop = time.perf_counter() + seconds

    def run(first: int) -> int:
        done = 0
        while time.perf_counter() < stop:
            load(first + done * threads)
            done += 1
        return done

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(run, range(threads)))
    return done / (time.perf_counter() - begin)


def _options(held: _Held, config: DataConfig, read_seconds: float, seconds: float) -> tuple[Option, ...]:
    """Try the same images shrunk, and as raw pixels."""
    side = -(-int(_ROOM * config.image_size) // _SIDE_STEP) * _SIDE_STEP
    chosen = spread_evenly(held.num_samples, _TRIED)
    before = float(np.mean([len(_view(held.read(sample).image)) for sample in chosen]))
    options = []
    if float(np.median(held.sizes().max(1))) > 1.25 * side:
        how = Intake(max_side=side)
        taken = [take_in(Stored(held.read(sample).image), how) for sample in chosen]
        small = [Stored(one.image) for one in taken]
        options.append(_option(f"--max-side {side}", held, small, chosen, config, before, read_seconds, seconds))
    if isinstance(held.read(0).image, bytes):
        raw = [Stored(shrunk_pixels(held.read(sample).image, side)) for sample in chosen]
        options.append(
            _option(f"raw .beton of {side} pixels", held, raw, chosen, config, before, read_seconds, seconds)
        )
    return tuple(options)


def _option(
    name: str,
    held: _Held,
    stored: list[Stored],
    chosen: list[int],
    config: DataConfig,
    before: float,
    read_seconds: float,
    seconds: float,
) -> Option:
    sizes = [decode(one.image).shape[:2] for one in stored]
    other = _Held(held, stored, chosen, [(height, width) for height, width in sizes])
    spent = _timed(_loader(other, config), len(stored), seconds)
    ratio = float(np.mean([len(_view(one.image)) for one in stored])) / before
    return Option(name, 1 / (spent + read_seconds * ratio), ratio)


def _advice(parts: tuple[Part, ...], total: float, options: tuple[Option, ...]) -> list[str]:
    """Say what limits, and the best of what was tried."""
    largest = max(parts, key=lambda part: part.seconds)
    share = largest.seconds / total
    cure = {
        "read": "bring the data nearer (a local disk, data.cache), or make it smaller",
        "decode": "only smaller or raw images make it faster",
        "crop, resize": "smaller stored images make it faster",
        "augment": "take fewer operations, or give it more threads",
        "hand over": "nothing of the data is worth changing",
    }[largest.name]
    limits = "dominates" if share >= _LARGE_SHARE else "is the largest part"
    said = [f"{largest.name} {limits} ({share:.0%} of an image's time): {cure}."]
    better = [option for option in options if option.rate * total > 1.2]
    if better:
        tried = "; ".join(
            f"{option.name}: {option.rate * total:.1f} times as fast at {option.bytes_ratio:.2g} times the bytes"
            for option in better
        )
        said.append(f"Tried on some of these images: {tried}.")
    return said
