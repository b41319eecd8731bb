"""Object detection around any model with feature maps: RetinaNet.

    image --encoder--> maps of three sizes, each normed --feature pyramid, and two smaller maps made of the last-->
    five levels --heads, shared by all--> per place nine anchors: logits of every class, and offsets of a box

Pyramid and heads are torchvision's, with GroupNorm in the heads as in its `retinanet_resnet50_fpn_v2`. Images of a
micro batch have one size, and none is padded: attention is global, so padding would change what is seen of an image.

Letters: B = images, C = channels, H, W = rows and columns of a map, K = classes, A = anchors of all levels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork

from setformer_dist.core.boxes import ANCHORS_PER_PLACE, NO_BOX, Detected, anchors_of, detection_loss
from setformer_dist.core.errors import ConfigError
from setformer_dist.models.encoded import FeatureMaps, check_feature_maps

# What the names of the classifier's parameters begin with.
CLASSIFIER = "head.classification_head.cls_logits."

_GROUP = 8  # channels that are normed together, 32 groups of the usual 256: the smallest map may have one place
_LEVELS = 5
_OF_ENCODER = 3  # levels, at most; the others are made of the last
_FINEST = 8  # image pixels per place of the first level, unless all maps are coarser
_BOXES_MEASURED = 64  # of an image, where memory is predicted: as many as are matched at once


class Detector(FeatureMaps):
    """An encoder with the heads of RetinaNet.

    Attributes:
        levels: the maps that are taken, as positions in the encoder's `feature_info`.
        strides: image pixels per place of each level.
    """

    def __init__(self, encoder: nn.Module, name: str, classes: int, channels: int) -> None:
        """Build around an encoder without a classifier.

        Args:
            encoder: a model of timm.
            name: of its architecture.
            classes: K.
            channels: of the pyramid and the heads, a multiple of 8.

        Raises:
            ConfigError: the encoder gives no feature maps, or channels are impossible.
        """
        check_feature_maps(encoder, name, "detection")
        if channels % _GROUP:
            near = max(1, round(channels / _GROUP)) * _GROUP
            raise ConfigError(f"task.args.channels = {channels} must be a multiple of {_GROUP}, such as {near}")
        super().__init__(encoder)
        self.name, self.num_classes = name, classes
        info: list[dict[str, int]] = encoder.feature_info  # type: ignore[assignment]
        reductions = [int(level["reduction"]) for level in info]
        self.levels = levels_of(reductions)
        widths, strides = [int(info[i]["num_chs"]) for i in self.levels], [reductions[i] for i in self.levels]
        self.plain = Plain(widths[0]) if len(set(reductions)) == 1 and len(reductions) > 1 else None
        if self.plain is not None:
            widths, strides = widths * 3, [max(1, strides[0] // 2), strides[0], strides[0] * 2]
        further = _LEVELS - len(widths)
        self.strides = [*strides, *(strides[-1] << (i + 1) for i in range(further))]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.pyramid = FeaturePyramidNetwork(widths, channels)
        self.further = nn.ModuleList(nn.Conv2d(channels if i else widths[-1], channels, 3, 2) for i in range(further))
        for conv in self.further:  # as those of the pyramid
            nn.init.kaiming_uniform_(conv.weight, a=1)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.head = RetinaNetHead(channels, ANCHORS_PER_PLACE, classes, partial(nn.GroupNorm, channels // _GROUP))

    def forward(self, images: torch.Tensor) -> Detected:
        """(B, C, height, width) -> logits (B, A, K), offsets (B, A, 4), anchors (A, 5), fp32."""
        maps = self.maps(images, self.levels)
        maps = self.plain(maps[0]) if self.plain is not None else maps
        named = OrderedDict(
            (str(i), norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            for i, (norm, x) in enumerate(zip(self.norms, maps, strict=True))
        )
        levels = list(self.pyramid(named).values())
        for i, conv in enumerate(self.further):
            last = levels[-1].relu() if i else named[str(len(named) - 1)]
            # Padded before: of a map of one column oneDNN's gradient in bf16 has numbers of other memory (torch 2.14).
            levels.append(conv(nn.functional.pad(last, (1, 1, 1, 1))))
        said = self.head(levels)
        anchors = anchors_of([(x.shape[2], x.shape[3]) for x in levels], self.strides, images.device)
        return said["cls_logits"], said["bbox_regression"], anchors

    def measured_loss(self, outputs: Detected, images: torch.Tensor) -> torch.Tensor:
        """Return a loss that takes the memory of the task's, to predict it by: each anchor is compared with boxes."""
        targets = torch.zeros((len(images), _BOXES_MEASURED, 5), device=images.device)
        targets[:, :, 4] = NO_BOX
        return detection_loss(outputs, targets).sum()


def levels_of(reductions: Sequence[int]) -> list[int]:
    """Return which feature maps are taken: the last of each size from `_FINEST` on, at most three; else the last.

    Args:
        reductions: image pixels per token of each map, in order.
    """
    last = [i for i, r in enumerate(reductions) if i + 1 == len(reductions) or reductions[i + 1] != r]
    return [i for i in last if reductions[i] >= _FINEST][-_OF_ENCODER:] or last[-1:]


class Plain(nn.Module):
    """Maps of three sizes from one, for models whose blocks all have one size (ViTDet, Y. Li et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.finer = nn.ConvTranspose2d(width, width, 2, 2)
        self.coarser = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W) -> maps of twice the rows and columns, as many, and half of them."""
        return [self.finer(x), x, self.coarser(x)]
