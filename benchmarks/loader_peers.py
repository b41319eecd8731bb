"""One loader, measured in a process of its own: `python -m benchmarks.loader_peers JSON` prints a line of JSON.

Every loader does the same: random resized crop to S x S (area 8 to 100 %, ratio 3/4 to 4/3), mirrored half of the
time, uint8 out. Each is a generator that yields once when its libraries are imported, then the number of images of each
batch. Rates are given by the wall clock and by the seconds of the processor that this process and its children took.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import simplejpeg
import torch
from PIL import Image
from torch.nn.functional import interpolate

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


class Settings(NamedTuple):
    """What is measured.

    Attributes:
        data: folder with images/, tar/, jpg.beton, raw.beton and mds/, all of the same pictures.
        threads: threads, or worker processes where a loader has no threads.
        size: S.
        batch: images of a batch.
        seconds: to measure.
    """

    data: Path
    threads: int
    size: int
    batch: int
    seconds: float


Loader = Callable[[Settings], Iterator[int]]


def _random_box(random: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a crop; what a plain program does, without any key."""
    while True:
        area = height * width * random.uniform(*SCALE)
        ratio = np.exp(random.uniform(*np.log(RATIO)))
        rows, columns = round(float(np.sqrt(area / ratio))), round(float(np.sqrt(area * ratio)))
        if 0 < rows <= height and 0 < columns <= width:
            return int(random.integers(height - rows + 1)), int(random.integers(width - columns + 1)), rows, columns


def _fast(data: bytes, size: int, random: np.random.Generator) -> torch.Tensor:
    """Decode whole, crop, resize, mirror: simplejpeg and torch, as fast as a few lines make it."""
    pixels = simplejpeg.decode_jpeg(data)
    top, left, rows, columns = _random_box(random, *pixels.shape[:2])
    image = torch.from_numpy(pixels[top : top + rows, left : left + columns]).permute(2, 0, 1)
    image = interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
    return image.flip(-1) if random.random() < 0.5 else image


def _all_images(settings: Settings) -> list[bytes]:
    return [path.read_bytes() for path in sorted((settings.data / "images").rglob("*.jpg"))]


def _bare(settings: Settings, work: Callable[[bytes], Any]) -> Iterator[int]:
    """Do work on images that are in memory already, one thread or several."""
    images = itertools.cycle(_all_images(settings))
    yield 0
    if settings.threads == 1:
        while True:
            for data in itertools.islice(images, settings.batch):
                work(data)
            yield settings.batch
    with ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while True:
            list(pool.map(work, itertools.islice(images, settings.batch)))
            yield settings.batch


def bare_decoder(settings: Settings) -> Iterator[int]:
    """The limit: libjpeg-turbo decoding whole images."""
    return _bare(settings, simplejpeg.decode_jpeg)


def bare_decoder_resize(settings: Settings) -> Iterator[int]:
    """The limit with geometry: whole images decoded, cropped, resized, mirrored; nothing read, nothing batched."""
    random = np.random.default_rng(0)
    return _bare(settings, lambda data: _fast(data, settings.size, random))


def _ours(settings: Settings, name: str, engine: str = "native", interpolation: str = "bilinear") -> Iterator[int]:
    config_module = importlib.import_module("dataloaders.config")
    opening = importlib.import_module("dataloaders.opening")
    ranks = importlib.import_module("setformer_dist.core.ranks").RankInfo()
    kind = importlib.import_module("dataloaders.reading.streams").ShardTrainStream
    if engine == "ffcv":
        kind = importlib.import_module("dataloaders.ffcv.check").load_ffcv_engine().FfcvTrainStream
    yield 0
    config = config_module.DataConfig(
        root=str(settings.data),
        train=name,
        image_size=settings.size,
        interpolation=interpolation,
        engine=engine,
        threads=settings.threads,
    )
    source = opening.open_source(config.root, config.train, config)
    stream = kind(source, config, 0, ranks, settings.batch, settings.batch)
    try:
        for batch in stream.micro_batches(0):
            yield len(batch.inputs)
    finally:
        stream.close()


def _ffcv(settings: Settings, name: str) -> Iterator[int]:
    """FFCV's Loader with its own decoder and flip."""
    loading = importlib.import_module("ffcv.loader")
    decoders, images = importlib.import_module("ffcv.fields.decoders"), importlib.import_module("ffcv.fields.rgb_image")
    transforms = importlib.import_module("ffcv.transforms")
    yield 0
    size = (settings.size, settings.size)
    crop = images.RandomResizedCropRGBImageDecoder(size, scale=SCALE, ratio=RATIO)
    loader = loading.Loader(
        str(settings.data / name),
        batch_size=settings.batch,
        num_workers=settings.threads,
        order=loading.OrderOption.RANDOM,
        pipelines={
            "image": [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.ToTorchImage()],
            "label": [decoders.IntDecoder(), transforms.ToTensor()],
        },
    )
    while True:
        for found, _ in loader:
            yield len(found)


