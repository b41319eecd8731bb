"""Masked autoencoding: reconstruct the hidden units of an image from the visible ones; no labels are needed.

Which units are hidden follows from (seed, epoch, sample id) in training, and from the sample id alone in evaluation, so
neither ranks nor micro batches nor workers change a mask, and losses of evaluations can be compared.

m = images of a micro batch, K = hidden units of an image, U = pixels of a unit's side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pydantic
import torch

from setformer_dist.core import config as base
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.masking import check_unit, hidden_units
from setformer_dist.core.metric import METRICS_OF, Metric
from setformer_dist.core.seeding import Purpose, sample_keys
from setformer_dist.core.task import Prepare
from setformer_dist.core.transfer import on_device

# Images (m, 3, H, W) -> (m, C, rows, columns) fp32.
Latents = Callable[[torch.Tensor], torch.Tensor]

_EVALUATION = -1  # in the place of seed and epoch
_FLAT = 1e-6  # added to a unit's variance, as in MAE


class HidingConfig(FrozenConfig):
    """The table [task.args] of task "simmim".

    Attributes:
        unit: side of the squares that are hidden or visible as a whole, in pixels; a multiple of the model's stride.
        ratio: share of the units that is hidden.
        normalise: compare with the pixels of each unit brought to mean 0 and variance 1.
    """

    unit: int = pydantic.Field(default=32, ge=1)
    ratio: float = pydantic.Field(default=0.6, gt=0, lt=1)
    normalise: bool = True


class MaskedConfig(HidingConfig):
    """The table [task.args] of task "mae".

    Attributes:
        decoder_dim: channels of the decoder, a multiple of 32.
        decoder_depth: blocks of the decoder.
        target: "pixels" of hidden units, or "latent": the tokens that the averaged weights compute of the whole image,
            each brought to mean 0 and variance 1 (data2vec: A. Baevski et al. 2022); `normalise` is for pixels alone.
    """

    decoder_dim: int = pydantic.Field(default=256, ge=32)
    decoder_depth: int = pydantic.Field(default=2, ge=1)
    target: Literal["pixels", "latent"] = "pixels"


class Hidden:
    """The loss is the mean square error of the hidden units' pixels."""

    name: str
    metrics: tuple[Metric, ...] = METRICS_OF["mae"]
    outputs: tuple[str, ...] = ()
    exclusive = False
    needs_labels = False
    config_type: type[HidingConfig]
    config: HidingConfig

    def __init__(self, args: Mapping[str, object], classes: tuple[str, ...]) -> None:
        self.config = base.build(self.config_type, args, "task.args")

    def check_images(self, shapes: Sequence[tuple[int, int]], stride: int) -> None:
        """Check that units fit into images of these heights and widths; raises ConfigError.

        Args:
            shapes: of the run's images.
            stride: image pixels per token of the model's last stage.
        """
        for shape in shapes:
            check_unit(self.config.unit, stride, shape, self.config.ratio)

    def prepared(
        self, whole: Prepare, dtype: torch.dtype, seed: int, steps_per_epoch: int, latents: Latents | None = None
    ) -> Prepare:
        """Return what makes inputs with masks, and targets.

        Args:
            whole: makes fp32 images.
            dtype: of the inputs.
            seed: of the run.
            steps_per_epoch: optimizer steps of an epoch.
            latents: images -> (m, C, rows, columns) fp32, the targets where they are latent.

        Raises:
            ConfigError: they are, and nothing computes them.
        """
        if self.latent and latents is None:
            raise ConfigError(
                "task.args.target = 'latent' compares with averaged weights as they are during training, so the loss "
                "is computed there alone: score the features with `setformer probe`"
            )
        return MaskedPrepare(whole, self.config, dtype, seed, steps_per_epoch, latents)

    @property
    def latent(self) -> bool:
        """Whether the targets are tokens that averaged weights compute."""
        return isinstance(self.config, MaskedConfig) and self.config.target == "latent"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean square error, shape (); both (m, K, U, U, 3)."""
        return (outputs.float() - targets).square().mean()

    def sums(self, outputs: torch.Tensor, batch: MicroBatch, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss summed over the images that count."""
        each = (outputs.float() - targets).square().flatten(1).mean(dim=1).cpu()
        return (each * batch.weights).sum().unsqueeze(0)

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return the mean over the images."""
        return {"loss": sums[0] / count}

    def confidences(self, outputs: torch.Tensor) -> torch.Tensor:
        """Refuse: there are no classes."""
        raise ConfigError(
            f"a model of task {self.name} reconstructs hidden parts of images and has no classes: fine-tune it "
            "(model.weights), or score its features with `setformer probe`"
        )


class Masked(Hidden):
    """Masked autoencoding: the encoder computes visible tokens alone (K. He et al. 2022)."""

    name = "mae"
    config_type = MaskedConfig
    config: MaskedConfig


class Simmim(Hidden):
    """Masked image modelling by whole images, hidden units replaced by learned pixels (Z. Xie et al. 2022)."""

    name = "simmim"
    config_type = HidingConfig


TASKS_OF_HIDDEN = (Masked.name, Simmim.name)


class MaskedPrepare:
    """A `Prepare` that draws masks and makes targets of hidden pixels, or of their latents.

    Args: as of `Hidden.prepared`, with the task's table.
    """

    def __init__(
        self,
        whole: Prepare,
        config: HidingConfig,
        dtype: torch.dtype,
        seed: int,
        steps_per_epoch: int,
        latents: Latents | None,
    ) -> None:
        self._whole = whole
        self._config = config
        self._dtype = dtype
        self._seed = seed
        self._steps_per_epoch = steps_per_epoch
        self._latents = latents

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (m, 4, H, W), images and a channel that is 1 in hidden units, and targets (m, K, U, U, 3) fp32.

        Latent targets are (m, K, s, s, C) fp32, with s tokens of a unit's side.
        """
        images, _ = self._whole(batch, train=train)
        unit = self._config.unit
        rows, columns = images.shape[2] // unit, images.shape[3] // unit
        hidden = torch.from_numpy(hidden_units(self._keys(batch, train), rows, columns, self._config.ratio))
        if self._latents is not None:
            with torch.no_grad():
                found = self._latents(images.to(self._dtype))
            targets = hidden_pixels(found, hidden, found.shape[2] // rows)
        else:
            targets = hidden_pixels(images, hidden, unit)
            targets = normalised(targets) if self._config.normalise else targets
        channel = on_device(hidden, images.device).repeat_interleave(unit, 1).repeat_interleave(unit, 2).unsqueeze(1)
        return torch.cat([images.to(self._dtype), channel.to(self._dtype)], 1), targets

    def _keys(self, batch: MicroBatch, train: bool) -> np.ndarray:
        if not train:
            return sample_keys(Purpose.MASK, _EVALUATION, _EVALUATION, batch.sample_ids.numpy())
        epoch = batch.step // self._steps_per_epoch
        return sample_keys(Purpose.MASK, self._seed, epoch, batch.drawn_ids)


def hidden_pixels(images: torch.Tensor, hidden: torch.Tensor, unit: int) -> torch.Tensor:
    """Return the hidden units of images, (m, K, U, U, 3), in row-major order.

    Args:
        images: (m, 3, H, W).
        hidden: (m, H / U, W / U) bool, on the CPU, the same number of each image.
        unit: U.
    """
    m, channels, height, width = images.shape
    units = images.reshape(m, channels, height // unit, unit, width // unit, unit).permute(0, 2, 4, 3, 5, 1)
    index = on_device(hidden.flatten().nonzero().squeeze(1), images.device)
    return units.reshape(-1, unit, unit, channels).index_select(0, index).view(m, -1, unit, unit, channels)


def normalised(units: torch.Tensor) -> torch.Tensor:
    """Bring each unit of (m, K, U, U, 3) to mean 0 and variance 1 over all its numbers."""
    mean, scale = moments(units)
    return (units - mean) / scale


def moments(units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each unit, both (m, K, 1, 1, 1)."""
    over = (2, 3, 4)
    variance, mean = torch.var_mean(units, dim=over, keepdim=True)
    return mean, (variance + _FLAT).sqrt()
