"""The `[task]` table of a run config."""

from __future__ import annotations

from typing import Any

import pydantic

from setformer_dist.core.config import FrozenConfig


class TaskConfig(FrozenConfig):
    """What the run learns.

    Attributes:
        name: "classification" (one class per sample), "multilabel" (a class of the data names a set of labels, such as
            "cat+dog"), or a task that a module of run.imports registers.
        args: the task's own. "classification" and "multilabel" have loss ("cross_entropy", "binary_cross_entropy" or
            "focal"), class_weights (a factor for each class, by name), and gamma and alpha of "focal"; "multilabel" has
            separator ("+") and none ("none", the class without any label) as well.
    """

    name: str = "classification"
    args: dict[str, Any] = pydantic.Field(default_factory=dict)
