"""SeTformer: a hierarchical vision transformer whose attention is optimal transport to a small reference set.

P. Shamsolmoali, M. Zareapoor, E. Granger, M. Felsberg, "SeTformer Is What You Need for Vision and Language",
AAAI 2024, arXiv 2401.03540. Stem, downsampling and the depths and widths of Mini and Tiny follow NAT (A. Hassani
et al., "Neighborhood Attention Transformer", CVPR 2023), which reproduces the published sizes; the paper's own
table of depths and widths could not be read, so those of Small and Base are the ones that fit its sizes.

    image --stem (two 3x3 convs)--> stage 1 --3x3 conv--> stage 2 --> ... --> norm --> mean --> classifier
    stage = blocks of   x + attention(norm(x)),   x + mlp(norm(x))

Tokens travel as (B, H, W, C) in memory order, which a channels-last convolution reads and writes without a copy.

Letters: B = images, H, W = token rows and columns, C = channels, h = heads, n = H * W, m = references,
k = anchors, d = channels of one head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from setformer_dist.core.config import FrozenConfig, build, merge
from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.set_attention import IntTuple, SetAttentionConfig, set_attention

# ------------------------------------------------------------------------------------------------ configuration


class SetformerConfig(FrozenConfig):
    """Shape of a SeTformer; every field is a keyword of `timm.create_model`.

    Attributes:
        embed_dim: channels of stage 1; each later stage doubles them.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratio: hidden width of the MLP over its input width.
        stem_strides: strides of the two stem convolutions.
        layer_scale: initial value of a learned factor per channel on each branch, or None for no factor.
        drop_path_rate: share of samples that skip a branch in the last block; earlier blocks rise to it linearly.
        drop_rate: dropout before the classifier.
        in_chans: channels of the input image.
        num_classes: classes; 0 removes the classifier.
        global_pool: timm's name of the pooling, "avg" for the mean of all tokens, "" for none.
        attn: the attention's choices.
    """

    embed_dim: int = pydantic.Field(default=64, ge=2)
    depths: IntTuple = (3, 4, 6, 5)
    num_heads: IntTuple = (2, 4, 8, 16)
    mlp_ratio: float = pydantic.Field(default=3.0, gt=0)
    stem_strides: IntTuple = (2, 2)
    layer_scale: float | None = None
    drop_path_rate: float = pydantic.Field(default=0.0, ge=0, lt=1)
    drop_rate: float = pydantic.Field(default=0.0, ge=0, lt=1)
    in_chans: int = pydantic.Field(default=3, ge=1)
    num_classes: int = pydantic.Field(default=1000, ge=0)
    global_pool: str = "avg"
    attn: SetAttentionConfig = SetAttentionConfig()

    @pydantic.model_validator(mode="after")
    def _possible(self) -> SetformerConfig:
        if not self.depths or min(self.depths) < 1 or len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths {self.depths} and num_heads {self.num_heads} must give one positive number per stage"
            )
        if len(self.stem_strides) != 2 or min(self.stem_strides) < 1:
            raise ValueError(f"stem_strides {self.stem_strides} must be two positive numbers")
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim = {self.embed_dim} must be even: the stem's first layer has half of it")
        m = self.attn.references
        if not isinstance(m, int) and len(m) != len(self.depths):
            raise ValueError(f"attn.references {m} must be one number, or one for each of {len(self.depths)} stages")
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(
                    f"{heads} heads do not divide a stage of {width} channels: "
                    f"with embed_dim = {self.embed_dim} the stages have {self.widths}"
                )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))

    @property
    def reductions(self) -> tuple[int, ...]:
        """Image pixels per token along one axis, by stage."""
        stem = self.stem_strides[0] * self.stem_strides[1]
        return tuple(stem * 2**i for i in range(len(self.depths)))


# ------------------------------------------------------------------------------------------------------- layers


class DropPath(nn.Module):
    """Stochastic depth of the whole model: one draw per sample and branch, made before the first block.

    With sample keys the draw is a pure function of (key, branch): it does not depend on which rank holds the
    sample, on the micro batch, or on recomputation. Without keys it comes from torch's generator.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        """Set the share of samples dropped by each branch, in model order."""
        super().__init__()
        self.rates = tuple(rates)
        self.keys: torch.Tensor | None = None

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
        rate = torch.tensor(self.rates, device=device).unsqueeze(1)
        return ((uniform >= rate) / (1.0 - rate)).to(dtype)