def _torchvision(size: int) -> Any:
    v2 = importlib.import_module("torchvision.transforms.v2")
    return v2.Compose([v2.RandomResizedCrop(size, SCALE, RATIO), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def _data_loader(data: Any, settings: Settings, **options: Any) -> Iterator[int]:
    """Torch's DataLoader, for ever: in this process for one thread, else by that many worker processes."""
    workers = settings.threads if settings.threads > 1 else 0
    kept = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    loader: Any = importlib.import_module("torch.utils.data").DataLoader(
        data, batch_size=settings.batch, num_workers=workers, **kept, **options
    )
    while True:
        for images, _ in loader:
            yield len(images)


def image_folder(settings: Settings) -> Iterator[int]:
    """Torchvision's ImageFolder and v2 transforms in torch's DataLoader."""
    datasets = importlib.import_module("torchvision.datasets")
    transform = _torchvision(settings.size)
    yield 0
    folder = datasets.ImageFolder(str(settings.data / "images"), transform)
    yield from _data_loader(folder, settings, shuffle=True, drop_last=True)


def _webdataset(settings: Settings, shown: Callable[[bytes], Any]) -> Iterator[int]:
    wds = importlib.import_module("webdataset")
    yield 0
    urls = sorted(map(str, (settings.data / "tar").glob("*.tar")))
    data = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).repeat().shuffle(1000)
    data = data.to_tuple("jpg", "cls").map_tuple(shown, int).batched(settings.batch, partial=False)
    workers = settings.threads if settings.threads > 1 else 0
    for images, _ in wds.WebLoader(data, batch_size=None, num_workers=workers):
        yield len(images)


def webdataset(settings: Settings) -> Iterator[int]:
    """WebDataset with PIL and torchvision's transforms, as its examples have it."""
    transform = _torchvision(settings.size)
    return _webdataset(settings, lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")))


def webdataset_fast(settings: Settings) -> Iterator[int]:
    """WebDataset with our decoder's libraries: simplejpeg and torch."""
    random = np.random.default_rng(0)
    return _webdataset(settings, lambda data: _fast(data, settings.size, random).contiguous())


def streaming(settings: Settings) -> Iterator[int]:
    """MosaicML Streaming with PIL and torchvision's transforms."""
    library = importlib.import_module("streaming")
    transform = _torchvision(settings.size)
    yield 0

    class Pictures(library.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")), sample["label"]

    data = Pictures(local=str(settings.data / "mds"), shuffle=True, batch_size=settings.batch, shuffle_seed=0)
    yield from _data_loader(data, settings, drop_last=True)


LOADERS: dict[str, Loader] = {
    "bare decoder": bare_decoder,
    "bare decoder + resize": bare_decoder_resize,
    "ours, tar": lambda settings: _ours(settings, "tar"),
    "ours, tar, bicubic": lambda settings: _ours(settings, "tar", interpolation="bicubic"),
    "ours, .beton JPEG": lambda settings: _ours(settings, "jpg.beton"),
    "ours, .beton raw": lambda settings: _ours(settings, "raw.beton"),
    "ours by FFCV, .beton JPEG": lambda settings: _ours(settings, "jpg.beton", "ffcv"),
    "ours by FFCV, .beton raw": lambda settings: _ours(settings, "raw.beton", "ffcv"),
    "FFCV, JPEG": lambda settings: _ffcv(settings, "jpg.beton"),
    "FFCV, raw": lambda settings: _ffcv(settings, "raw.beton"),
    "WebDataset": webdataset,
    "WebDataset + simplejpeg": webdataset_fast,
    "torchvision ImageFolder": image_folder,
    "MosaicML Streaming": streaming,
}


def _processes() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def _cpu_seconds() -> float:
    return sum(t.user + t.system for t in (process.cpu_times() for process in _processes()))


def _resident_mib() -> float:
    """Return the memory of all processes together, what they share counted once (PSS)."""
    return float(sum(process.memory_full_info().pss for process in _processes()) / 2**20)


def measure(loader: Loader, settings: Settings) -> dict[str, float]:
    """Import, begin, warm up for a second, measure."""
    torch.set_num_threads(1)
    batches = loader(settings)
    next(batches)
    before, start = _resident_mib(), time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    for _ in itertools.takewhile(lambda _: time.perf_counter() < start + first + 1.0, batches):
        pass
    images, start, cpu = 0, time.perf_counter(), _cpu_seconds()
    while time.perf_counter() < start + settings.seconds:
        images += next(batches)
    wall, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    memory = _resident_mib() - before
    batches.close()  # type: ignore[attr-defined]
    return {
        "images_per_second": images / wall,
        "images_per_cpu_second": images / cpu,
        "first_batch_seconds": first,
        "memory_mib": memory,
    }


def main() -> None:
    """Measure what the argument names."""
    asked = json.loads(sys.argv[1])
    settings = Settings(Path(asked["data"]), asked["threads"], asked["size"], asked["batch"], asked["seconds"])
    print(json.dumps(measure(LOADERS[asked["loader"]], settings)))


if __name__ == "__main__":
    main()
