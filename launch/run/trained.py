"""A trained checkpoint used by one process: `setformer eval`, `setformer predict`, the report's pictures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from checkpoints.reader import Checkpoint, open_checkpoint, read_kept
from dataloaders.config import DataConfig, TokenConfig
from dataloaders.pixels.decode import stored_shape
from dataloaders.pixels.transforms import decode_for_eval
from dataloaders.reading.device import pictures_of
from dataloaders.sources.files import LARGEST_SAMPLE, read_whole
from dataloaders.tokens import TokenSplit
from launch.ranks.environment import usable_cores
from launch.run.config import RunConfig
from launch.run.identity import shapes_of
from launch.run.initial_weights import better_of
from launch.run.inputs import Split, check_evaluated, check_takes, images_of, inputs_of
from launch.run.memory import check_image_fits
from launch.run.objective import build_for, check_parts, encoder_of, prepare_for, vocabulary_of
from launch.run.own_model import OwnModel, check_same_buffers, digest_of_buffers, made_own, round_buffers
from setformer_dist.core import config as base
from setformer_dist.core.batch import EvalStream, MicroBatch
from setformer_dist.core.boxes import Detected, Detections, detections_of
from setformer_dist.core.errors import CheckpointError, ConfigError, DataError
from setformer_dist.core.metric import Weights
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.pixel_maps import classes_of
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.revisions import as_trained
from setformer_dist.core.task import Prepare, Task
from setformer_dist.core.words import counted, plain
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.deepspeed_engine import DTYPES
from setformer_dist.engine.evaluate import EvalResult, evaluate
from setformer_dist.models.arguments import check_arguments
from setformer_dist.models.build import check_name
from setformer_dist.report.html import ClassifiedImage
from setformer_dist.tasks.build import build_task
from setformer_dist.tasks.detection import Detection
from setformer_dist.tasks.mae import Hidden
from setformer_dist.tasks.masked_text import MaskedText
from setformer_dist.tasks.segmentation import Segmentation


@dataclass(frozen=True)
class Trained:
    """A trained model, and what it was trained as.

    Attributes:
        model: with its weights.
        config: of the run that trained it; of an exported model, what is known of it.
        classes: of the data that it was trained on; of an exported model that names none, their numbers.
        place: where the weights lie.
        weights: which they are, for people, such as "ema".
        task: what it learnt.
        inputs: the model's input spec.
        named: whether the classes' names are known.
    """

    model: nn.Module
    config: RunConfig
    classes: tuple[str, ...]
    place: Path
    weights: str
    task: Task
    inputs: Mapping[str, object]
    named: bool

    def prepare(self) -> Prepare:
        """Return the way from a micro batch to what the model takes, in fp32 where the model is."""
        device, vocabulary = _device_of(self.model), vocabulary_of(self.inputs)
        return prepare_for(self.config, self.task, len(self.classes), device, torch.float32, vocabulary=vocabulary)

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Return how sure the model is of each class, (k, classes), of images (k, B, S, S) as decoded."""
        return self.task.confidences(self.outputs(images)).cpu()

    @torch.no_grad()
    def outputs(self, images: torch.Tensor) -> Any:
        """Return the model's outputs of images (k, B, H, W) as decoded; of a classifier (k, classes)."""
        count = len(images)
        zeros = torch.zeros(count, dtype=torch.int64)
        batch = MicroBatch(inputs=images, labels=zeros, weights=torch.ones(count), sample_ids=zeros)
        inputs = inputs_of(self.config.data).prepare(len(self.classes), _device_of(self.model), torch.float32)
        return self.model(inputs(batch, train=False)[0])


@dataclass(frozen=True)
class TrainedRun(Trained):
    """A model of a run's checkpoint."""

    checkpoint: Checkpoint


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def load_trained(path: Path, weights: Weights = "auto", own: OwnModel | None = None, best: bool = False) -> TrainedRun:
    """Load the model of a step folder, a checkpoints folder or a run folder, in fp32 on the CPU.

    Nothing that the checkpoint says is followed further than its own bytes: the model is one that this program knows,
    its arguments are its constructor's (`models.arguments`), and it is not built unless it has the parameters that the
    checkpoint holds.

    Args:
        path: where the checkpoint is.
        weights: "plain", "ema", or "auto": what scored better in the run's last evaluation.
        own: makes the model, where it was given to the run as an object: its code is in no checkpoint.
        best: of several checkpoints, take the best by the run's `checkpoint.best_metric`, not the newest.

    Raises:
        CheckpointError: nothing there verifies, it was not written by a run, or it holds no average.
    """
    return read_kept(path, lambda: _load_trained(path, weights, own, best))


