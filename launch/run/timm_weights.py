"""Weights in timm's layout for a model of another size or another number of classes, by timm's own rules.

timm resizes position embeddings, adapts patch kernels, renames what older versions called otherwise, and leaves out a
classifier of another number of classes. It does so while it builds a pretrained model, so one is built and its
parameters are taken. timm reads no file itself: it gets tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from setformer_dist.core.errors import CheckpointError, ConfigError

HUB = "hf-hub:"
_FILE = "model.safetensors"


@dataclass(frozen=True)
class Adapted:
    """Parameters that fit the model.

    Attributes:
        tensors: of the whole model, by name.
        drawn: names of those that the weights do not hold: timm's rules leave them as they are drawn.
        classifier: beginnings of the names of the classifier's parameters.
        unused: names of the weights that the model has not.
    """

    tensors: Mapping[str, torch.Tensor]
    drawn: frozenset[str]
    classifier: tuple[str, ...]
    unused: tuple[str, ...]


def classifiers_of(name: str) -> tuple[str, ...]:
    """Return the modules that are the classifier of a registered model, as timm knows them; () where it knows none."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    found = config.classifier if config is not None else None
    return (found,) if isinstance(found, str) else tuple(found or ())


def adapted(tensors: Mapping[str, torch.Tensor], name: str, arguments: Mapping[str, object]) -> Adapted:
    """Return weights as the model `name` with these arguments takes them.

    Args:
        tensors: the weights, by name.
        name: of the architecture.
        arguments: of `timm.create_model`, num_classes among them.

    Raises:
        CheckpointError: timm cannot adapt them, or the function that makes the model is not timm's and takes none.
    """
    names = frozenset(tensors)
    classifiers = classifiers_of(name)
    heads = {f"{classifier}.{kind}" for classifier in classifiers for kind in ("weight", "bias")}
    weight = tensors.get(f"{classifiers[0]}.weight") if classifiers else None
    classes = 0 if weight is None else len(weight)
    dropped = heads if classes != arguments["num_classes"] else set()
    overlay = {
        "state_dict": dict(tensors),
        "num_classes": classes,
        "label_offset": 0,
        "custom_load": False,
        "source": "",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = timm.create_model(name, **arguments).state_dict()
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():  # of timm's interpolations, to timm's authors
                warnings.simplefilter("ignore", UserWarning)
                model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
        except (RuntimeError, KeyError, ValueError, AssertionError) as error:
            raise CheckpointError(_first_line(error)) from None
    found = model.state_dict()
    untouched = {n for n in found if torch.equal(found[n], fresh[n])}
    parameters = {n for n, _ in model.named_parameters()}
    other = {n for n in names & parameters - dropped if not _same(tensors[n], found[n])}
    # A model of one's own may draw by a generator of its own, or load weights of its own.
    own = not timm.models.model_entrypoint(name.split(".")[0]).__module__.startswith("timm.")
    refused = sorted(n for n in other if n in untouched or (own and tensors[n].shape == found[n].shape))
    if refused:
        raise CheckpointError(f"model {name} takes no notice of pretrained weights, such as {refused[0]}")
    drawn = frozenset(dropped & found.keys() | untouched - names)
    unused = sorted(names - found.keys() - heads)
    return Adapted(found, drawn, tuple(f"{c}." for c in classifiers), tuple(unused))


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor.to(other.dtype), other)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def fetched(name: str) -> Path:
    """Return the local copy of a hub's model.safetensors; what is in the hub's cache is not fetched again.

    Args:
        name: "hf-hub:OWNER/MODEL" or "hf-hub:OWNER/MODEL@REVISION".

    Raises:
        ConfigError: there is no such thing, or no network.
    """
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, _FILE, revision=revision or None))
    except HFValidationError:
        raise ConfigError(f"model.weights = {name}: {repository!r} is no name of the form OWNER/MODEL") from None
    except (OSError, EntryNotFoundError) as error:
        raise ConfigError(
            f"model.weights = {name} cannot be fetched ({_first_line(error)}): check the name and the network, or "
            f"download its {_FILE} elsewhere and name that file"
        ) from None
