"""Who computes new sets from a problem, now or elsewhere meanwhile; `refresh.py` says when, and applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import TensorSums
from setformer_dist.ops.refit import Problem, figures, refit


@dataclass(frozen=True)
class Refitted:
    """What became of a problem, the same on all ranks.

    Attributes:
        sets: the new ones, on the CPU, by the name of their parameters; None where there are none.
        figures: what they do (`ops.refit.figures`), on rank 0; empty elsewhere.
        by: who has computed them: "job" or "ray".
        late: why they are not, or not by whom they should be; "" where all is as it should be.
    """

    sets: Mapping[str, torch.Tensor] | None
    figures: Mapping[str, Mapping[str, float]]
    by: str
    late: str = ""


class Refitter(Protocol):
    """Computes new sets. `begin` and `finish` are collective."""

    def begin(self, step: int, problem: Problem) -> None:
        """Take a problem, the same on all ranks, made after `step` optimizer steps; it replaces any other.

        A run that resumes, or goes back to a checkpoint, gives the same problem again.
        """
        ...

    def finish(self, step: int) -> Refitted:
        """Return what became of the problem of a step."""
        ...

    def close(self) -> None:
        """End all that computes."""
        ...


class InJob:
    """The ranks of the run compute the new sets together when they are wanted.

    Args:
        ranks: this process's place.
        device: that computes.
        sums: over all ranks, of tensors of this device.
    """

    def __init__(self, ranks: RankInfo, device: torch.device, sums: TensorSums | None = None) -> None:
        self._ranks = ranks
        self._device = device
        self._sums = sums
        self._problem: Problem | None = None

    def begin(self, step: int, problem: Problem) -> None:
        """Keep the problem for `finish`."""
        self._problem = problem

    def finish(self, step: int) -> Refitted:
        """Compute the new sets."""
        problem, self._problem = self._problem, None
        assert problem is not None
        sums = self._sums or TensorSums()
        here = problem.to(self._device)
        new = refit(here, sums, self._ranks.rank, self._ranks.world_size)
        found = figures(here, new) if self._ranks.is_main else {}
        return Refitted({name: vectors.cpu() for name, vectors in new.items()}, found, "job")

    def close(self) -> None:
        """Nothing is left."""


def united(parts: Mapping[str, torch.Tensor], sums: TensorSums) -> dict[str, torch.Tensor]:
    """Return fp32 tensors whole on every rank, bit by bit. Collective.

    Args:
        parts: their bits as int32, on the CPU; of each element one rank has them, and all others zero.
        sums: over all ranks.
    """
    bits = sums.sum(torch.cat([part.reshape(-1) for part in parts.values()]))
    whole = torch.split(bits, [part.numel() for part in parts.values()])
    return {n: one.view(torch.float32).view(part.shape) for (n, part), one in zip(parts.items(), whole, strict=True)}