def _load_trained(path: Path, weights: Weights, own: OwnModel | None, best: bool) -> TrainedRun:
    checkpoint = open_checkpoint(path)
    about = _about(checkpoint)
    if best:
        checkpoint = open_checkpoint(path, best_by=about.config.checkpoint)
        about = _about(checkpoint)
    config, place = about.config, checkpoint.path
    chosen = better_of(checkpoint) if weights == "auto" else weights
    state = "ema" if chosen == "ema" else "param"
    if state not in checkpoint.states():
        raise CheckpointError(f"checkpoint {place} holds no averaged weights: the run had ema.decay = 0")
    shapes = checkpoint.parameters()
    try:
        task = build_task(config.task, about.classes)
        if own is not None:
            model = made_own(own, config, len(task.outputs))
        else:
            with no_more_parameters_than(shapes, config.model), torch.device("meta"):
                empty = build_for(config, task, about.inputs)
            _check_shapes(shapes_of(empty), shapes, place)
            model = build_for(config, task, about.inputs)
        _check_shapes(shapes_of(model), shapes, place, given=own is not None)
        if own is not None:
            check_same_buffers(checkpoint.trainer, digest_of_buffers(model), place)
            round_buffers(model, DTYPES[config.precision.dtype])
    except ConfigError as error:
        raise CheckpointError(
            f"the model of checkpoint {place} cannot be built: {error}{_own_code(about.imports)}"
        ) from None
    _fill(model, checkpoint.read_full(state), checkpoint)
    return TrainedRun(
        model.eval(), config, about.classes, place, chosen, task, about.inputs, named=True, checkpoint=checkpoint
    )


def _own_code(modules: tuple[str, ...]) -> str:
    if not modules:
        return ""
    return (
        f" (its run imported {', '.join(modules)}; if you trust that code, add --import {modules[0]}, or import it "
        "first in Python)"
    )


@dataclass(frozen=True)
class _About:
    """What trainer.json says of a run, checked.

    Attributes:
        config: of the run, with nothing in it that would start processes or write files.
        classes: their names.
        inputs: the model's input spec.
        imports: modules that the run imported; none is imported because they stand here.
    """

    config: RunConfig
    classes: tuple[str, ...]
    inputs: dict[str, object]
    imports: tuple[str, ...]


def _about(checkpoint: Checkpoint) -> _About:
    """Check what trainer.json says of a run.

    Raises:
        CheckpointError: it does not describe a run of this program.
    """
    state, place = checkpoint.trainer, checkpoint.path
    if "config" not in state:
        raise CheckpointError(f"checkpoint {place} holds no run config, so it was not written by a run")
    table, classes, inputs = state["config"], state.get("classes"), state.get("inputs", {})
    run = state.get("run")
    scores = run.get("evaluation") if isinstance(run, dict) else None
    for what, value, kind in (("config", table, dict), ("classes", classes, list), ("inputs", inputs, dict)):
        if not isinstance(value, kind):
            raise CheckpointError(f"checkpoint {place}: {what} of trainer.json is no {kind.__name__}")
    assert isinstance(classes, list)  # checked above
    if not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"checkpoint {place}: a class of trainer.json is no string")
    if not isinstance(scores, dict) or not all(isinstance(score, (int, float)) for score in scores.values()):
        raise CheckpointError(f"checkpoint {place}: run.evaluation of trainer.json is no table of numbers")
    try:
        written = {key: value for key, value in table.items() if key != "resolved"}
        if isinstance(written.get("model"), dict):
            written["model"] = as_trained(written["model"])
        config = base.build(RunConfig, written, str(place))
    except ConfigError as error:
        raise CheckpointError(f"checkpoint of a run that this version does not know: {error}") from None
    return _About(_harmless(config), tuple(classes), inputs, config.run.imports)


