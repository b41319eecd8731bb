"""SeTformer: a hierarchical vision transformer whose attention is optimal transport to a small reference set.

P. Shamsolmoali, M. Zareapoor, E. Granger, M. Felsberg, "SeTformer Is What You Need for Vision and Language",
AAAI 2024, arXiv 2401.03540. Stem, downsampling and the depths and widths of Mini and Tiny follow NAT (A. Hassani
et al., "Neighborhood Attention Transformer", CVPR 2023), which reproduces the published sizes; the paper's own
table of depths and widths could not be read, so those of Small and Base are the ones that fit its sizes.

    image --stem (two 3x3 convs)--> stage 1 --3x3 conv--> stage 2 --> ... --> norm --> mean --> classifier
    stage = blocks of   x + attention(norm(x)),   x + mlp(norm(x))

The attention can be exchanged for SOFT, CAST or softmax (`attention`), so that all are compared in one backbone.
Tokens travel as (B, H, W, C) in memory order, which a channels-last convolution reads and writes without a copy.

Letters: B = images, H, W = token rows and columns, C = channels, h = heads, n = H * W.
"""

from __future__ import annotations

from collections.abc import Sequence

import pydantic
import torch
from timm.layers import ClassifierHead
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from setformer_dist.core.config import FrozenConfig, build
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import Recompute
from setformer_dist.models.attention import (
    KINDS,
    AttentionConfig,
    AttentionKind,
    CastAttentionConfig,
    SetAttention,
    SoftAttentionConfig,
    SoftmaxAttention,
    make_attention,
)
from setformer_dist.models.layers import (
    DropPath,
    Mlp,
    Pyramid,
    RowConv,
    channels_last,
    conv_tokens,
    create,
    drop_path_rates,
    edge_rows,
    init_linear,
    pretrained_cfg,
    run_blocks,
    scale_branch,
)
from setformer_dist.models.recompute import WHOLE, MadeAgain, per_stage
from setformer_dist.models.visible import VisibleUnits
from setformer_dist.ops import block as blocks
from setformer_dist.ops.parts import Rows, from_above, mean_of_rows
from setformer_dist.ops.set import split
from setformer_dist.ops.set.attention import IntTuple, SetAttentionConfig, problem_of

# Policies with which a block itself computes nothing again.
_KEPT = ("none", *sorted(WHOLE))
_KEPT_COMPILED = (*_KEPT, "cheap")

_NOT_BY_SUMS = (
    "attention = {!r} needs tokens of other rows, not only sums over them: use attention = 'set', SeTformer proper"
)

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
        attention: "set" is SeTformer proper; the others stand in for it.
        attn: SeT's choices.
        soft: those of SOFT, for "soft" and "soft_norm".
        cast: those of CAST.
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
    attention: AttentionKind = "set"
    attn: SetAttentionConfig = SetAttentionConfig()
    soft: SoftAttentionConfig = SoftAttentionConfig()
    cast: CastAttentionConfig = CastAttentionConfig()

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
        self.attention_config.check_stages(len(self.depths), on_grid=True)
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
    def attention_config(self) -> AttentionConfig:
        """The attention's kind with the choices of each."""
        return AttentionConfig(kind=self.attention, attn=self.attn, soft=self.soft, cast=self.cast)

    @property
    def reductions(self) -> tuple[int, ...]:
        """Image pixels per token along one axis, by stage."""
        stem = self.stem_strides[0] * self.stem_strides[1]
        return tuple(stem * 2**i for i in range(len(self.depths)))


# ------------------------------------------------------------------------------------------------------- layers


