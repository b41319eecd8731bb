"""What a loader does with damaged data: run as a process of its own, since some of them hang or die.

    echo '[{"path": "…", "truth": "…"}, …]' | python -m benchmarks.damage_peers webdataset

prints one line of JSON per job. Labels are sample numbers, so a delivered picture can be held against the one that
belongs to its label.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Reader = Callable[[str, dict[str, Any]], Iterator[tuple[Pixels, int]]]

# Decoders differ by rounding (fast DCT, 10 of 255 at most on these pictures); another picture, or a torn one, by more.
ANOTHER = 40


def webdataset(path: str, report: dict[str, Any], careful: bool = False) -> Iterator[tuple[Pixels, int]]:
    """WebDataset as its manual uses it; `careful` with its handler that warns and continues."""
    wds = importlib.import_module("webdataset")
    handler = wds.warn_and_continue if careful else wds.reraise_exception
    data = wds.WebDataset(path, shardshuffle=False, handler=handler, empty_check=False)
    yield from data.decode("rgb8", handler=handler).to_tuple("jpg", "cls", handler=handler)


def webdataset_careful(path: str, report: dict[str, Any]) -> Iterator[tuple[Pixels, int]]:
    """See `webdataset`."""
    return webdataset(path, report, careful=True)


def image_folder(path: str, report: dict[str, Any]) -> Iterator[tuple[Pixels, int]]:
    """Torchvision's ImageFolder in torch's DataLoader."""
    folder = importlib.import_module("torchvision.datasets").ImageFolder(path, transform=np.asarray)
    loader = importlib.import_module("torch.utils.data").DataLoader(folder, batch_size=None)
    for image, label in loader:
        yield image.numpy(), int(label)


def ffcv(path: str, report: dict[str, Any]) -> Iterator[tuple[Pixels, int]]:
    """FFCV's Loader with its own decoders."""
    loading = importlib.import_module("ffcv.loader")
    decoders = importlib.import_module("ffcv.fields.decoders")
    pipelines = {"image": [decoders.SimpleRGBImageDecoder()], "label": [decoders.IntDecoder()]}
    loader = loading.Loader(path, batch_size=8, num_workers=1, pipelines=pipelines, drop_last=False)
    for images, labels in loader:
        yield from zip(images.copy(), labels[:, 0].tolist(), strict=True)


def native(path: str, report: dict[str, Any], engine: str = "native") -> Iterator[tuple[Pixels, int]]:
    """Ours: one epoch of a training stream, damage tolerated, pictures as they are stored."""
    opening = importlib.import_module("dataloaders.opening")
    config_module = importlib.import_module("dataloaders.config")
    ranks = importlib.import_module("setformer_dist.core.ranks").RankInfo()
    where = Path(path)
    config = config_module.DataConfig(
        root=str(where.parent),
        train=where.name,
        engine=engine,
        image_size=report["size"],
        max_bad_share=1.0,
        augment=config_module.AugmentConfig(crop="none", flip=False),
    )
    source = opening.open_source(config.root, config.train, config)
    if engine == "ffcv":
        kind = importlib.import_module("dataloaders.ffcv.check").load_ffcv_engine().FfcvTrainStream
    else:
        kind = importlib.import_module("dataloaders.reading.streams").ShardTrainStream
    stream = kind(source, config, 0, ranks, 1, 1)
    try:
        for batch in itertools.islice(stream.micro_batches(0), source.num_samples):
            report["replaced"] += len(batch.substitutions)
            report["said"] = report["said"] or "; ".join(batch.substitutions)
            yield batch.inputs[0].permute(1, 2, 0).numpy(), int(batch.labels[0])
    finally:
        stream.close()


def native_ffcv(path: str, report: dict[str, Any]) -> Iterator[tuple[Pixels, int]]:
    """Ours, with FFCV as its engine."""
    return native(path, report, "ffcv")


READERS: dict[str, Reader] = {
    "WebDataset": webdataset,
    "WebDataset, warn and continue": webdataset_careful,
    "ImageFolder": image_folder,
    "FFCV": ffcv,
    "ours": native,
    "ours, other people's tar": native,
    "ours, image folder": native,
    "ours, no index": native,
    "ours by FFCV": native_ffcv,
}


def run_job(reader: Reader, path: str, truth: Pixels) -> dict[str, Any]:
    """Read all there is; return how much came, how much of it was wrong, and what was said."""
    report: dict[str, Any] = {"delivered": 0, "wrong": 0, "replaced": 0, "said": "", "size": truth.shape[1]}
    try:
        for image, label in reader(path, report):
            report["delivered"] += 1
            expected = truth[label] if 0 <= label < len(truth) else None
            same = expected is not None and image.shape == expected.shape
            report["wrong"] += not (same and np.abs(image.astype(int) - expected).max() < ANOTHER)
    except Exception as error:  # noqa: BLE001  (what it says is the result)
        report["said"] = f"{type(error).__name__}: {error}"
    return report


def main() -> None:
    """Answer the jobs on standard input."""
    reader = READERS[sys.argv[1]]
    for job in json.load(sys.stdin):
        print(json.dumps(run_job(reader, job["path"], np.load(job["truth"]))), flush=True)


if __name__ == "__main__":
    main()
