"""Masked autoencoding around a SeTformer: visible tokens through the encoder, all through a light decoder.

    image, hidden units --encoder, visible tokens only--> maps of all stages --fusion--> tokens of the last stage's size
    --mask token at hidden places, places added--> decoder blocks --norm, linear--> pixels of the hidden units

The form is Hiera's (C. Ryali et al. 2023), after K. He et al. 2022. In SeT attention a token that is left out has no
weight in any sum, so leaving hidden tokens out is what masking them does, exactly. Convolutions see zeros there
(visible.py). The decoder is of SeT blocks: its cost is linear in the tokens too, and it takes any image size.

Letters: B = images, R, C = rows and columns of units, U = pixels of a unit's side, V = visible units, K = hidden ones,
s = tokens of a unit's side in the last stage, p = U / s, D = channels of the decoder.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.masking import visible_units
from setformer_dist.core.model_config import Recompute
from setformer_dist.models.encoded import Encoded
from setformer_dist.models.layers import init_linear, run_blocks
from setformer_dist.models.recompute import per_stage
from setformer_dist.models.setformer import Block, SeTformer, SetformerConfig
from setformer_dist.models.visible import VisibleUnits
from setformer_dist.ops.set.attention import SetAttentionConfig

_HEAD_CHANNELS = 32
_REFERENCES = 49  # of each head of the decoder
_LONGEST_WAVE = 10_000.0  # of places, as in transformers since Vaswani et al. 2017


class Fusion(nn.Module):
    """Brings the maps of all stages to the last stage's tokens and the decoder's channels, and adds them."""

    def __init__(self, widths: tuple[int, ...], dim: int) -> None:
        """Build for stages of these channels, each with half the tokens a side of the one before."""
        super().__init__()
        last = len(widths) - 1
        self.maps = nn.ModuleList(nn.Linear(4 ** (last - i) * width, dim) for i, width in enumerate(widths))
        self.norm = nn.LayerNorm(dim)

    def forward(self, stages: list[torch.Tensor]) -> torch.Tensor:
        """[(B, V s_i, s_i, C_i)] -> (B, V s, s, D): the sum of one convolution per stage, its kernel its stride."""
        b, rows, side, _ = stages[-1].shape
        total: torch.Tensor | None = None
        for x, linear in zip(stages, self.maps, strict=True):
            k = x.shape[2] // side
            patches = x.view(b, rows, k, side, k, -1).transpose(2, 3).flatten(3)
            total = linear(patches) if total is None else total + linear(patches)
        return self.norm(total)  # type: ignore[no-any-return]


class MaskedModel(Encoded):
    """An encoder, and around it what learns to fill in hidden units of its images.

    Takes (B, in_chans + 1, height, width): an image, and a channel that is above 0.5 in hidden units. Every image
    hides `visible_units` fewer than it has units. Without that channel the last units are hidden, which serves to
    count costs. Returns (B, K, U, U, in_chans), the pixels of the hidden units in row-major order.

    Attributes:
        encoder: the model that is kept.
        unit: U.
        ratio: share of the units that is hidden.
        stride: image pixels per token of the encoder's last stage, p.
        channels: of an image.
    """

    def __init__(self, encoder: nn.Module, unit: int, ratio: float, stride: int, channels: int) -> None:
        super().__init__(encoder)
        self.unit, self.ratio, self.stride, self.channels = unit, ratio, stride, channels

    def visible_of(self, inputs: torch.Tensor) -> VisibleUnits:
        """Return the visible units of (B, in_chans + 1, height, width), or of images the first ones."""
        b, channels, height, width = inputs.shape
        rows, columns = height // self.unit, width // self.unit
        count = visible_units(rows * columns, self.ratio)
        if channels == self.channels:
            index = torch.arange(count, device=inputs.device).expand(b, count)
        else:
            hidden = (inputs[:, -1, :: self.unit, :: self.unit] > 0.5).flatten(1).to(torch.int8)
            index = hidden.argsort(dim=1, stable=True)[:, :count]
        return VisibleUnits(index.contiguous(), rows, columns)

    def pixels_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, K s, s, p p in_chans), pixels of the tokens of hidden units -> (B, K, U, U, in_chans)."""
        side, patch = self.unit // self.stride, self.stride
        x = tokens.view(tokens.shape[0], -1, side, side, patch, patch, self.channels).transpose(3, 4)
        return x.reshape(x.shape[0], -1, self.unit, self.unit, self.channels)


