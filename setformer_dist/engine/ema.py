"""An exponential average of the fp32 masters, sharded as they are: one more state per fragment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from setformer_dist.core.fragments import Fragment
from setformer_dist.engine.config import EmaConfig
from setformer_dist.engine.master import MasterState


class Ema:
    """The average over what this rank holds of the masters."""

    def __init__(self, master: MasterState, config: EmaConfig) -> None:
        self._master = master
        self._config = config
        self._average = [f.tensor.clone() for f in master.fragments("param")]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the masters after optimizer step `step` into the average."""
        current = [f.tensor for f in self._master.fragments("param")]
        torch._foreach_lerp_(self._average, current, 1.0 - self._config.decay_at(step))

    def fragments(self) -> list[Fragment]:
        """Return live views of the average, state "ema"."""
        masters = self._master.fragments("param")
        return [
            Fragment(f.name, "ema", f.start, f.shape, average)
            for f, average in zip(masters, self._average, strict=True)
        ]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model compute with the average for a while; the masters come back bit by bit. Collective.

        After an error inside nothing is put back: that takes all ranks, and the others may be elsewhere.
        """
        masters = [f.tensor for f in self._master.fragments("param")]
        kept = [m.clone() for m in masters]
        _write(masters, self._average)
        self._master.refresh()
        yield
        _write(masters, kept)
        self._master.refresh()


@torch.no_grad()
def _write(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    torch._foreach_copy_(targets, sources)
