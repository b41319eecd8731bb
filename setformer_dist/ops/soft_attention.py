"""SOFT attention as pure functions: a Gaussian kernel between all tokens, by way of m landmarks, without softmax.

    S = P A+ P^T      P_ij = exp(-|q_i - l_j|^2 / (2 sqrt d))  (n x m),   A = the same kernel among the landmarks
    output = P (A+ (P^T V))

The n x n matrix S is never formed; the cost is linear in n. Landmarks are means of neighbouring tokens (`pool_grid`,
`pool_sequence`) or whatever the caller makes of them. Equations: Lu et al., "SOFT: Softmax-free transformer with
linear complexity" (NeurIPS 2021); the symmetric normalisation is that of SOFT++ (IJCV 2024). Kernels and inverse are
computed in fp32 (fp64 for fp64 inputs) whatever the compute dtype or autocast around them: the inverse has entries of
both signs whose products bf16 would drown in rounding.

Letters: b = images or sequences, h = heads, n = tokens, m = landmarks, d = channels of one head, e = channels of a
value, H, W = token rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import at_least_fp32, no_autocast

HALVINGS = 10


def soft_attention(
    q_bhnd: torch.Tensor,
    v_bhne: torch.Tensor,
    landmarks_bhmd: torch.Tensor,
    *,
    mask_bn: torch.Tensor | None = None,
    landmark_mask_bm: torch.Tensor | None = None,
    iterations: int = 20,
    ridge: float = 0.0,
    normalise: bool = False,
) -> torch.Tensor:
    """Attend by a Gaussian kernel through landmarks (Lu et al. 2021, equations 5 to 9).

    Args:
        q_bhnd: queries, which are the keys too; any float dtype.
        v_bhne: values.
        landmarks_bhmd: in the space of the queries.
        mask_bn: bool, True for valid tokens; the others take no part and their output is 0.
        landmark_mask_bm: bool, True for landmarks that exist; the others are as if they were not there.
        iterations: Newton-Raphson rounds of the inverse.
        ridge: times the identity, added to A before it is inverted (the authors' code: 0.01; their paper: 0).
        normalise: SOFT++: D^(-1/2) A+ D^(-1/2) in place of A+, with D = diag(A 1).

    Returns:
        (b, h, n, e) in the dtype of v. Rows of S do not sum to 1: there is no normalisation over tokens.

    Raises:
        ConfigError: shapes that do not fit, a mask that is not boolean, no iterations, a negative ridge.
    """
    _check(q_bhnd, v_bhne, landmarks_bhmd, mask_bn, landmark_mask_bm, iterations, ridge)
    if mask_bn is not None:
        hidden_b1n1 = ~mask_bn[:, None, :, None]
        # Both are blanked, so that not even NaN in the padding can reach a product or a gradient.
        q_bhnd, v_bhne = q_bhnd.masked_fill(hidden_b1n1, 0), v_bhne.masked_fill(hidden_b1n1, 0)
    with no_autocast(q_bhnd.device):
        q, landmarks = at_least_fp32(q_bhnd), at_least_fp32(landmarks_bhmd)
        tokens_bhnm, among_bhmm = gaussian_kernel(q, landmarks), gaussian_kernel(landmarks, landmarks)
        if landmark_mask_bm is not None:
            tokens_bhnm = tokens_bhnm.masked_fill(~landmark_mask_bm[:, None, None, :], 0)
            among_bhmm = _without(among_bhmm, landmark_mask_bm)
        middle_bhmm = _middle(among_bhmm, iterations, ridge, normalise)
        y_bhne = tokens_bhnm @ (middle_bhmm @ (tokens_bhnm.mT @ v_bhne.to(q.dtype)))
    if mask_bn is not None:
        y_bhne = y_bhne.masked_fill(hidden_b1n1, 0)
    return y_bhne.to(v_bhne.dtype)


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gaussian kernel exp(-|x - y|^2 / (2 sqrt d)) of all pairs.

    Args:
        x: (..., n, d).
        y: (..., m, d).

    Returns:
        (..., n, m), in (0, 1].
    """
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2)
    # Rounding can leave the distance of equal points just below zero.
    distance = (squares - 2.0 * (x @ y.mT)).clamp_min(0.0)
    return torch.exp(distance * (-0.5 * x.shape[-1] ** -0.5))


