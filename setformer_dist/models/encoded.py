"""An encoder within a larger model: what engine and checkpoints ask of it, and how feature maps are taken from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import Recompute
from setformer_dist.models.layers import Untraceable, called_as
from setformer_dist.models.recompute import set_recompute

# What the names of the encoder's parameters begin with.
ENCODER = "encoder."

# Classes of timm's whose `forward_intermediates` refuses to norm the last map.
_NOT_NORMED = ("Hiera", "HieraDet")

_DEEPEST = (99999,)  # timm's order of what lies behind all blocks


class Encoded(Untraceable, nn.Module):
    """A model around an encoder.

    Attributes:
        encoder: a model of timm, without a classifier.
    """

    encoder: nn.Module

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature_info = encoder.feature_info
        self.num_features, self.num_classes = encoder.num_features, 0

    def set_sample_keys(self, keys: torch.Tensor | None) -> None:
        """Make the encoder's drop path a function of these keys, where it takes them."""
        own = getattr(self.encoder, "set_sample_keys", None)
        if own is not None:
            own(keys)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that must not decay: all but the weights of linear layers and convolutions."""
        own = getattr(self.encoder, "no_weight_decay", None)
        names = {f"{ENCODER}{name}" for name in own()} if own is not None else set()
        weights = {
            f"{n}.weight"
            for n, module in self.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
        }
        others = {name for name, _ in self.named_parameters() if not name.startswith(ENCODER)}
        return names | (others - weights)


class FeatureMaps(Encoded):
    """A model that takes feature maps of its encoder: of any model with timm's `forward_intermediates`.

    Attributes:
        name: of the encoder's architecture.
        first: what the names of the own parameters before the encoder begin with; "" for none.
        last: the same of those behind it; "" for all that is left.
    """

    name: str
    first, last = "", ""

    def set_recompute(self, recompute: Recompute | tuple[Recompute, ...]) -> None:
        """Say what the encoder's backward pass computes again."""
        set_recompute(self.encoder, recompute, self.name)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.set_recompute("block" if enable else "none")

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return timm's patterns that order the parameters by depth, for layer decay."""
        found = self.encoder.group_matcher(coarse=coarse)  # type: ignore[operator]
        before = f"^{self.first}|" if self.first else ""
        return {
            "stem": [(rf"{before}{pattern}", order) for pattern, order in _within(found["stem"])],
            "blocks": [*_within(found["blocks"]), (rf"^{self.last}", _DEEPEST)],
        }

    def maps(self, images: torch.Tensor, levels: int | Sequence[int]) -> list[torch.Tensor]:
        """Return feature maps of (B, C, H, W) images, each (B, channels, rows, columns).

        Args:
            images: as the encoder takes them.
            levels: positions in `feature_info`; a number means the last so many.
        """
        normed = type(self.encoder).__name__ not in _NOT_NORMED

        def compute(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(
                self.encoder.forward_intermediates(  # type: ignore[operator]
                    x, indices=levels, norm=normed, output_fmt="NCHW", intermediates_only=True
                )
            )

        if torch.compiler.is_compiling():  # which follows no change of a method; ZeRO-3 gathers by no module here
            return list(compute(images))
        with called_as(self.encoder, compute):
            return list(self.encoder(images))


def check_feature_maps(encoder: nn.Module, name: str, task: str) -> None:
    """Refuse an encoder of this name that gives no feature maps, for a task; raises ConfigError."""
    if not getattr(encoder, "feature_info", None) or not hasattr(encoder, "forward_intermediates"):
        raise ConfigError(
            f"task {task}: {name} gives no feature maps: it needs feature_info and forward_intermediates, as timm's "
            "models have them"
        )


def _within(patterns: str | list[tuple[str, object]]) -> list[tuple[str, object]]:
    """Return timm's patterns of an encoder's parameters as patterns of ours."""
    pairs = [(patterns, None)] if isinstance(patterns, str) else patterns
    return [(rf"^{ENCODER}(?:{pattern.replace('^', '')})", order) for pattern, order in pairs]