def _harmless(config: RunConfig) -> RunConfig:
    """Return the config without what would start processes, or write to a folder, because a file says so."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"imports": ()})})
    if not isinstance(config.data, DataConfig):
        return config
    changed = {"cache": "", "workers": 0, "threads": usable_cores(), "prefetch": 2}
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


@contextlib.contextmanager
def no_more_parameters_than(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> Iterator[None]:
    """Refuse to build a model of more or larger parameters than a checkpoint holds: its depth may be any number.

    Args:
        shapes: of what the checkpoint holds.
        config: of the model. Its arguments are checked before the block, as this builds the architecture's default
            model, which may well be larger.

    Raises:
        ConfigError: an argument is not the model's own; or within the block, at the first parameter too many.
    """
    check_name(config.name)
    check_arguments(config.name, config.args)
    count, largest = 0, max((math.prod(shape) for shape in shapes.values()), default=0)

    def registered(module: nn.Module, name: str, parameter: torch.Tensor | None) -> None:
        nonlocal count
        count += parameter is not None
        # Models replace some parameters while they are built, so the number is bounded, not compared.
        if count > 4 * len(shapes) + 64 or (parameter is not None and parameter.numel() > max(largest, 2**20)):
            raise ConfigError("its config asks for more or larger parameters than it holds")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _check_shapes(
    model: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]], place: Path, given: bool = False
) -> None:
    """Refuse a checkpoint whose config, or the model given for it, has other parameters than it holds.

    Raises:
        CheckpointError: naming the first parameters that differ.
    """
    wrong = sorted(name for name in {*model, *there} if model.get(name) != there.get(name))
    if not wrong:
        return
    if given:
        raise CheckpointError(
            f"the model that was passed has other parameters than checkpoint {place}, such as {', '.join(wrong[:4])}: "
            "pass the model that the run trained"
        )
    raise CheckpointError(f"checkpoint {place} and its own config disagree about {', '.join(wrong[:4])}")


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Load every parameter; buffers are constants of the architecture and not in checkpoints."""
    result = model.load_state_dict(weights, strict=False)
    parameters = {name for name, _ in model.named_parameters()}
    wrong = [*(name for name in result.missing_keys if name in parameters), *result.unexpected_keys]
    if wrong:
        raise CheckpointError(f"checkpoint {checkpoint.path} and its own config disagree about {', '.join(wrong[:4])}")


def is_of_pairs(trained: Trained) -> bool:
    """Return whether a model judges pairs of texts, and no single ones."""
    return trained.inputs.get("pairs") is True


def _listed(classes: tuple[str, ...]) -> str:
    """Return how many classes there are, and the first."""
    named = f" ({', '.join(map(plain, classes[:4]))}{', …' if len(classes) > 4 else ''})" if classes else ""
    return f"{counted(len(classes), 'class', 'classes')}{named}"


def data_for(trained: Trained, split: Split) -> DataConfig | TokenConfig:
    """Return how a model reads a split; longer texts are cut to the model's length.

    Raises:
        DataError: the tokens are of another tokenizer, or of pairs where the model judges single texts, or the reverse.
    """
    data = trained.config.data
    if not isinstance(split, TokenSplit):
        return data
    if split.facts.tokenizer != (ours := trained.inputs.get("tokenizer", "")):
        raise DataError(
            f"{split.folder} is of tokenizer {split.facts.tokenizer[:12] or 'none'}, and {trained.place} of "
            f"{str(ours)[:12] or 'none'}: pack the texts with that of the model"
        )
    if ours and trained.task.name != MaskedText.name and split.facts.pairs != is_of_pairs(trained):
        there, here = ("pairs of texts", "single texts") if split.facts.pairs else ("single texts", "pairs of texts")
        raise DataError(f"{split.folder} has {there}, and {trained.place} judges {here}: name other data")
    longest = trained.inputs.get("length")
    if not (ours and isinstance(data, TokenConfig) and isinstance(longest, int)):
        return data
    return data.model_copy(update={"length": min(longest, split.facts.length)})


