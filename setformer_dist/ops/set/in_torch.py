"""SeT attention in plain PyTorch without an autograd graph: few heads at a time, so that n x m matrices stay in cache.

Sinkhorn runs on scalings of K = exp(s / epsilon) (ops/sinkhorn.py): u = a / (K v), v = (1/m) / (K^T u).

    gather   pooled_j = sum_i Gw_ij u_i x_i / N_j        Gw = K F (F: position filter)
    scatter       y_i = sum_j Ww_ij v_j pooled_j / D_i   Ww = K F, of the second set's K where there is one
    with `renormalise` N and D are the sums of the weights before them, otherwise 1 / (m v_j) and a_i / u_i.

The backward is derived by hand. It keeps only the v of each round, (rounds + 1) * m numbers per head, and computes
everything else again; the rows of all rounds are one product, K [v_0 ... v_(L-1)]. Either it is the exact derivative
of the rounds that were run, or the implicit one at the fixed point. Peak memory beyond inputs and outputs: a few
n x m matrices of one chunk.

Letters: z = chunk of heads and images, n = tokens, m = references, k = features, d = values, L = rounds, s = sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch.nn import functional as F

from setformer_dist.ops.kernels import log_filter, no_autocast, unit, unit_backward
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem
from setformer_dist.ops.sinkhorn import implicit_adjoint, last_rows, product, scaling_rounds, unrolled_adjoint

# Numbers in one n x m matrix of a chunk: 1 MiB of fp32, so that a handful stay within the caches of two cores.
CHUNK = {"cpu": 1 << 18}
CHUNK_ELSEWHERE = 1 << 26


def _chunks(inputs: Inputs) -> Iterator[tuple[slice | list[int], slice]]:
    """Yield (images, heads) of each chunk: many images where they are small, a part of the heads otherwise.

    A single head that could have had company comes as a pair with itself: the library divides a single product among
    threads, and adds up in another order than in a batch.
    """
    b, h, n, _ = inputs.x_bhnd.shape
    one = n * inputs.gather_hmk.shape[1]
    heads = max(1, CHUNK.get(inputs.x_bhnd.device.type, CHUNK_ELSEWHERE) // one)
    if heads >= h:
        images = heads // h
        for i in range(0, b, images):
            alone = heads > 1 and h == 1 and min(images, b - i) == 1
            yield [i, i] if alone else slice(i, i + images), slice(0, h)
    else:
        for i in range(b):
            for j in range(0, h, heads):
                yield slice(i, i + 1), slice(j, j + heads)


class Filters(Protocol):
    """Position filters of a call."""

    def of(self, images: slice | list[int], heads: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the (gather, scatter) filters of a chunk, each (z or 1, n, m), or None."""
        ...


class Chunk:
    """Inputs of one chunk, flattened over images and heads, in the working dtype."""

    def __init__(
        self, inputs: Inputs, images: slice | list[int], heads: slice, dtype: torch.dtype, filters: Filters
    ) -> None:
        x = inputs.x_bhnd[images, heads]
        self.b, self.h, self.n, self.d = x.shape
        self.x = x.reshape(-1, self.n, self.d).to(dtype)
        self.inverse_length: torch.Tensor | None = None
        if inputs.features_bhnk is None:
            self.inverse_length = self.x.square().sum(-1, keepdim=True).clamp_min_(1e-12).rsqrt_()
            self.features = self.x * self.inverse_length
        else:
            self.features = inputs.features_bhnk[images, heads].flatten(0, 1).to(dtype)
        self.references = [r[heads] for r in (inputs.gather_hmk, inputs.scatter_hmk) if r is not None]
        self.m = self.references[0].shape[1]
        self.row_sums = self._row_sums(inputs.mask_bn, images)
        self.filters = filters.of(images, self.h)

    def _row_sums(self, mask_bn: torch.Tensor | None, images: slice | list[int]) -> torch.Tensor | float:
        """a: 1 / n for valid tokens, 0 for the others; (z, 1, n), or one number without a mask."""
        if mask_bn is None:
            return 1.0 / self.n
        mask = _of(mask_bn, images).to(self.x.dtype)
        share = (mask / mask.sum(-1, keepdim=True)).unsqueeze(1)
        return share if mask.shape[0] == 1 else share.repeat_interleave(self.h, 0)

    def each(self, references_hmk: torch.Tensor) -> torch.Tensor:
        """Repeat one reference set for each image; (z, m, k)."""
        if self.b == 1:
            return references_hmk
        return references_hmk.repeat(self.b, 1, 1)


