"""Which arguments a run config or a checkpoint may give to a model: those of its own constructor, and no others.

`timm.create_model` takes more than a model's arguments. Some of it fetches, opens or writes files (`pretrained`,
`pretrained_cfg`, `checkpoint_path`, `cache_dir`, and what later versions add), so a foreign checkpoint could
have it done. The list of what is allowed therefore comes from the model: the fields of the config for ours, the
signature of the constructor for timm's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable

import pydantic
import timm
import torch
from timm.models import build_model_with_cfg
from torch import nn

from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError
from setformer_dist.models import sequence, setformer, soft, text

_CONFIGS: dict[str, type[pydantic.BaseModel]] = {
    setformer.__name__: setformer.SetformerConfig,
    soft.__name__: soft.SoftConfig,
    sequence.__name__: sequence.SequenceConfig,
    text.__name__: text.TextConfig,
}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@functools.cache
def model_arguments(name: str) -> frozenset[str]:
    """Return the names of the arguments that the architecture's own constructor takes.

    Args:
        name: as `timm.is_model` knows it.
    """
    entry = timm.models.model_entrypoint(name.split(".")[0])
    config = _CONFIGS.get(entry.__module__)
    if config is not None:
        return frozenset(config.model_fields)
    with torch.device("meta"):
        default = entry()
    return frozenset(_constructor_arguments(type(default))) - _arguments_of_loaders()


def _constructor_arguments(model: type[nn.Module]) -> Iterable[str]:
    """Yield the named arguments of a class, and of its bases as far as it hands on what it does not know."""
    for base in model.__mro__:
        if base is nn.Module:
            return
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        yield from (p.name for p in parameters if p.kind in _NAMED)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return


def _arguments_of_loaders() -> frozenset[str]:
    """Return what timm takes for itself; no model of timm 1.0.31 has an argument of such a name."""
    return frozenset(
        name for loader in (timm.create_model, build_model_with_cfg) for name in inspect.signature(loader).parameters
    )


def check_arguments(name: str, arguments: Iterable[str]) -> None:
    """Refuse arguments that are not the model's own.

    Raises:
        ConfigError: naming the first, and the nearest that the model has.
    """
    foreign = sorted({*arguments} - model_arguments(name))
    if not foreign:
        return
    if foreign[0] in _arguments_of_loaders():
        repair = "name the file in model.weights, if you want to begin with trained weights"
        raise ConfigError(f"model.args.{foreign[0]} would load or write files, which a config may not do: {repair}")
    raise ConfigError(
        f"model.args.{foreign[0]} is not an argument of {name}: {nearest(foreign[0], sorted(model_arguments(name)))}"
    )