def keyed_uniform(keys: torch.Tensor, streams: int) -> torch.Tensor:
    """Return numbers in [0, 1) that depend on (key, stream) alone.

    The key and the stream are mixed by the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); int64
    products wrap around on every device, and a logical shift is an arithmetic one with the sign bits masked.

    Args:
        keys: (b,) int64, any values.
        streams: s.

    Returns:
        (s, b) fp32 with 24 random bits.
    """
    stream = torch.arange(1, streams + 1, device=keys.device, dtype=torch.int64).unsqueeze(1)
    x = keys.unsqueeze(0) + stream * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF).float() * 2.0**-24


def conv_tokens(x_bhwc: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Apply a convolution to channels-last tokens; the permutations are views, not copies."""
    y_bchw: torch.Tensor = conv(x_bhwc.permute(0, 3, 1, 2))
    return y_bchw.permute(0, 2, 3, 1).contiguous()


class Stem(nn.Module):
    """Two 3x3 convolutions without activation between them, then a norm (NAT's stem)."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int]) -> None:
        """Build for images of `in_chans` channels and tokens of `dim`."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=strides[0], padding=1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=strides[1], padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image_bchw: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, height, width) -> (B, H, W, C); sides are divided by the strides, rounded up."""
        x = self.conv1(image_bchw.contiguous(memory_format=torch.channels_last))
        return self.norm(conv_tokens(x.permute(0, 2, 3, 1), self.conv2))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """3x3 convolution of stride 2 that doubles the channels, then a norm."""

    def __init__(self, dim: int) -> None:
        """Build for `dim` input channels."""
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x_bhwc: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.norm(conv_tokens(x_bhwc, self.conv))  # type: ignore[no-any-return]


class SetAttention(nn.Module):
    """SeT attention: one input map (for similarity and values), transport per head, one output map.

    Attributes:
        references: (h, m, d) parameter, the set that gathers.
        return_references: (h, m, d) parameter, the set that scatters, or None with one set.
        anchors: (h, k, d) parameter of the Nyström map, or None.
    """

    def __init__(self, dim: int, num_heads: int, config: SetAttentionConfig) -> None:
        """Build for `dim` channels split over `num_heads` heads; `config` as `of_stage` returns it."""
        super().__init__()
        self.num_heads = num_heads
        self.config = config
        width = dim // num_heads
        m, k = config.references_of(0), width
        self.anchors: nn.Parameter | None = None
        if config.kernel == "nystrom":
            k = config.anchors or width
            self.anchors = nn.Parameter(torch.empty(num_heads, k, width))
        self.input = nn.Linear(dim, dim)
        self.output = nn.Linear(num_heads * k, dim)
        self.references = nn.Parameter(torch.empty(num_heads, m, k))
        self.return_references: nn.Parameter | None = None
        if config.reference_sets == 2:
            self.return_references = nn.Parameter(torch.empty(num_heads, m, k))
        self.reset_references()

    def reset_references(self) -> None:
        """Draw references and anchors in random directions, of about unit length."""
        for vectors in (self.references, self.return_references, self.anchors):
            if vectors is not None:
                nn.init.normal_(vectors, std=vectors.shape[-1] ** -0.5)

    def forward(self, x_bhwc: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        b, rows, columns, _ = x_bhwc.shape
        x = self.input(x_bhwc).view(b, rows * columns, self.num_heads, -1)
        y_hbnd = set_attention(
            x.permute(2, 0, 1, 3).contiguous(),
            self.references,
            (rows, columns),
            self.config,
            return_references_hmd=self.return_references,
            anchors_hkd=self.anchors,
        )
        y = y_hbnd.permute(1, 2, 0, 3).reshape(b, rows, columns, -1)
        return self.output(y)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, ratio: float) -> None:
        """Build for `dim` channels and a hidden layer `ratio` times as wide."""
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each on a normed input and added to it."""

    def __init__(self, stage: int, config: SetformerConfig) -> None:
        """Build a block of stage `stage`, counted from 0."""
        super().__init__()
        dim = config.widths[stage]
        self.norm1 = nn.LayerNorm(dim)
        self.attn: nn.Module = SetAttention(dim, config.num_heads[stage], config.attn.of_stage(stage))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_ratio)
        scale = config.layer_scale
        self.scale1 = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        self.scale2 = None if scale is None else nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: torch.Tensor, keep_2b: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C); keep_2b: (2, B) drop path factors of the two branches, or None."""
        x = x + self._branch(self.attn(self.norm1(x)), self.scale1, keep_2b, 0)
        return x + self._branch(self.mlp(self.norm2(x)), self.scale2, keep_2b, 1)

    @staticmethod
    def _branch(y: torch.Tensor, scale: torch.Tensor | None, keep_2b: torch.Tensor | None, index: int) -> torch.Tensor:
        if scale is not None:
            y = y * scale
        if keep_2b is not None:
            y = y * keep_2b[index].to(y.dtype).view(-1, 1, 1, 1)
        return y


class Stage(nn.Module):
    """A downsampling (not in the first stage) and the blocks of one resolution."""

    def __init__(self, index: int, config: SetformerConfig) -> None:
        """Build stage `index`, counted from 0."""
        super().__init__()
        dim = config.widths[index]
        self.grad_checkpointing = False
        self.downsample = Downsample(dim // 2) if index else nn.Identity()
        self.blocks = nn.ModuleList(Block(index, config) for _ in range(config.depths[index]))

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, W, C_in) -> (B, H', W', C); keep: (2 * blocks, B) drop path factors, or None."""
        x = self.downsample(x)
        for i, block in enumerate(self.blocks):
            keep_2b = None if keep is None else keep[2 * i : 2 * i + 2]
            if self.grad_checkpointing and torch.is_grad_enabled():
                # The factors are arguments, so that recomputation sees those of the first pass.
                x = checkpoint(block, x, keep_2b, use_reentrant=False)
            else:
                x = block(x, keep_2b)
        return x


# -------------------------------------------------------------------------------------------------------- model


class SeTformer(nn.Module):
    """Image classifier and feature pyramid, with timm's method set."""

    output_fmt = "NHWC"

    def __init__(self, **fields: Any) -> None:
        """Build from the fields of SetformerConfig.

        Raises:
            ConfigError: a field is unknown, of the wrong type, or the combination is impossible.
        """
        super().__init__()
        config = build(SetformerConfig, fields, "model")
        self.config = config
        self.num_classes = config.num_classes
        self.in_chans = config.in_chans
        self.global_pool = config.global_pool
        self.num_features = self.head_hidden_size = config.widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(config.widths, config.reductions, strict=True))
        ]
        self.stem = Stem(config.in_chans, config.embed_dim, config.stem_strides)
        self.stages = nn.ModuleList(Stage(i, config) for i in range(len(config.depths)))
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(
            self.num_features,
            config.num_classes,
            pool_type=config.global_pool,
            drop_rate=config.drop_rate,
            input_fmt=self.output_fmt,
        )
        self.drop_path = DropPath(_drop_path_rates(config))
        self.apply(_init_linear)

    def set_sample_keys(self, keys: torch.Tensor | None) -> None:
        """Make drop path a function of these keys for the coming forward passes; None goes back to torch's RNG.

        Args:
            keys: (B,) int64, one per sample of the next batch.
        """
        self.drop_path.keys = keys

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that must not decay: references, anchors, norms, layer scales, biases.

        Named by the layer that holds them, not by their shape, which ZeRO stage 3 hides.
        """
        names: set[str] = set()
        for prefix, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                matrix = isinstance(module, nn.Linear | nn.Conv2d) and name == "weight"
                if not matrix:
                    names.add(f"{prefix}.{name}" if prefix else name)
        return names

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that order the parameters by depth, for layer decay."""
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last layer, Identity where there is none."""
        return self.head.fc  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes remove it, `global_pool = ""` removes the pooling too."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features

    def forward_features(self, image: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, height, width) -> (B, H, W, C) normed tokens of the last stage."""
        return self.norm(self._stages(image, len(self.stages))[-1])  # type: ignore[no-any-return]

    def forward_head(self, x_bhwc: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, H, W, C) -> (B, num_classes), or (B, C) before the classifier."""
        return self.head(x_bhwc, pre_logits=pre_logits)  # type: ignore[no-any-return]

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
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: leave out the final features.
        """
        assert output_fmt in ("NCHW", "NHWC"), f"output_fmt {output_fmt!r} must be NCHW or NHWC"
        take, last = feature_take_indices(len(self.stages), indices)
        outputs = self._stages(x, last + 1 if stop_early else len(self.stages))
        complete = len(outputs) == len(self.config.depths)
        final = self.norm(outputs[-1]) if complete else outputs[-1]
        chosen = [final if norm and i == len(self.config.depths) - 1 else outputs[i] for i in sorted(take)]
        if output_fmt == "NCHW":
            chosen = [y.permute(0, 3, 1, 2).contiguous() for y in chosen]
        return chosen if intermediates_only else (final, chosen)

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
            self.num_features = self.head_hidden_size = self.config.widths[last]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return list(take)

    def _stages(self, image: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Return the outputs of the first `count` stages."""
        x = self.stem(image)
        keep = self.drop_path(x.shape[0], x.device, x.dtype)
        outputs: list[torch.Tensor] = []
        branch = 0
        for stage, depth in zip(self.stages[:count], self.config.depths, strict=False):
            x = stage(x, None if keep is None else keep[branch : branch + 2 * depth])
            branch += 2 * depth
            outputs.append(x)
        return outputs


def _drop_path_rates(config: SetformerConfig) -> list[float]:
    """Return the rate of each branch (two per block), rising linearly from 0 to drop_path_rate."""
    blocks = sum(config.depths)
    return [config.drop_path_rate * (i // 2) / max(blocks - 1, 1) for i in range(2 * blocks)]


def _init_linear(module: nn.Module) -> None:
    """Truncated normal weights and zero biases in linear layers (NAT); convolutions keep torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------- entry points


def _pretrained_cfg(size: int, classes: int, **fields: Any) -> dict[str, Any]:
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
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        **fields,
    }