def evaluate_checkpoint(
    trained: Trained, split: Split, micro_batch: int, advance: Callable[[int], None] = lambda samples: None
) -> EvalResult:
    """Score a split with one process, where the model is.

    Args:
        trained: the model.
        split: what is scored.
        micro_batch: samples computed at once.
        advance: told the samples of each micro batch as it begins.

    Raises:
        DataError: the task needs classes, and the split has others; for a model without names, another number of them.
            Or its texts are not the model's kind (`data_for`).
        ConfigError: the model has no classes, or is the encoder alone of one that fills in images.
    """
    if not trained.named and not trained.classes:
        raise _without_classes(trained)
    if isinstance(trained.task, Hidden | MaskedText) and encoder_of(trained.model) is trained.model:
        raise ConfigError(
            f"{trained.place} is the encoder alone of a run of task {trained.task.name}, and has no loss: evaluate the "
            "run, or score its features with `setformer probe`"
        )
    data = data_for(trained, split)
    same = split.classes == trained.classes if trained.named else len(split.classes) == len(trained.classes)
    check_parts(trained.task, [split])
    if getattr(trained.task, "needs_labels", True) and not same:
        option = "--like" if isinstance(split, TokenSplit) else "--classes-from"
        raise DataError(
            f"the split's {_listed(split.classes)} are not the {_listed(trained.classes)} of {trained.place}: "
            f"pack it with {option} the training split"
        )
    check_evaluated(trained.model, trained.config.model.name, data, split)
    ranks = RankInfo()
    joined = connect(ranks)
    stream = _Told(inputs_of(data).eval_stream(split, ranks, micro_batch), advance)
    try:
        result = evaluate(trained.model, trained.task, stream, trained.prepare(), TorchCollectives(ranks))
        assert result is not None  # no rank gives up here
        return result
    finally:
        stream.close()
        if joined:  # not within a training, whose ranks continue
            disconnect()


@dataclass(frozen=True)
class _Told:
    """A stream (`EvalStream`) that says how many samples each micro batch has, as it is handed out."""

    stream: EvalStream
    advance: Callable[[int], None]

    @property
    def num_samples(self) -> int:
        return self.stream.num_samples

    def micro_batches(self) -> Iterator[MicroBatch]:
        for batch in self.stream.micro_batches():
            self.advance(int((batch.sample_ids >= 0).sum()))
            yield batch

    def close(self) -> None:
        self.stream.close()


