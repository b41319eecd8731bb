"""The split form of SeT attention in PyTorch, on any device: holds the kernel matrices of all heads at once.

`forward` and `backward` are collective, as those of split_cpp.py; both send the same numbers in the same order, so
that one rank may run this and another that. Letters as in split.py.
"""

from __future__ import annotations

import math

import torch

from setformer_dist.ops.kernels import log_filter, unit, unit_backward
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set.in_torch import Chunk, Scatter, into_inputs, kernel_of, similarity_gradient
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem
from setformer_dist.ops.set.split_common import Kept, Whole, needs_last, sum_all
from setformer_dist.ops.sinkhorn import implicit_system, product


def forward(
    inputs: Inputs, whole: Whole, problem: SetProblem, rows: Rows, dtype: torch.dtype
) -> tuple[torch.Tensor, Kept]:
    """Return y (b, h, n / p, d) of this part's tokens in the dtype of x, and what `backward` needs.

    Args:
        inputs: of this part; positions and mask too.
        whole: what is known of the whole image.
        problem: the numbers.
        rows: the group.
        dtype: in which to work (`sinkhorn.working_dtype`).
    """
    x = inputs.x_bhnd
    y, kept = _forward(_Part(inputs, whole, problem, dtype), problem, rows)
    return y.view(x.shape).to(x.dtype), kept


def backward(
    grad_y: torch.Tensor, inputs: Inputs, whole: Whole, kept: Kept, problem: SetProblem, rows: Rows, dtype: torch.dtype
) -> Gradients:
    """Return the gradients of this part's x and features, and this part's share of those of the reference sets.

    Args:
        grad_y: (b, h, n / p, d).
        inputs: as `forward` got them, as are the arguments below.
        whole: likewise.
        kept: what it returned.
        problem: likewise.
        rows: likewise.
        dtype: likewise.
    """
    x, features = inputs.x_bhnd, inputs.features_bhnk
    b, h, n, _ = x.shape
    part = _Part(inputs, whole, problem, dtype)
    e = grad_y.reshape(b * h, n, -1).to(dtype)
    dx, dfeatures, shares = _backward(part, e, kept, problem, rows)
    sets = [
        unit_backward(r.to(dtype), share.view(b, h, part.m, -1).sum(0)).to(r.dtype)
        for r, share in zip((inputs.gather_hmk, inputs.scatter_hmk), shares, strict=False)
        if r is not None
    ]
    found = None if features is None else dfeatures.view(features.shape).to(features.dtype)
    return Gradients(dx.view(x.shape).to(x.dtype), found, sets[0], sets[1] if len(sets) > 1 else None)


# ------------------------------------------------------------------------------------------------------------- a part