class Stem(nn.Module):
    """Two 3x3 convolutions without activation between them, then a norm (NAT's stem)."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int]) -> None:
        """Build for images of `in_chans` channels and tokens of `dim`."""
        super().__init__()
        self.conv1 = RowConv(in_chans, dim // 2, 3, stride=strides[0], padding=1)
        self.conv2 = RowConv(dim // 2, dim, 3, stride=strides[1], padding=1)
        self.norm = nn.LayerNorm(dim)
        self.rows: Rows | None = None

    def forward(self, image_bchw: torch.Tensor, visible: VisibleUnits | None = None) -> torch.Tensor:
        """(B, in_chans, height, width) -> (B, H, W, C); sides are divided by the strides, rounded up.

        With a group the image is what `margins` says, and the tokens are those of this part. With visible units the
        tokens are theirs, gathered.
        """
        if visible is not None:
            return self._of_visible(image_bchw, visible)
        if self.rows is not None:
            x = self.conv1(edge_rows(channels_last(image_bchw), self.rows), padded=True)
            # Beyond the image's border the second convolution sees zeros, not what the first makes of zeros.
            x = edge_rows(x, self.rows)
            return blocks.norm(conv_tokens(x.permute(0, 2, 3, 1), self.conv2, padded=True), self.norm)
        x = self.conv1(channels_last(image_bchw))
        return blocks.norm(conv_tokens(x.permute(0, 2, 3, 1), self.conv2), self.norm)

    def _of_visible(self, image_bchw: torch.Tensor, visible: VisibleUnits) -> torch.Tensor:
        """Return tokens of visible units, which see zeros in place of hidden ones, before both convolutions."""
        side = image_bchw.shape[2] // visible.rows
        image_bchw = image_bchw.masked_fill(~visible.seen(side).unsqueeze(1), 0.0)
        x = self.conv1(channels_last(image_bchw))
        x = x.masked_fill(~visible.seen(side // self.conv1.stride[0]).unsqueeze(1), 0.0)
        return blocks.norm(visible.gather(conv_tokens(x.permute(0, 2, 3, 1), self.conv2)), self.norm)

    def margins(self) -> tuple[int, int]:
        """Return how many image rows above and below its own a part needs, where there are some."""
        first, second = self.conv1.stride[0], self.conv2.stride[0]
        return first + 1, max(0, 2 + first - first * second)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 that doubles the channels, then a norm."""

    def __init__(self, dim: int) -> None:
        """Build for `dim` input channels."""
        super().__init__()
        self.conv = RowConv(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)
        self.rows: Rows | None = None

    def forward(self, x_bhwc: torch.Tensor, visible: VisibleUnits | None = None) -> torch.Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C); a part has an even number of rows, and gets that above it.

        With visible units x holds their tokens, gathered, and so does the result.
        """
        if visible is not None:
            return blocks.norm(visible.gather(conv_tokens(visible.scatter(x_bhwc), self.conv)), self.norm)
        if self.rows is not None:
            x_bhwc = torch.cat([from_above(x_bhwc[:, -1:], self.rows), x_bhwc], 1)
            return blocks.norm(conv_tokens(x_bhwc, self.conv, padded=True), self.norm)
        return blocks.norm(conv_tokens(x_bhwc, self.conv), self.norm)


class Block(nn.Module):
    """Attention and MLP, each on a normed input and added to it."""

    def __init__(self, stage: int, config: SetformerConfig) -> None:
        """Build a block of stage `stage`, counted from 0."""
        super().__init__()
        dim = config.widths[stage]
        self.norm1 = nn.LayerNorm(dim)
        self.attn = make_attention(config.attention_config, dim, config.num_heads[stage], stage)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_ratio)
        scale = config.layer_scale
        self.scale1 = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        self.scale2 = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        self.rows: Rows | None = None
        self.recompute: Recompute = "none"

    def forward(
        self, x: torch.Tensor, keep_2b: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C).

        Args:
            x: tokens, of a grid of H x W or, with positions, of some places of one.
            keep_2b: (2, B) drop path factors of the two branches, or None.
            positions: (B or 1, H W, axes) as in `set_attention`, or None.
        """
        compiling = torch.compiler.is_compiling()  # a compiler makes cheap things again by itself
        if self.recompute in (_KEPT_COMPILED if compiling else _KEPT) or not torch.is_grad_enabled():
            if self._has_parts(x):
                return self._by_parts(x, keep_2b, positions)
            x = x + self._transported(x, self.norm1(x), keep_2b, positions)
            return x + self._mixed(x, keep_2b)
        if compiling:
            x = x + self._transported(x, self.norm1(x), keep_2b, positions)
            return x + checkpoint(self._mixed, x, keep_2b, use_reentrant=False)
        with MadeAgain() as again:
            if self._has_parts(x):
                return self._by_parts(x, keep_2b, positions, again)
            x = x + self._transported(x, again.norm(self.norm1, x), keep_2b, positions)
            if self.recompute == "cheap":
                return x + self._mixed(x, keep_2b, again)
        # To its end, as ZeRO-3 would keep weights of a layer whose forward pass is cut short.
        return x + checkpoint(self._mixed, x, keep_2b, use_reentrant=False, early_stop=False)

    def _has_parts(self, x: torch.Tensor) -> bool:
        """Return whether `_by_parts` can take the weights of the layers."""
        attn, mlp = self.attn, self.mlp
        if type(attn) not in KINDS or blocks.altered(attn) or type(mlp) is not Mlp or blocks.altered(mlp):
            return False
        layers = (self.norm1, attn.output, self.norm2, mlp.fc1, mlp.fc2)
        return mlp.approximate == "none" and blocks.available(x, layers, (self.scale1, self.scale2))  # type: ignore[arg-type]

    def _by_parts(
        self,
        x: torch.Tensor,
        keep_2b: torch.Tensor | None,
        positions: torch.Tensor | None,
        again: MadeAgain | None = None,
    ) -> torch.Tensor:
        """As `forward`, in three autograd functions: what is before attention, attention, what is behind it."""
        x, normed = blocks.enter(x, self.norm1) if again is None else again.enter(self.norm1, x)
        y = self._attended(normed, positions, mapped=False)
        weights = blocks.Weights.of(self.attn.output, self.scale1, self.norm2, self.mlp.fc1, self.mlp.fc2, self.scale2)  # type: ignore[arg-type]
        policy: blocks.Again = "none" if again is None else "cheap" if self.recompute == "cheap" else "mlp"
        return blocks.leave(x, y, keep_2b, weights, self.norm2.eps, policy)

    def _attended(self, normed: torch.Tensor, positions: torch.Tensor | None, mapped: bool = True) -> torch.Tensor:
        tokens, shape = normed.flatten(1, 2), normed.shape[:-1]
        if positions is not None:
            return self.attn(tokens, positions_bna=positions, mapped=mapped).unflatten(1, shape[1:])  # type: ignore[no-any-return]
        grid = (shape[1] * (1 if self.rows is None else self.rows.count), shape[2])
        return self.attn(tokens, grid, mapped=mapped).unflatten(1, shape[1:])  # type: ignore[no-any-return]

    def _transported(
        self, x: torch.Tensor, normed: torch.Tensor, keep_2b: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        y = self._attended(normed, positions)
        return scale_branch(y if self.scale1 is None else y * self.scale1, keep_2b, 0)

    def _mixed(self, x: torch.Tensor, keep_2b: torch.Tensor | None, again: MadeAgain | None = None) -> torch.Tensor:
        y = self.mlp(self.norm2(x) if again is None else again.norm(self.norm2, x), again)
        return scale_branch(y if self.scale2 is None else y * self.scale2, keep_2b, 1)


class Stage(nn.Module):
    """A downsampling (not in the first stage) and the blocks of one resolution."""

    def __init__(self, index: int, config: SetformerConfig) -> None:
        """Build stage `index`, counted from 0."""
        super().__init__()
        dim = config.widths[index]
        self.recompute: Recompute = "none"
        self.rows: Rows | None = None
        self.downsample = Downsample(dim // 2) if index else nn.Identity()
        self.blocks = nn.ModuleList(Block(index, config) for _ in range(config.depths[index]))

    def forward(
        self, x: torch.Tensor, keep: torch.Tensor | None = None, visible: VisibleUnits | None = None
    ) -> torch.Tensor:
        """(B, H, W, C_in) -> (B, H', W', C).

        Args:
            x: tokens of the stage before.
            keep: (2 * blocks, B) drop path factors, or None.
            visible: units whose tokens, gathered, x holds; None where it holds the whole grid.
        """
        if visible is None:
            return run_blocks(self.blocks, self.downsample(x), keep, recompute=self.recompute, rows=self.rows)
        x = x if isinstance(self.downsample, nn.Identity) else self.downsample(x, visible)
        first = self.blocks[0].attn
        assert isinstance(first, SetAttention)
        positions = visible.positions(x.shape[2], first.config)
        return run_blocks(self.blocks, x, keep, recompute=self.recompute, positions=positions)


# -------------------------------------------------------------------------------------------------------- model


class SeTformer(Pyramid):
    """Image classifier and feature pyramid, with timm's method set."""

    output_fmt = "NHWC"

    def __init__(self, **fields: object) -> None:
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
        self.widths = config.widths
        self.num_features = self.head_hidden_size = config.widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(config.widths, config.reductions, strict=True))
        ]
        self.stem = Stem(config.in_chans, config.embed_dim, config.stem_strides)
        self.stages = nn.ModuleList(Stage(i, config) for i in range(len(config.depths)))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(
            self.num_features,
            config.num_classes,
            pool_type=config.global_pool,
            drop_rate=config.drop_rate,
            input_fmt=self.output_fmt,
        )
        self.drop_path = DropPath(drop_path_rates(config.depths, config.drop_path_rate))
        self.rows: Rows | None = None
        self.apply(init_linear)

    def set_recompute(self, recompute: Recompute | tuple[Recompute, ...]) -> None:
        """Say what the backward pass computes again, for all stages or for each (recompute.py).

        Raises:
            ConfigError: there are not as many as stages.
        """
        policies = per_stage(recompute, len(self.stages))
        for stage, policy in zip(self.stages, policies, strict=True):
            for module in (stage, *stage.blocks):  # type: ignore[misc]
                module.recompute = policy

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.set_recompute("block" if enable else "none")

    def why_not_split(self) -> str | None:
        """Return why the rows of an image cannot lie on several ranks, in this model; None where they can."""
        if self.config.attention not in ("set", "softmax"):
            return _NOT_BY_SUMS.format(self.config.attention)
        if self.global_pool != "avg":
            return f"global_pool = {self.global_pool!r} is not a sum over the parts: use global_pool = 'avg'"
        if self.config.drop_rate > 0:
            return f"drop_rate = {self.config.drop_rate} draws from each rank's own generator: set it to 0"
        if self.config.attention == "softmax":  # gathers the keys and values of all parts
            return None
        return split.why_not(problem_of(self.config.attn), torch.float32)

    def split_rows(self, rows: Rows | None) -> None:
        """Hold part of each image's rows from now on, as one of a group of ranks; None holds whole images again.

        Every forward and backward pass is then collective over the group, `forward` takes the rows that `image_rows`
        names, and the logits are the same on all of its ranks. The loss of each rank counts once: the sum of the
        group's gradients is that of the sum of its losses.

        Raises:
            ConfigError: with the reason.
        """
        reason = None if rows is None else self.why_not_split()
        if reason is not None:
            raise ConfigError(f"rows of an image on several ranks: {reason}")
        for module in self.modules():
            if isinstance(module, SeTformer | Stem | Stage | Downsample | Block | SetAttention | SoftmaxAttention):
                module.rows = rows

    def row_multiple(self, parts: int) -> int:
        """Return what the rows of an image must be a multiple of, so that all stages have equal parts."""
        return self.config.reductions[-1] * parts

    def image_rows(self, height: int, part: int, parts: int) -> slice:
        """Return the rows of an image that a part needs: its own, and those that the stem's convolutions look at.

        Raises:
            ConfigError: the parts would not be equal; naming heights that work.
        """
        unit = self.row_multiple(parts)
        if height % unit or not height:
            near = sorted({max(height // unit, 1) * unit, (height // unit + 1) * unit})
            raise ConfigError(
                f"an image of {height} rows cannot be cut into {parts} equal parts for this model: its rows must be a "
                f"multiple of {unit}, such as {' or '.join(map(str, near))}"
            )
        above, below = self.stem.margins()
        share = height // parts
        return slice(max(0, part * share - above), min(height, (part + 1) * share + below))

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

    def forward_head(self, x_bhwc: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, H, W, C) -> (B, num_classes), or (B, C) before the classifier."""
        if self.rows is not None:
            x_bhwc = mean_of_rows(x_bhwc, self.rows)
        return self.head(x_bhwc, pre_logits=pre_logits)  # type: ignore[no-any-return]

    def why_not_masked(self) -> str | None:
        """Return why parts of an image cannot be left out of this model, None where they can."""
        if self.config.attention == "set":
            return None
        return (
            f"attention = {self.config.attention!r} has no form for some tokens of an image at their own places, in "
            "which a token that is left out changes nothing: use attention = 'set', SeTformer proper"
        )

    def forward_visible(self, image: torch.Tensor, visible: VisibleUnits) -> list[torch.Tensor]:
        """(B, in_chans, height, width) -> outputs of all stages, (B, V s, s, C) with the stage's s and C.

        Tokens of hidden units are not computed, and what their pixels hold has no effect. The last output is not
        normed.
        """
        return self._stages(image, len(self.stages), visible)[0]

    def _stages(
        self, image: torch.Tensor, count: int, visible: VisibleUnits | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return the outputs of the first `count` stages; there is no class token."""
        x = self.stem(image, visible)
        keep = self.drop_path(x.shape[0], x.device, x.dtype)
        outputs: list[torch.Tensor] = []
        branch = 0
        for stage, depth in zip(self.stages[:count], self.config.depths, strict=False):
            x = stage(x, None if keep is None else keep[branch : branch + 2 * depth], visible)
            branch += 2 * depth
            outputs.append(x)
        return outputs, None

    def _final(self, map_bhwc: torch.Tensor, token_b1c: torch.Tensor | None) -> torch.Tensor:
        """Return the map."""
        return map_bhwc


# ------------------------------------------------------------------------------------------------- entry points

# The square roots of the numbers of tokens at 224 x 224 pixels.
CAST_CLUSTERS = (56, 28, 14, 7)


def _cfg(size: int, classes: int, **fields: object) -> dict[str, object]:
    """Describe a variant to timm."""
    return pretrained_cfg(size, classes, **{"first_conv": "stem.conv1", "classifier": "head.fc", **fields})


default_cfgs = generate_default_cfgs(
    {
        "setformer_nano.untrained": _cfg(32, 10, pool_size=(4, 4), crop_pct=1.0),
        "setformer_mini.untrained": _cfg(224, 1000),
        "setformer_tiny.untrained": _cfg(224, 1000),
        "setformer_small.untrained": _cfg(224, 1000),
        "setformer_base.untrained": _cfg(224, 1000),
    }
)


@register_model  # type: ignore[untyped-decorator]
def setformer_nano(pretrained: bool = False, **overrides: object) -> nn.Module:
    """For images of 8 to 32 pixels and for tests: 0.6 M parameters."""
    shape = {
        "embed_dim": 48,
        "depths": (1, 2, 1),
        "num_heads": (2, 4, 8),
        "mlp_ratio": 2.0,
        "stem_strides": (2, 1),
        "attn": {"references": 16},
        "soft": {"landmarks": 16},
        "cast": {"clusters": (16, 8, 4)},
    }
    return create(SeTformer, "setformer_nano", pretrained, shape, overrides)


@register_model  # type: ignore[untyped-decorator]
def setformer_mini(pretrained: bool = False, **overrides: object) -> nn.Module:
    """16.4 M parameters; widths and depths of NAT-Mini."""
    shape = {
        "embed_dim": 64,
        "depths": (3, 4, 6, 5),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratio": 3.0,
        "attn": {"references": (49, 25, 16, 9)},
        "cast": {"clusters": CAST_CLUSTERS},
    }
    return create(SeTformer, "setformer_mini", pretrained, shape, overrides)


@register_model  # type: ignore[untyped-decorator]
def setformer_tiny(pretrained: bool = False, **overrides: object) -> nn.Module:
    """22.7 M parameters; widths and depths of NAT-Tiny."""
    shape = {
        "embed_dim": 64,
        "depths": (3, 4, 18, 5),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratio": 3.0,
        "attn": {"references": (49, 25, 9, 9)},
        "cast": {"clusters": CAST_CLUSTERS},
    }
    return create(SeTformer, "setformer_tiny", pretrained, shape, overrides)


@register_model  # type: ignore[untyped-decorator]
def setformer_small(pretrained: bool = False, **overrides: object) -> nn.Module:
    """35.5 M parameters; width of NAT-Small, 14 blocks in stage 3."""
    shape = {
        "embed_dim": 96,
        "depths": (3, 4, 14, 5),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "attn": {"references": (49, 25, 9, 9)},
        "cast": {"clusters": CAST_CLUSTERS},
    }
    return create(SeTformer, "setformer_small", pretrained, shape, overrides)


@register_model  # type: ignore[untyped-decorator]
def setformer_base(pretrained: bool = False, **overrides: object) -> nn.Module:
    """57.15 M parameters; width of NAT-Base, 3 blocks in stage 4."""
    shape = {
        "embed_dim": 128,
        "depths": (3, 4, 18, 3),
        "num_heads": (4, 8, 16, 32),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "attn": {"references": (49, 49, 25, 25)},
        "cast": {"clusters": CAST_CLUSTERS},
    }
    return create(SeTformer, "setformer_base", pretrained, shape, overrides)
