"""An exported model: a folder with model.safetensors and config.json, as `setformer ckpt export` and timm write them.

What config.json says describes the model and its images, and is not followed: the architecture is one that timm knows,
its arguments are its constructor's, and nothing is fetched, imported or opened because a file names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dataloaders.config import DataConfig, TokenConfig
from dataloaders.pixels.depth import Numbers
from launch.ranks.environment import usable_cores
from launch.run.config import RunConfig
from launch.run.inputs import ImageInputs, TokenInputs
from launch.run.objective import classified_by_model, with_heads
from launch.run.trained import Trained, load_trained, no_more_parameters_than
from setformer_dist.core import config as base
from setformer_dist.core import strictjson
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.files import read_plain
from setformer_dist.core.metric import Weights
from setformer_dist.core.revisions import as_trained
from setformer_dist.core.task import Task
from setformer_dist.tasks.build import build_task

OURS = "setformer_dist"  # in config.json: what timm's keys do not say
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_NAMED = 4  # tensors that an error names


class _Images(pydantic.BaseModel):
    """timm's pretrained_cfg, as far as it says how images are evaluated."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"]
    crop_pct: float
    crop_mode: Literal["center"] = "center"
    label_names: tuple[str, ...] | None = None


class _Ours(pydantic.BaseModel):
    """What an export of ours adds.

    Attributes:
        task: table [task] of the run.
        pixels: data type of the bands.
        crop: `data.augment.crop` of the run: windows are evaluated at native scale.
        eval_crop: of the run; None for timm's crop_pct.
        eval_view: of the run; None for that of its task.
        bucket_multiple: of the run.
        eval_longest: of the run.
        classes: of the data, where they are not the model's outputs.
    """

    task: dict[str, Any] = {}
    pixels: Numbers = "uint8"
    crop: Literal["resized", "scale_jitter", "pad", "window", "none"] = "resized"
    eval_crop: float | None = None
    eval_view: Literal["centre", "whole"] | None = None
    bucket_multiple: Annotated[int, pydantic.Field(ge=1)] = 32
    eval_longest: Annotated[int, pydantic.Field(ge=0)] = 0
    classes: tuple[str, ...] | None = None


class _Described(pydantic.BaseModel):
    """config.json in timm's layout for hubs; keys that mean nothing here are left out."""

    architecture: str
    num_classes: Annotated[int, pydantic.Field(ge=0)]
    model_args: dict[str, Any] = {}
    label_names: tuple[str, ...] | None = None
    pretrained_cfg: _Images
    setformer_dist: _Ours = _Ours()  # `OURS`

    def outputs(self) -> tuple[str, ...] | None:
        """Return the names of the classes, None where the file has none. Those of one name get their numbers.

        Labels of ImageNet for people have "crane" twice, a bird and a machine.
        """
        names = self.label_names or self.pretrained_cfg.label_names or None
        if names is not None and len(names) != self.num_classes:
            raise ValueError(f"names {len(names)} classes, and num_classes is {self.num_classes}")
        often = Counter(names or ())
        return names and tuple(f"{name} ({i})" if often[name] > 1 else name for i, name in enumerate(names))


class _TextsOurs(pydantic.BaseModel):
    """What an export of a model of texts adds.

    Attributes:
        task: table [task] of the run.
        classes: of the data.
        inputs: the model's input spec.
    """

    task: dict[str, Any]
    classes: tuple[str, ...]
    inputs: dict[str, Any]


class _DescribedTexts(pydantic.BaseModel):
    """config.json of a model of texts."""

    architecture: str
    model_args: dict[str, Any] = {}
    setformer_dist: _TextsOurs  # `OURS`


def load_named(path: Path, weights: Weights = "auto", best: bool = False) -> Trained:
    """Load the model of a run or a checkpoint (`load_trained`), or an exported one.

    Raises:
        CheckpointError: nothing there verifies, or the exported model is damaged.
        ConfigError: an exported model has no other weights to choose.
    """
    if not is_exported(path):
        if (path / _WEIGHTS).is_file() and not (path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{path} has {_WEIGHTS} and no {_CONFIG}, so nothing says how its inputs are prepared: an export of "
                "images has both, and one of token sequences is loaded by timm, as its README.md shows; or name the run"
            )
        return load_trained(path, weights, best=best)
    if best or weights != "auto":
        raise ConfigError(
            f"{path} is an exported model, with one set of weights: do not choose weights or the best checkpoint, or "
            "name the run"
        )
    return load_exported(path)


def is_exported(path: Path) -> bool:
    """Return whether a folder holds an exported model, and no run."""
    return (path / _CONFIG).is_file() and (path / _WEIGHTS).is_file() and not (path / "checkpoints").is_dir()