class _PartFilters:
    """Position filters of a part's tokens, scaled as those of the whole image are (`in_torch`)."""

    def __init__(self, inputs: Inputs, whole: Whole, problem: SetProblem, dtype: torch.dtype) -> None:
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None
        if inputs.positions_bna is None:
            return
        assert inputs.places_ma is not None
        logs = log_filter(inputs.positions_bna.to(dtype), inputs.places_ma.to(dtype), problem.tau)
        if not problem.renormalise:
            same = logs.exp()
            self._made = same, same
            return
        assert whole.nearest_b1m is not None
        valid = logs
        if inputs.mask_bn is not None:
            valid = logs.masked_fill(~inputs.mask_bn.unsqueeze(-1), -math.inf)
        self._made = torch.exp(valid - whole.nearest_b1m), torch.exp(logs - logs.amax(-1, keepdim=True))

    def of(self, images: slice | list[int], heads: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the (gather, scatter) filters of all images."""
        if self._made is None:
            return None
        gather, scatter = (f if f.shape[0] == 1 else f.repeat_interleave(heads, 0) for f in self._made)
        return gather, scatter


class _Part(Chunk):
    """This rank's tokens of all images and heads, with the row sums of the whole."""

    def __init__(self, inputs: Inputs, whole: Whole, problem: SetProblem, dtype: torch.dtype) -> None:
        self._whole = whole
        gather, scatter = (None if r is None else unit(r.to(dtype)) for r in (inputs.gather_hmk, inputs.scatter_hmk))
        assert gather is not None
        b, h = inputs.x_bhnd.shape[:2]
        united = inputs._replace(gather_hmk=gather, scatter_hmk=scatter)
        super().__init__(united, slice(0, b), slice(0, h), dtype, _PartFilters(inputs, whole, problem, dtype))
        pairs = [kernel_of(self, r, problem) for r in self.references]
        self.kernels, self.similarities = [k for k, _ in pairs], [s for _, s in pairs]

    def _row_sums(self, mask_bn: torch.Tensor | None, images: slice | list[int]) -> torch.Tensor | float:
        if mask_bn is None:
            return 1.0 / self._whole.tokens
        assert self._whole.mask_bn is not None
        share = mask_bn.to(self.x.dtype) / self._whole.mask_bn.sum(-1, keepdim=True)
        return share.unsqueeze(1).repeat_interleave(self.h, 0)

    def gathering(self) -> torch.Tensor:
        """Return K F of the set that gathers."""
        return self.kernels[0] if self.filters is None else self.kernels[0] * self.filters[0]


# ----------------------------------------------------------------------------------------------- forward, backward


def _forward(part: _Part, problem: SetProblem, rows: Rows) -> tuple[torch.Tensor, Kept]:
    """Return y (z, n, d) of this part's tokens, and what is kept."""
    sets, a, m = len(part.kernels), part.row_sums, part.m
    every = [[k.new_ones(k.shape[0], 1, m)] for k in part.kernels]
    for _ in range(problem.iterations - 1):
        us = [a / product(vs[-1], k.mT) for vs, k in zip(every, part.kernels, strict=True)]
        totals = sum_all(rows, [product(u, k) for u, k in zip(us, part.kernels, strict=True)])
        for vs, total in zip(every, totals, strict=True):
            vs.append((1.0 / m) / total)
    us = [a / product(vs[-1], k.mT) for vs, k in zip(every, part.kernels, strict=True)]
    weights = part.gathering()
    first = 0 if needs_last(problem, sets) else 1
    mine = [product(weights.mT, part.x * us[0].mT)]
    mine += [product(us[0], weights)] if problem.renormalise else []
    mine += [product(u, k) for u, k in zip(us[first:], part.kernels[first:], strict=True)]
    totals = sum_all(rows, mine)
    for vs, total in zip(every[first:], totals[-(sets - first) :], strict=True):
        vs.append((1.0 / m) / total)
    if first:
        every[0].append(torch.ones_like(every[0][0]))  # nothing looks at it
    rounds = torch.stack([torch.cat(vs, 1) for vs in every])
    if problem.renormalise:
        inverse_sum = totals[1].clamp_min(torch.finfo(weights.dtype).tiny).reciprocal_().mT
    else:
        inverse_sum = (rounds[0][:, -1:] * m).mT
    kept = Kept(rounds, totals[0] * inverse_sum, inverse_sum)
    return Scatter(part, part.kernels[-1], rounds[-1], problem).tokens(kept.pooled), kept


def _backward(
    part: _Part, grad_y: torch.Tensor, kept: Kept, problem: SetProblem, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return (dx, dfeatures, this part's share of each reference set's gradient), flattened over z."""
    rounds, pooled = kept.rounds, kept.pooled
    scatter = Scatter(part, part.kernels[-1], rounds[-1], problem)
    e = grad_y * scatter.inverse_sum
    direct_back = product(e, (pooled * scatter.v.mT).mT)
    if problem.renormalise:
        y = product(scatter.weights, pooled * scatter.v.mT).mul_(scatter.inverse_sum)
        direct_back -= (e * y).sum(-1, keepdim=True) * scatter.v
    direct_back *= scatter.weights
    systems = [_System(part, index, rounds[index]) for index in range(len(rounds))] if problem.implicit else []
    mine = [product(scatter.weights.mT, e), direct_back.sum(-2, keepdim=True), *(t for s in systems for t in s.mine())]
    dpooled, dg_back, *schurs = sum_all(rows, mine)
    dpooled = dpooled * scatter.v.mT

    u = part.row_sums / product(rounds[0][:, -2:-1], part.kernels[0].mT)
    t = dpooled * kept.inverse_sum
    weights = part.gathering()
    dx = product(weights, t).mul_(u.mT)
    direct = product(part.x * u.mT, t.mT)
    if problem.renormalise:
        direct -= u.mT * (t * pooled).sum(-1).unsqueeze(1)
    direct *= weights

    # Which potentials have a gradient: as in in_torch.py. The gathering columns' sums follow from what all ranks have.
    whole = not problem.renormalise
    df, df_back = direct.sum(-1).unsqueeze(1), direct_back.sum(-1).unsqueeze(1) if whole else None
    dg = (pooled * dpooled).sum(-1).unsqueeze(1) if whole else None
    if len(rounds) == 1:
        directs = [direct.add_(direct_back)]
        dfs: list[torch.Tensor | None] = [df if df_back is None else df + df_back]
        dgs = [dg_back if dg is None else dg + dg_back]
    else:
        directs, dfs = [direct, direct_back], [df, df_back]
        dgs = [torch.zeros_like(dg_back) if dg is None else dg, dg_back]
    if problem.implicit:
        adjoints = _implicit(systems, schurs, dfs, dgs, rows)
    else:
        adjoints = _unrolled(part, rounds, dfs, dgs, rows)
    gradients = (
        similarity_gradient(left, right, kernel, s, d_exponent, problem)
        for (left, right), kernel, s, d_exponent in zip(adjoints, part.kernels, part.similarities, directs, strict=True)
    )
    return into_inputs(part, dx, gradients)


def _unrolled(
    part: _Part,
    rounds: torch.Tensor,
    dfs: list[torch.Tensor | None],
    dgs: list[torch.Tensor],
    rows: Rows,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As `sinkhorn.unrolled_adjoint` of every set: one message for each round but the first."""
    inverses = [product(vs[:, :-1], k.mT).reciprocal_() for vs, k in zip(rounds, part.kernels, strict=True)]
    found: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in rounds]
    for step in range(rounds[0].shape[1] - 1, 0, -1):
        at = slice(step - 1, step)
        columns = []
        for index, (kernel, vs, inverse_kv) in enumerate(zip(part.kernels, rounds, inverses, strict=True)):
            y = vs[:, step : step + 1] * dgs[index] * part.m
            u = inverse_kv[:, at] * part.row_sums
            through = u * product(y, kernel.mT)
            df = dfs[index]
            x = (-through if df is None else df - through) * inverse_kv[:, at]
            found[index][0].extend((u, x))
            found[index][1].extend((y, vs[:, at]))
            if step > 1:
                columns.append(product(x, kernel))
        if step > 1:
            totals = sum_all(rows, columns)
            dgs = [-vs[:, at] * total for vs, total in zip(rounds, totals, strict=True)]
        dfs = [None] * len(dfs)
    return [(torch.cat(left, 1), torch.cat(right, 1)) for left, right in found]


class _System:
    """This part's share of the linear system of one set's implicit gradient (`sinkhorn.implicit_adjoint`), in fp64."""

    def __init__(self, part: _Part, index: int, rounds: torch.Tensor) -> None:
        kernel = part.kernels[index]
        self.u = part.row_sums / product(rounds[:, -2:-1], kernel.mT)
        self.v, self.dtype = rounds[:, -1:], kernel.dtype
        self.plan = (kernel * self.u.mT * self.v).double()
        sums = self.plan.sum(-1).unsqueeze(1)
        self.inverse_a = torch.where(sums > 0, 1.0 / sums, 0.0)
        self.weighted = self.plan * self.inverse_a.mT

    def mine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the column sums (z, m) and P^T A^-1 P (z, m, m) of these tokens."""
        return self.plan.sum(-2), product(self.plan.mT, self.weighted)

    def solved(
        self, columns: torch.Tensor, gram: torch.Tensor, side: torch.Tensor, df: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return left and right of the adjoint from the sums over all parts."""
        beta = implicit_system(columns, gram, side)
        alpha = -product(beta, self.plan.mT) if df is None else df - product(beta, self.plan.mT)
        alpha, beta = (alpha * self.inverse_a).to(self.dtype), beta.to(self.dtype)
        return torch.cat([alpha * self.u, self.u], 1), torch.cat([self.v, beta * self.v], 1)


def _implicit(
    systems: list[_System],
    schurs: list[torch.Tensor],
    dfs: list[torch.Tensor | None],
    dgs: list[torch.Tensor],
    rows: Rows,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As `sinkhorn.implicit_adjoint` of every set; one message, besides what went with the first."""
    mine = [product(df.double(), s.weighted) for s, df in zip(systems, dfs, strict=True) if df is not None]
    totals = iter(sum_all(rows, mine))
    sides = [dg if df is None else dg - next(totals) for df, dg in zip(dfs, dgs, strict=True)]
    pairs = zip(schurs[::2], schurs[1::2], strict=True)
    return [
        system.solved(columns, gram, side.double(), df)
        for system, (columns, gram), side, df in zip(systems, pairs, sides, dfs, strict=True)
    ]