default_cfgs = generate_default_cfgs(
    {
        "setformer_nano.untrained": _pretrained_cfg(32, 10, pool_size=(4, 4), crop_pct=1.0),
        "setformer_mini.untrained": _pretrained_cfg(224, 1000),
        "setformer_tiny.untrained": _pretrained_cfg(224, 1000),
        "setformer_small.untrained": _pretrained_cfg(224, 1000),
        "setformer_base.untrained": _pretrained_cfg(224, 1000),
    }
)


def _create(variant: str, pretrained: bool, shape: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """Build a variant: its shape, overridden field by field, `attn` included."""
    attn = overrides.get("attn")
    if isinstance(attn, SetAttentionConfig):
        overrides["attn"] = attn.model_dump(exclude_unset=True)
    fields = merge(shape, overrides)
    depths = fields["depths"]
    model = build_model_with_cfg(
        SeTformer,
        variant,
        pretrained,
        feature_cfg={"out_indices": tuple(range(len(depths))), "feature_cls": "getter"},
        **fields,
    )
    assert isinstance(model, nn.Module)
    return model


@register_model  # type: ignore[untyped-decorator]
def setformer_nano(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """For images of 8 to 32 pixels and for tests: 0.6 M parameters."""
    shape = {
        "embed_dim": 48,
        "depths": (1, 2, 1),
        "num_heads": (2, 4, 8),
        "mlp_ratio": 2.0,
        "stem_strides": (2, 1),
        "attn": {"references": 16},
    }
    return _create("setformer_nano", pretrained, shape, **overrides)


@register_model  # type: ignore[untyped-decorator]
def setformer_mini(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """16.4 M parameters; widths and depths of NAT-Mini."""
    shape = {
        "embed_dim": 64,
        "depths": (3, 4, 6, 5),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratio": 3.0,
        "attn": {"references": (49, 25, 16, 9)},
    }
    return _create("setformer_mini", pretrained, shape, **overrides)


@register_model  # type: ignore[untyped-decorator]
def setformer_tiny(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """22.7 M parameters; widths and depths of NAT-Tiny."""
    shape = {
        "embed_dim": 64,
        "depths": (3, 4, 18, 5),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratio": 3.0,
        "attn": {"references": (49, 25, 9, 9)},
    }
    return _create("setformer_tiny", pretrained, shape, **overrides)


@register_model  # type: ignore[untyped-decorator]
def setformer_small(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """35.5 M parameters; width of NAT-Small, 14 blocks in stage 3."""
    shape = {
        "embed_dim": 96,
        "depths": (3, 4, 14, 5),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "attn": {"references": (49, 25, 9, 9)},
    }
    return _create("setformer_small", pretrained, shape, **overrides)


@register_model  # type: ignore[untyped-decorator]
def setformer_base(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """57.15 M parameters; width of NAT-Base, 3 blocks in stage 4."""
    shape = {
        "embed_dim": 128,
        "depths": (3, 4, 18, 3),
        "num_heads": (4, 8, 16, 32),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "attn": {"references": (49, 49, 25, 25)},
    }
    return _create("setformer_base", pretrained, shape, **overrides)
