"""Kernel maps and position filters: pure functions from features to similarities.

All similarities here stay within [-1, 1] because every vector is first brought to unit length; the transport
plan relies on that bound.

Letters: h = heads, n = tokens, m = references, k = anchors, d = channels of one head, a = axes of a
place. A leading `...` stands for any batch dimensions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def unit(x: torch.Tensor) -> torch.Tensor:
    """Bring vectors to unit length; a zero vector stays zero.

    Args:
        x: (..., d).
    """
    # The square sum is taken in the tensor's own dtype: bf16 reductions accumulate in fp32 inside the kernel.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(1e-12))


def unit_backward(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x, given that of `unit(x)`; both (..., d)."""
    square = x.square().sum(-1, keepdim=True)
    inverse = square.clamp_min(1e-12).rsqrt()
    along = (grad * x).sum(-1, keepdim=True) * inverse.square()
    return (grad - x * torch.where(square < 1e-12, 0.0, along)) * inverse


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Return fp64 as it is and anything narrower as fp32."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products keep their dtype; nothing to do for meta tensors, without autocast."""
    if device.type == "meta":  # torch.amp.is_autocast_available would cut the graphs of PyTorch 2.11's compiler
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def gaussian(cosine: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian kernel of unit vectors from their dot product.

    exp((t - 1) / sigma^2) = exp(-|x - y|^2 / (2 sigma^2)) for |x| = |y| = 1 (Mialon et al., ICLR 2021).

    Args:
        cosine: dot products t, any shape.
        sigma: width of the kernel, in units of the feature length.

    Returns:
        Same shape, values in (0, 1].
    """
    return torch.exp((cosine - 1.0) * (1.0 / sigma**2))


class _InverseSquareRoot(torch.autograd.Function):
    """V diag(1 / (sqrt(lambda) + ridge)) V^T of a symmetric matrix, with a gradient free of eigenvector gaps.

    Autograd through `eigh` divides by differences of eigenvalues, which is infinite for equal ones (anchors
    start nearly orthogonal, so equal eigenvalues are the rule). The derivative of a matrix function needs only
    the divided differences of the scalar function, here -1 / (e_i e_j (s_i + s_j)) with s = sqrt(lambda) and
    e = s + ridge.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        # The floor keeps s_i + s_j above zero for a rank-deficient matrix (two equal anchors).
        root = values.clamp_min(torch.finfo(matrix.dtype).eps).sqrt()
        return (vectors / (root + ridge).unsqueeze(-2)) @ vectors.mT, root, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, root, vectors = output
        ctx.mark_non_differentiable(root, vectors)
        ctx.save_for_backward(root, vectors)
        ctx.ridge = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        root, vectors = ctx.saved_tensors
        e = root + ctx.ridge
        differences = -1.0 / (e.unsqueeze(-1) * e.unsqueeze(-2) * (root.unsqueeze(-1) + root.unsqueeze(-2)))
        inner = vectors.mT @ (0.5 * (grad + grad.mT)) @ vectors
        return vectors @ (differences * inner) @ vectors.mT, None


def inverse_square_root(matrix: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
    """Inverse square root of symmetric positive semidefinite matrices, differentiable once.

    Args:
        matrix: (..., k, k), fp32 or fp64.
        ridge: added to the root of every eigenvalue before the reciprocal; bounds the result by 1 / ridge
            (1e-2 in the code of Mialon et al.).

    Returns:
        (..., k, k), symmetric.
    """
    inverse: torch.Tensor = _InverseSquareRoot.apply(matrix, ridge)[0]
    return inverse


def nystrom(x_hnd: torch.Tensor, anchors_hkd: torch.Tensor, sigma: float, ridge: float = 1e-2) -> torch.Tensor:
    """Nyström features of the Gaussian kernel: k(z, z)^(-1/2) k(z, x), of length at most 1.

    Their dot products approximate the Gaussian kernel between the x, exactly so on the anchors (ridge = 0).

    Args:
        x_hnd: (h, n, d), unit vectors.
        anchors_hkd: (h, k, d), any length; brought to unit length here.
        sigma: width of the Gaussian.
        ridge: see `inverse_square_root`.

    Returns:
        (h, n, k) in the dtype of x. The work is done in at least fp32: the root has entries up to 1 / ridge of
        both signs, whose products bf16 would drown in rounding.
    """
    with no_autocast(x_hnd.device):
        x, anchors = at_least_fp32(x_hnd), unit(at_least_fp32(anchors_hkd))
        root_hkk = inverse_square_root(gaussian(anchors @ anchors.mT, sigma), ridge)
        return (gaussian(x @ anchors.mT, sigma) @ root_hkk).to(x_hnd.dtype)


def line_places(
    count: int, dtype: torch.dtype, device: torch.device | None = None, *, offset: float = 0.0
) -> torch.Tensor:
    """Places (i + offset) / count of tokens or references on a line, i counted from 0; (count, 1).

    The code of Mialon et al. counts from 0 on a line, and from 1 on a grid (docs/operators.md).

    Args:
        count: cells of equal size on the line.
        dtype: of the places.
        device: where they are.
        offset: where in its cell a place lies: 0 at the beginning, 0.5 at the centre.

    Divided in fp64, as in fp32 a GPU multiplies by 1 / count instead, whose last bit may differ.
    """
    cells = torch.arange(count, device=device, dtype=torch.float64)
    return ((cells + offset) / count).to(dtype).unsqueeze(1)


def grid_places(
    grid: tuple[int, int], dtype: torch.dtype, device: torch.device | None = None, *, offset: float = 0.0
) -> torch.Tensor:
    """Places on a grid of any rows and columns, row-major, on each axis as `line_places`; (rows * columns, 2)."""
    rows, columns = (line_places(side, dtype, device, offset=offset).squeeze(1) for side in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2)


def log_filter(positions_bna: torch.Tensor, places_ma: torch.Tensor, tau: float) -> torch.Tensor:
    """Logarithm of the position filter, -|p_i - q_j|^2 / tau^2: over two axes, the sum of those over each.

    Args:
        positions_bna: places of the tokens, (..., n, a) within [0, 1).
        places_ma: places of the references, (m, a).
        tau: width, as a share of an axis.

    Returns:
        (..., n, m).
    """
    apart = (positions_bna.unsqueeze(-2) - places_ma) / tau
    return -apart.square().sum(-1)
