"""SOFT and SOFT++: vision transformers with a Gaussian kernel through 49 landmarks in place of softmax.

J. Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021, arXiv 2110.11945; the `_norm`
variants are those of "Softmax-free Linear Transformers" (IJCV 2024, arXiv 2207.03341).

    image --stem (three 3x3 convs)--> stage 1 --3x3 conv--> ... --> stage 4 --> norm --> class token --> classifier
    stages 1 to 3 = + positions, blocks of   norm(x + soft(x)),   norm(x + mlp(x))
    stage 4       = class token, + positions, blocks of   x + softmax(norm(x)),   x + mlp(norm(x))

Where paper and published code differ, the paper is followed, unless the published numbers of parameters say otherwise:

* landmarks are sampled by a convolution per head, and values pass a depthwise convolution in parallel to the attention
  (code): only with both do all five sizes, 13.07, 24.11, 45.81, 64.70 and 87.11 M, come out to the last digit;
* queries are divided by d^(1/4) before that convolution (code; until 2026-11-28 ours were not, see core/revisions.py);
* Small has 7 blocks in stage 3 (paper; the code's 20 make 38.9 M);
* nothing is added to the landmarks' kernel before its inversion (paper; the code adds 0.01 to the diagonal).

Two things are ours. Published stem and downsampling use BatchNorm, whose running statistics depend on how a batch is
spread over machines, so our engine refuses it; `conv_norm = "layer"`, the default, has as many parameters, and
`conv_norm = "batch"` is the published model for use outside of our engine. And blocks drop whole branches
(`drop_path_rate`) where the code puts dropout at that rate on single values.

Letters: B = images, H, W = token rows and columns, C = channels, n = H * W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from setformer_dist.core.config import FrozenConfig, build
from setformer_dist.core.model_config import Recompute
from setformer_dist.models.attention import AttentionConfig, SoftAttentionConfig, make_attention
from setformer_dist.models.layers import (
    DropPath,
    Mlp,
    Pyramid,
    channels_last,
    conv_tokens,
    create,
    drop_path_rates,
    init_linear,
    pretrained_cfg,
    run_blocks,
    scale_branch,
)
from setformer_dist.ops.set.attention import IntTuple

STEM_WIDTH = 32
MLP_RATIO = 4.0
# Positions are learned for images of 224 x 224 pixels and resized to any other.
POSITIONS_FOR = 224
PUBLISHED: dict[str, Any] = {"sampling": "conv", "conv_stride": (8, 4, 2, 1), "value_conv": (9, 5, 3, 0)}

# ------------------------------------------------------------------------------------------------ configuration


class SoftConfig(FrozenConfig):
    """Shape of a SOFT; every field is a keyword of `timm.create_model`.

    Attributes:
        widths: channels of each stage.
        depths: blocks of each stage; the last stage has softmax attention.
        num_heads: heads of each stage.
        attention: "soft", or "soft_norm" for SOFT++.
        soft: the attention's choices; of tuples the last entry has no meaning.
        conv_norm: norm behind the convolutions of stem and downsampling, see the top of the file.
        drop_path_rate: share of samples that skip a branch in the last block; earlier blocks rise to it linearly.
        drop_rate: dropout before the classifier.
        in_chans: channels of the input image.
        num_classes: classes; 0 removes the classifier.
        global_pool: "token" for the class token, "avg" for the mean of the others, "" for none.
    """

    widths: IntTuple = (64, 128, 320, 512)
    depths: IntTuple = (1, 2, 3, 2)
    num_heads: IntTuple = (2, 4, 10, 16)
    attention: Literal["soft", "soft_norm"] = "soft"
    soft: SoftAttentionConfig = SoftAttentionConfig(**PUBLISHED)
    conv_norm: Literal["layer", "batch"] = "layer"
    drop_path_rate: float = pydantic.Field(default=0.0, ge=0, lt=1)
    drop_rate: float = pydantic.Field(default=0.0, ge=0, lt=1)
    in_chans: int = pydantic.Field(default=3, ge=1)
    num_classes: int = pydantic.Field(default=1000, ge=0)
    global_pool: Literal["token", "avg", ""] = "token"

    @pydantic.model_validator(mode="after")
    def _possible(self) -> SoftConfig:
        stages = len(self.depths)
        if not stages or min(self.depths) < 1 or not stages == len(self.widths) == len(self.num_heads):
            raise ValueError(
                f"widths {self.widths}, depths {self.depths} and num_heads {self.num_heads} must give one positive "
                "number per stage"
            )
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if heads < 1 or width < 1 or width % heads:
                raise ValueError(f"{heads} heads do not divide a stage of {width} channels: widths are {self.widths}")
        self.attention_config(0).check_stages(stages, on_grid=True)
        return self

    def attention_config(self, stage: int) -> AttentionConfig:
        """Return the attention of a stage, counted from 0."""
        kind = "softmax" if stage == len(self.depths) - 1 and stage else self.attention
        return AttentionConfig(kind=kind, soft=self.soft)

    @property
    def reductions(self) -> tuple[int, ...]:
        """Image pixels per token along one axis, by stage."""
        return tuple(4 * 2**i for i in range(len(self.depths)))


# ------------------------------------------------------------------------------------------------------- layers


class ConvNorm(nn.Module):
    """3x3 convolution, norm, ReLU."""

    def __init__(self, before: int, after: int, stride: int, norm: str) -> None:
        """Build from `before` to `after` channels; `norm` is "layer" or "batch"."""
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.norm: nn.Module = nn.LayerNorm(after) if norm == "layer" else nn.BatchNorm2d(after)

    def forward(self, x_bhwc: torch.Tensor) -> torch.Tensor:
        """(B, H, W, before) -> (B, H', W', after); sides are divided by the stride, rounded up."""
        y = conv_tokens(x_bhwc, self.conv)
        if isinstance(self.norm, nn.BatchNorm2d):
            return F.relu(self.norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return F.relu(self.norm(y))


class SoftBlock(nn.Module):
    """SOFT attention and MLP; each is added to its input, and the sum is normed."""

    def __init__(self, stage: int, config: SoftConfig) -> None:
        """Build a block of stage `stage`, counted from 0."""
        super().__init__()
        dim = config.widths[stage]
        self.attn = make_attention(config.attention_config(stage), dim, config.num_heads[stage], stage)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO, approximate="tanh")
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, keep_2b: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C); keep_2b: (2, B) drop path factors of the two branches, or None."""
        y = self.attn(x.flatten(1, 2), (x.shape[1], x.shape[2])).view(x.shape)
        x = self.norm1(x + scale_branch(y, keep_2b, 0))
        return self.norm2(x + scale_branch(self.mlp(x), keep_2b, 1))  # type: ignore[no-any-return]


