"""Entropic optimal transport with uniform marginals: the plan that SeT uses as attention.

    P = argmin_{P 1 = 1/n, P^T 1 = 1/m}  - sum_ij s_ij P_ij - epsilon H(P)      (similarity s, cost -s)

Two ways to the same plan, proved equal by the tests, gradients included:

* `sinkhorn_log` iterates on potentials with logsumexp: right for any similarity and any epsilon, slow.
* `sinkhorn_scaling` iterates on scalings, u = (1/n) / (G v), v = (1/m) / (G^T u) with G = exp(s / epsilon): two
  matrix-vector products per iteration instead of n * m exponentials, and a backward of its own that costs the
  same again plus one product of rank 2 L. It needs |s| / epsilon <= 20, so that fp32 cannot overflow.

Both update rows first and columns last, as in Mialon et al. (ICLR 2021): columns sum to 1/m exactly, rows up to
convergence. Both compute in fp32 (fp64 for fp64 input) whatever the compute dtype or autocast around them; where
torch is told to round fp32 products to TF32 on a GPU, those of the scaling follow it.

Letters: z = batch (heads x samples), n = tokens, m = references, L = iterations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from setformer_dist.ops.kernels import at_least_fp32, no_autocast

# exp(20) bounds the entries of G, exp(+-40) the scalings and their products: far inside fp32's exp(+-87).
MAX_EXPONENT = 20.0


def transport_plan(similarity: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Return the plan after `iterations` rounds, by scaling where that is safe and by logarithms elsewhere.

    Args:
        similarity: (..., n, m), within [-1, 1], any float dtype.
        epsilon: strength of the entropy, in units of the similarity.
        iterations: rounds L >= 1; a round sets the row sums, then the column sums.

    Returns:
        (..., n, m), fp32 (fp64 for fp64), non-negative; columns sum to 1/m.
    """
    if epsilon * MAX_EXPONENT >= 1.0:
        return sinkhorn_scaling(similarity, epsilon, iterations)
    return sinkhorn_log(similarity, epsilon, iterations)


def sinkhorn_log(similarity: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Plan by iterations on log scalings; see `transport_plan` for arguments and result.

    The similarity may have any size. The gradient is plain autograd through the iterations.
    """
    with no_autocast(similarity.device):
        exponent = at_least_fp32(similarity) / epsilon
        n, m = exponent.shape[-2:]
        column = torch.zeros_like(exponent[..., :1, :])
        row = column
        for _ in range(iterations):
            row = -math.log(n) - torch.logsumexp(exponent + column, dim=-1, keepdim=True)
            column = -math.log(m) - torch.logsumexp(exponent + row, dim=-2, keepdim=True)
        return torch.exp(exponent + row + column)


def sinkhorn_scaling(similarity: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Plan by matrix scaling; see `transport_plan` for arguments and result.

    Needs |similarity| / epsilon <= MAX_EXPONENT. Differentiable once.
    """
    shape = similarity.shape
    flat = at_least_fp32(similarity).reshape(-1, shape[-2], shape[-1])
    plan: torch.Tensor = _Scaling.apply(flat, epsilon, iterations)
    return plan.view(shape)


class _Scaling(torch.autograd.Function):
    """Unrolled scaling iterations; the backward is the exact derivative of the unrolled loop.

    With potentials f = log u, g = log v and M = s / epsilon, each half round is a (negative) logsumexp, whose
    derivative is a softmax: G scaled by a row vector and a column vector. The gradient of M is therefore
    P * dP minus G times a sum of 2 L outer products, which is one matrix product of inner size 2 L; only G and
    the vectors of each round are kept, never a second n x m matrix per round.
    """

    @staticmethod
    def forward(ctx: Any, similarity_znm: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
        z, n, m = similarity_znm.shape
        with no_autocast(similarity_znm.device):
            kernel = torch.exp(similarity_znm * (1.0 / epsilon))
            # Vectors lie as rows and multiply from the left, by a transposed copy where needed: measured 5 times
            # faster on the CPU than a product with a column.
            kernel_t = kernel.mT.contiguous()
            v = kernel.new_ones(z, 1, m)
            rows, columns = [], [v]
            for _ in range(iterations):
                u = (1.0 / n) / torch.bmm(v, kernel_t)
                v = (1.0 / m) / torch.bmm(u, kernel)
                rows.append(u)
                columns.append(v)
            plan = kernel * u.mT * v
        ctx.epsilon = epsilon
        ctx.save_for_backward(kernel, kernel_t, torch.cat(rows, 1), torch.cat(columns, 1))
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_plan: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        kernel, kernel_t, rows, columns = ctx.saved_tensors
        n, m = kernel.shape[-2:]
        iterations = rows.shape[1]
        with no_autocast(kernel.device):
            direct = grad_plan * kernel * rows[:, -1].unsqueeze(-1) * columns[:, -1:]
            df: torch.Tensor | float = direct.sum(-1).unsqueeze(1)
            dg = direct.sum(-2, keepdim=True)
            left, right = [], []
            for step in range(iterations, 0, -1):
                u = rows[:, step - 1 : step]
                v, v_before = columns[:, step : step + 1], columns[:, step - 1 : step]
                y = v * dg * m
                x = u * (df - u * torch.bmm(y, kernel_t)) * n
                dg = -v_before * torch.bmm(x, kernel)
                df = 0.0
                left += [u, x]
                right += [y, v_before]
            outer = torch.bmm(torch.cat(left, 1).mT, torch.cat(right, 1))
            return (direct - kernel * outer) * (1.0 / ctx.epsilon), None, None
