"""Masked image modelling by whole images: hidden units are replaced by learned pixels, and one layer predicts them.

    image, hidden units --learned pixels in their place--> encoder of whole images --linear--> pixels of hidden units

The form is SimMIM's (Z. Xie et al. 2022), for every model with timm's `forward_intermediates`. SimMIM replaces the
patches of a linear embedding by one learned token; learned pixels do the same for such a stem, and serve any other.
The encoder computes hidden units as well, so a step costs what a step of classification does.
"""

from __future__ import annotations

import torch
from torch import nn

from setformer_dist.models.encoded import FeatureMaps, check_feature_maps
from setformer_dist.models.layers import init_linear
from setformer_dist.models.masked import MaskedModel


class SimmimModel(FeatureMaps, MaskedModel):
    """An encoder of whole images, some of whose units are replaced, with a layer that predicts these."""

    first, last = "replacement", "pixels"

    def __init__(self, encoder: nn.Module, unit: int, ratio: float, name: str, channels: int) -> None:
        """Build around an encoder without a classifier, of this name, for images of so many channels.

        Raises:
            ConfigError: the encoder gives no feature maps.
        """
        check_feature_maps(encoder, name, "simmim")
        info: list[dict[str, int]] = encoder.feature_info  # type: ignore[assignment]
        super().__init__(encoder, unit, ratio, int(info[-1]["reduction"]), channels)
        self.name = name
        self.replacement = nn.Parameter(torch.empty(self.channels, unit, unit))
        self.pixels = nn.Linear(int(info[-1]["num_chs"]), self.stride**2 * self.channels)
        nn.init.normal_(self.replacement, std=0.02)
        self.pixels.apply(init_linear)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, in_chans + 1, height, width) -> (B, K, U, U, in_chans): pixels of the hidden units, row-major."""
        visible = self.visible_of(inputs)
        images = inputs[:, : self.channels]
        learned = self.replacement.to(images.dtype).repeat(1, visible.rows, visible.columns)
        images = torch.where(visible.seen(self.unit).unsqueeze(1), images, learned)
        features = self.maps(images, 1)[0].permute(0, 2, 3, 1).contiguous()
        return self.pixels_of(self.pixels(visible.hidden().gather(features)))
