"""`setformer probe`: what the frozen features of a trained model know of the classes of a data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from launch.run.inputs import Split, check_splits, inputs_of
from launch.run.objective import encoder_of
from launch.run.trained import Trained
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.seeding import Purpose, sample_keys
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


def probe(
    trained: Trained, train: Split, val: Split, batch: int, neighbours: int = 20, share: float = 1.0, seed: int = 0
) -> Probed:
    """Score the features of a trained model with the labels of two splits of the same classes.

    Args:
        trained: whose weights stay as they are.
        train: whose labels are learnt.
        val: what is scored.
        batch: images computed at once.
        neighbours: that vote.
        share: of the labels of each class that are used, drawn from the seed.
        seed: of that draw.

    Raises:
        ConfigError: the model gives no features, or the share is none.
        DataError: the splits differ, or there are fewer than two classes.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--labels {share} must be above 0, and at most 1 for all labels")
    check_splits(train, val)
    if len(train.classes) < 2:
        raise DataError("a probe tells classes apart, and the data have one: name labelled data with --data")
    model = encoder_of(trained.model).eval()
    x, labels, ids = features_of(trained, model, train, batch)
    chosen = drawn(labels, ids, share, seed)
    x, labels = x[chosen], labels[chosen]
    y, wanted, _ = features_of(trained, model, val, batch)
    return Probed(
        linear_top1(x, labels, y, wanted),
        neighbours_top1(x, labels, y, wanted, neighbours),
        len(x),
        len(y),
        len(train.classes),
    )


@torch.no_grad()
def features_of(
    trained: Trained, model: nn.Module, split: Split, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (features (n, c) fp32, labels (n,), sample ids (n,)) of a split as evaluation sees it, on the CPU.

    Raises:
        ConfigError: the model gives no features.
    """
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise ConfigError(
            f"model {trained.config.model.name} gives no features: it needs forward_features and forward_head, as "
            "timm's models have them"
        )
    inputs, device = inputs_of(trained.config.data), next(model.parameters()).device
    prepare = inputs.prepare(len(split.classes), device, torch.float32)
    stream = inputs.eval_stream(split, RankInfo(), batch)
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        for part in stream.micro_batches():
            images, _ = prepare(part, train=False)
            features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
            counts = part.weights > 0
            found.append((features.flatten(1).float().cpu()[counts], part.labels[counts], part.sample_ids[counts]))
    finally:
        stream.close()
    features, labels, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return features, labels, ids


def drawn(labels: torch.Tensor, ids: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Return which samples a share of the labels of each class is, at least one of each: rising indices."""
    keys = sample_keys(Purpose.MASK, seed, 0, ids.numpy()).view(np.uint64)
    order = keys.argsort(kind="stable")
    kept = []
    for label in sorted(set(labels.tolist())):
        of_class = order[labels.numpy()[order] == label]
        kept.append(of_class[: max(1, round(share * len(of_class)))])
    return torch.from_numpy(np.sort(np.concatenate(kept)))
