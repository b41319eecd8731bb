"""What a run reads, behind one interface: images, or token sequences. The one place that distinguishes them.

All else (trainer, checkpoints, evaluation) sees streams of micro batches, a `Prepare`, and classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from dataloaders.config import DataConfig, TokenConfig
from dataloaders.ffcv.check import load_ffcv_engine
from dataloaders.opening import check_mixture_room, open_source
from dataloaders.order.mixture import MixtureSource
from dataloaders.order.resolution import telling_shapes, training_shapes
from dataloaders.pixels.transforms import check_pixels, evaluated_shape
from dataloaders.reading.device import Prepare as ImagePrepare
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.source import Source
from dataloaders.sources.shards import check_same_classes
from dataloaders.tokens import (
    TokenEvalStream,
    TokenPrepare,
    TokenSplit,
    TokenTrainStream,
    batch_length,
    open_token_split,
)
from setformer_dist.core.batch import EvalStream, TrainStream
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.task import Prepare
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.models.build import build_model, created, timm_arguments
from setformer_dist.models.measure import refuses

_CHANNELS = 3  # of models that are told nothing


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

    def open_train(self) -> Split:
        """Open what is trained on; raises DataError."""
        ...

    def spec(self, split: Split) -> dict[str, object]:
        """Return the input spec: arguments of the model about its inputs, JSON-able; checkpoints keep it."""
        ...

    def build_model(self, config: ModelConfig, num_classes: int, input_spec: dict[str, object], seed: int) -> nn.Module:
        """Return the model for inputs of this spec."""
        ...

    def model_arguments(self, config: ModelConfig, num_classes: int) -> dict[str, object] | None:
        """Return the arguments of `timm.create_model` for the architecture; None where timm's rules do not hold."""
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
    """Images from any container that `dataloaders.opening` knows."""

    config: DataConfig

    def open(self, root: str, name: str) -> Source:
        """Open images, and check that they are such as the config says."""
        source = open_source(root, name, self.config)
        check_pixels(source, self.config.form)
        return source

    def open_train(self) -> Source:
        """Open the training images: one set, or those of the mixture."""
        mixture = self.config.mixture
        if not mixture:
            return self.open(self.config.root, self.config.train)
        sources = [self.open(entry.root, entry.train) for entry in mixture]
        check_mixture_room(sources, self.config)
        return MixtureSource(sources, [entry.weight for entry in mixture])

    def spec(self, split: Split) -> dict[str, object]:
        """Return the image size."""
        return self.input_spec

    @property
    def _size(self) -> int | tuple[int, int]:
        """The image size as models take it: one number for square images."""
        height, width = self.config.shape
        return height if height == width else (height, width)

    def build_model(self, config: ModelConfig, num_classes: int, input_spec: dict[str, object], seed: int) -> nn.Module:
        """Build for the image size, and check that the model takes all others that training will show it."""
        model = build_model(self._with_bands(config), num_classes, self._size, seed)
        check_shapes(model, config.name, self.config)
        return model

    def model_arguments(self, config: ModelConfig, num_classes: int) -> dict[str, object]:
        """Return them for the image size."""
        return timm_arguments(self._with_bands(config), num_classes, self._size)

    @property
    def input_spec(self) -> dict[str, object]:
        """The input spec of every split: the image size."""
        return {"image_size": self._size if isinstance(self._size, int) else list(self._size)}

    def created(self, config: ModelConfig, num_classes: int) -> nn.Module:
        """Return a model for these images that only looks at them; unlike those that train it may hold any state."""
        return created(self._with_bands(config), num_classes, self._size)

    def _with_bands(self, config: ModelConfig) -> ModelConfig:
        """Return the config of a model that takes the images' bands.

        Raises:
            ConfigError: it names another number of channels.
        """
        bands = self.config.bands
        if (said := config.args.get("in_chans", bands)) != bands:
            raise ConfigError(
                f"model.args.in_chans = {said!r}, and images are read with {bands} bands, as many as data.mean and "
                "data.std have numbers: leave it out, as the model follows the data, or change data.mean and data.std"
            )
        return config if bands == _CHANNELS else config.model_copy(update={"args": {**config.args, "in_chans": bands}})

    def train_stream(self, split: Split, seed: int, ranks: RankInfo, plan: BatchPlan) -> TrainStream:
        """Return augmented images."""
        source, size = images_of(split), plan.global_size
        if plan.micro_pixels is None:
            return self._streams()[0](source, self.config, seed, ranks, size, plan.micro)
        if self.config.engine != "native":
            raise ConfigError(
                f'data.engine = "{self.config.engine}" has micro batches of one size: leave batch.micro_pixels out, or '
                'use data.engine = "native"'
            )
        for shape in training_shapes(self.config):
            plan.micro_at(shape)  # refuses it before the first step
        return ShardTrainStream(source, self.config, seed, ranks, size, plan.micro, plan.micro_at)

    def eval_stream(self, split: Split, ranks: RankInfo, micro_batch: int) -> EvalStream:
        """Return images as they are."""
        return self._streams()[1](images_of(split), self.config, ranks, micro_batch)

    def _streams(self) -> tuple[type[ShardTrainStream], type[ShardEvalStream]]:
        """Return the streams of the engine that the config names."""
        if self.config.engine == "native":
            return ShardTrainStream, ShardEvalStream
        engine = load_ffcv_engine()
        return engine.FfcvTrainStream, engine.FfcvEvalStream

    def prepare(self, num_classes: int, device: torch.device | str, dtype: torch.dtype) -> Prepare:
        """Normalise, mix."""
        return ImagePrepare(self.config, num_classes, device, dtype)

    @property
    def dtype(self) -> None:
        """The model's own."""
        return

    def shape(self, split: Split) -> tuple[int, ...]:
        """Return (bands, H, W)."""
        return (self.config.bands, *self.config.shape)

    def tokens(self, model: nn.Module, split: Split) -> int:
        """Return the tokens of the first stage, from timm's feature_info."""
        info: Any = getattr(model, "feature_info", None)
        reduction = info[0]["reduction"] if info else 1
        height, width = self.config.shape
        return int(-(-height // reduction)) * int(-(-width // reduction))


def images_of(split: Split) -> Source:
    """Return a split of images as what it is."""
    assert not isinstance(split, TokenSplit)
    return cast(Source, split)


def check_shapes(model: nn.Module, name: str, config: DataConfig | TokenConfig) -> None:
    """Refuse a model that does not take a size of training's images, before the step that shows one.

    A model is made for `data.image_size`, so where training has no other it is tried only if its patches do not fit in.

    Raises:
        ConfigError: naming the size.
    """
    if isinstance(config, TokenConfig):
        return
    asked = "data.image_width, data.resolutions or data.aspect_buckets ask for"
    if not (config.resolutions or config.aspect_buckets or config.image_width):
        info: Any = getattr(model, "feature_info", None)
        if not info or config.image_size % max(level["reduction"] for level in info) == 0:
            return
        asked = "data.image_size asks for"
    for shape in telling_shapes(config):
        if (error := refuses(model, (config.bands, *shape))) is not None:
            raise ConfigError(
                f"model {name} does not take images of {shape[0]} x {shape[1]}, which {asked} "
                f"({str(error).splitlines()[0]}): choose other sizes or another model"
            )


def evaluated_shapes(config: DataConfig, split: Split) -> list[tuple[int, int]]:
    """Return every height and width in which evaluation shows images of a split, in order."""
    stored = np.unique(images_of(split).sizes(), axis=0).tolist()
    return sorted({evaluated_shape((height, width), config) for height, width in stored})


def check_evaluated(model: nn.Module, name: str, config: DataConfig | TokenConfig, split: Split) -> None:
    """Refuse a model that does not take whole images of a split, before the first evaluation does.

    Of many sizes five are tried, as each takes up to a second: the extremes, and one of the middle.

    Raises:
        ConfigError: naming the size.
    """
    if isinstance(config, TokenConfig) or config.eval_view != "whole":
        return
    shapes = [shape for shape in evaluated_shapes(config, split) if shape != config.shape]
    wide = sorted(shapes, key=lambda shape: shape[1])
    middle = len(shapes) // 2
    for shape in sorted({*shapes[:1], *shapes[middle : middle + 1], *shapes[-1:], *wide[:1], *wide[-1:]}):
        check_takes(model, name, config.bands, *shape)


def check_takes(model: nn.Module, name: str, bands: int, height: int, width: int) -> None:
    """Refuse an image of a height and width that a model does not take.

    Raises:
        ConfigError: naming the size.
    """
    if (error := refuses(model, (bands, height, width))) is not None:
        raise ConfigError(
            f"model {name} does not take images of {height} x {width}, in which evaluation shows whole images "
            f"({str(error).splitlines()[0]}): let it take any size (Swin: model.args.strict_img_size = false; ViT: "
            "model.args.dynamic_img_size = true), choose another data.bucket_multiple, or take another model"
        )


def shapes_of_images(config: DataConfig) -> list[tuple[int, int]]:
    """Return every height and width of the images of a run, those of evaluations too."""
    return sorted({config.shape, *training_shapes(config)})


def evaluation_micro(config: DataConfig | TokenConfig, plan: BatchPlan) -> int:
    """Return the samples of a rank's micro batch in evaluations."""
    return plan.micro if isinstance(config, TokenConfig) else plan.micro_at(config.shape)


@dataclass(frozen=True)
class TokenInputs:
    """Token sequences from packed splits."""

    config: TokenConfig

    def open(self, root: str, name: str) -> TokenSplit:
        """Open packed tokens."""
        return open_token_split(Path(root) / name)

    def open_train(self) -> TokenSplit:
        """Open the training tokens."""
        return self.open(self.config.root, self.config.train)

    def spec(self, split: Split) -> dict[str, object]:
        """Return vocabulary, length, number of sequences and whether there is padding."""
        assert isinstance(split, TokenSplit)
        facts = split.facts
        return {
            "vocabulary": facts.vocabulary,
            "length": batch_length(split, self.config),
            "sequences": facts.sequences,
            "padded": not facts.full,
            **({"tokenizer": facts.tokenizer} if facts.tokenizer else {}),
            **({"pairs": True} if facts.pairs else {}),
        }

    def build_model(self, config: ModelConfig, num_classes: int, input_spec: dict[str, object], seed: int) -> nn.Module:
        """Build with the spec as further arguments; those in the config have precedence."""
        here, given = input_spec.get("vocabulary"), config.args.get("vocabulary")
        if isinstance(here, int) and isinstance(given, int) and given < here:
            raise ConfigError(f"model.args.vocabulary = {given} is less than the {here} ids of the data: leave it out")
        tokens, longest = input_spec.get("length"), config.args.get("length")
        if isinstance(tokens, int) and isinstance(longest, int) and longest < tokens:
            raise ConfigError(
                f"model.args.length = {longest} is less than the {tokens} tokens of the data: leave it out, or set "
                f"data.length = {longest}, which cuts what is longer"
            )
        if told := {"tokenizer", "pairs"} & config.args.keys():
            raise ConfigError(f"model.args.{min(told)} is what the data say: leave it out")
        return build_model(config.model_copy(update={"args": {**input_spec, **config.args}}), num_classes, 0, seed)

    def model_arguments(self, config: ModelConfig, num_classes: int) -> None:
        """Return None: what encodes sequences has no pretrained weights."""
        return

    def train_stream(self, split: Split, seed: int, ranks: RankInfo, plan: BatchPlan) -> TrainStream:
        """Return padded sequences."""
        assert isinstance(split, TokenSplit)
        if plan.micro_pixels is not None:
            raise ConfigError("batch.micro_pixels bounds micro batches of images, and this data has none: leave it out")
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
        """Return the padded tokens of all sequences of a sample; where padding is trimmed, those that are there."""
        assert isinstance(split, TokenSplit)
        length = batch_length(split, self.config)
        if self.config.trim:
            length = max(1, round(float(split.lengths.clip(max=length).mean())))
        return split.facts.sequences * length


def inputs_of(config: DataConfig | TokenConfig) -> ImageInputs | TokenInputs:
    """Return the kind of data that a config names."""
    return TokenInputs(config) if isinstance(config, TokenConfig) else ImageInputs(config)


def check_splits(train: Split, val: Split) -> None:
    """Check that both splits are of the same data: a label means the same in both, and so does a token.

    Raises:
        DataError: naming what differs.
    """
    if not (isinstance(train, TokenSplit) and isinstance(val, TokenSplit)):
        check_same_classes(images_of(train), images_of(val))
        return
    ours, theirs = vars(train.facts), vars(val.facts)
    for name, a in ours.items():
        b = theirs[name]
        if a != b:
            raise DataError(
                f"{train.folder} and {val.folder} are of different data ({name} {a!r} and {b!r}): prepare them together"
            )
