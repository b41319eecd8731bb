"""Masked image modelling by whole images: hidden units are replaced by learned pixels, and one layer predicts them.

    image, hidden units --learned pixels in their place--> encoder of whole images --linear--> pixels of hidden units

The form is SimMIM's (Z. Xie et al. 2022), for every model with timm's `forward_intermediates`. SimMIM replaces the
patches of a linear embedding by one learned token; learned pixels do the same for such a stem, and serve any other.
The encoder computes hidden units as well, so a step costs what a step of classification does.
"""

from __future__ import annotations

import torch
from torch import nn

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import Recompute
from setformer_dist.models.layers import called_as, init_linear
from setformer_dist.models.masked import ENCODER, MaskedModel
from setformer_dist.models.recompute import set_recompute


class SimmimModel(MaskedModel):
    """An encoder of whole images, some of whose units are replaced, with a layer that predicts these."""

    def __init__(self, encoder: nn.Module, unit: int, ratio: float, name: str, channels: int) -> None:
        """Build around an encoder without a classifier, of this name, for images of so many channels.

        Raises:
            ConfigError: the encoder gives no feature maps.
        """
        info = getattr(encoder, "feature_info", None)
        if not info or not hasattr(encoder, "forward_intermediates"):
            raise ConfigError(
                f"task simmim: {name} gives no feature maps: it needs feature_info and forward_intermediates, as "
                "timm's models have them"
            )
        super().__init__(encoder, unit, ratio, int(info[-1]["reduction"]), channels)
        self._name = name
        self.replacement = nn.Parameter(torch.empty(self.channels, unit, unit))
        self.pixels = nn.Linear(int(info[-1]["num_chs"]), self.stride**2 * self.channels)
        nn.init.normal_(self.replacement, std=0.02)
        self.pixels.apply(init_linear)

    def set_recompute(self, recompute: Recompute | tuple[Recompute, ...]) -> None:
        """Say what the encoder's backward pass computes again."""
        set_recompute(self.encoder, recompute, self._name)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.set_recompute("block" if enable else "none")

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return timm's patterns that order the parameters by depth, for layer decay."""
        found = self.encoder.group_matcher(coarse=coarse)  # type: ignore[operator]
        return {
            "stem": [(rf"^replacement|{pattern}", order) for pattern, order in _within(found["stem"])],
            "blocks": [*_within(found["blocks"]), (r"^pixels", (99999,))],
        }

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, in_chans + 1, height, width) -> (B, K, U, U, in_chans): pixels of the hidden units, row-major."""
        visible = self.visible_of(inputs)
        images = inputs[:, : self.channels]
        learned = self.replacement.to(images.dtype).repeat(1, visible.rows, visible.columns)
        images = torch.where(visible.seen(self.unit).unsqueeze(1), images, learned)
        if torch.compiler.is_compiling():  # which follows no change of a method; ZeRO-3 gathers by no module here
            features = self._features(images)
        else:
            with called_as(self.encoder, self._features):
                features = self.encoder(images)
        return self.pixels_of(self.pixels(visible.hidden().gather(features)))

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the last feature map, (B, rows, columns, channels)."""
        maps = self.encoder.forward_intermediates(  # type: ignore[operator]
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps[0].permute(0, 2, 3, 1).contiguous()  # type: ignore[no-any-return]


def _within(patterns: str | list[tuple[str, object]]) -> list[tuple[str, object]]:
    """Return timm's patterns of an encoder's parameters as patterns of ours."""
    pairs = [(patterns, None)] if isinstance(patterns, str) else patterns
    return [(rf"^{ENCODER}(?:{pattern.replace('^', '')})", order) for pattern, order in pairs]