class SoftmaxBlock(nn.Module):
    """Softmax attention and MLP, each on a normed input and added to it."""

    def __init__(self, stage: int, config: SoftConfig) -> None:
        """Build a block of stage `stage`, counted from 0."""
        super().__init__()
        dim = config.widths[stage]
        self.norm1 = nn.LayerNorm(dim)
        self.attn = make_attention(config.attention_config(stage), dim, config.num_heads[stage], stage)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO)

    def forward(self, x: torch.Tensor, keep_2b: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 1 + n, C) -> (B, 1 + n, C); keep_2b as in `SoftBlock`."""
        x = x + scale_branch(self.attn(self.norm1(x)), keep_2b, 0)
        return x + scale_branch(self.mlp(self.norm2(x)), keep_2b, 1)


class Stage(nn.Module):
    """A downsampling (not in the first stage), positions, and the blocks of one resolution.

    Attributes:
        position: (1, n, C) parameter for images of 224 x 224 pixels; in the last stage the class token's comes first.
        class_token: (1, 1, C) parameter of the last stage, or None.
    """

    def __init__(self, index: int, config: SoftConfig) -> None:
        """Build stage `index`, counted from 0."""
        super().__init__()
        dim, last = config.widths[index], config.attention_config(index).kind == "softmax"
        self.side = -(-POSITIONS_FOR // config.reductions[index])
        self.grad_checkpointing = False
        self.downsample = ConvNorm(config.widths[index - 1], dim, 2, config.conv_norm) if index else nn.Identity()
        self.position = nn.Parameter(torch.empty(1, self.side**2 + last, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.class_token: nn.Parameter | None = None
        if last:
            self.class_token = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.trunc_normal_(self.class_token, std=0.02)
        block = SoftmaxBlock if last else SoftBlock
        self.blocks = nn.ModuleList(block(index, config) for _ in range(config.depths[index]))

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, H, W, C_in) -> (B, H', W', C) and the (B, 1, C) class token or None; keep as in `run_blocks`."""
        x = self.downsample(x)
        b, rows, columns, dim = x.shape
        position = self.position if self.class_token is None else self.position[:, 1:]
        x = x + resize(position.view(1, self.side, self.side, dim), (rows, columns))
        recompute: Recompute = "block" if self.grad_checkpointing else "none"
        if self.class_token is None:
            return run_blocks(self.blocks, x, keep, recompute=recompute), None
        token = (self.class_token + self.position[:, :1]).expand(b, -1, -1)
        y = run_blocks(self.blocks, torch.cat([token, x.flatten(1, 2)], 1), keep, recompute=recompute)
        return y[:, 1:].reshape(b, rows, columns, dim), y[:, :1]