def _without(among_bhmm: torch.Tensor, landmark_mask_bm: torch.Tensor) -> torch.Tensor:
    """Put rows and columns of the identity in place of landmarks that do not exist: the others never see them."""
    both_b1mm = (landmark_mask_bm.unsqueeze(-1) & landmark_mask_bm.unsqueeze(-2)).unsqueeze(1)
    identity = torch.eye(among_bhmm.shape[-1], dtype=among_bhmm.dtype, device=among_bhmm.device)
    return torch.where(both_b1mm, among_bhmm, identity)


def _middle(among_bhmm: torch.Tensor, iterations: int, ridge: float, normalise: bool) -> torch.Tensor:
    """Return what stands between P and P^T."""
    inverted = among_bhmm
    if ridge:
        inverted = inverted + ridge * torch.eye(inverted.shape[-1], dtype=inverted.dtype, device=inverted.device)
    inverse = newton_inverse(inverted, iterations, halve=normalise)
    if not normalise:
        return inverse
    degree = among_bhmm.sum(-1, keepdim=True).rsqrt()
    return degree * inverse * degree.mT


# ------------------------------------------------------------------------------------------------------- inverse


class _NewtonInverse(torch.autograd.Function):
    """Newton-Raphson iterations forward, the derivative of the inverse itself backward: no graph of the rounds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: torch.Tensor, iterations: int, halve: bool) -> torch.Tensor:
        with no_autocast(matrix.device):
            inverse = _step_size(matrix, halve) * matrix
            for _ in range(iterations):
                inverse = 2.0 * inverse - inverse @ matrix @ inverse
        return inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        with no_autocast(inverse.device):
            return -(inverse.mT @ grad @ inverse.mT), None, None


def _step_size(matrix: torch.Tensor, halve: bool) -> torch.Tensor:
    """Return alpha of the start alpha A, (..., 1, 1): 0.9 * 2 / |A|^2 with the largest row sum as norm.

    The published code of SOFT takes the norm before it adds its ridge, which a larger ridge would let diverge.
    SOFT++ halves alpha up to ten times while |I - A alpha A| > 1.01. Its published code differs in two points. It
    starts without the factor 0.9, and then never leaves zero for A = I, which landmarks far apart approach: the error
    starts at -1, and squaring keeps it at 1. And it takes the largest norm of a whole batch, so that an image depends
    on its neighbours. Here each matrix is halved by itself, without a branch, so that compilers need not look at the
    values. The bound is safe, not tight: kernels with many near landmarks are halved to the end, which costs nearly ten
    rounds. Another start is another result only where the rounds do not end: tests/numerics/test_soft_published.py.
    """
    alpha = 1.8 / matrix.abs().sum(-1).amax(-1)[..., None, None].square()
    if not halve:
        return alpha
    square = matrix @ matrix
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(HALVINGS):
        error = (identity - alpha * square).abs().sum(-2).amax(-1)[..., None, None]
        alpha = torch.where(error > 1.01, 0.5 * alpha, alpha)
    return alpha


def newton_inverse(matrix: torch.Tensor, iterations: int = 20, *, halve: bool = False) -> torch.Tensor:
    """Approximate the pseudo-inverse of symmetric positive semidefinite matrices (Lu et al. 2021, algorithm 2).

    A_0 = alpha A,  A_(k+1) = 2 A_k - A_k A A_k; the error I - A A_k is squared by every round. Eigenvalues that the
    rounds do not reach (below about 2^(-iterations / 2) of the largest) are damped, not inverted. The gradient is that
    of the inverse, dL/dA = -A+^T G A+^T (proposition 2), exact once the rounds have converged. Differentiable once.

    Args:
        matrix: (..., m, m), fp32 or fp64, not zero.
        iterations: rounds.
        halve: start as SOFT++ does.

    Returns:
        (..., m, m).
    """
    inverse: torch.Tensor = _NewtonInverse.apply(matrix, iterations, halve)
    return inverse


# ----------------------------------------------------------------------------------------------------- landmarks


def pool_grid(
    x_bhnd: torch.Tensor, grid: tuple[int, int], cells: tuple[int, int], mask_bn: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Average the tokens of each cell of a coarse grid.

    Args:
        x_bhnd: tokens in row-major order; any float dtype.
        grid: H, W with n = H * W; no multiples of the cells needed.
        cells: rows and columns of the coarse grid; at most H and W are made.
        mask_bn: bool, True for valid tokens; None means all.

    Returns:
        (b, h, m, d) means of the valid tokens, in at least fp32, and (b, m) which cells have any (None for all).
    """
    b, h, _, d = x_bhnd.shape
    with no_autocast(x_bhnd.device):
        x = at_least_fp32(x_bhnd)
        rows = _membership(grid[0], min(cells[0], grid[0]), x)
        columns = _membership(grid[1], min(cells[1], grid[1]), x)
        weight = x.new_ones(1, 1, *grid, 1)
        if mask_bn is not None:
            x = x.masked_fill(~mask_bn[:, None, :, None], 0)
            weight = mask_bn.to(x.dtype).view(b, 1, *grid, 1)
        count = _cell_sums(weight, rows, columns)
        mean = _cell_sums(x.reshape(b, h, *grid, d), rows, columns) / count.clamp_min(1.0)
    return mean.flatten(2, 3), None if mask_bn is None else count.flatten(1) > 0