class _Filters:
    """exp of the position filter, the largest entry of each column (gather) or row (scatter) being 1.

    Any factor per column (row) cancels in the renormalisation; so a narrow filter on a coarse grid does not underflow
    to columns (rows) of zeros. Without renormalisation both are the filter itself.
    """

    def __init__(self, inputs: Inputs, problem: SetProblem, dtype: torch.dtype) -> None:
        self._inputs, self._problem, self._dtype = inputs, problem, dtype
        alike = [t is None or t.shape[0] == 1 for t in (inputs.positions_bna, inputs.mask_bn)]
        shared = inputs.positions_bna is not None and all(alike)
        self._shared = self._make(slice(0, 1)) if shared else None

    def of(self, images: slice | list[int], heads: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the (gather, scatter) filters of a chunk, each (z or 1, n, m), or None."""
        if self._inputs.positions_bna is None:
            return None
        if self._shared is not None:
            return self._shared
        gather, scatter = self._make(images)
        return gather.repeat_interleave(heads, 0), scatter.repeat_interleave(heads, 0)

    def _make(self, images: slice | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        positions, places = self._inputs.positions_bna, self._inputs.places_ma
        assert positions is not None
        assert places is not None
        mask = None if self._inputs.mask_bn is None else _of(self._inputs.mask_bn, images)
        chosen = _of(positions, images)
        if mask is not None:
            chosen = chosen.expand(max(len(chosen), len(mask)), -1, -1)
        logs = log_filter(chosen.to(self._dtype), places.to(self._dtype), self._problem.tau)
        if not self._problem.renormalise:
            same = logs.exp_()
            return same, same
        valid = logs
        if mask is not None:
            valid = logs.masked_fill(~mask.unsqueeze(-1), -math.inf)
        return torch.exp(valid - valid.amax(-2, keepdim=True)), torch.exp(logs - logs.amax(-1, keepdim=True))


def _of(tensor: torch.Tensor, images: slice | list[int]) -> torch.Tensor:
    """Return the rows of some images, of a tensor that has one for each or one for all."""
    return tensor if tensor.shape[0] == 1 else tensor[images]


def _prepared(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Bring the references to unit length in the working dtype, and fill up the tokens."""
    gather, scatter = (None if r is None else unit(r.to(dtype)) for r in (inputs.gather_hmk, inputs.scatter_hmk))
    assert gather is not None
    return _filled_up(inputs._replace(gather_hmk=gather, scatter_hmk=scatter))


def _filled_up(inputs: Inputs) -> Inputs:
    """Fill up with masked tokens to a multiple of four, so that all n x m matrices begin alike in memory.

    `sinkhorn.product` says what hangs on it; it would have to copy them.
    """
    n = inputs.x_bhnd.shape[2]
    more = -n % 4
    if not more or inputs.x_bhnd.device.type != "cpu":
        return inputs

    def rows(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else F.pad(t, (0, 0, 0, more))

    mask = inputs.mask_bn
    if mask is None:
        mask = torch.ones(1, n, dtype=torch.bool)
    x = rows(inputs.x_bhnd)
    assert x is not None
    return inputs._replace(
        x_bhnd=x,
        features_bhnk=rows(inputs.features_bhnk),
        positions_bna=rows(inputs.positions_bna),
        mask_bn=F.pad(mask, (0, more)),
    )


def kernel_of(chunk: Chunk, references_hmk: torch.Tensor, problem: SetProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K = exp(s / epsilon) and, for the Gaussian kernel, s itself (otherwise K again); (z, n, m)."""
    s = product(chunk.features, chunk.each(references_hmk).mT)
    if problem.sigma > 0:
        s = s.sub_(1.0).mul_(1.0 / problem.sigma**2).exp_()
        return torch.exp(s * (1.0 / problem.epsilon)), s
    kernel = s.mul_(1.0 / problem.epsilon).exp_()
    return kernel, kernel


def forward(inputs: Inputs, problem: SetProblem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (b, h, n, d) in the dtype of x, and the v of every round (s, b, h, L + 1, m) for `backward`."""
    b, h, n, _ = inputs.x_bhnd.shape
    sets = 1 if inputs.scatter_hmk is None else 2
    y = torch.empty_like(inputs.x_bhnd)
    rounds = inputs.x_bhnd.new_empty((sets, b, h, problem.iterations + 1, inputs.gather_hmk.shape[1]), dtype=dtype)
    with torch.no_grad(), no_autocast(y.device):
        inputs = _prepared(inputs, dtype)
        filters = _Filters(inputs, problem, dtype)
        for images, heads in _chunks(inputs):
            chunk = Chunk(inputs, images, heads, dtype, filters)
            y_z, rounds_z = _chunk_forward(chunk, problem)
            y[images, heads] = y_z.view(chunk.b, chunk.h, chunk.n, chunk.d)[:, :, :n].to(y.dtype)
            for index, every in enumerate(rounds_z):
                rounds[index, images, heads] = every.view(chunk.b, chunk.h, -1, chunk.m)
    return y, rounds


def _chunk_forward(chunk: Chunk, problem: SetProblem) -> tuple[torch.Tensor, list[torch.Tensor]]:
    kernel, _ = kernel_of(chunk, chunk.references[0], problem)
    rounds = [scaling_rounds(kernel, chunk.row_sums, problem.iterations, problem.tolerance)]
    gather = _Gather(chunk, kernel, rounds[0], problem)
    pooled = gather.pooled()
    if len(chunk.references) == 2:
        kernel, _ = kernel_of(chunk, chunk.references[1], problem)
        rounds.append(scaling_rounds(kernel, chunk.row_sums, problem.iterations, problem.tolerance))
    return Scatter(chunk, kernel, rounds[-1], problem).tokens(pooled), rounds


class _Gather:
    """Tokens into references."""

    def __init__(self, chunk: Chunk, kernel: torch.Tensor, rounds: torch.Tensor, problem: SetProblem) -> None:
        self.chunk = chunk
        self.u = last_rows(kernel, rounds, chunk.row_sums)
        self.weights = kernel if chunk.filters is None else kernel * chunk.filters[0]
        tiny = torch.finfo(kernel.dtype).tiny
        if problem.renormalise:
            self.inverse_sum = product(self.u, self.weights).clamp_min_(tiny).reciprocal_().mT
        else:
            self.inverse_sum = (rounds[:, -1:] * chunk.m).mT

    def pooled(self) -> torch.Tensor:
        """(z, m, d)."""
        return product(self.weights.mT, self.chunk.x * self.u.mT).mul_(self.inverse_sum)


class Scatter:
    """References back to tokens."""

    def __init__(self, chunk: Chunk, kernel: torch.Tensor, rounds: torch.Tensor, problem: SetProblem) -> None:
        self.v = rounds[:, -1:]
        self.weights = kernel if chunk.filters is None else kernel * chunk.filters[1]
        tiny = torch.finfo(kernel.dtype).tiny
        if problem.renormalise:
            self.inverse_sum = product(self.v, self.weights.mT).clamp_min_(tiny).reciprocal_().mT
        else:
            self.inverse_sum = last_rows(kernel, rounds, 1.0).mT

    def tokens(self, pooled_zmd: torch.Tensor) -> torch.Tensor:
        """(z, n, d)."""
        return product(self.weights, pooled_zmd * self.v.mT).mul_(self.inverse_sum)


# ------------------------------------------------------------------------------------------------------ backward


def backward(
    grad_y: torch.Tensor, inputs: Inputs, rounds: torch.Tensor, problem: SetProblem, dtype: torch.dtype
) -> Gradients:
    """Return the gradients of everything that `forward` got.

    Args:
        grad_y: (b, h, n, d).
        inputs: as `forward` got them.
        rounds: what it returned.
        problem: likewise.
        dtype: likewise.
    """

    def like(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format)

    dx = torch.empty_like(inputs.x_bhnd)
    dfeatures = None if inputs.features_bhnk is None else torch.empty_like(inputs.features_bhnk)
    sums = [like(inputs.gather_hmk), like(inputs.scatter_hmk)]
    n = inputs.x_bhnd.shape[2]
    with torch.no_grad(), no_autocast(dx.device):
        given = inputs.gather_hmk, inputs.scatter_hmk
        inputs = _prepared(inputs, dtype)
        grad_y = F.pad(grad_y, (0, 0, 0, inputs.x_bhnd.shape[2] - n))
        filters = _Filters(inputs, problem, dtype)
        for images, heads in _chunks(inputs):
            chunk = Chunk(inputs, images, heads, dtype, filters)
            e = grad_y[images, heads].reshape(-1, chunk.n, chunk.d).to(dtype)
            rounds_z = [r[images, heads].flatten(0, 1) for r in rounds]
            dx_z, df_z, references = _chunk_backward(chunk, e, rounds_z, problem)
            if dfeatures is not None:
                dfeatures[images, heads] = df_z.view(chunk.b, chunk.h, chunk.n, -1)[:, :, :n].to(dfeatures.dtype)
            dx[images, heads] = dx_z.view(chunk.b, chunk.h, chunk.n, chunk.d)[:, :, :n].to(dx.dtype)
            for total, one in zip(sums, references, strict=False):
                assert total is not None
                each = one.view(chunk.b, chunk.h, chunk.m, -1)
                total[heads] += each[0] if isinstance(images, list) else each.sum(0)
        gather, scatter = (
            None if r is None or of_unit is None else unit_backward(r.to(dtype), of_unit).to(r.dtype)
            for r, of_unit in zip(given, sums, strict=True)
        )
    assert gather is not None
    return Gradients(dx, dfeatures, gather, scatter)


def _chunk_backward(
    chunk: Chunk, grad_y: torch.Tensor, rounds: list[torch.Tensor], problem: SetProblem
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return (dx, dfeatures, one gradient for each reference set), all flattened over z."""
    kernel, s = kernel_of(chunk, chunk.references[0], problem)
    gather = _Gather(chunk, kernel, rounds[0], problem)
    pooled = gather.pooled()
    back_kernel, back_s = (kernel, s) if len(rounds) == 1 else kernel_of(chunk, chunk.references[1], problem)
    scatter = Scatter(chunk, back_kernel, rounds[-1], problem)

    e = grad_y * scatter.inverse_sum
    dpooled = product(scatter.weights.mT, e).mul_(scatter.v.mT)
    direct_back = product(e, (pooled * scatter.v.mT).mT)
    if problem.renormalise:
        # The sum that divides y_i takes e_i . y_i away from every weight of row i.
        y = product(scatter.weights, pooled * scatter.v.mT).mul_(scatter.inverse_sum)
        direct_back -= (e * y).sum(-1, keepdim=True) * scatter.v
    direct_back *= scatter.weights

    t = dpooled * gather.inverse_sum
    dx = product(gather.weights, t).mul_(gather.u.mT)
    direct = product(chunk.x * gather.u.mT, t.mT)
    if problem.renormalise:
        direct -= gather.u.mT * (t * pooled).sum(-1).unsqueeze(1)
    direct *= gather.weights

    # What u and v of each plan get: renormalised, gathering does not see its v and scattering not its u.
    whole = not problem.renormalise
    df, dg = direct.sum(-1).unsqueeze(1), direct.sum(-2, keepdim=True) if whole else None
    dg_back, df_back = direct_back.sum(-2, keepdim=True), direct_back.sum(-1).unsqueeze(1) if whole else None
    adjoint = implicit_adjoint if problem.implicit else unrolled_adjoint
    if len(rounds) == 1:
        dg_all = dg_back if dg is None else dg + dg_back
        df_all = df if df_back is None else df + df_back
        plans = [(kernel, s, direct.add_(direct_back), df_all, dg_all)]
    else:
        plans = [
            (kernel, s, direct, df, torch.zeros_like(dg_back) if dg is None else dg),
            (back_kernel, back_s, direct_back, torch.zeros_like(df) if df_back is None else df_back, dg_back),
        ]
    gradients = (
        _through_rounds(adjoint, k, similarity, d_exponent, d_f, d_g, every, chunk, problem)
        for (k, similarity, d_exponent, d_f, d_g), every in zip(plans, rounds, strict=True)
    )
    return into_inputs(chunk, dx, gradients)


def into_inputs(
    chunk: Chunk, dx: torch.Tensor, gradients: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Carry the gradients of the similarities on to what was compared.

    Args:
        chunk: whose.
        dx: gradient of the values, (z, n, d); changed in place where x itself was compared.
        gradients: of each set's similarities, (z, n, m), asked for one after the other.

    Returns:
        (dx, dfeatures, one gradient for each reference set), all flattened over z.
    """
    dfeatures: torch.Tensor | None = None
    dreferences = []
    for ds, r in zip(gradients, chunk.references, strict=True):
        part = product(ds, chunk.each(r))
        dfeatures = part if dfeatures is None else dfeatures.add_(part)
        dreferences.append(product(ds.mT, chunk.features))
    assert dfeatures is not None
    if chunk.inverse_length is not None:
        along = (dfeatures * chunk.features).sum(-1, keepdim=True)
        dx += (dfeatures - chunk.features * along) * chunk.inverse_length
    return dx, dfeatures, dreferences


_Adjoint = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float], tuple[torch.Tensor, torch.Tensor]
]


def _through_rounds(
    adjoint: _Adjoint,
    kernel: torch.Tensor,
    s: torch.Tensor,
    direct: torch.Tensor,
    df: torch.Tensor,
    dg: torch.Tensor,
    rounds: torch.Tensor,
    chunk: Chunk,
    problem: SetProblem,
) -> torch.Tensor:
    left, right = adjoint(kernel, rounds, df, dg, chunk.row_sums)
    return similarity_gradient(left, right, kernel, s, direct, problem)


def similarity_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    kernel: torch.Tensor,
    s: torch.Tensor,
    direct: torch.Tensor,
    problem: SetProblem,
) -> torch.Tensor:
    """Return the gradient of the similarity, (z, n, m): the direct one less what goes through u and v.

    Args:
        left: of `unrolled_adjoint`, as are the names below.
        right: likewise.
        kernel: K.
        s: as `kernel_of` returns it.
        direct: gradient of s / epsilon where u and v are held; changed in place.
        problem: the numbers.
    """
    d_exponent = direct.sub_(product(left.mT, right).mul_(kernel))
    if problem.sigma > 0:
        d_exponent *= s * (1.0 / problem.sigma**2)
    return d_exponent.mul_(1.0 / problem.epsilon)
