"""The model of a run as its task needs it: a classifier, or an encoder within what fills in hidden parts of images."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dataloaders.config import DataConfig, TokenConfig
from dataloaders.source import Source
from dataloaders.sources.shards import ShardDataset
from dataloaders.tokens import TokenSplit
from launch.run.config import RunConfig
from launch.run.inputs import ImageInputs, Split, TokenInputs, images_of, inputs_of, shapes_of_images
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import OWN_MODEL
from setformer_dist.core.task import Dense, DensePrepare, Hiding, Prepare, Task
from setformer_dist.engine.averaged import AveragedModel
from setformer_dist.models.detector import Detector
from setformer_dist.models.encoded import ENCODER, Encoded
from setformer_dist.models.masked import MaskedAutoencoder, MaskedModel, latents
from setformer_dist.models.recompute import set_recompute
from setformer_dist.models.segmenter import Segmenter
from setformer_dist.models.simmim import SimmimModel
from setformer_dist.models.text import OF_TEXTS, MaskedLanguageModel
from setformer_dist.tasks.build import build_task
from setformer_dist.tasks.detection import Detection
from setformer_dist.tasks.mae import TASKS_OF_HIDDEN, Hidden, Masked
from setformer_dist.tasks.masked_text import MaskedText, MaskedTextPrepare
from setformer_dist.tasks.regression import Regression
from setformer_dist.tasks.segmentation import Segmentation

# Tasks whose model has an encoder within it.
TASKS_OF_ENCODERS = (*TASKS_OF_HIDDEN, Segmentation.name, Detection.name, MaskedText.name)

# Tasks of texts, and what they learn from.
_OF_TEXTS = {MaskedText.name: "texts", Regression.name: "numbers of texts"}

_NAMES_OF_PARTS = {"mask": "masks", "boxes": "boxes"}

log = logging.getLogger(__name__)


def build_for(config: RunConfig, task: Task, input_spec: dict[str, object]) -> nn.Module:
    """Return the run's model with weights from its seed.

    Args:
        config: of the run.
        task: what it learns.
        input_spec: of the data (`Inputs.spec`).

    Raises:
        ConfigError: the model cannot be built, or not for the task.
    """
    inputs: ImageInputs | TokenInputs = inputs_of(config.data)
    check_objective(config, task)
    model = inputs.build_model(config.model, classified_by_model(task), input_spec, config.run.seed)
    if isinstance(task, MaskedText):
        return MaskedLanguageModel(model, task.config.ratio, task.config.eval_ratio)
    if not isinstance(task, Hidden):
        return with_heads(model, task, config.model.name)
    assert isinstance(config.data, DataConfig)  # checked above
    whole = _around(model, task, config.model.name, config.data.bands)
    task.check_images(shapes_of_images(config.data), whole.stride)
    set_recompute(whole, config.model.policy, config.model.name)
    return whole


def with_heads(model: nn.Module, task: Task, name: str) -> nn.Module:
    """Return a model of this name with the heads of a task that needs feature maps; of others the model itself."""
    if isinstance(task, Segmentation):
        return Segmenter(model, name, len(task.outputs), task.config.channels, task.config.auxiliary > 0)
    if isinstance(task, Detection):
        return Detector(model, name, len(task.outputs), task.config.channels)
    return model


def classified_by_model(task: Task) -> int:
    """Return the outputs of the classifier in the model that the config names; 0 where a larger model has its own."""
    return 0 if isinstance(task, Segmentation | Detection) else len(task.outputs)


def _around(encoder: nn.Module, task: Hidden, name: str, bands: int) -> MaskedModel:
    if isinstance(task, Masked):
        t = task.config
        return MaskedAutoencoder(encoder, t.unit, t.ratio, t.decoder_dim, t.decoder_depth, task.latent)
    return SimmimModel(encoder, task.config.unit, task.config.ratio, name, bands)


def assumed_classes(config: RunConfig) -> int:
    """Return how many classes data that are not there are taken to have: as ImageNet, ADE20K, or COCO."""
    return {Segmentation.name: 150, Detection.name: 80}.get(config.task.name, 1000)


def build_assumed(config: RunConfig) -> nn.Module:
    """Return the model for images of `assumed_classes`, where the data are not there; raises as `build_for`."""
    classes = assumed_classes(config)
    if config.task.name in TASKS_OF_ENCODERS:
        # Class weights name classes that are not known.
        args = {key: value for key, value in config.task.args.items() if key != "class_weights"}
        task = config.task.model_copy(update={"args": args})
        return build_for(config, build_task(task, tuple(map(str, range(classes)))), {})
    return inputs_of(config.data).build_model(config.model, classes, {}, config.run.seed)


def check_objective(config: RunConfig, task: Task) -> None:
    """Check that a task that hides parts of images can learn by this config.

    Raises:
        ConfigError: naming the key.
    """
    if isinstance(config.data, DataConfig) and not config.data.labels and getattr(task, "needs_labels", True):
        what = "masks or boxes" if isinstance(task, Dense) else "labels"
        raise ConfigError(
            f"task {task.name} learns from {what}, and data.labels = false says that there are none: remove the key, "
            'or choose a task without (task.name = "mae" or "simmim")'
        )
    if task.name in _OF_TEXTS:
        _check_texts(config, task)
        return
    if not isinstance(task, Hiding | Dense):
        return
    if isinstance(config.data, TokenConfig):
        raise ConfigError(f"task {task.name} learns from images, and [data] has token sequences: choose another task")
    if isinstance(task, Dense):
        _check_dense(config, config.data, task)
        return
    augment = config.data.augment
    for key in ("mixup", "cutmix"):
        if getattr(augment, key):
            raise ConfigError(
                f"data.augment.{key} blends two images, and task {task.name} reconstructs one: set it to 0"
            )
    _check_no_teacher(config, task)
    if isinstance(task, Masked) and task.latent:
        if not config.ema.decay:
            raise ConfigError(
                "task.args.target = 'latent' is what averaged weights compute: set ema.decay, such as 0.999"
            )
        if config.refresh.on or not config.refresh.learn:
            raise ConfigError(
                "task.args.target = 'latent' follows the average of learned weights, and [refresh] sets references "
                "otherwise: remove the table"
            )
    if config.parallel.sequence > 1:
        raise ConfigError(
            f"parallel.sequence = {config.parallel.sequence}: task {task.name} has no form for images that "
            "ranks share by rows yet: set parallel.sequence = 1"
        )


def _check_texts(config: RunConfig, task: Task) -> None:
    if not isinstance(config.data, TokenConfig):
        raise ConfigError(
            f"task {task.name} learns from {_OF_TEXTS[task.name]}, and [data] has images: pack texts with `setformer "
            'text pack` and set data.kind = "tokens", or choose another task'
        )
    if isinstance(task, MaskedText) and not config.model.name.startswith((OF_TEXTS, OWN_MODEL)):
        raise ConfigError(
            f"task mlm trains encoders of texts, and model.name = {config.model.name!r} is none: set it to text_mini, "
            "text_small or text_base"
        )
    if config.data.smoothing:
        raise ConfigError(f"data.smoothing is of classes, and task {task.name} has none: set it to 0")
    _check_no_teacher(config, task)


def _check_tokens(task: Task, split: TokenSplit) -> None:
    """Check that token sequences have what a task learns from; raises ConfigError."""
    facts = split.facts
    if task.name == MaskedText.name and not facts.tokenizer:
        raise ConfigError(
            f"task {task.name} hides tokens of texts, and {split.folder} has none: pack some with `setformer text pack`"
        )
    if task.name == Regression.name and not facts.numbers:
        raise ConfigError(
            f"task {task.name} learns from numbers, and samples of {split.folder} have none: pack them with --number"
        )
    if getattr(task, "needs_labels", True) and task.name != Regression.name and not facts.labelled:
        raise ConfigError(
            f"task {task.name} learns from classes, and samples of {split.folder} have none: pack them with --label, "
            'or choose another task (task.name = "mlm" or "regression")'
        )


def _check_no_teacher(config: RunConfig, task: Task) -> None:
    if config.distill.teacher:
        raise ConfigError(
            f"distill.teacher: task {task.name} has no classes of images to learn from a teacher: remove distill"
        )


def _check_dense(config: RunConfig, data: DataConfig, task: Task) -> None:
    _check_no_teacher(config, task)
    for key in ("mixup", "cutmix", "smoothing"):
        if getattr(data.augment, key):
            raise ConfigError(
                f"data.augment.{key} changes the class of an image, and task {task.name} learns from annotations of "
                "its pixels: set it to 0"
            )


def check_parts(task: Task, splits: Iterable[Split]) -> None:
    """Check that samples have what a task learns from; warn where some have not.

    Raises:
        ConfigError: naming the split that has not.
    """
    for split in splits:
        if isinstance(split, TokenSplit):
            _check_tokens(task, split)
            continue
        if not isinstance(task, Dense):
            continue
        source = images_of(split)
        if missing := sorted(task.needs_parts - source.parts):
            what = _NAMES_OF_PARTS.get(missing[0], missing[0])
            raise ConfigError(
                f"task {task.name} learns from {what}, and samples of {source.name} have none: pack images with their "
                f"{what} (setformer data pack --help), or choose another task"
            )
        _warn_of_gaps(task, source)


def _warn_of_gaps(task: Dense, source: Source) -> None:
    """Say how many samples have no mask; those without boxes may well show nothing."""
    if "mask" in task.needs_parts and isinstance(source, ShardDataset) and (count := source.without("mask")):
        log.warning(
            "%d of %d samples of %s have no masks: they are read, and nothing is learnt or scored by them",
            count, source.num_samples, source.name,
        )  # fmt: skip


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the model that gives features: the encoder of a larger one, else the model itself."""
    return model.encoder if isinstance(model, Encoded) else model


