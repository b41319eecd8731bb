"""The `[model]` table of a run config; it imports neither torch nor timm, so a typo is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from setformer_dist.core import revisions
from setformer_dist.core.config import FrozenConfig

# What model.name begins with where a program gave the model as an object; no checkpoint holds its code.
OWN_MODEL = "own:"

# The sets of vectors that a SeT attention layer may have, by the names of its parameters.
SetKind = Literal["references", "return_references", "anchors"]


class ModelConfig(FrozenConfig):
    """Which model, and what differs from its registered shape.

    Attributes:
        name: model name, as in `timm.create_model`.
        drop_path: stochastic depth rate of the last block; the rates of earlier blocks rise to it linearly.
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third more work.
        args: arguments of the model's constructor, such as embed_dim, depths, stem_strides, attention ("set", "soft",
            "soft_norm", "cast" or "softmax"), and the options of the attention: [model.args.attn] with epsilon,
            iterations, references …, [model.args.soft], [model.args.cast]. Arguments of `timm.create_model` that load
            or write files (pretrained, checkpoint_path, …) are refused.
        weights: initial weights for fine-tuning: a checkpoint of this project (a run folder or the folder of one step),
            a .safetensors file, or hf-hub:timm/MODEL. A resumed run does not read them again.
        skip: name prefixes of parameters that `weights` does not set, such as ["head."] for another number of classes;
            they keep their random initialization.
    """

    name: str = "setformer_tiny"
    drop_path: float = pydantic.Field(default=0.0, ge=0, lt=1)
    activation_checkpointing: bool = False
    args: dict[str, Any] = pydantic.Field(default_factory=dict)
    weights: str | None = None
    skip: tuple[str, ...] | None = pydantic.Field(default=None, strict=False)

    @pydantic.field_validator("args")
    @classmethod
    def _scale_is_named(cls, value: Mapping[str, object], info: pydantic.ValidationInfo) -> dict[str, object]:
        # Written back, unlike other defaults: a config that does not name it is of an older version, and means another.
        return revisions.named(str(info.data.get("name", "")), value)

    @pydantic.model_validator(mode="after")
    def _skipped_of_something(self) -> ModelConfig:
        if self.skip is not None and self.weights is None:
            raise ValueError("model.skip says what is not taken from model.weights, which is not set: set it too")
        return self
