"""The numbers of one SeT attention, as every implementation takes them."""

from __future__ import annotations

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