def load_exported(folder: Path) -> Trained:
    """Load an exported model, in fp32 on the CPU.

    Raises:
        CheckpointError: it is damaged, or its images are prepared in a way that is unknown here.
    """
    place = folder / _CONFIG
    try:
        said = strictjson.parse(read_plain(place))
        if _is_of_texts(said):
            return _load_texts(folder, _DescribedTexts.model_validate(said))
        about = _Described.model_validate(said)
        names = about.outputs()
        config = _config_of(about, place)
        classes = about.setformer_dist.classes or names or tuple(map(str, range(about.num_classes)))
        task = build_task(config.task, classes)
        if len(task.outputs) != about.num_classes:
            raise ValueError(f"has {len(task.outputs)} classes, and num_classes is {about.num_classes}")
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{place} describes no model that can be loaded: {base.readable(error)}") from None
    except (ValueError, ConfigError, OSError) as error:
        raise CheckpointError(f"{place} describes no model that can be loaded: {error}") from None
    assert isinstance(config.data, DataConfig)
    inputs = ImageInputs(config.data)
    model = _filled(lambda: _created(inputs, config, task), config, folder / _WEIGHTS)
    return Trained(model.eval(), config, classes, folder, "exported", task, inputs.input_spec, named=names is not None)


def _is_of_texts(said: object) -> bool:
    ours = said.get(OURS) if isinstance(said, dict) else None
    return isinstance(ours, dict) and "inputs" in ours


def _load_texts(folder: Path, about: _DescribedTexts) -> Trained:
    """Load an exported model of texts; raises as `load_exported`."""
    ours = about.setformer_dist
    table = {
        "run": {"name": "exported"}, "model": {"name": about.architecture, "args": about.model_args},
        "task": ours.task, "data": {"kind": "tokens", "root": ""}, "batch": {"global_size": 1},
        "schedule": {"steps": 1},
    }  # fmt: skip
    config = base.build(RunConfig, table, str(folder / _CONFIG))
    assert isinstance(config.data, TokenConfig)
    inputs, task = TokenInputs(config.data), build_task(config.task, ours.classes)

    def created() -> nn.Module:
        return inputs.build_model(config.model, classified_by_model(task), ours.inputs, config.run.seed)

    model = _filled(created, config, folder / _WEIGHTS)
    return Trained(model.eval(), config, ours.classes, folder, "exported", task, ours.inputs, named=True)


def _config_of(about: _Described, place: Path) -> RunConfig:
    """Return the config of a run that would have trained the model, as far as it says how the model is evaluated."""
    images, ours = about.pretrained_cfg, about.setformer_dist
    bands, height, width = images.input_size
    if not bands == len(images.mean) == len(images.std):
        raise ValueError(f"input_size has {bands} bands, mean {len(images.mean)} numbers, std {len(images.std)}")
    args = dict(about.model_args)
    if args.pop("num_classes", about.num_classes) != about.num_classes:
        raise ValueError(f"num_classes is {about.num_classes}, and another number in model_args")
    data = {
        "image_size": height, "image_width": 0 if width == height else width, "mean": images.mean, "std": images.std,
        "interpolation": images.interpolation, "pixels": ours.pixels, "augment": {"crop": ours.crop},
        "eval_crop": images.crop_pct if ours.eval_crop is None else ours.eval_crop, "threads": usable_cores(),
        "bucket_multiple": ours.bucket_multiple, **({"eval_longest": ours.eval_longest} if ours.eval_longest else {}),
        **({} if ours.eval_view is None else {"eval_view": ours.eval_view}),
    }  # fmt: skip
    table = {
        "run": {"name": "exported"}, "model": as_trained({"name": about.architecture, "args": args}),
        "task": ours.task, "data": data, "batch": {"global_size": 1}, "schedule": {"steps": 1},
    }  # fmt: skip
    return base.build(RunConfig, table, str(place))


def _filled(created: Callable[[], nn.Module], config: RunConfig, path: Path) -> nn.Module:
    """Return the model with the weights of a file.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with no_more_parameters_than(shapes, config.model), torch.device("meta"):
            expected = {n: tuple(t.shape) for n, t in created().state_dict().items()}
        _check_same(expected, shapes, path)
        model = created()
        model.load_state_dict(safetensors.torch.load_file(path))
    except ConfigError as error:
        raise CheckpointError(f"the model of {path} cannot be built: {error}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete .safetensors file: {error}") from None
    return model.float()


def _created(inputs: ImageInputs, config: RunConfig, task: Task) -> nn.Module:
    model = inputs.created(config.model, classified_by_model(task))
    return with_heads(model, task, config.model.name)


def _check_same(expected: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]], path: Path) -> None:
    wrong = sorted(name for name in {*expected, *there} if expected.get(name) != there.get(name))
    if wrong:
        raise CheckpointError(
            f"{path} and {_CONFIG} beside it disagree about {', '.join(wrong[:_NAMED])}: export the model again"
        )
