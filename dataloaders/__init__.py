"""Packed image data: from an ImageFolder to micro batches that depend on neither ranks nor processes.

What this package promises:

* the samples of a batch, and every pixel of them, are a function of (data, config, seed, step) alone: the same
  for any number of ranks, micro batch size and reader processes, before and after a resumption;
* a damaged byte is found (sizes on opening, checksums and strict decoding on reading), named and counted, and
  never changes what any other place of the stream holds;
* evaluation counts each sample exactly once, on any number of ranks;
* opening data runs no foreign code: shards are plain tar, the index is JSON and safetensors.
"""

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.packing.pack import PackOptions, PackResult, pack_image_folder
from dataloaders.packing.verify import verify_split
from dataloaders.pixels.transforms import decode_for_eval
from dataloaders.reading.device import Prepare
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.source import Boxes, DamagedSampleError, Source, Stored
from dataloaders.sources.shards import ShardDataset, check_same_classes, open_split

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
    "open_split",
    "pack_image_folder",
    "verify_split",
]