def resize(position_1hwc: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate positions bilinearly to another grid; the same grid gets them as they are."""
    if position_1hwc.shape[1:3] == grid:
        return position_1hwc
    return F.interpolate(position_1hwc.permute(0, 3, 1, 2), size=grid, mode="bilinear").permute(0, 2, 3, 1)


# -------------------------------------------------------------------------------------------------------- model


class SOFT(Pyramid):
    """Image classifier and feature pyramid, with timm's method set."""

    output_fmt = "NHWC"

    def __init__(self, **fields: object) -> None:
        """Build from the fields of SoftConfig.

        Raises:
            ConfigError: a field is unknown, of the wrong type, or the combination is impossible.
        """
        super().__init__()
        config = build(SoftConfig, fields, "model")
        self.config = config
        self.num_classes = config.num_classes
        self.in_chans = config.in_chans
        self.global_pool: str = config.global_pool
        self.widths = config.widths
        self.num_features = self.head_hidden_size = config.widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(config.widths, config.reductions, strict=True))
        ]
        channels = (config.in_chans, STEM_WIDTH, STEM_WIDTH, config.widths[0])
        self.stem = nn.Sequential(
            *(ConvNorm(channels[i], channels[i + 1], stride, config.conv_norm) for i, stride in enumerate((2, 1, 2)))
        )
        self.stages = nn.ModuleList(Stage(i, config) for i in range(len(config.depths)))
        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = self._classifier()
        self.drop_path = DropPath(drop_path_rates(config.depths, config.drop_path_rate))
        self.apply(init_linear)

    def _classifier(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last layer, Identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes remove it, `global_pool = ""` removes the pooling too."""
        self.num_classes = num_classes
        if global_pool is not None:
            assert global_pool in ("token", "avg", ""), f"global_pool {global_pool!r} must be 'token', 'avg' or ''"
            self.global_pool = global_pool
        self.head = self._classifier()

    def forward_head(self, x_bnc: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, 1 + n, C), class token first -> (B, num_classes), or (B, C) before the classifier."""
        if self.global_pool:
            x_bnc = x_bnc[:, 0] if self.global_pool == "token" else x_bnc[:, 1:].mean(1)
        x_bnc = self.head_drop(x_bnc)
        return x_bnc if pre_logits else self.head(x_bnc)

    def _stages(self, image: torch.Tensor, count: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return the outputs of the first `count` stages and, where the last is among them, the class token."""
        x = self.stem(channels_last(image).permute(0, 2, 3, 1))
        keep = self.drop_path(x.shape[0], x.device, x.dtype)
        outputs: list[torch.Tensor] = []
        token: torch.Tensor | None = None
        branch = 0
        for stage, depth in zip(self.stages[:count], self.config.depths, strict=False):
            x, token = stage(x, None if keep is None else keep[branch : branch + 2 * depth])
            branch += 2 * depth
            outputs.append(x)
        return outputs, token

    def _final(self, map_bhwc: torch.Tensor, token_b1c: torch.Tensor | None) -> torch.Tensor:
        """Return (B, 1 + n, C), class token first; (B, n, C) of a model whose last stages are pruned."""
        tokens = map_bhwc.flatten(1, 2)
        return tokens if token_b1c is None else torch.cat([token_b1c, tokens], 1)


# ------------------------------------------------------------------------------------------------- entry points


VARIANTS: dict[str, dict[str, object]] = {
    "soft_tiny": {"depths": (1, 2, 3, 2)},
    "soft_small": {"depths": (1, 3, 7, 4)},
    "soft_medium": {"depths": (1, 3, 29, 5), "widths": (64, 128, 288, 512), "num_heads": (2, 4, 9, 16)},
    "soft_large": {"depths": (1, 3, 40, 5)},
    "soft_huge": {"depths": (1, 5, 49, 5), "widths": (64, 128, 352, 512), "num_heads": (2, 4, 11, 16)},
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}{norm}.untrained": pretrained_cfg(224, 1000, first_conv="stem.0.conv", classifier="head", crop_pct=0.9)
        for name in VARIANTS
        for norm in ("", "_norm")
    }
)


def _soft(name: str, pretrained: bool, overrides: Mapping[str, object]) -> nn.Module:
    attention = "soft_norm" if name.endswith("_norm") else "soft"
    shape = {**VARIANTS[name.removesuffix("_norm")], "attention": attention, "soft": PUBLISHED}
    return create(SOFT, name, pretrained, shape, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_tiny(pretrained: bool = False, **overrides: object) -> nn.Module:
    """13.07 M parameters."""
    return _soft("soft_tiny", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_small(pretrained: bool = False, **overrides: object) -> nn.Module:
    """24.11 M parameters."""
    return _soft("soft_small", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_medium(pretrained: bool = False, **overrides: object) -> nn.Module:
    """45.81 M parameters."""
    return _soft("soft_medium", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_large(pretrained: bool = False, **overrides: object) -> nn.Module:
    """64.70 M parameters."""
    return _soft("soft_large", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_huge(pretrained: bool = False, **overrides: object) -> nn.Module:
    """87.11 M parameters."""
    return _soft("soft_huge", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_tiny_norm(pretrained: bool = False, **overrides: object) -> nn.Module:
    """13.07 M parameters, symmetric normalisation."""
    return _soft("soft_tiny_norm", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_small_norm(pretrained: bool = False, **overrides: object) -> nn.Module:
    """24.11 M parameters, symmetric normalisation."""
    return _soft("soft_small_norm", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_medium_norm(pretrained: bool = False, **overrides: object) -> nn.Module:
    """45.81 M parameters, symmetric normalisation."""
    return _soft("soft_medium_norm", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_large_norm(pretrained: bool = False, **overrides: object) -> nn.Module:
    """64.70 M parameters, symmetric normalisation."""
    return _soft("soft_large_norm", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def soft_huge_norm(pretrained: bool = False, **overrides: object) -> nn.Module:
    """87.11 M parameters, symmetric normalisation."""
    return _soft("soft_huge_norm", pretrained, overrides)
