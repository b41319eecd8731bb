"""What a block keeps for its backward pass, and what it computes again: memory against time, the same bits either way.

    none     all is kept, in units of one token map of the block (ratio of the MLP 2, with layer scale): 12
    cheap    outputs of norms and of the GELU are made again from their inputs: 8, hardly any work
    mlp      the MLP's branch is computed again, and the norm before the attention: 5, about half a forward pass
    block    all but the block's input: 1, a whole forward pass
    offload  as block, and a GPU's copy of that input goes to host memory: 0 (host_memory.py)

The rounds of attention, and what ranks exchange for them, are computed again by "block" and "offload" alone; even
there the sums of the first pass are taken over, so a recomputation exchanges nothing (`ops.parts.Rows.recomputing`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional as F

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import Recompute
from setformer_dist.ops import block

ORDER: tuple[Recompute, ...] = get_args(Recompute)

# Policies that compute whole blocks again.
WHOLE: frozenset[Recompute] = frozenset({"block", "offload"})


class MadeAgain:
    """Within `with`, tensors that are named are not kept by autograd: the backward pass makes them again.

    Nothing but their inputs is held. Weights of norms are copied, as ZeRO-3 may take them away before.
    """

    def __init__(self) -> None:
        self._made: list[tuple[torch.Tensor, Callable[[], torch.Tensor]]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> MadeAgain:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__(None, None, None)
        self._made.clear()

    def norm(self, norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        """Normalise, and name the result."""
        weight, bias = (None if w is None else w.detach().clone() for w in (norm.weight, norm.bias))
        made = functools.partial(F.layer_norm, x.detach(), list(norm.normalized_shape), weight, bias, norm.eps)
        return self._named(norm(x), made)

    def enter(self, norm: nn.LayerNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise as `ops.block.enter`, and name the norm."""
        weight, bias = (None if w is None else w.detach().clone() for w in (norm.weight, norm.bias))
        x, normed = block.enter(x, norm)
        given = x.detach()

        def made() -> torch.Tensor:
            again = block.add_norm(given.contiguous(), None, None, None, weight, bias, norm.eps).normed
            assert again is not None
            return again

        return x, self._named(normed, made)

    def gelu(self, x: torch.Tensor, approximate: str) -> torch.Tensor:
        """Apply GELU, and name the result."""
        made = functools.partial(F.gelu, x.detach(), approximate=approximate)
        return self._named(F.gelu(x, approximate=approximate), made)

    def _named(self, tensor: torch.Tensor, made: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._made.append((tensor.detach(), made))
        return tensor

    def _pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()._cdata
        for output, made in self._made:
            whole = output.numel() == tensor.numel() and tensor.is_contiguous()
            if whole and output.untyped_storage()._cdata == storage:
                return made, tensor.shape
        return tensor

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        made, shape = packed
        again: torch.Tensor = made()
        return again.view(shape)


def per_stage(recompute: Recompute | tuple[Recompute, ...], stages: int) -> tuple[Recompute, ...]:
    """Return one policy for each stage.

    Raises:
        ConfigError: there are not as many as stages.
    """
    if isinstance(recompute, str):
        return (recompute,) * stages
    if len(recompute) != stages:
        raise ConfigError(
            f"model.recompute = {list(recompute)} names {len(recompute)} stages, and the model has {stages}: name as "
            "many, or one policy for all"
        )
    return recompute


def candidates(stages: int, host_memory: bool) -> list[tuple[Recompute, ...]]:
    """Return policies in the order in which they cost time, each holding less than the one before.

    Stages come from the first on: a byte that they keep takes the fewest multiplications to make again.

    Args:
        stages: of the model.
        host_memory: whether the host's memory is another than the device's.
    """
    none, cheap, mlp, block, offload = ORDER
    found = [(none,) * stages, (cheap,) * stages]
    for policy, before in ((mlp, cheap), (block, mlp), (offload, block))[: 3 if host_memory else 2]:
        found += [(policy,) * i + (before,) * (stages - i) for i in range(1, stages + 1)]
    return found


def set_recompute(model: nn.Module, recompute: Recompute | tuple[Recompute, ...], name: str) -> None:
    """Say what a model computes again in its backward pass.

    Args:
        model: one of ours, or one with timm's `set_grad_checkpointing`, which knows "none" and "block" alone.
        recompute: for all stages, or for each.
        name: of the model, for messages.

    Raises:
        ConfigError: the model cannot.
    """
    own = getattr(model, "set_recompute", None)
    if own is not None:
        own(recompute)
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if recompute == "none":
        if switch is not None:
            switch(False)
        return
    if switch is None:
        raise ConfigError(
            f"model.activation_checkpointing or model.recompute needs model {name} to have set_grad_checkpointing, as "
            "timm's models do: add it, or leave the key out"
        )
    if recompute != "block":
        raise ConfigError(
            f"model.recompute = {recompute!r}: {name} can recompute whole blocks alone: use 'block' or 'none'"
        )
    switch(True)
