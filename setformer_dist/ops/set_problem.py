"""The numbers of one SeT attention, as every implementation takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
