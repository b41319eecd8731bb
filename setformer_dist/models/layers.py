"""What our image models share: keyed stochastic depth, small layers, and timm's method set over stages.

Letters: B = images, H, W = token rows and columns, C = channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from setformer_dist.core.config import FrozenConfig, merge
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import Recompute
from setformer_dist.models.host_memory import InHostMemory
from setformer_dist.models.recompute import WHOLE, MadeAgain
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.splitmix import GOLDEN, mix64

USE_EXPORT = "use torch.export.export, torch.onnx.export(..., dynamo=True) or torch.compile (docs/operators.md)"


class DropPath(nn.Module):
    """Stochastic depth of the whole model: one draw per sample and branch, made before the first block.

    With sample keys the draw is a pure function of (key, branch): it does not depend on which rank holds the
    sample, on the micro batch, or on recomputation. Without keys it comes from torch's generator.
    """

    bits: torch.Tensor

    def __init__(self, rates: Sequence[float]) -> None:
        """Set the share of samples dropped by each branch, in model order."""
        super().__init__()
        self.rates = tuple(rates)
        self.keys: torch.Tensor | None = None
        # The bits of fp32, which no change of the model's dtype rounds. They move with the model, as a copy from the
        # host in every pass would wait for the device, and has no place in a CUDA graph.
        bits = torch.tensor(self.rates, dtype=torch.float32).view(torch.int32)
        self.register_buffer("bits", bits, persistent=False)

    def forward(self, batch: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """Return (branches, batch) factors, 0 or 1 / (1 - rate), or None where nothing is dropped."""
        if not self.training or not any(self.rates):
            return None
        if self.keys is None:
            uniform = torch.rand(len(self.rates), batch, device=device)
        else:
            if self.keys.numel() != batch:
                raise ConfigError(
                    f"{self.keys.numel()} sample keys were set for a batch of {batch}: set one key per sample"
                )
            uniform = keyed_uniform(self.keys.to(device), len(self.rates))
        rate = self.bits.view(torch.float32).to(device).unsqueeze(1)
        return ((uniform >= rate) / (1.0 - rate)).to(dtype)


def drop_path_rates(depths: Sequence[int], last: float) -> list[float]:
    """Return the rate of each branch (two per block), rising linearly from 0 to `last`."""
    blocks = sum(depths)
    return [last * (i // 2) / max(blocks - 1, 1) for i in range(2 * blocks)]


def keyed_uniform(keys: torch.Tensor, streams: int) -> torch.Tensor:
    """Return numbers in [0, 1) that depend on (key, stream) alone.

    They are SplitMix64's: a key is the word that its stream begins at.

    Args:
        keys: (b,) int64, any values.
        streams: s.

    Returns:
        (s, b) fp32 with 24 random bits.
    """
    stream = torch.arange(1, streams + 1, device=keys.device, dtype=torch.int64).unsqueeze(1)
    x = mix64(keys.unsqueeze(0) + stream * GOLDEN)
    return ((x >> 40) & 0xFFFFFF).float() * 2.0**-24


class RowConv(nn.Conv2d):
    """A convolution that can do without its padding of rows, where those above and below are real ones or given."""

    def forward(self, x_bchw: torch.Tensor, padded: bool = False) -> torch.Tensor:
        """As nn.Conv2d; with `padded`, x already has the rows of the padding."""
        if not padded:
            return super().forward(x_bchw)
        # Within this module's forward, where ZeRO-3 has gathered its weight.
        return F.conv2d(x_bchw, self.weight, self.bias, self.stride, (0, int(self.padding[1])))


def conv_tokens(x_bhwc: torch.Tensor, conv: nn.Conv2d, padded: bool = False) -> torch.Tensor:
    """Apply a convolution to channels-last tokens; the permutations are views, not copies; `padded`: see `RowConv`."""
    x_bchw = x_bhwc.permute(0, 3, 1, 2)
    y_bchw: torch.Tensor = conv(x_bchw, padded=True) if padded else conv(x_bchw)
    return y_bchw.permute(0, 2, 3, 1).contiguous()


def edge_rows(x_bchw: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Add the rows of zeros that a 3x3 convolution of the whole image pads, where this part ends at its border."""
    return F.pad(x_bchw, (0, 0, int(rows.is_top), int(rows.is_bottom)))


