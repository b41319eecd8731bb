"""Masked language modelling: name the hidden tokens of a text from the others; no labels are needed.

Which tokens are hidden follows from (seed, epoch, sample id) in training, and from the sample id alone in evaluation,
so neither ranks nor micro batches change it, and losses of evaluations can be compared. The loss is a mean over the
hidden tokens of all micro batches and ranks of a step.

m = texts of a micro batch, n = tokens of a padded text, K = most hidden tokens of a text, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pydantic
import torch
import torch.nn.functional as F

from setformer_dist.core import config as base
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.metric import METRICS_OF, Metric
from setformer_dist.core.seeding import Purpose, sample_keys
from setformer_dist.core.text_ids import IGNORED, hidden_counts, hide_tokens
from setformer_dist.core.transfer import on_device

_EVALUATION = -1  # in the place of seed and epoch


class MaskedTextConfig(FrozenConfig):
    """The table [task.args] of task "mlm".

    Attributes:
        ratio: share of a text's tokens that is hidden in training.
        eval_ratio: the same in evaluation; losses of different values cannot be compared.
    """

    ratio: float = pydantic.Field(default=0.15, gt=0, lt=1)
    eval_ratio: float = pydantic.Field(default=0.15, gt=0, lt=1)


class MaskedText:
    """Cross entropy of the hidden tokens, and the share of them that is named."""

    name = "mlm"
    metrics: tuple[Metric, ...] = METRICS_OF["mlm"]
    outputs: tuple[str, ...] = ()
    exclusive = False
    needs_labels = False

    def __init__(self, args: Mapping[str, object], classes: tuple[str, ...]) -> None:
        """Read the task's table; raises ConfigError."""
        self.config = base.build(MaskedTextConfig, args, "task.args")

    def count(self, batch: MicroBatch) -> float:
        """Return the hidden tokens of a micro batch."""
        return float(hidden_counts(batch.inputs.numpy(), self.config.ratio).sum())

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy summed over hidden tokens, shape ().

        Args:
            outputs: logits, (m, K, V).
            targets: (m, K) int64, `IGNORED` where nothing is hidden.
        """
        return F.cross_entropy(outputs.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def sums(self, outputs: torch.Tensor, batch: MicroBatch, targets: torch.Tensor) -> torch.Tensor:
        """Return (loss, named, hidden) summed over the hidden tokens of the texts that count."""
        targets = targets.masked_fill(batch.weights.to(targets.device)[:, None] == 0, IGNORED)
        named = (outputs.argmax(dim=2) == targets).sum()
        return torch.stack([self.loss(outputs, targets), named, (targets != IGNORED).sum()]).double().cpu()

    def figures(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Return means over the hidden tokens."""
        loss, named, hidden = sums
        return {"loss": loss / max(1.0, hidden), "accuracy": named / max(1.0, hidden)}

    def confidences(self, outputs: torch.Tensor) -> torch.Tensor:
        """Refuse: there are no classes."""
        raise ConfigError("a model of task mlm names hidden tokens and has no classes: fine-tune it (model.weights)")


class MaskedTextPrepare:
    """A `Prepare` that hides tokens of texts.

    Args:
        config: of the task.
        device: where to.
        vocabulary: V.
        seed: of the run.
        steps_per_epoch: optimizer steps of an epoch.
    """

    def __init__(
        self, config: MaskedTextConfig, device: torch.device, vocabulary: int, seed: int, steps_per_epoch: int
    ) -> None:
        self._config = config
        self._device = device
        self._vocabulary = vocabulary
        self._seed = seed
        self._steps_per_epoch = steps_per_epoch

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (m, 2, n) int32, ids and in the first K columns where hidden tokens are; and (m, K) what they were."""
        if train:
            epoch = batch.step // self._steps_per_epoch
            keys = sample_keys(Purpose.MASK, self._seed, epoch, batch.drawn_ids)
        else:
            keys = sample_keys(Purpose.MASK, _EVALUATION, _EVALUATION, batch.sample_ids.numpy())
        ratio = self._config.ratio if train else self._config.eval_ratio
        shown, places, targets = hide_tokens(batch.inputs.numpy(), keys, self._vocabulary, ratio)
        inputs = torch.zeros(len(shown), 2, shown.shape[1], dtype=torch.int32)
        inputs[:, 0] = torch.from_numpy(shown)
        inputs[:, 1, : places.shape[1]] = torch.from_numpy(places)
        return on_device(inputs, self._device), on_device(torch.from_numpy(targets), self._device)
