"""Losses of logits against soft targets: torch's and torchvision's, with weights of classes.

m = samples of a micro batch, k = outputs of the model, such as the classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from setformer_dist.core.config import FrozenConfig, nearest
from setformer_dist.core.errors import ConfigError

LossName = Literal["cross_entropy", "binary_cross_entropy", "focal"]


class LossConfig(FrozenConfig):
    """The keys of [task.args] that say what the loss is.

    Attributes:
        loss: "cross_entropy"; "binary_cross_entropy" of each output by itself, mean over the outputs (for one class per
            sample: Wightman et al. 2021); or "focal", the same with less weight where the model is right already (Lin
            et al. 2017). "multilabel" has no "cross_entropy".
        class_weights: factor of an output's part of the loss, by the output's name; 1 for those not named.
        gamma: of "focal": how much less what is right already counts; 0 is binary cross entropy.
        alpha: of "focal": weight of an output that is to be 1, 1 - alpha of one that is to be 0; -1 weights neither.
    """

    loss: LossName = "cross_entropy"
    class_weights: dict[str, Annotated[float, pydantic.Field(gt=0, lt=math.inf)]] = pydantic.Field(default_factory=dict)
    gamma: float = pydantic.Field(default=2.0, ge=0)
    alpha: float = pydantic.Field(default=0.25, ge=-1, le=1)

    @pydantic.model_validator(mode="after")
    def _focal_alone(self) -> LossConfig:
        if given := {"gamma", "alpha"} & self.model_fields_set if self.loss != "focal" else set():
            raise ValueError(f'task.args.{min(given)} is of loss = "focal", and this is "{self.loss}": leave it out')
        return self


def weights_of(class_weights: Mapping[str, float], outputs: tuple[str, ...]) -> torch.Tensor | None:
    """Return the weight of each output, (k,); None where none is named.

    Raises:
        ConfigError: a weight is of an output that there is not.
    """
    for name in class_weights:
        if name not in outputs:
            raise ConfigError(f"task.args.class_weights: {name!r} is no output: {nearest(name, outputs)}")
    return torch.tensor([class_weights.get(name, 1.0) for name in outputs]) if class_weights else None


class Loss:
    """A loss of a model with these outputs.

    Raises:
        ConfigError: a weight is of an output that there is not.
    """

    def __init__(self, config: LossConfig, outputs: tuple[str, ...]) -> None:
        self._config = config
        self._weights = weights_of(config.class_weights, outputs)

    def mean(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean over samples, shape (), fp32.

        Args:
            logits: (m, k), any float dtype.
            targets: (m, k) fp32, 0 to 1; for "cross_entropy" rows sum to 1.
        """
        logits, weights = logits.float(), self._on(logits.device)
        if self._config.loss == "cross_entropy":
            return F.cross_entropy(logits, targets, weights)
        if self._config.loss == "binary_cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, targets, weights)
        return self._focal(logits, targets).mean()

    def each(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of every sample, (m,) fp32.

        Args:
            logits: (m, k), any float dtype.
            targets: as in `mean`; or classes, (m,) int64, of which "cross_entropy" takes the logarithm alone.
        """
        logits, weights = logits.float(), self._on(logits.device)
        if self._config.loss == "cross_entropy":
            return F.cross_entropy(logits, targets, weights, reduction="none")
        if targets.dim() == 1:
            targets = F.one_hot(targets, logits.shape[1]).float()
        if self._config.loss == "binary_cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none").mean(dim=1)
        return self._focal(logits, targets).mean(dim=1)

    def _focal(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weights = self._on(logits.device)
        loss: torch.Tensor = sigmoid_focal_loss(logits, targets, self._config.alpha, self._config.gamma)
        return loss if weights is None else loss * weights

    def _on(self, device: torch.device) -> torch.Tensor | None:
        if self._weights is not None and self._weights.device != device:
            self._weights = self._weights.to(device)
        return self._weights