class MaskedAutoencoder(MaskedModel):
    """An encoder with a decoder that learns to reconstruct the hidden units of its images."""

    encoder: SeTformer

    def __init__(self, encoder: nn.Module, unit: int, ratio: float, dim: int, depth: int, latent: bool = False) -> None:
        """Build around an encoder without a classifier; the decoder has `depth` blocks of `dim` channels.

        With `latent` it predicts what `latents` returns, not pixels.

        Raises:
            ConfigError: parts of an image cannot be left out of this model, or the decoder is impossible.
        """
        if not isinstance(encoder, SeTformer):
            raise ConfigError(
                f"{type(encoder).__name__} has no encoder in stages that takes some tokens of an image: task mae is "
                "for setformer_* models with attention = 'set', and task simmim for others"
            )
        if (reason := encoder.why_not_masked()) is not None:
            raise ConfigError(f"task mae: {reason}, or task simmim, which leaves no token out")
        if dim % _HEAD_CHANNELS:
            near = f"{max(1, dim // _HEAD_CHANNELS) * _HEAD_CHANNELS}"
            raise ConfigError(f"task.args.decoder_dim = {dim} must be a multiple of {_HEAD_CHANNELS}, such as {near}")
        super().__init__(encoder, unit, ratio, encoder.config.reductions[-1], encoder.in_chans)
        self.fusion = Fusion(encoder.widths, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        decoder = SetformerConfig(
            embed_dim=dim,
            depths=(depth,),
            num_heads=(dim // _HEAD_CHANNELS,),
            mlp_ratio=2.0,
            attn=SetAttentionConfig(references=_REFERENCES),
        )
        self.decoder = nn.ModuleList(Block(0, decoder) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.latent = latent
        self.pixels = nn.Linear(dim, encoder.num_features if latent else self.stride**2 * self.channels)
        for module in (self.fusion, self.decoder, self.pixels):
            module.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def stages(self) -> nn.ModuleList:
        """The encoder's, to which policies of recomputation belong."""
        return self.encoder.stages

    def set_recompute(self, recompute: Recompute | tuple[Recompute, ...]) -> None:
        """Say what the backward pass computes again: the encoder's stages, and the decoder as the last of them."""
        self.encoder.set_recompute(recompute)
        for block in self.decoder:
            block.recompute = per_stage(recompute, len(self.stages))[-1]  # type: ignore[assignment]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.set_recompute("block" if enable else "none")

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return timm's patterns that order the parameters by depth, for layer decay; the decoder is the deepest."""
        return {
            "stem": r"^encoder\.stem",
            "blocks": [
                (r"^encoder\.stages\.(\d+)", None),
                (r"^(?:encoder\.norm|fusion|mask_token|decoder|norm|pixels)", (99999,)),
            ],
        }

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, in_chans + 1, height, width) -> (B, K, U, U, in_chans): pixels of the hidden units, row-major.

        With latent targets (B, K, s, s, C): their tokens as `latents` has them.
        """
        visible = self.visible_of(inputs)
        images = inputs[:, : self.channels]
        *stages, last = self.encoder.forward_visible(images, visible)
        return self.decoded([*stages, self.encoder.norm(last)], visible)

    def decoded(self, stages: list[torch.Tensor], visible: VisibleUnits) -> torch.Tensor:
        """Return what `forward` does, from the encoder's stages."""
        x = visible.scatter(self.fusion(stages))
        _, height, width, dim = x.shape
        x = torch.where(visible.seen(height // visible.rows).unsqueeze(-1), x, self.mask_token.to(x.dtype))
        x = x + sine_places(height, width, dim, x.device).to(x.dtype)
        x = run_blocks(self.decoder, x, None, recompute=self.decoder[0].recompute)  # type: ignore[arg-type]
        x = self.pixels(self.norm(visible.hidden().gather(x)))
        side = self.unit // self.stride
        return x.view(x.shape[0], -1, side, side, x.shape[-1]) if self.latent else self.pixels_of(x)


def latents(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what a latent target is of: the encoder's last tokens, each of mean 0 and variance 1 over its channels.

    Args:
        encoder: computes whole images.
        images: (B, in_chans, height, width).

    Returns:
        (B, C, rows, columns) fp32.
    """
    assert isinstance(encoder, SeTformer)
    found = encoder.forward_intermediates(images, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    tokens = found[0]
    assert isinstance(tokens, torch.Tensor)
    return F.layer_norm(tokens.float(), tokens.shape[-1:]).permute(0, 3, 1, 2)


def sine_places(height: int, width: int, dim: int, device: torch.device) -> torch.Tensor:
    """Return fixed codes of the places of a grid, (height, width, dim) fp32: sines and cosines of row and column.

    Args:
        height: rows.
        width: columns.
        dim: a multiple of 4.
        device: where to.
    """
    quarter = dim // 4
    rates = torch.exp(-math.log(_LONGEST_WAVE) * torch.arange(quarter, device=device, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(n, device=device, dtype=torch.float64)[:, None] * rates for n in (height, width))
    of_rows = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, width, -1)
    of_columns = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(height, -1, -1)
    return torch.cat([of_rows, of_columns], 2).float()