def channels_last(image_bchw: torch.Tensor) -> torch.Tensor:
    """Return the image in the memory order of channels-last convolutions; as it is under transforms such as vmap.

    Raises:
        ConfigError: it stands for a trace that would not hold the model.
    """
    refuse_tracers(image_bchw)
    if torch._C._are_functorch_transforms_active():  # which know no memory format; values are the same
        return image_bchw
    return image_bchw.contiguous(memory_format=torch.channels_last)


def refuse_tracers(inputs: object) -> None:
    """Refuse tracers that cannot follow the checks, or write down the choices of one call without saying so.

    Raises:
        ConfigError: with what to use.
    """
    if isinstance(inputs, torch.fx.Proxy):
        raise ConfigError(f"torch.fx.symbolic_trace cannot follow this model: {USE_EXPORT}")
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise ConfigError(f"torch.jit.trace would keep the choices of one call (mode, sample keys): {USE_EXPORT}")


class Untraceable:
    """Answers torch.jit.script of a model, which cannot compile it, in one sentence."""

    def __prepare_scriptable__(self) -> object:
        """Raise ConfigError; torch.jit.script asks every module for this first."""
        raise ConfigError(f"torch.jit.script cannot compile this model: {USE_EXPORT}")


@contextmanager
def called_as(module: nn.Module, function: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Let a call of a module compute something else than its `forward` for a while, with all its hooks.

    ZeRO-3 gathers a module's weights by these, so another method of it, called directly, would find none.
    """
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def scale_branch(y: torch.Tensor, keep_2b: torch.Tensor | None, index: int) -> torch.Tensor:
    """Multiply a branch's output by its drop path factor of each sample; no factors leave it as it is."""
    if keep_2b is None:
        return y
    return y * keep_2b[index].to(y.dtype).view(-1, *(1,) * (y.ndim - 1))


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    keep: torch.Tensor | None,
    *,
    recompute: Recompute,
    rows: Rows | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply blocks of `forward(x, keep_2b)` one after the other, or with positions of `forward(x, keep_2b, positions)`.

    Args:
        blocks: of one stage.
        x: tokens, in the blocks' layout.
        keep: (2 * blocks, B) drop path factors, or None.
        recompute: of the stage; "block" and "offload" are done here, the others by the blocks themselves.
        rows: the group that shares the images; a recomputation takes over the sums of the first pass.
        positions: where the tokens lie, for blocks that take some tokens of a grid (visible.py).
    """
    places = () if positions is None else (positions,)
    contexts: dict[str, Any] = {} if rows is None else {"context_fn": rows.recomputing}
    whole = recompute in WHOLE and torch.is_grad_enabled()
    with InHostMemory() if recompute == "offload" and whole else nullcontext():
        for i, block in enumerate(blocks):
            keep_2b = None if keep is None else keep[2 * i : 2 * i + 2]
            if whole:
                # The factors are arguments, so that recomputation sees those of the first pass.
                x = checkpoint(block, x, keep_2b, *places, use_reentrant=False, **contexts)
            else:
                x = block(x, keep_2b, *places)
    return x


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, ratio: float, approximate: str = "none") -> None:
        """Build for `dim` channels and a hidden layer `ratio` times as wide; `approximate` as in torch's GELU."""
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)
        self.approximate = approximate

    def forward(self, x: torch.Tensor, again: MadeAgain | None = None) -> torch.Tensor:
        """(..., C) -> (..., C); `again` makes the GELU's output once more in the backward pass."""
        hidden = self.fc1(x)
        if again is not None:
            return self.fc2(again.gelu(hidden, self.approximate))  # type: ignore[no-any-return]
        return self.fc2(F.gelu(hidden, approximate=self.approximate))  # type: ignore[no-any-return]


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights and zero biases in linear layers (NAT); convolutions keep torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------- timm's methods


