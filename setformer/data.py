"""The data of a run without a run: the same samples in the same order, for a loop of one's own.

m = micro batch, C = classes, H, W = height, width, n = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dataloaders.sources.python import Dataset, PythonSource
from launch.run.compose import Splits, open_splits
from launch.run.config import RunConfig, resolve
from launch.run.inputs import inputs_of
from launch.run.own_code import bring
from setformer.configs import check_config
from setformer_dist.core.batch import EvalStream, TrainStream
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.task import Dense, DensePrepare, Prepare
from setformer_dist.tasks.build import build_task


def open_data(config: RunConfig) -> Splits:
    """Open the training and the validation split of a run.

    Args:
        config: of the run; the modules of `run.imports` are imported first.

    Returns:
        `train` and `val`; of each `classes` (names; a label is a position in it), `num_samples`, `fingerprint`.

    Raises:
        ConfigError: a module of `run.imports` cannot be imported.
        DataError: a split is missing or damaged, or the two have different classes.
    """
    check_config(config)
    bring(config.run.imports)
    return open_splits(resolve(config, RankInfo.from_env().world_size))


def own_data(train: Dataset, val: Dataset, classes: Sequence[str]) -> Splits:
    """Return data sets in Python as the data of a run, in place of what its [data] table names.

    A sample is `(image, label)` or `(image, label, soft)`: the image (H, W, 3) uint8, the soft label a probability for
    each class in order, or a table by class name. Or it is `(image, mask)`: the mask (H, W) integers, the class of each
    pixel, 255 where it does not count. Or it is `(image, objects)`, objects a table as torchvision's detection has it:
    "boxes" (k, 4) x0, y0, x1, y1 in pixels of the image, "labels" (k,) integers from 0, and if it likes "iscrowd" (k,)
    and "area" (k,). The same index must always give the same sample. All samples are read once here, for their sizes
    and for the fingerprint by which a resumed run knows its data.

    Args:
        train: the training samples: a sequence, or a `torch.utils.data.Dataset` with a length.
        val: the validation samples.
        classes: class names; a label is a position in it.

    Raises:
        DataError: a data set is empty or no sequence, a sample is something else, cannot be read, or differs when it is
            read again.
    """
    return Splits(PythonSource(train, classes, "the training data"), PythonSource(val, classes, "the validation data"))


def train_stream(config: RunConfig, data: Splits, ranks: RankInfo | None = None) -> TrainStream:
    """Return one rank's training samples, augmented, in the order that a run of this config sees.

    `stream.micro_batches(first_step)` yields micro batches without end, `resolve(config, ranks).plan.accumulation` of
    them for each optimizer step: `inputs` (m, 3, H, W) uint8 or (m, n) int32, `labels` (m,) int64, `sample_ids` (m,)
    int64. Close it at the end.

    Args:
        config: of the run.
        data: from `open_data`.
        ranks: this process's place; None reads RANK and WORLD_SIZE, which torchrun and deepspeed set.

    Raises:
        ConfigError: the batch does not divide among the ranks, or does not fit the data.
    """
    place = ranks or RankInfo.from_env()
    run = resolve(config, place.world_size)
    return inputs_of(config.data).train_stream(
        data.train, config.run.seed, place.sharing_data(run.plan.sequence), run.plan
    )


def eval_stream(config: RunConfig, data: Splits, ranks: RankInfo | None = None) -> EvalStream:
    """Return one rank's share of the validation split, each sample once over all ranks.

    `stream.micro_batches()` yields it; filling at the end has `weights` 0. Close it at the end.

    Args:
        config: of the run.
        data: from `open_data`.
        ranks: as `train_stream`.

    Raises:
        ConfigError: the batch does not divide among the ranks.
    """
    place = ranks or RankInfo.from_env()
    run = resolve(config, place.world_size)
    return inputs_of(config.data).eval_stream(data.val, place.sharing_data(run.plan.sequence), run.plan.micro)


def prepare(config: RunConfig, data: Splits, device: torch.device | str = "cpu") -> Prepare:
    """Return what turns a micro batch into inputs and targets on a device: normalised, mixed, smoothed.

    `prepare(...)(batch, train=True)` returns inputs, (m, 3, H, W) float32 or (m, n) int32, and targets, (m, C) float32
    whose rows sum to 1; of task "segmentation" targets are the masks, (m, H, W) uint8.

    Args:
        config: of the run.
        data: from `open_data`.
        device: where to.
    """
    task = build_task(config.task, data.train.classes)
    inputs = inputs_of(config.data).prepare(len(data.train.classes), device, torch.float32)
    return DensePrepare(inputs, task) if isinstance(task, Dense) else inputs
