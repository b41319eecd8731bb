"""What a run reads, behind one interface: images from shards, or token sequences. The one place that tells them apart.

All else (trainer, checkpoints, evaluation) sees streams of micro batches, a `Prepare`, and classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dataloaders import Prepare as ImagePrepare
from dataloaders import ShardDataset, ShardEvalStream, ShardTrainStream, check_same_classes, open_split
from dataloaders.config import DataConfig, TokenConfig
from dataloaders.tokens import (
    TokenEvalStream,
    TokenPrepare,
    TokenSplit,
    TokenTrainStream,
    batch_length,
    open_token_split,
)
from setformer_dist.core.batch import EvalStream, TrainStream
from setformer_dist.core.errors import DataError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.evaluate import Prepare
from setformer_dist.models.build import ModelConfig, build_model


class Split(Protocol):
    """A packed split, of any kind."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the split."""
        ...

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        ...


class Inputs(Protocol):
    """One kind of data."""

    def open(self, root: str, name: str) -> Split:
        """Open a split and check it; raises DataError."""
        ...

    def told(self, split: Split) -> dict[str, Any]:
        """Return what a model must be told about the inputs, JSON-able; checkpoints keep it."""
        ...

    def build_model(self, config: ModelConfig, num_classes: int, told: dict[str, Any], seed: int) -> nn.Module:
        """Return the model for inputs of which it is told this."""
        ...

    def train_stream(self, split: Split, seed: int, ranks: RankInfo, plan: BatchPlan) -> TrainStream:
        """Return one rank's training samples."""
        ...

    def eval_stream(self, split: Split, ranks: RankInfo, micro_batch: int) -> EvalStream:
        """Return one rank's share of a split."""
        ...

    def prepare(self, num_classes: int, device: torch.device | str, dtype: torch.dtype) -> Prepare:
        """Return the way from micro batches to what the model takes."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """What the model takes: integers, or None for its own floating dtype."""
        ...

    def shape(self, split: Split) -> tuple[int, ...]:
        """Return the shape of one sample as the model takes it."""
        ...

    def tokens(self, model: nn.Module, split: Split) -> int:
        """Return the tokens that the model's first layer sees of a sample."""
        ...


@dataclass(frozen=True)
class ImageInputs:
    """Images from packed shards."""

    config: DataConfig

    def open(self, root: str, name: str) -> ShardDataset:
        """Open packed shards."""
        return open_split(Path(root) / name)

    def told(self, split: Split) -> dict[str, Any]:
        """Return the image size."""
        return {"image_size": self.config.image_size}

    def build_model(self, config: ModelConfig, num_classes: int, told: dict[str, Any], seed: int) -> nn.Module:
        """Build for the image size."""
        return build_model(config, num_classes, self.config.image_size, seed)

    def train_stream(self, split: Split, seed: int, ranks: RankInfo, plan: BatchPlan) -> TrainStream:
        """Return augmented images."""
        assert isinstance(split, ShardDataset)
        return ShardTrainStream(split, self.config, seed, ranks, plan.global_size, plan.micro)

    def eval_stream(self, split: Split, ranks: RankInfo, micro_batch: int) -> EvalStream:
        """Return images as they are."""
        assert isinstance(split, ShardDataset)
        return ShardEvalStream(split, self.config, ranks, micro_batch)

    def prepare(self, num_classes: int, device: torch.device | str, dtype: torch.dtype) -> Prepare:
        """Normalise, mix."""
        return ImagePrepare(self.config, num_classes, device, dtype)

    @property
    def dtype(self) -> None:
        """The model's own."""
        return

    def shape(self, split: Split) -> tuple[int, ...]:
        """Return (3, S, S)."""
        return (3, self.config.image_size, self.config.image_size)

    def tokens(self, model: nn.Module, split: Split) -> int:
        """Return the tokens of the first stage, from timm's feature_info."""
        info: Any = getattr(model, "feature_info", None)
        reduction = info[0]["reduction"] if info else 1
        return int(-(-self.config.image_size // reduction)) ** 2


@dataclass(frozen=True)
class TokenInputs:
    """Token sequences from packed splits."""

    config: TokenConfig

    def open(self, root: str, name: str) -> TokenSplit:
        """Open packed tokens."""
        return open_token_split(Path(root) / name)

    def told(self, split: Split) -> dict[str, Any]:
        """Return vocabulary, length, number of sequences and whether there is padding."""
        assert isinstance(split, TokenSplit)
        facts = split.facts
        return {
            "vocabulary": facts.vocabulary,
            "length": batch_length(split, self.config),
            "sequences": facts.sequences,
            "padded": not facts.full,
        }

    def build_model(self, config: ModelConfig, num_classes: int, told: dict[str, Any], seed: int) -> nn.Module:
        """Build with what is told as further arguments; those on the page have the last word."""
        return build_model(config.model_copy(update={"args": {**told, **config.args}}), num_classes, 0, seed)

    def train_stream(self, split: Split, seed: int, ranks: RankInfo, plan: BatchPlan) -> TrainStream:
        """Return padded sequences."""
        assert isinstance(split, TokenSplit)
        return TokenTrainStream(split, self.config, seed, ranks, plan.global_size, plan.micro)

    def eval_stream(self, split: Split, ranks: RankInfo, micro_batch: int) -> EvalStream:
        """Return padded sequences."""
        assert isinstance(split, TokenSplit)
        return TokenEvalStream(split, self.config, ranks, micro_batch)

    def prepare(self, num_classes: int, device: torch.device | str, dtype: torch.dtype) -> Prepare:
        """Bring ids to the device; the dtype is the model's own affair."""
        return TokenPrepare(self.config, num_classes, device)

    @property
    def dtype(self) -> torch.dtype:
        """Token ids."""
        return torch.int32

    def shape(self, split: Split) -> tuple[int, ...]:
        """Return (n,) or (s, n)."""
        assert isinstance(split, TokenSplit)
        length = batch_length(split, self.config)
        return (length,) if split.facts.sequences == 1 else (split.facts.sequences, length)

    def tokens(self, model: nn.Module, split: Split) -> int:
        """Return the padded tokens of all sequences of a sample."""
        assert isinstance(split, TokenSplit)
        return split.facts.sequences * batch_length(split, self.config)


def inputs_of(config: DataConfig | TokenConfig) -> ImageInputs | TokenInputs:
    """Return the kind of data that a config speaks of."""
    return TokenInputs(config) if isinstance(config, TokenConfig) else ImageInputs(config)


def check_splits(train: Split, val: Split) -> None:
    """Check that both splits are of the same data: a label means the same in both, and so does a token.

    Raises:
        DataError: naming what differs.
    """
    if isinstance(train, ShardDataset) and isinstance(val, ShardDataset):
        check_same_classes(train, val)
    if not (isinstance(train, TokenSplit) and isinstance(val, TokenSplit)):
        return
    ours, theirs = vars(train.facts), vars(val.facts)
    for name, a in ours.items():
        b = theirs[name]
        if a != b:
            raise DataError(
                f"{train.folder} and {val.folder} are of different data ({name} {a!r} and {b!r}): prepare them together"
            )
