"""SeT attention written for reading: every equation one line, gradients by plain autograd through the rounds.

The other implementations are proved against this one. Potentials are logarithms, so any epsilon is safe; everything
is computed in fp32 (fp64 for fp64 inputs) and the n x m plan of every head is kept: use it to check, not to train.

Letters: b = images, h = heads, n = tokens, m = references, k = features, d = values of one head, a = axes of a place.
"""

from __future__ import annotations

import math

import torch

from setformer_dist.ops.kernels import at_least_fp32, gaussian, log_filter, no_autocast, unit
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.sinkhorn import log_plan


def forward(inputs: Inputs, problem: SetProblem) -> torch.Tensor:
    """Gather the tokens into m references and scatter them back.

    Returns:
        (b, h, n, d) in the dtype of x. What stands at masked tokens has no meaning.
    """
    x_bhnd, features_bhnk, gather_hmk, scatter_hmk, positions_bna, places_ma, mask_bn = inputs
    with no_autocast(x_bhnd.device):
        x = at_least_fp32(x_bhnd)
        features = unit(x) if features_bhnk is None else features_bhnk.to(x.dtype)
        gather = scatter = plan_of(features, unit(gather_hmk.to(x.dtype)), mask_bn, problem)
        if scatter_hmk is not None:
            scatter = plan_of(features, unit(scatter_hmk.to(x.dtype)), mask_bn, problem)
        if positions_bna is not None:
            assert places_ma is not None
            nearness = log_filter(positions_bna.to(x.dtype), places_ma.to(x.dtype), problem.tau).unsqueeze(1)
            gather, scatter = gather + nearness, scatter + nearness
        if mask_bn is not None:
            gather = gather.masked_fill(~mask_bn[:, None, :, None], -math.inf)
        if problem.renormalise:
            gather, scatter = torch.softmax(gather, dim=-2), torch.softmax(scatter, dim=-1)
        else:
            count = x.shape[-2] if mask_bn is None else mask_bn.sum(-1).view(-1, 1, 1, 1)
            gather, scatter = gather.exp() * gather_hmk.shape[-2], scatter.exp() * count
        return (scatter @ (gather.mT @ x)).to(x_bhnd.dtype)


def plan_of(
    features_bhnk: torch.Tensor, references_hmk: torch.Tensor, mask_bn: torch.Tensor | None, problem: SetProblem
) -> torch.Tensor:
    """Return the logarithm of the plan, (b, h, n, m).

    Args:
        features_bhnk: of length at most 1, fp32 or fp64.
        references_hmk: likewise.
        mask_bn: True for valid tokens, at least one per image, or None.
        problem: the numbers.
    """
    similarity = features_bhnk @ references_hmk.mT
    if problem.sigma > 0:
        similarity = gaussian(similarity, problem.sigma)
    mask = None if mask_bn is None else mask_bn.unsqueeze(1)
    return log_plan(similarity / problem.epsilon, problem.iterations, mask)