@dataclass(frozen=True)
class FoundObject:
    """An object that a detector found.

    Attributes:
        name: of its class.
        label: the class's number.
        score: how sure the model is, 0 to 1.
        box: x0, y0, x1, y1 in pixels of the image file.
    """

    name: str
    label: int
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, best first.

    Attributes:
        image: its file.
        classes: their names.
        probabilities: of them; of a segmentation the shares of the image's pixels, of a detection the scores of their
            surest boxes.
        mask: of a segmentation, (H, W) uint8, the class of each pixel of the image.
        objects: of a detection, best first.
    """

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    mask: torch.Tensor | None = field(default=None, compare=False, repr=False)
    objects: tuple[FoundObject, ...] | None = None


def shown_whole(data: DataConfig) -> DataConfig:
    """Return a config by which whole images are marked, also where evaluation shows their centre."""
    return data.model_copy(update={"eval_view": "whole"})


def detected_in(outputs: Detected, seen: tuple[int, int], stored: tuple[int, int]) -> Detections:
    """Return what a detector found in one image, in stored pixels, on the CPU.

    Args:
        outputs: of one image.
        seen: (height, width) as the model saw it.
        stored: (height, width) as it is stored.
    """
    (found,) = detections_of(outputs, seen)
    scale = torch.tensor([stored[1] / seen[1], stored[0] / seen[0]] * 2)
    return Detections(found.boxes.cpu() * scale, found.scores.cpu(), found.labels.cpu())


def predict(trained: Trained, images: Iterable[Path], top: int) -> Iterator[Prediction | DataError]:
    """Classify image files one after the other; yield an error in the place of an image that does not decode.

    Raises:
        ConfigError: the model does not take images, or has no classes.
    """
    data_config = trained.config.data
    if not isinstance(data_config, DataConfig):
        raise ConfigError(
            f"{trained.place} is a model of token sequences: use `setformer text predict`, or name one of images"
        )
    if not trained.task.outputs:
        raise _without_classes(trained)
    if isinstance(trained.task, Segmentation | Detection):
        data_config = shown_whole(data_config)
    taken = {data_config.shape}  # which training has shown
    for path in images:
        try:
            stored = read_whole(path, LARGEST_SAMPLE)
            pixels, shape = decode_for_eval(stored, data_config), stored_shape(stored, data_config.form)
        except OSError as error:
            if path.is_dir():
                yield DataError(f"image {path} is a folder without an image: name image files, or a folder of them")
                continue
            yield DataError(f"image {path} cannot be read: {error.strerror}")
            continue
        except DataError as error:
            yield DataError(f"image {path}: {error}")
            continue
        try:
            bands, height, width = pixels.shape
            if (height, width) not in taken:
                check_takes(trained.model, trained.config.model.name, bands, height, width)
                check_image_fits(trained.model, bands, height, width)
                taken.add((height, width))
        except ConfigError as error:
            yield DataError(f"image {path}: {error}")
            continue
        yield _predicted(trained, path, pixels, shape, top)


def _predicted(trained: Trained, path: Path, pixels: torch.Tensor, shape: tuple[int, int], top: int) -> Prediction:
    """Return what a model says of an image as it sees it, (B, H, W), which is stored as (height, width)."""
    outputs, names = trained.outputs(pixels.unsqueeze(0)), trained.task.outputs
    mask, objects = None, None
    if isinstance(trained.task, Segmentation):
        mask = classes_of(outputs, *shape)[0].cpu()
        probabilities = torch.bincount(mask.flatten(), minlength=len(names)) / mask.numel()
    else:
        probabilities = trained.task.confidences(outputs).cpu()[0]
    if isinstance(trained.task, Detection):
        found = detected_in(outputs, (pixels.shape[1], pixels.shape[2]), shape)
        listed = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        objects = tuple(FoundObject(names[label], label, score, tuple(box)) for label, score, box in listed)
    best = probabilities.topk(min(top, len(names)))
    return Prediction(path, tuple(names[i] for i in best.indices.tolist()), tuple(best.values.tolist()), mask, objects)


def _without_classes(trained: Trained) -> ConfigError:
    return ConfigError(
        f"{trained.place} (task {trained.task.name}) has no classes: fine-tune it (model.weights), or score its "
        "features with `setformer probe`"
    )


def classified_samples(trained: Trained, split: Split, count: int = 24, pool: int = 400) -> list[ClassifiedImage]:
    """Classify images spread over a split and return some, the wrong ones first; none where the data are no images.

    Args:
        trained: the model.
        split: where the samples come from.
        count: pictures returned.
        pool: samples classified, spread evenly.
    """
    data_config = trained.config.data
    if not isinstance(data_config, DataConfig) or not trained.task.exclusive:
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
        found = labels[first : first + 64], best.values.tolist(), best.indices.tolist()
        for image, label, probability, predicted in zip(pictures_of(images, data_config), *found, strict=True):
            names = trained.classes
            scored.append(ClassifiedImage(image, names[label], names[predicted], probability))
    wrong = [entry for entry in scored if entry.true_class != entry.predicted_class][: count // 3]
    right = [entry for entry in scored if entry.true_class == entry.predicted_class]
    right = right[:: max(1, len(right) // (count - len(wrong)))][: count - len(wrong)]
    return [*wrong, *right]


def open_named_split(trained: Trained, root: str | None, split: str | None) -> Split:
    """Open a split: below `root`, or in the folder that the run's own config names.

    Raises:
        ConfigError: the config names a URL: what a checkpoint says is not fetched.
        DataError: the split is missing or damaged.
    """
    data = trained.config.data
    if root is None and "://" in data.root:
        raise ConfigError(
            f"{trained.place} was trained on data behind a URL, {data.root}, and no URL is fetched because a "
            "checkpoint names it: give it with --data"
        )
    if not (root or data.root):
        raise ConfigError(f"{trained.place} is an exported model and names no data: give the folder with --data")
    return inputs_of(data).open(root or data.root, split or data.val)
