"""The `[task]` table of a run config."""

from __future__ import annotations

from typing import Any

import pydantic

from setformer_dist.core.config import FrozenConfig


class TaskConfig(FrozenConfig):
    """What the run learns.

    Attributes:
        name: "classification" (one class per sample), "multilabel" (a class name joins the labels of a sample, such as
            "cat+dog"), "segmentation" (a class for every pixel; docs/segmentation.md), "detection" (boxes around
            objects; docs/detection.md), "mlm" (hidden tokens of texts), "sentences" (classification with F1 and
            Matthews' correlation) and "regression" (a number per text; docs/language.md), "mae" and "simmim" (masked
            image modelling, without labels; docs/pretraining.md), or a task that a module of run.imports registers.
        args: arguments of the task. "classification", "sentences" and "multilabel" take loss ("cross_entropy",
            "binary_cross_entropy" or "focal"), class_weights (a factor per class name), and for "focal" gamma and
            alpha. "multilabel" also takes separator (default "+") and none (the class name for samples without labels,
            default "none"). "mae" and "simmim" take unit (side of what is hidden, in pixels, default
            32), ratio (share that is hidden, default 0.6) and normalise (default true), and "mae" decoder_dim (default
            256), decoder_depth (default 2) and target ("pixels" or "latent", default "pixels"). "segmentation" takes
            channels (of its head, default 512), auxiliary (weight of its second head's loss, default 0.4) and
            class_weights. "detection" takes channels (of its pyramid and heads, default 256). "mlm" takes ratio and
            eval_ratio (share of tokens that training and evaluation hide, default 0.15).
    """

    name: str = "classification"
    args: dict[str, Any] = pydantic.Field(default_factory=dict)
