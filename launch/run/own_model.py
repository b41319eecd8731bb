"""Models that a program gives as objects: a module, or a function that makes one.

A checkpoint of such a model has its weights and a name to show, but no code. So the caller passes the object again when
using the checkpoint (`setformer.load(path, model=...)`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from launch.run.config import RunConfig
from launch.run.inputs import check_shapes, inputs_of
from setformer_dist.core import revisions
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import OWN_MODEL
from setformer_dist.core.task import Task
from setformer_dist.models.build import own_model

# A module whose copy is trained, or a function of the number of outputs that makes one.
OwnModel = nn.Module | Callable[[int], nn.Module]

# Tasks whose loss takes one number for each output.
_BY_OUTPUT = ("classification", "multilabel")


def named_own(config: RunConfig, own: OwnModel) -> RunConfig:
    """Return a run's config with the name under which its folder and checkpoints show a model of the user's own.

    Raises:
        ConfigError: it is neither module nor function; or the config says something of the model that only models built
            by name can follow.
    """
    if not isinstance(own, nn.Module) and not callable(own):
        raise ConfigError(
            f"model must be a torch.nn.Module or a function of the number of outputs, and is {own!r:.40}: a registered "
            "name belongs into model.name of the config"
        )
    model = config.model
    asked = {"args": revisions.without_defaults(model.args), "drop_path": model.drop_path, "weights": model.weights}
    if wrong := [key for key, value in asked.items() if value]:
        raise ConfigError(
            f"model.{wrong[0]} applies only to models that are built by name, and this run gets a model as an object: "
            f'remove the key, from Python by load_config(..., "~model.{wrong[0]}")'
        )
    kind = type(own) if isinstance(own, nn.Module) else own
    name = getattr(kind, "__qualname__", type(kind).__qualname__)
    shown = model.model_copy(update={"name": f"{OWN_MODEL}{name}", "args": {}})
    return config.model_copy(update={"model": shown})


def made_own(own: OwnModel, config: RunConfig, outputs: int) -> nn.Module:
    """Return a model of a user's own: a copy of the module, or what the function makes, drawn from the run's seed.

    Raises:
        ConfigError: it cannot be made, is no module, or is one that cannot be trained over several ranks.
    """

    def make(count: int) -> nn.Module:
        if isinstance(own, nn.Module):
            return copy.deepcopy(own)
        try:
            return own(count)
        except ConfigError:
            raise
        except Exception as error:
            name = config.model.name.removeprefix(OWN_MODEL)
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"model {name} cannot be made as {name}({count}): {why}: it takes the number of outputs"
            ) from error

    return own_model(make, config.model, outputs, config.run.seed)


def build_own(own: OwnModel, config: RunConfig, shape: tuple[int, ...], task: Task) -> nn.Module:
    """Return `made_own`, tried on one sample.

    Args:
        own: the model.
        config: of the run.
        shape: of a sample as the model takes it, without the batch.
        task: what the run learns.

    Raises:
        ConfigError: also where the model does not take the run's samples, or has another number of outputs.
    """
    inputs, outputs = inputs_of(config.data), len(task.outputs)
    model = made_own(own, config, outputs)
    name = config.model.name.removeprefix(OWN_MODEL)
    model.eval()
    try:
        with torch.no_grad():
            made = model(torch.zeros(1, *shape, dtype=inputs.dtype or torch.float32))
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"model {name} does not take a batch of shape {(1, *shape)}: {why}") from error
    model.train()
    if task.name in _BY_OUTPUT and getattr(made, "shape", None) != (1, outputs):
        got = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
        raise ConfigError(
            f"model {name} makes {got} of one sample, and task {task.name} on this data needs {(1, outputs)}: give it "
            f"{outputs} outputs, or pass a function of their number that makes the model"
        )
    check_shapes(model, name, config.data)
    return model