def _membership(n: int, cells: int, like: torch.Tensor) -> torch.Tensor:
    """Return (cells, n) with 1 where a row (column) of the grid belongs to a cell, 0 elsewhere."""
    cell_of_n = torch.arange(n, device=like.device) * cells // n
    return (torch.arange(cells, device=like.device).unsqueeze(1) == cell_of_n).to(like.dtype)


def _cell_sums(x_bhrcd: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Sum over the cells, by two products: deterministic on every device, which scattered additions are not."""
    b, h, _, width, d = x_bhrcd.shape
    by_rows = (rows @ x_bhrcd.flatten(3)).view(b, h, rows.shape[0], width, d)
    return columns @ by_rows


def pool_sequence(
    x_bhnd: torch.Tensor, m: int, mask_bn: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Average the tokens of m consecutive segments; the valid tokens are shared out evenly, in their order.

    A padded sequence gets the segments that it would get without its padding.

    Args:
        x_bhnd: tokens in order; any float dtype.
        m: segments; at most n are made.
        mask_bn: bool, True for valid tokens, which may stand anywhere; None means all.

    Returns:
        (b, h, m, d) means, in at least fp32, and (b, m) which segments have tokens (None for all).
    """
    n = x_bhnd.shape[-2]
    m = min(m, n)
    valid_bn = x_bhnd.new_ones(1, n, dtype=torch.bool) if mask_bn is None else mask_bn
    rank_bn = valid_bn.long().cumsum(-1) - 1
    segment_bn = rank_bn * m // valid_bn.sum(-1, keepdim=True).clamp_min(1)
    with no_autocast(x_bhnd.device):
        x = at_least_fp32(x_bhnd)
        if mask_bn is not None:
            x = x.masked_fill(~mask_bn[:, None, :, None], 0)
        belongs_bmn = (torch.arange(m, device=x.device).unsqueeze(1) == segment_bn.unsqueeze(1)) & valid_bn.unsqueeze(1)
        count_bm = belongs_bmn.sum(-1)
        mean = (belongs_bmn.to(x.dtype).unsqueeze(1) @ x) / count_bm.clamp_min(1)[:, None, :, None]
    return mean, None if mask_bn is None else count_bm > 0


# -------------------------------------------------------------------------------------------------------- checks


def _check(
    q: torch.Tensor,
    v: torch.Tensor,
    landmarks: torch.Tensor,
    mask: torch.Tensor | None,
    landmark_mask: torch.Tensor | None,
    iterations: int,
    ridge: float,
) -> None:
    b, h, n, d = q.shape
    if v.shape[:-1] != (b, h, n):
        raise ConfigError(
            f"v_bhne has shape {tuple(v.shape)}: with q_bhnd {tuple(q.shape)} it must be ({b}, {h}, {n}, e)"
        )
    if landmarks.ndim != 4 or (*landmarks.shape[:2], landmarks.shape[3]) != (b, h, d) or landmarks.shape[2] < 1:
        raise ConfigError(
            f"landmarks_bhmd has shape {tuple(landmarks.shape)}: with q_bhnd {tuple(q.shape)} it must be "
            f"({b}, {h}, m, {d}) with m at least 1"
        )
    for name, given, shape in (
        ("mask_bn", mask, (b, n)),
        ("landmark_mask_bm", landmark_mask, (b, landmarks.shape[2])),
    ):
        if given is not None and (given.dtype != torch.bool or given.shape != shape):
            raise ConfigError(f"{name} is {given.dtype} {tuple(given.shape)}: it must be torch.bool {shape}")
    if iterations < 1:
        raise ConfigError(f"iterations = {iterations} must be at least 1")
    if ridge < 0:
        raise ConfigError(f"ridge = {ridge} must not be negative")
