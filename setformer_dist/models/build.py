"""A model from the `[model]` table: any name that timm knows, ours included."""

from __future__ import annotations

import difflib
from typing import Any

import pydantic
import timm
import torch
from torch import nn

import setformer_dist.models  # noqa: F401 — registers our models with timm
from setformer_dist.core.config import FrozenConfig, readable
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.seeding import Purpose, torch_seed
from setformer_dist.models import revisions
from setformer_dist.models.arguments import check_arguments

# What constructors of timm's models raise for values that do not go together; none of them checks its arguments first.
_IMPOSSIBLE = (TypeError, ValueError, AssertionError, AttributeError, LookupError, ArithmeticError, RuntimeError)


class ModelConfig(FrozenConfig):
    """Which model, and what differs from its registered shape.

    Attributes:
        name: as in `timm.create_model`.
        drop_path: stochastic depth of the last block; earlier blocks rise to it linearly.
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third more work.
        args: further arguments of the model's own constructor, such as embed_dim, depths, stem_strides, attention
            ("set", "soft", "soft_norm", "cast", "softmax"), or the tables of their choices: [model.args.attn] with
            epsilon, iterations, references …, [model.args.soft], [model.args.cast]. What timm takes beside them
            (pretrained, checkpoint_path, …) is refused: it would load or write files.
        weights: what a new run begins with, for fine-tuning: a checkpoint of ours (a run's folder, or one step's), or a
            .safetensors file as `setformer ckpt export` writes it. A run that goes on does not read it again.
        skip: beginnings of the names of parameters that are not taken from there but drawn from the seed, such as
            ["head."] for another number of classes.
    """

    name: str = "setformer_tiny"
    drop_path: float = pydantic.Field(default=0.0, ge=0, lt=1)
    activation_checkpointing: bool = False
    args: dict[str, Any] = pydantic.Field(default_factory=dict)
    weights: str | None = None
    skip: tuple[str, ...] | None = pydantic.Field(default=None, strict=False)

    @pydantic.field_validator("args")
    @classmethod
    def _scale_is_named(cls, value: dict[str, Any], info: pydantic.ValidationInfo) -> dict[str, Any]:
        # Written back, unlike other defaults: a config that does not name it is of an older version, and means another.
        return revisions.named(str(info.data.get("name", "")), value)

    @pydantic.model_validator(mode="after")
    def _skipped_of_something(self) -> ModelConfig:
        if self.skip is not None and self.weights is None:
            raise ValueError("model.skip says what is not taken from model.weights, which is not set: set it too")
        return self

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if not timm.is_model(value):
            ours = [*timm.list_models("setformer_*"), *timm.list_models("soft_*")]
            close = difflib.get_close_matches(value, [*ours, *timm.list_models()], n=1)
            raise ValueError(f"no model {value!r}{f': did you mean {close[0]}?' if close else ''}")
        return value


def timm_arguments(config: ModelConfig, num_classes: int, image_size: int) -> dict[str, Any]:
    """Return the arguments with which `timm.create_model` makes the architecture, besides what only training needs."""
    arguments = {"num_classes": num_classes, **config.args}
    if _fixes_input_size(config.name):
        arguments.setdefault("img_size", image_size)
    return arguments


def build_model(config: ModelConfig, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Return the model with weights drawn from the seed alone.

    Args:
        config: see `ModelConfig`.
        num_classes: classes of the data set.
        image_size: passed on as `img_size` to models that fix their input size; others take any size.
        seed: the run's.

    Raises:
        ConfigError: an argument is not the model's own or impossible.
    """
    check_arguments(config.name, config.args)
    torch.manual_seed(torch_seed(Purpose.INIT, seed))
    arguments = {"drop_path_rate": config.drop_path, **timm_arguments(config, num_classes, image_size)}
    try:
        model: nn.Module = timm.create_model(config.name, **arguments)
    except pydantic.ValidationError as error:
        raise ConfigError(f"model.args of {config.name}: {readable(error)}") from None
    except _IMPOSSIBLE as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(f"model {config.name} cannot be built with model.args = {config.args}: {why}") from None
    _refuse_running_statistics(model, config.name)
    if config.activation_checkpointing:
        switch: Any = model.set_grad_checkpointing
        switch(True)
    return model


def _refuse_running_statistics(model: nn.Module, name: str) -> None:
    """Refuse state that training changes outside the parameters: ranks would not share it, nor checkpoints hold it.

    Raises:
        ConfigError: naming the first such buffer.
    """
    saved = set(model.state_dict())
    running = [n for n, b in model.named_buffers() if n in saved and b.is_floating_point() and "running" in n]
    if running:
        raise ConfigError(
            f"model {name} keeps running statistics ({running[0]} …), which neither ranks nor checkpoints share: "
            "choose a model with layer or group norms (soft_*: conv_norm = 'layer')"
        )


def _fixes_input_size(name: str) -> bool:
    """Whether timm marks the architecture as bound to its input size (ViT, Swin with absolute windows)."""
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(pretrained is not None and pretrained.fixed_input_size) or name.startswith(("swin", "vit"))
