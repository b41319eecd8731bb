"""What frozen features know of the classes of a data set: `setformer probe`, and what probes in training share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dataloaders.config import DataConfig
from dataloaders.sources.subset import SubsetSource
from launch.run.inputs import Split, check_splits, images_of, inputs_of
from launch.run.objective import encoder_of
from launch.run.trained import Trained, data_for
from setformer_dist.core.batch import EvalStream
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.seeding import Purpose, sample_keys
from setformer_dist.core.task import Prepare
from setformer_dist.engine.probe import linear_top1, neighbours_top1


@dataclass(frozen=True)
class Probed:
    """How well features tell classes apart.

    Attributes:
        linear: top-1 accuracy of a linear classifier, from 0 to 1.
        neighbours: that of a vote of the nearest neighbours.
        trained_on: labelled samples.
        scored: samples.
        classes: of the data.
    """

    linear: float
    neighbours: float
    trained_on: int
    scored: int
    classes: int


@dataclass(frozen=True)
class Features:
    """Features of samples: (n, c) fp32 and (n,) int64 labels and sample ids, on the CPU."""

    values: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


def probe(
    trained: Trained, train: Split, val: Split, batch: int, neighbours: int = 20, share: float = 1.0, seed: int = 0
) -> Probed:
    """Score the features of a trained model with the labels of two splits of the same classes.

    Args:
        trained: whose weights stay as they are.
        train: whose labels are learnt.
        val: what is scored.
        batch: samples computed at once.
        neighbours: that vote.
        share: of the labels of each class that are used, drawn from the seed.
        seed: of that draw.

    Raises:
        ConfigError: the model gives no features, or the share is none.
        DataError: the splits differ, are of another tokenizer, or there are fewer than two classes.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--labels {share} must be above 0, and at most 1 for all labels")
    config = data_for(trained, val)
    model = encoder_of(trained.model).eval()
    check_probed(model, trained.config.model.name, train, val)
    if isinstance(config, DataConfig):
        config, train = with_labels(config, train, share, seed)
    inputs, device = inputs_of(config), next(model.parameters()).device
    prepare = inputs.prepare(len(train.classes), device, torch.float32)
    found = []
    with torch.no_grad():
        for split in (train, val):
            stream = inputs.eval_stream(split, RankInfo(), batch)
            try:
                features = features_of(functools.partial(pooled, model), stream, prepare)
            finally:
                stream.close()
            assert features is not None
            found.append(features)
    x, y = found
    if share < 1 and not isinstance(config, DataConfig):
        kept = torch.from_numpy(drawn(x.labels.numpy(), x.ids.numpy(), share, seed))
        x = Features(x.values[kept], x.labels[kept], x.ids[kept])
    return Probed(
        linear_top1(x.values, x.labels, y.values, y.labels),
        neighbours_top1(x.values, x.labels, y.values, y.labels, neighbours),
        len(x.labels),
        len(y.labels),
        len(train.classes),
    )


def check_probed(model: nn.Module, name: str, train: Split, val: Split) -> None:
    """Check that a model of this name gives features, and that two splits have labels that can be told apart.

    Raises:
        ConfigError: it gives none.
        DataError: the splits differ, or there are fewer than two classes.
    """
    check_splits(train, val)
    if len(train.classes) < 2:
        raise DataError(
            f"a probe tells classes apart, and the data have {'one' if train.classes else 'none'}: name labelled data "
            "(--data, eval.probe.data)"
        )
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise ConfigError(
            f"model {name} gives no features: it needs forward_features and forward_head, as timm's models have them"
        )


def pooled(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the features that a classifier would see, (m, c)."""
    features: torch.Tensor = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    return features.flatten(1)


def features_of(
    compute: Callable[[torch.Tensor], torch.Tensor],
    stream: EvalStream,
    prepare: Prepare,
    given_up: Callable[[], bool] = lambda: False,
) -> Features | None:
    """Return the features of this rank's share of a split as evaluation sees it; None when given up.

    Args:
        compute: images -> (m, c).
        stream: the samples.
        prepare: makes images.
        given_up: asked before each micro batch.
    """
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for part in stream.micro_batches():
        if given_up():
            return None
        images, _ = prepare(part, train=False)
        counts = part.weights > 0
        found.append((compute(images).float().cpu()[counts], part.labels[counts], part.sample_ids[counts]))
    return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def with_labels(config: DataConfig, split: Split, share: float, seed: int) -> tuple[DataConfig, Split]:
    """Return a split of a share of the labels of each class, at least one of each, and the config that reads it."""
    if share == 1:
        return config, split
    source = images_of(split)
    ids = np.arange(source.num_samples)
    chosen = drawn(source.labels(ids).numpy(), ids, share, seed)
    return config.model_copy(update={"engine": "native"}), SubsetSource(source, chosen)


def drawn(labels: np.ndarray, ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which samples a share of the labels of each class is, at least one of each: rising indices."""
    keys = sample_keys(Purpose.MASK, seed, 0, ids).view(np.uint64)
    order = keys.argsort(kind="stable")
    kept = []
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        kept.append(of_class[: max(1, round(share * len(of_class)))])
    return np.sort(np.concatenate(kept))
