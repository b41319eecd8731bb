"""Checkpoints as the engine sees them; `checkpoints` implements them, the engine never imports it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from setformer_dist.core.fragments import Fragment


class SavedState(Protocol):
    """A checkpoint that was found and verified."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    @property
    def trainer(self) -> dict[str, Any]:
        """What the trainer saved besides tensors."""
        ...


class CheckpointStore(Protocol):
    """Saves and finds checkpoints of one run. Every method is collective."""

    def due(self, step: int) -> bool:
        """Return whether the policy wants a checkpoint after this many optimizer steps."""
        ...

    def save(
        self, step: int, fragments: Iterable[Fragment], trainer: dict[str, Any], metrics: Mapping[str, float]
    ) -> Path:
        """Make a checkpoint durable; return its folder."""
        ...

    def newest(self) -> SavedState | None:
        """Return the newest checkpoint that verifies and belongs to this model, or None."""
        ...

    def load(self, saved: SavedState, fragments: Iterable[Fragment]) -> None:
        """Fill the fragments' tensors in place."""
        ...