class Pyramid(Untraceable, nn.Module, ABC):
    """A classifier made of a stem and stages, each with fewer tokens: what timm and our engine ask of it.

    A subclass sets `stages`, `norm`, `head`, `drop_path`, `widths`, `num_classes`, `num_features` and `global_pool`,
    calls its stages in `_stages` and puts the last one's output together in `_final`.
    """

    stages: nn.ModuleList
    norm: nn.Module
    drop_path: DropPath
    widths: tuple[int, ...]
    num_features: int

    def set_sample_keys(self, keys: torch.Tensor | None) -> None:
        """Make drop path a function of these keys for the coming forward passes; None goes back to torch's RNG.

        Args:
            keys: (B,) int64, one per sample of the next batch.
        """
        self.drop_path.keys = keys

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that must not decay: all but the weights of linear layers and convolutions.

        Named by the layer that holds them, not by their shape, which ZeRO stage 3 hides.
        """
        names: set[str] = set()
        for prefix, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                matrix = isinstance(module, nn.Linear | nn.Conv2d) and name == "weight"
                if not matrix:
                    names.add(f"{prefix}.{name}" if prefix else name)
        return names

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return timm's patterns that order the parameters by depth, for layer decay."""
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.(?:downsample|position|class_token)", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def forward_features(self, image: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, height, width) -> normed tokens of the last stage, as `forward_head` takes them."""
        maps, token = self._stages(image, len(self.stages))
        return self._final(self.norm(maps[-1]), None if token is None else self.norm(token))

    @abstractmethod
    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify the tokens; without the classifier where `pre_logits`."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, height, width) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(image))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the outputs of chosen stages, and unless `intermediates_only` the final features before them.

        Args:
            x: (B, in_chans, height, width).
            indices: stages; an int means the last so many, None all.
            norm: apply the final norm to the last stage's output (the only one it is made for).
            stop_early: leave out the stages behind the last one asked for.
            output_fmt: of the intermediates: "NCHW", "NHWC", or "NLC", tokens in row-major order without a class token.
            intermediates_only: leave out the final features.
        """
        assert output_fmt in ("NCHW", "NHWC", "NLC"), f"output_fmt {output_fmt!r} must be NCHW, NHWC or NLC"
        take, last = feature_take_indices(len(self.stages), indices)
        maps, token = self._stages(x, last + 1 if stop_early else len(self.stages))
        complete = len(maps) == len(self.widths)
        normed = self.norm(maps[-1]) if complete else maps[-1]
        # As in timm, each stage once and in order, however often and in what order it is asked for.
        chosen = [normed if norm and i == len(self.widths) - 1 else maps[i] for i in sorted(set(take))]
        if output_fmt == "NCHW":
            chosen = [y.permute(0, 3, 1, 2).contiguous() for y in chosen]
        elif output_fmt == "NLC":
            chosen = [y.flatten(1, 2) for y in chosen]
        return (
            chosen if intermediates_only else (self._final(normed, None if token is None else self.norm(token)), chosen)
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last one asked for, and what they fed; return the stages kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.widths[last]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return list(take)

    @abstractmethod
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes remove it, `global_pool = ""` removes the pooling too."""

    @abstractmethod
    def _stages(self, image: torch.Tensor, count: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return the (B, H, W, C) outputs of the first `count` stages, and the last one's (B, 1, C) class token."""

    @abstractmethod
    def _final(self, map_bhwc: torch.Tensor, token_b1c: torch.Tensor | None) -> torch.Tensor:
        """Put a stage's output together as `forward_features` returns it."""


# ------------------------------------------------------------------------------------------------- entry points


def pretrained_cfg(size: int, classes: int, **fields: object) -> dict[str, object]:
    """Describe a model to timm; there are no weights to download."""
    return {
        "url": "",
        "num_classes": classes,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        **fields,
    }


def create(
    model: type[Pyramid], variant: str, pretrained: bool, shape: Mapping[str, object], overrides: Mapping[str, object]
) -> nn.Module:
    """Build a registered variant: its shape, overridden field by field, tables of choices included."""
    tables = {
        name: value.model_dump(exclude_unset=True) if isinstance(value, FrozenConfig) else value
        for name, value in overrides.items()
    }
    fields = merge(shape, tables)
    depths = fields["depths"]
    assert isinstance(depths, Sequence)
    built = build_model_with_cfg(
        model,
        variant,
        pretrained,
        feature_cfg={"out_indices": tuple(range(len(depths))), "feature_cls": "getter"},
        **fields,
    )
    assert isinstance(built, nn.Module)
    return built
