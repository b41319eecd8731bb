"""The reference sets of a model's SeT attention: which there are, what its layers see of them, and freezing them.

Letters: b = images or sequences, n = tokens, h = heads, d = channels of one head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn

from setformer_dist.core.model_config import SetKind
from setformer_dist.models.attention import SetAttention
from setformer_dist.ops.refit import Layer


@contextlib.contextmanager
def watched_marginals(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the marginal errors of every SeT attention of a model while the context is open.

    They are computed within the forward passes, where the parameters are whole even if ZeRO-3 cuts them in between.

    Args:
        model: any; without SeT attention nothing is collected.

    Yields:
        A list that grows by one tensor (b, h) per SeT layer and forward pass, fp32 or wider: for each image (or
        sequence) and head the largest |n (row sum) - 1| that the layer's rounds leave.
    """
    found: list[torch.Tensor] = []
    layers = set_attentions(model)
    for layer in layers:
        layer.watcher = found.append
    try:
        yield found
    finally:
        for layer in layers:
            layer.watcher = None


@contextlib.contextmanager
def watched_tokens(model: nn.Module, take: Callable[[str, torch.Tensor, torch.Tensor | None], None]) -> Iterator[None]:
    """Hand over the tokens of every SeT attention of a model while the context is open.

    Args:
        model: any; without SeT attention nothing is handed over.
        take: called in each forward pass of a layer with its name, the tokens (b, h, n, d), which must not be changed,
            and the mask (b, n), True for valid ones, or None.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SetAttention)}
    for name, layer in layers.items():
        layer.taker = functools.partial(take, name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.taker = None


def reference_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Return the SeT attention layers of a model as K-means sees them, first block first; before ZeRO cuts it."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SetAttention):
            h, width = module.num_heads, module.input.out_features // module.num_heads
            sizes = {kind: (h, vectors.shape[1], vectors.shape[2]) for kind, vectors in module.sets().items()}
            found.append(Layer(name, h, width, module.config, sizes))
    return tuple(found)


def freeze_sets(model: nn.Module, kinds: Collection[SetKind]) -> None:
    """Give these sets of every SeT attention no gradient from now on: the optimizer leaves them as they are."""
    for layer in set_attentions(model):
        layer.frozen = frozenset(kinds)


def set_attentions(model: nn.Module) -> list[SetAttention]:
    """Return the SeT attention layers of a model, first block first."""
    return [module for module in model.modules() if isinstance(module, SetAttention)]
