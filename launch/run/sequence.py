"""parallel.sequence of a run: whether the model and the data allow it, and how the parts of an image come about.

Each rank of a group decodes the whole image and keeps its rows: augmentation, mixing and a teacher see whole images.
Only of windows of tiled images, where nothing looks at other rows, it decodes no more than its own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from dataloaders.config import DataConfig
from dataloaders.source import PartlyDecoded
from launch.run.config import RunConfig
from launch.run.inputs import Split, shapes_of_images
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.task import Counted, Prepare, Task
from setformer_dist.engine.comm import RowGroup
from setformer_dist.ops.parts import Rows

log = logging.getLogger(__name__)

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Splittable(Protocol):
    """What a model offers whose images can lie on several ranks (models/setformer.py)."""

    def why_not_split(self) -> str | None:
        """Return why not, in this model."""
        ...

    def split_rows(self, rows: Rows | None) -> None:
        """Hold part of each image from now on."""
        ...

    def image_rows(self, height: int, part: int, parts: int) -> slice:
        """Return the rows of an image that a part needs; raises ConfigError where the parts would not be equal."""
        ...


def check_sequence(config: RunConfig, task: Task | None, model: nn.Module) -> None:
    """Refuse what groups of ranks cannot share, before training.

    Args:
        config: of the run.
        task: None where the data are not there yet.
        model: the run's, whole.

    Raises:
        ConfigError: naming what stands against it, and the repair.
    """
    parts = config.parallel.sequence
    if parts == 1:
        return
    reason = _why_not(config, task, model)
    if reason is not None:
        raise ConfigError(
            f"parallel.sequence = {parts}: {reason} (parallel.sequence = 1 gives every rank whole images)"
        )
    assert isinstance(config.data, DataConfig)
    for height, _ in shapes_of_images(config.data):
        cast(Splittable, model).image_rows(height, 0, parts)


def _why_not(config: RunConfig, task: Task | None, model: nn.Module) -> str | None:
    if task is not None and isinstance(task, Counted):
        return f"task {task.name} has a loss that counts elements of whole images"
    known = config.model.name
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORM):
            return (
                f"{name} of {config.model.name} is a BatchNorm, whose statistics would be those of a part of the rows"
            )
        if isinstance(module, nn.Dropout) and module.p > 0:
            return (
                f"{name} of {config.model.name} is a dropout of {module.p} from each rank's own generator: set it to 0"
            )
    if not all(hasattr(model, method) for method in ("why_not_split", "split_rows", "image_rows")):
        return f"{known} has no form for images cut by rows; a SeTformer with attention = 'set' has"
    return cast(Splittable, model).why_not_split()


def split_model(config: RunConfig, model: nn.Module, ranks: RankInfo) -> Rows | None:
    """Have the model hold this rank's rows; None and nothing changed where images are whole. Collective.

    Args:
        config: of the run.
        model: not yet DeepSpeed's; `check_sequence` has nothing against it.
        ranks: this process's place.
    """
    parts = config.parallel.sequence
    if parts == 1:
        return None
    if ranks.is_main and ranks.local_world_size % parts:
        log.warning(
            "%d ranks on this host are no multiple of parallel.sequence = %d: a group lies on two hosts, and blocks "
            "exchange their sums between them",
            ranks.local_world_size,
            parts,
        )
    rows = Rows(RowGroup(ranks, parts, config.run.timeout_minutes))
    cast(Splittable, model).split_rows(rows)
    return rows


def decode_own_rows(config: RunConfig, split: Split, model: nn.Module, ranks: RankInfo) -> None:
    """Have a split decode no more than this rank's rows, where its storage and what is done to images allow it.

    Mixing, mirroring left to right and erasing treat each row alone; other augmentations and a teacher look at all of
    them, and images that are turned upside down need other rows.
    """
    data, parts = config.data, config.parallel.sequence
    if parts == 1 or not isinstance(data, DataConfig) or not isinstance(split, PartlyDecoded):
        return
    augment = data.augment
    looks_further = (
        augment.randaugment_ops
        or augment.policy != "none"
        or augment.color_jitter
        or augment.own
        or augment.vflip
        or config.distill.teacher
    )
    if augment.crop != "window" or looks_further:
        return
    own = {
        height: cast(Splittable, model).image_rows(height, ranks.rank % parts, parts)
        for height, _ in shapes_of_images(data)
    }
    split.decode_only({height: (rows.start, rows.stop) for height, rows in own.items()})


@dataclass(frozen=True)
class RowsPrepare:
    """Keeps of the images what this rank's part needs.

    Attributes:
        whole: makes whole images and targets.
        model: says which rows.
        rows: the group.
    """

    whole: Prepare
    model: Splittable
    rows: Rows

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, Any]:
        """Return this part of the images (m, 3, rows, W), and the targets of the whole."""
        images, targets = self.whole(batch, train=train)
        own = self.model.image_rows(images.shape[2], self.rows.index, self.rows.count)
        return images[:, :, own], targets


def with_rows(prepare: Prepare, model: nn.Module, rows: Rows | None) -> Prepare:
    """Return the preparation of this rank's part of the images; of whole ones, `prepare` itself."""
    return prepare if rows is None else RowsPrepare(prepare, cast(Splittable, model), rows)
