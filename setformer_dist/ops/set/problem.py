"""One SeT attention as every implementation takes it: its tensors, its numbers, and the gradients it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    """The tensors of one call; b images, h heads, n tokens, m references, k features, d values, a axes of a place.

    Attributes:
        x_bhnd: values, any float dtype.
        features_bhnk: what is compared with the references, of length at most 1; None means x of unit length.
        gather_hmk: references that gather, of any length and brought to unit length by the implementation.
        scatter_hmk: references that scatter, likewise; None means one plan for both ways.
        positions_bna: places of the tokens, (b or 1, n, a), None for no position filter.
        places_ma: places of the references, given with `positions_bna`.
        mask_bn: True for valid tokens, at least one per image; None means all.
    """

    x_bhnd: torch.Tensor
    features_bhnk: torch.Tensor | None
    gather_hmk: torch.Tensor
    scatter_hmk: torch.Tensor | None
    positions_bna: torch.Tensor | None
    places_ma: torch.Tensor | None
    mask_bn: torch.Tensor | None


class Gradients(NamedTuple):
    """Of x, features and both reference sets; None where the input was None."""

    x: torch.Tensor
    features: torch.Tensor | None
    gather: torch.Tensor
    scatter: torch.Tensor | None


@dataclass(frozen=True)
class SetProblem:
    """What is computed, apart from the tensors.

    Attributes:
        epsilon: entropy of the transport, in units of the similarity.
        sigma: width of the Gaussian kernel of unit vectors; 0 takes the similarity as it is.
        tau: width of the position filter; without meaning where no positions are given.
        iterations: Sinkhorn rounds, at most.
        tolerance: 0 runs all rounds; otherwise a head of an image stops once its largest relative error of a row
            sum is below.
        implicit: differentiate at the fixed point instead of through the rounds.
        renormalise: divide gathering weights by their column sums and scattering weights by their row sums.
    """

    epsilon: float
    sigma: float
    tau: float
    iterations: int
    tolerance: float = 0.0
    implicit: bool = False
    renormalise: bool = True

    def numbers(self) -> list[float]:
        """Return the fields as floats, as an operator takes them: one argument costs a call less than seven."""
        flags = float(self.implicit), float(self.renormalise)
        return [self.epsilon, self.sigma, self.tau, float(self.iterations), self.tolerance, *flags]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> SetProblem:
        """Return what `numbers` returned the fields of."""
        epsilon, sigma, tau, iterations, tolerance, implicit, renormalise = numbers
        return cls(epsilon, sigma, tau, int(iterations), tolerance, bool(implicit), bool(renormalise))
