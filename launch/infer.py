"""A trained checkpoint used by one process: `setformer eval`, `setformer predict`, the report's pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from checkpoints.reader import Checkpoint, open_checkpoint
from dataloaders import decode_for_eval
from dataloaders.config import DataConfig
from launch.config import RunConfig
from launch.inputs import Split, images_of, inputs_of
from setformer_dist.core import config as base
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import CheckpointError, ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.evaluate import EvalResult, Prepare, evaluate
from setformer_dist.models.revisions import as_trained
from setformer_dist.report.html import ClassifiedImage

Weights = Literal["plain", "ema", "auto"]


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a checkpoint, and what it was trained as."""

    model: nn.Module
    config: RunConfig
    classes: tuple[str, ...]
    checkpoint: Checkpoint
    weights: str

    def prepare(self) -> Prepare:
        """Return the way from a micro batch to what the model takes, in fp32 where the model is."""
        return inputs_of(self.config.data).prepare(len(self.classes), _device_of(self.model), torch.float32)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Return class probabilities (k, classes) of images (k, 3, S, S) uint8."""
        count = len(images)
        zeros = torch.zeros(count, dtype=torch.int64)
        batch = MicroBatch(inputs=images, labels=zeros, weights=torch.ones(count), sample_ids=zeros)
        inputs, _ = self.prepare()(batch, train=False)
        logits: torch.Tensor = self.model(inputs)
        return logits.float().softmax(dim=1).cpu()


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def load_trained(path: Path, weights: Weights = "auto") -> Trained:
    """Load the model of a step folder, a checkpoints folder or a run folder, in fp32 on the CPU.

    Args:
        path: where the checkpoint is.
        weights: "plain", "ema", or "auto": what scored better in the run's last evaluation.

    Raises:
        CheckpointError: nothing there verifies, or it holds no average.
    """
    checkpoint = open_checkpoint(path)
    state = checkpoint.trainer
    if "config" not in state:
        raise CheckpointError(f"checkpoint {checkpoint.path} holds no run config, so it was not written by a run")
    table = {key: value for key, value in state["config"].items() if key != "resolved"}
    table["model"] = as_trained(table["model"])
    config = base.build(RunConfig, table, str(checkpoint.path))
    classes = tuple(state["classes"])
    chosen = _choose(weights, config, state)
    if chosen == "ema" and not config.ema.decay:
        raise CheckpointError(f"checkpoint {checkpoint.path} holds no averaged weights: the run had ema.decay = 0")
    inputs = inputs_of(config.data)
    model = inputs.build_model(config.model, len(classes), state.get("inputs", {}), config.run.seed)
    _fill(model, checkpoint.read_full("ema" if chosen == "ema" else "param"), checkpoint)
    return Trained(model.eval(), config, classes, checkpoint, chosen)


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Load every parameter; buffers are constants of the architecture and not in checkpoints."""
    result = model.load_state_dict(weights, strict=False)
    parameters = {name for name, _ in model.named_parameters()}
    wrong = [*(name for name in result.missing_keys if name in parameters), *result.unexpected_keys]
    if wrong:
        raise CheckpointError(f"checkpoint {checkpoint.path} and its own config disagree about {', '.join(wrong[:4])}")


def _choose(weights: Weights, config: RunConfig, state: dict[str, Any]) -> str:
    if weights != "auto":
        return weights
    scores = state["run"]["evaluation"]
    return "ema" if config.ema.decay and scores.get("ema_top1", -1.0) > scores.get("top1", 0.0) else "plain"


def evaluate_checkpoint(trained: Trained, split: Split, micro_batch: int) -> EvalResult:
    """Score a split with one process, where the model is.

    Raises:
        DataError: the split's classes are not the model's.
    """
    if split.classes != trained.classes:
        raise DataError(
            f"the split's {len(split.classes)} classes are not the {len(trained.classes)} of the checkpoint: "
            "pack it with --classes-from the training split"
        )
    ranks = RankInfo()
    connect(ranks)
    stream = inputs_of(trained.config.data).eval_stream(split, ranks, micro_batch)
    try:
        result = evaluate(trained.model, stream, trained.prepare(), TorchCollectives(ranks))
        assert result is not None  # nobody gives up here
        return result
    finally:
        stream.close()
        disconnect()


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, best first."""

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(trained: Trained, images: Iterable[Path], top: int) -> list[Prediction]:
    """Classify image files.

    Raises:
        ConfigError: the model does not take images.
        DataError: a file is missing or does not decode.
    """
    data_config = trained.config.data
    if not isinstance(data_config, DataConfig):
        raise ConfigError(f"{trained.checkpoint.path} is a model of token sequences: name a checkpoint of images")
    found = []
    for path in images:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"image {path} cannot be read: {error.strerror}") from None
        try:
            pixels = decode_for_eval(data, data_config)
        except DataError as error:
            raise DataError(f"image {path}: {error}") from None
        probabilities = trained.probabilities(pixels.unsqueeze(0))[0]
        best = probabilities.topk(min(top, len(trained.classes)))
        names = tuple(trained.classes[i] for i in best.indices.tolist())
        found.append(Prediction(path, names, tuple(best.values.tolist())))
    return found


def classified_samples(trained: Trained, split: Split, count: int = 24, pool: int = 400) -> list[ClassifiedImage]:
    """Classify images spread over a split and return some, the wrong ones first; none where the data are no images.

    Args:
        trained: the model.
        split: where the samples come from.
        count: pictures returned.
        pool: samples classified, spread evenly.
    """
    data_config = trained.config.data
    if not isinstance(data_config, DataConfig):
        return []
    source = images_of(split)
    step = max(1, split.num_samples // pool)
    pixels, labels = [], []
    for index in range(0, split.num_samples, step):
        try:
            pixels.append(decode_for_eval(source.read(index).image, data_config))
        except DataError:  # damaged: evaluation has counted it
            continue
        labels.append(int(source.labels(np.array([index]))))
    scored = []
    for first in range(0, len(pixels), 64):
        images = torch.stack(pixels[first : first + 64])
        best = trained.probabilities(images).max(dim=1)
        for image, label, probability, predicted in zip(
            images, labels[first : first + 64], best.values.tolist(), best.indices.tolist(), strict=True
        ):
            names = trained.classes
            scored.append(ClassifiedImage(image, names[label], names[predicted], probability))
    wrong = [entry for entry in scored if entry.true_class != entry.predicted_class][: count // 3]
    right = [entry for entry in scored if entry.true_class == entry.predicted_class]
    right = right[:: max(1, len(right) // (count - len(wrong)))][: count - len(wrong)]
    return [*wrong, *right]


def open_named_split(trained: Trained, root: str | None, split: str | None) -> Split:
    """Open a split by the run's own config, or below another root or of another name."""
    data = trained.config.data
    return inputs_of(data).open(root or data.root, split or data.val)
