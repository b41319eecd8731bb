"""What a run's checkpoints belong to: model, classes, config, versions."""

from __future__ import annotations

import importlib.metadata
import json

from torch import nn

from checkpoints.identity import Identity, digest_json, digest_shapes
from launch.run.config import ResolvedRun
from setformer_dist import __version__
from setformer_dist.core.revisions import unnamed

LIBRARIES = ("torch", "deepspeed", "timm", "safetensors")


def identity_of(
    run: ResolvedRun, model: nn.Module, classes: tuple[str, ...], input_spec: dict[str, object]
) -> Identity:
    """Return what the run's checkpoints belong to; `input_spec` is that of the model (`Inputs.spec`)."""
    c = run.config
    return Identity(
        model=c.model.name,
        model_args=json.dumps({**unnamed(c.model.args), **input_spec}, sort_keys=True),
        parameters=digest_shapes(shapes_of(model)),
        config_hash=run.identity_hash(),
        stage=c.zero.stage,
        world_size=run.plan.world_size,
        classes=digest_json(list(classes)),
        versions={"setformer_dist": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES},
    )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every parameter, sharded or not."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
