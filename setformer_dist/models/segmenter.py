"""Semantic segmentation around any model with feature maps: UPerNet's head, and an auxiliary one in training.

    image --encoder--> maps of four sizes, each normed --pooled context into the smallest, top-down sums, fusion-->
    logits of every class at the largest map's size

The heads are those of UPerNet (T. Xiao et al. 2018) as Swin, NAT and CSWin are measured with (mmsegmentation's UPerHead
and FCNHead), but for norms: GroupNorm in place of BatchNorm, whose statistics would depend on the micro batch, and no
dropout, which would depend on the rank. Maps are resized and pooled by matrix products: the gradients of torch's own
kernels add up in any order on a GPU, and no run would be repeatable.

Letters: B = images, C = channels, H, W = rows and columns of a map, K = classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.pixel_maps import pixel_loss, pooled, resized
from setformer_dist.models.encoded import FeatureMaps, check_feature_maps

# What the names of the classifiers' parameters begin with.
CLASSIFIERS = ("head.classify.", "auxiliary.classify.")

_BINS = (1, 2, 3, 6)  # of pooled context, a side
_GROUPS = 32  # of norms; channels are multiples of it
_LEVELS = 4  # maps of a model whose blocks all have one size


class Segmenter(FeatureMaps):
    """An encoder with UPerNet's head.

    Attributes:
        levels: the maps that are taken, as positions in the encoder's `feature_info`.
    """

    def __init__(self, encoder: nn.Module, name: str, classes: int, channels: int, auxiliary: bool) -> None:
        """Build around an encoder without a classifier.

        Args:
            encoder: a model of timm.
            name: of its architecture.
            classes: K.
            channels: of the head, a multiple of 32.
            auxiliary: whether a second head, on the last map but one, has a loss of its own in training.

        Raises:
            ConfigError: the encoder gives no feature maps, or channels are impossible.
        """
        check_feature_maps(encoder, name, "segmentation")
        if channels % (2 * _GROUPS):
            near = max(1, round(channels / (2 * _GROUPS))) * 2 * _GROUPS
            raise ConfigError(f"task.args.channels = {channels} must be a multiple of {2 * _GROUPS}, such as {near}")
        super().__init__(encoder)
        self.name, self.num_classes = name, classes
        info: list[dict[str, int]] = encoder.feature_info  # type: ignore[assignment]
        self.levels = levels_of([int(level["reduction"]) for level in info])
        widths = [int(info[level]["num_chs"]) for level in self.levels]
        self.head = UPerHead(widths, channels, classes)
        self.auxiliary = PlainHead(widths[-2], channels // 2, classes) if auxiliary else None

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, C, height, width) -> logits (B, K, H, W); in training with an auxiliary head also those of that head."""
        maps = self.maps(images, self.levels)
        logits: torch.Tensor = self.head(maps)
        if self.auxiliary is None or not self.training:
            return logits
        return logits, self.auxiliary(maps[-2])

    def measured_loss(
        self, outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], images: torch.Tensor
    ) -> torch.Tensor:
        """Return a loss that takes the memory of the task's, to predict it by: logits grow to the size of an image."""
        masks = torch.zeros((len(images), *images.shape[2:]), dtype=torch.uint8, device=images.device)
        heads = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return torch.stack([pixel_loss(logits, masks) for logits in heads]).sum()


def levels_of(reductions: Sequence[int]) -> list[int]:
    """Return which feature maps a head takes: the last of each size, or four evenly spaced ones of one size.

    Args:
        reductions: image pixels per token of each map, in order.
    """
    last = [i for i, r in enumerate(reductions) if i + 1 == len(reductions) or reductions[i + 1] != r]
    if len(last) > 1:
        return last[-_LEVELS:]
    count = min(_LEVELS, len(reductions))
    return [(i + 1) * len(reductions) // count - 1 for i in range(count)]


class ConvNorm(nn.Sequential):
    """A convolution without a bias, a norm and a ReLU."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(_GROUPS, out), nn.ReLU()
        )


class UPerHead(nn.Module):
    """Pooled context, a feature pyramid and the fusion of its levels."""

    def __init__(self, widths: Sequence[int], channels: int, classes: int) -> None:
        """Build for maps of these channels, the largest first."""
        super().__init__()
        *fine, coarse = widths
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.context = nn.ModuleList(ConvNorm(coarse, channels, 1) for _ in _BINS)
        self.bottom = ConvNorm(coarse + len(_BINS) * channels, channels, 3)
        self.lateral = nn.ModuleList(ConvNorm(width, channels, 1) for width in fine)
        self.smooth = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in fine)
        self.fuse = ConvNorm(len(widths) * channels, channels, 3)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """[(B, C_i, H_i, W_i)], the largest first -> (B, K, H_0, W_0)."""
        normed = [norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]
        *fine, coarse = normed
        size = coarse.shape[-2:]
        context = [resized(conv(pooled(coarse, n)), *size) for n, conv in zip(_BINS, self.context, strict=True)]
        levels = [self.bottom(torch.cat([coarse, *context], 1))]
        for x, lateral in zip(reversed(fine), reversed(self.lateral), strict=True):
            side: torch.Tensor = lateral(x)
            levels.insert(0, side + resized(levels[0], *side.shape[-2:]))
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)]
        size = levels[0].shape[-2:]
        joined = torch.cat([resized(x, *size) for x in (*smoothed, levels[-1])], 1)
        return self.classify(self.fuse(joined))  # type: ignore[no-any-return]


class PlainHead(nn.Module):
    """A convolution and a classifier."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = ConvNorm(width, channels, 3)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        return self.classify(self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))  # type: ignore[no-any-return]
