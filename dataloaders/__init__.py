"""Packed image data: from an ImageFolder to micro batches that depend on neither ranks nor processes.

What this package promises:

* the samples of a batch, and every pixel of them, are a function of (data, config, seed, step) alone: the same
  for any number of ranks, micro batch size and reader processes, before and after a resumption;
* a damaged byte is found (sizes on opening, checksums and strict decoding on reading), named and counted, and
  never changes what any other place of the stream holds;
* evaluation counts each sample exactly once, on any number of ranks;
* opening data runs no foreign code: shards are plain tar, the index is JSON and safetensors.

Names of this package are imported when they are first asked for: a rank reads without the code that packs, and a config
is checked without torch.

    helpers.py   processes that help: started quickly, safely despite threads, never left behind
    source.py    what every container of samples looks like to the loaders: samples by number, nothing else
    tokens.py    packed token sequences: a split on disk, its samples by number, and the streams that training reads
    config.py    the `[data]` table: images or tokens
    opening.py   the one place that detects the container: from the names of a config to samples by number
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataloaders.config import AugmentConfig, DataConfig
    from dataloaders.opening import open_source
    from dataloaders.packing.pack import PackOptions, PackResult, pack_image_folder
    from dataloaders.packing.verify import verify_split
    from dataloaders.pixels.transforms import decode_for_eval
    from dataloaders.reading.device import Prepare
    from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
    from dataloaders.source import Boxes, DamagedSampleError, Source, Stored
    from dataloaders.sources.shards import ShardDataset, check_same_classes, open_split

_HOME = {
    "AugmentConfig": "config",
    "Boxes": "source",
    "DamagedSampleError": "source",
    "DataConfig": "config",
    "PackOptions": "packing.pack",
    "PackResult": "packing.pack",
    "Prepare": "reading.device",
    "ShardDataset": "sources.shards",
    "ShardEvalStream": "reading.streams",
    "ShardTrainStream": "reading.streams",
    "Source": "source",
    "Stored": "source",
    "check_same_classes": "sources.shards",
    "decode_for_eval": "pixels.transforms",
    "open_source": "opening",
    "open_split": "sources.shards",
    "pack_image_folder": "packing.pack",
    "verify_split": "packing.verify",
}

__all__ = [
    "AugmentConfig",
    "Boxes",
    "DamagedSampleError",
    "DataConfig",
    "PackOptions",
    "PackResult",
    "Prepare",
    "ShardDataset",
    "ShardEvalStream",
    "ShardTrainStream",
    "Source",
    "Stored",
    "check_same_classes",
    "decode_for_eval",
    "open_source",
    "open_split",
    "pack_image_folder",
    "verify_split",
]


def __getattr__(name: str) -> object:
    """Return a name of `__all__`; its module is imported now."""
    if name not in _HOME:
        raise AttributeError(f"module 'dataloaders' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dataloaders.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
