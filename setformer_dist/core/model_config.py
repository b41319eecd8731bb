"""The `[model]` table of a run config; it imports neither torch nor timm, so a typo is reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from setformer_dist.core import revisions
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.continuing import FREE

# What model.name begins with where a program gave the model as an object; no checkpoint holds its code.
OWN_MODEL = "own:"

# What a block computes again in its backward pass (models/recompute.py), in the order of the memory that it leaves.
Recompute = Literal["none", "cheap", "mlp", "block", "offload"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(MiB|GiB)")

# The sets of vectors that a SeT attention layer may have, by the names of its parameters.
SetKind = Literal["references", "return_references", "anchors"]


class ModelConfig(FrozenConfig):
    """Which model, and what differs from its registered shape.

    Attributes:
        name: model name, as in `timm.create_model`.
        drop_path: stochastic depth rate of the last block; the rates of earlier blocks rise to it linearly.
        activation_checkpointing: recompute every block in the backward pass: less memory, about a third more work;
            the same as recompute = "block".
        recompute: what the backward pass computes again, for all stages or for each: "none"; "cheap", the outputs of
            norms and GELU; "mlp", the MLP as well; "block", all but a block's input; "offload", the same with that
            input in host memory (docs/memory.md). No policy changes a bit. Models other than setformer_* know "none"
            and "block".
        memory_budget: what a rank may take on its device, such as "20 GiB" or "900 MiB": the run takes the policy that
            recomputes least and is predicted to fit. Excludes `recompute`.
        args: arguments of the model's constructor, such as embed_dim, depths, stem_strides, attention ("set", "soft",
            "soft_norm", "cast" or "softmax"), and the options of the attention: [model.args.attn] with epsilon,
            iterations, references …, [model.args.soft], [model.args.cast]. Arguments of `timm.create_model` that load
            or write files (pretrained, checkpoint_path, …) are refused.
        weights: initial weights for fine-tuning: a checkpoint of this project (a run folder or the folder of one step),
            a .safetensors file or the folder of an exported model, or hf-hub:timm/MODEL. A resumed run does not read
            them again.
        skip: name prefixes of parameters that `weights` does not set, such as ["head."] for a new classifier; they keep
            their random initialization. So does a classifier of another number of classes, without this key.
        frozen_batch_norm: batch norms of a model of timm compute with the statistics, weights and biases of `weights`,
            which stay as they are, as in detectors. Other models with batch norms are refused: their running statistics
            would depend on ranks and micro batches.
        freeze: name prefixes of parameters that do not train, such as ["stem.", "stages.0."]: they keep their initial
            weights, and take no memory for gradients and optimizer states.
    """

    name: str = "setformer_tiny"
    drop_path: float = pydantic.Field(default=0.0, ge=0, lt=1)
    activation_checkpointing: Annotated[bool, FREE] = False
    recompute: Annotated[Recompute | Annotated[tuple[Recompute, ...], pydantic.Field(strict=False)], FREE] = "none"
    memory_budget: Annotated[str | None, FREE] = None
    args: dict[str, Any] = pydantic.Field(default_factory=dict)
    weights: str | None = None
    skip: tuple[str, ...] | None = pydantic.Field(default=None, strict=False)
    frozen_batch_norm: bool = False
    freeze: tuple[str, ...] = pydantic.Field(default=(), strict=False)

    @pydantic.field_validator("args")
    @classmethod
    def _scale_is_named(cls, value: Mapping[str, object], info: pydantic.ValidationInfo) -> dict[str, object]:
        # Written back, unlike other defaults: a config that does not name it is of an older version, and means another.
        return revisions.named(str(info.data.get("name", "")), value)

    @property
    def policy(self) -> Recompute | tuple[Recompute, ...]:
        """Return what is recomputed by config; a memory budget chooses later."""
        return "block" if self.activation_checkpointing else self.recompute

    @property
    def recomputes_blocks(self) -> bool:
        """Return whether every block of every stage is recomputed by config."""
        policies = (self.policy,) if isinstance(self.policy, str) else self.policy
        return set(policies) <= {"block", "offload"}

    @property
    def budget_bytes(self) -> int | None:
        """Return the memory budget in bytes."""
        found = None if self.memory_budget is None else _SIZE.fullmatch(self.memory_budget)
        return None if found is None else int(float(found[1]) * 2 ** {"MiB": 20, "GiB": 30}[found[2]])

    @pydantic.field_validator("memory_budget", mode="before")
    @classmethod
    def _budget_is_a_size(cls, value: object) -> object:
        found = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if value is not None and (found is None or float(found[1]) == 0):
            raise ValueError(f"model.memory_budget: {value!r} is no size: write it as '20 GiB' or '900 MiB'")
        return value

    @pydantic.model_validator(mode="after")
    def _one_policy(self) -> ModelConfig:
        given = [
            name for name, is_given in (
                ("activation_checkpointing", self.activation_checkpointing), ("recompute", self.recompute != "none"),
                ("memory_budget", self.memory_budget is not None),
            ) if is_given
        ]  # fmt: skip
        if len(given) > 1:
            raise ValueError(f"model.{given[0]} and model.{given[1]} both say what is recomputed: set one of them")
        return self

    @pydantic.model_validator(mode="after")
    def _skipped_of_something(self) -> ModelConfig:
        if self.skip is not None and self.weights is None:
            raise ValueError("model.skip says what is not taken from model.weights, which is not set: set it too")
        if self.frozen_batch_norm and self.weights is None:
            raise ValueError(
                "model.frozen_batch_norm takes the statistics of model.weights, which is not set: set it too, as batch "
                "norms without statistics normalise nothing"
            )
        return self