def kept_of(model: nn.Module) -> nn.Module:
    """Return the model that is kept after training: of an autoencoder its encoder, else the model itself."""
    return model.encoder if isinstance(model, MaskedModel | MaskedLanguageModel) else model


def averaged_of(task: Task, model: nn.Module, device: torch.device, dtype: torch.dtype) -> AveragedModel | None:
    """Return the averaged encoder that a task compares with, a copy made before ZeRO cuts the model; None for most."""
    if not (isinstance(task, Masked) and task.latent and isinstance(model, MaskedAutoencoder)):
        return None
    encoder = copy.deepcopy(model.encoder).eval().requires_grad_(False)
    return AveragedModel(encoder.to(device=device, dtype=dtype), ENCODER)


def averaged_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return what the copy of `averaged_of` takes of a rank's memory."""
    if not (isinstance(model, MaskedAutoencoder) and model.latent):
        return 0
    return sum(p.numel() for p in model.encoder.parameters()) * dtype.itemsize


def vocabulary_of(input_spec: Mapping[str, object]) -> int:
    """Return the number of ids that an input spec names; 0 for images."""
    size = input_spec.get("vocabulary", 0)
    return size if isinstance(size, int) else 0


def prepare_for(
    config: RunConfig,
    task: Task,
    classes: int,
    device: torch.device,
    dtype: torch.dtype,
    steps_per_epoch: int = 1,
    averaged: AveragedModel | None = None,
    vocabulary: int = 0,
) -> Prepare:
    """Return the way from micro batches to what the run's model takes, masks included.

    Args:
        config: of the run.
        task: what it learns.
        classes: of the data.
        device: where to.
        dtype: of inputs.
        steps_per_epoch: optimizer steps of an epoch; needed in training alone.
        averaged: what the task compares with (`averaged_of`).
        vocabulary: of texts, number of ids.
    """
    inputs = inputs_of(config.data)
    if isinstance(task, MaskedText):
        return MaskedTextPrepare(task.config, device, vocabulary, config.run.seed, steps_per_epoch)
    if isinstance(task, Dense):
        return DensePrepare(inputs.prepare(classes, device, dtype), task)
    if not isinstance(task, Hiding):
        return inputs.prepare(classes, device, dtype)
    whole = inputs.prepare(classes, device, torch.float32)
    if averaged is not None and isinstance(task, Masked):
        targets = functools.partial(latents, averaged.module)
        return task.prepared(whole, dtype, config.run.seed, steps_per_epoch, targets)
    return task.prepared(whole, dtype, config.run.seed, steps_per_epoch)
