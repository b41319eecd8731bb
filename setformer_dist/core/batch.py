"""The value that the loaders hand to the engine, and the protocols by which the two meet.

`dataloaders` implements them, `setformer_dist.engine` uses them; neither imports the other.

Letters: m = micro batch (samples of one rank in one accumulation step), H, W = height, width, n = tokens,
s = sequences of a sample, k = boxes of an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

VOID = 255  # in masks: the class of a pixel that does not count

_BITS_OF_IDS = 40  # more samples than any data set has


@dataclass(frozen=True)
class MixSpec:
    """How mixup or cutmix combines each sample of a micro batch with a partner of its fixed group.

    Drawn from (seed, epoch, group index), so it depends on neither ranks nor micro batch.

    Attributes:
        partner: (m,) int64, index within the micro batch of the sample mixed in.
        lam: (m,) float32, share of the sample itself in image and label.
        box: (m, 4) int64, y0, y1, x0, x1 of the pasted rectangle; all zero for mixup.
    """

    partner: torch.Tensor
    lam: torch.Tensor
    box: torch.Tensor


@dataclass(frozen=True)
class Annotations:
    """What is marked in the images of a micro batch, moved with every crop, resize and flip.

    Attributes:
        masks: (m, H, W) uint8, the class of each pixel, 255 where it does not count; None for data without masks. In
            evaluation with data.eval_view = "whole" they have the size in which they are stored.
        boxes: one (k, 4) float32 per image, x0, y0, x1, y1 in pixels of the input, clipped to it, without crowds; None
            for data without boxes. In evaluation with data.eval_view = "whole" they are as stored: all boxes, crowds
            too, in stored pixels.
        box_labels: one (k,) int64 per image, aligned with `boxes`.
        box_areas: one (k,) float32 per image, the objects' areas in stored pixels: of their outlines, where the
            annotations have them. For boxes as stored, else None.
        box_crowds: one (k,) bool per image, whether a box is of a region with several objects, which must not be
            counted as one. For boxes as stored, else None.
        sizes: (m, 2) int64, stored (height, width) of each image; zeros for filling and for damaged samples. For boxes
            as stored, else None.
    """

    masks: torch.Tensor | None = None
    boxes: tuple[torch.Tensor, ...] | None = None
    box_labels: tuple[torch.Tensor, ...] | None = None
    box_areas: tuple[torch.Tensor, ...] | None = None
    box_crowds: tuple[torch.Tensor, ...] | None = None
    sizes: torch.Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one accumulation step.

    Attributes:
        inputs: what the model is to see, on the CPU: (m, 3, H, W) uint8 pixels, which are normalised on the device, or
            token ids, (m, n) or (m, s, n) int32 with 0 for padding.
        labels: (m,) int64.
        weights: (m,) float32; 0 marks filling that must not count (evaluation only).
        sample_ids: (m,) int64, position in the data set, for proofs of order.
        mix: mixup or cutmix of this micro batch, or None.
        step: optimizer step since the start of the run that this micro batch belongs to (training only).
        substitutions: one line for each sample that was damaged and replaced.
        annotations: masks or boxes, for data that have them.
        soft: (m, classes) float32, how probable each class is, for data with soft labels; a row of zeros is of a sample
            that has only its label.
        numbers: (m,) float32, what regression is to compute, for data that have numbers in place of classes.
        copies: (m,) int64, which copy of its sample each is, where a global batch has several; else None.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    sample_ids: torch.Tensor
    mix: MixSpec | None = None
    step: int = -1
    substitutions: list[str] = field(default_factory=list)
    annotations: Annotations | None = None
    soft: torch.Tensor | None = None
    numbers: torch.Tensor | None = None
    copies: torch.Tensor | None = None

    @property
    def drawn_ids(self) -> npt.NDArray[np.int64]:
        """What random draws of a step tell samples apart by, (m,): their ids, and for copies of one sample others."""
        ids: npt.NDArray[np.int64] = self.sample_ids.numpy()
        return ids if self.copies is None else ids + (self.copies.numpy() << _BITS_OF_IDS)


class TrainStream(Protocol):
    """Endless training samples, cut by global order; its whole position is the optimizer step."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, equal on all ranks by construction."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the data set: changes when any sample's bytes, label or place change."""
        ...

    def micro_batches(self, first_step: int) -> Iterator[MicroBatch]:
        """Yield `accumulation` micro batches per optimizer step, endlessly, from `first_step` on."""
        ...

    def state(self, next_step: int) -> dict[str, Any]:
        """Return the cursor at an optimizer step, JSON-able and equal on all ranks."""
        ...

    def check_state(self, state: dict[str, Any]) -> int:
        """Return the optimizer step to resume from; raise DataError if the cursor is of other data or order."""
        ...

    def close(self) -> None:
        """End worker processes."""
        ...


class EvalStream(Protocol):
    """Each sample of a split exactly once over all ranks, the same number of micro batches on each."""

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        ...

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's share; filling has weight 0."""
        ...

    def close(self) -> None:
        """End worker processes."""
        ...
