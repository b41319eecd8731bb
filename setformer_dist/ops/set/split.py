"""SeT attention of an image whose rows lie on several ranks: exact, by 2 L small sums, whatever the image's size.

Each rank holds K = exp(s / epsilon) of its own tokens; a = 1 / n of the whole image. The sets g (gather) and t
(scatter), all heads and all images travel together. F: position filter.

    round l < L    u = a / (K v);                        SUM  u_g K_g, u_t K_t                  2 m     -> v = 1/(m sum)
    round L        u_g, u_t;                             SUM  N = u_g (K F), P = (K F)^T (u_g x), u_t K_t    m (d + 2)
                   pooled = P / N;  y = (K_t F) (v_t pooled) / ((K_t F) v_t)                    nothing
    backward       e = dy / D;                           SUM  (K_t F)^T e, column sums of dlogits_t          m (d + 1)
                   dx, dlogits_g, df_g                                                          nothing
    round l > 1    x = (df - u (K y)) / (K v_(l-1));     SUM  x_g K_g, x_t K_t                  2 m     -> dg of l - 1

The gradient of a reference set stays a partial sum on each rank: the ordinary reduction of gradients adds it up.
Letters as in in_torch.py; z = heads x images, p = parts. Kernel matrices of all heads are held at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import log_filter, no_autocast, unit, unit_backward
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set.in_torch import Chunk, Scatter, into_inputs, kernel_of, similarity_gradient
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.sinkhorn import implicit_system, product, working_dtype

_TILE = 1 << 20  # numbers of a filter at once, where its largest entries are looked for


@dataclass(frozen=True)
class Traffic:
    """Numbers that a rank puts into the sums of one attention, for each head of an image, and the sums themselves."""

    forward: int
    backward: int
    forward_messages: int
    backward_messages: int


def traffic(problem: SetProblem, sets: int, m: int, d: int) -> Traffic:
    """Return what an attention exchanges; n is not in it.

    Args:
        problem: the numbers.
        sets: 1 or 2 reference sets.
        m: references of a set.
        d: values of a head.
    """
    rounds = problem.iterations
    last = m * d + m * _column_sums(problem, sets)
    forward = sets * m * (rounds - 1) + last
    first = m * d + m
    if not problem.implicit:
        return Traffic(forward, first + sets * m * (rounds - 1), rounds, rounds)
    seen = sets if not problem.renormalise else 1  # potentials of rows that have a gradient
    return Traffic(forward, first + sets * (m * m + m) + seen * m, rounds, 2)


def _column_sums(problem: SetProblem, sets: int) -> int:
    """Return how many rows of m numbers the last round's message has besides P."""
    return (sets if _needs_last(problem, sets) else sets - 1) + problem.renormalise


def _needs_last(problem: SetProblem, sets: int) -> bool:
    """Return whether the last v of every set is needed; a renormalised gathering set of two cancels its own."""
    return sets == 1 or not problem.renormalise or problem.implicit


def why_not(problem: SetProblem, dtype: torch.dtype) -> str | None:
    """Return why the split form cannot compute it, None where it can."""
    if problem.tolerance > 0:
        return f"tolerance = {problem.tolerance} stops rounds by the errors of all tokens: set attn.tolerance = 0"
    if working_dtype(dtype, problem.epsilon) is None:
        return f"epsilon = {problem.epsilon} is below 0.01, where only logarithms are safe: raise attn.epsilon"
    return None


# ------------------------------------------------------------------------------------------- a part and the whole


@dataclass(frozen=True)
class Whole:
    """What a part must know of the whole image.

    Attributes:
        tokens: of the image, masked ones included.
        mask_bn: True for its valid tokens, None where all are.
        nearest_b1m: largest logarithm of the position filter in each column, over all valid tokens; None without one.
    """

    tokens: int
    mask_bn: torch.Tensor | None
    nearest_b1m: torch.Tensor | None


def part_of(whole: Inputs, problem: SetProblem, rows: Rows) -> tuple[Inputs, Whole]:
    """Cut what is known of the whole image down to this rank's tokens.

    Args:
        whole: x and features of this part; positions and mask of the whole image.
        problem: the numbers.
        rows: the group.
    """
    n = whole.x_bhnd.shape[2] * rows.count
    own = rows.own(n)
    positions, places, mask = whole.positions_bna, whole.places_ma, whole.mask_bn
    nearest = None
    if positions is not None and problem.renormalise:
        assert places is not None
        dtype = working_dtype(whole.x_bhnd.dtype, problem.epsilon)
        assert dtype is not None
        find = _kept_nearest if mask is None else _nearest
        nearest = find(positions, places, problem.tau, dtype, mask)
    inputs = whole._replace(
        positions_bna=None if positions is None else positions[:, own], mask_bn=None if mask is None else mask[:, own]
    )
    return inputs, Whole(n, mask, nearest)


def _nearest(
    positions_bna: torch.Tensor,
    places_ma: torch.Tensor,
    tau: float,
    dtype: torch.dtype,
    mask_bn: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the largest entry of each column of the filter's logarithm, over valid tokens, (b or 1, 1, m)."""
    images = positions_bna.shape[0] if mask_bn is None else mask_bn.shape[0]
    tile = max(1, _TILE // (images * places_ma.shape[0]))
    found: torch.Tensor | None = None
    for at in range(0, positions_bna.shape[1], tile):
        chosen = positions_bna[:, at : at + tile].expand(images, -1, -1).to(dtype)
        logs = log_filter(chosen, places_ma.to(dtype), tau)
        if mask_bn is not None:
            logs = logs.masked_fill(~mask_bn[:, at : at + tile].unsqueeze(-1), -math.inf)
        largest = logs.amax(-2, keepdim=True)
        found = largest if found is None else torch.maximum(found, largest)
    assert found is not None
    return found


@functools.lru_cache(maxsize=64)
def _kept_nearest(
    positions_bna: torch.Tensor, places_ma: torch.Tensor, tau: float, dtype: torch.dtype, mask_bn: None
) -> torch.Tensor:
    """Return `_nearest`, found once: the places of a grid are kept tensors (attention.py), told apart as objects."""
    return _nearest(positions_bna, places_ma, tau, dtype)


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


def _sum_all(rows: Rows, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the sums over the parts of several tensors, in one message."""
    total = rows.sum(torch.cat([t.reshape(-1) for t in tensors]))
    parts = torch.split(total, [t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


# ----------------------------------------------------------------------------------------------- forward, backward


@dataclass(frozen=True)
class _Kept:
    """What the backward needs besides the inputs: v of all rounds (z, L + 1, m) per set, pooled, 1 / N (z, m, 1)."""

    rounds: list[torch.Tensor]
    pooled: torch.Tensor
    inverse_sum: torch.Tensor


def _forward(part: _Part, problem: SetProblem, rows: Rows) -> tuple[torch.Tensor, _Kept]:
    """Return y (z, n, d) of this part's tokens, and what is kept."""
    sets, a, m = len(part.kernels), part.row_sums, part.m
    every = [[k.new_ones(k.shape[0], 1, m)] for k in part.kernels]
    for _ in range(problem.iterations - 1):
        us = [a / product(vs[-1], k.mT) for vs, k in zip(every, part.kernels, strict=True)]
        totals = _sum_all(rows, [product(u, k) for u, k in zip(us, part.kernels, strict=True)])
        for vs, total in zip(every, totals, strict=True):
            vs.append((1.0 / m) / total)
    us = [a / product(vs[-1], k.mT) for vs, k in zip(every, part.kernels, strict=True)]
    weights = part.gathering()
    first = 0 if _needs_last(problem, sets) else 1
    mine = [product(weights.mT, part.x * us[0].mT)]
    mine += [product(us[0], weights)] if problem.renormalise else []
    mine += [product(u, k) for u, k in zip(us[first:], part.kernels[first:], strict=True)]
    totals = _sum_all(rows, mine)
    for vs, total in zip(every[first:], totals[-(sets - first) :], strict=True):
        vs.append((1.0 / m) / total)
    if first:
        every[0].append(torch.ones_like(every[0][0]))  # nothing looks at it
    rounds = [torch.cat(vs, 1) for vs in every]
    if problem.renormalise:
        inverse_sum = totals[1].clamp_min(torch.finfo(weights.dtype).tiny).reciprocal_().mT
    else:
        inverse_sum = (rounds[0][:, -1:] * m).mT
    kept = _Kept(rounds, totals[0] * inverse_sum, inverse_sum)
    return Scatter(part, part.kernels[-1], rounds[-1], problem).tokens(kept.pooled), kept


def _backward(
    part: _Part, grad_y: torch.Tensor, kept: _Kept, problem: SetProblem, rows: Rows
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
    dpooled, dg_back, *schurs = _sum_all(rows, mine)
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
    rounds: list[torch.Tensor],
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
            totals = _sum_all(rows, columns)
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
    totals = iter(_sum_all(rows, mine))
    sides = [dg if df is None else dg - next(totals) for df, dg in zip(dfs, dgs, strict=True)]
    pairs = zip(schurs[::2], schurs[1::2], strict=True)
    return [
        system.solved(columns, gram, side.double(), df)
        for system, (columns, gram), side, df in zip(systems, pairs, sides, dfs, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------ with autograd


class _SplitAttention(torch.autograd.Function):
    """y of this part's tokens; gradients of x and features are this part's, those of the sets its share."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        inputs, (whole, problem, rows) = Inputs(*arguments[:7]), arguments[7:]
        dtype = working_dtype(inputs.x_bhnd.dtype, problem.epsilon)
        assert dtype is not None
        with no_autocast(inputs.x_bhnd.device):
            y, kept = _forward(_Part(inputs, whole, problem, dtype), problem, rows)
        ctx.rest = whole, problem, rows, dtype
        ctx.save_for_backward(kept.pooled, kept.inverse_sum, *inputs, *kept.rounds)
        return y.view(inputs.x_bhnd.shape).to(inputs.x_bhnd.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pooled, inverse_sum, *saved = ctx.saved_tensors
        inputs, rounds = Inputs(*saved[:7]), saved[7:]
        whole, problem, rows, dtype = ctx.rest
        b, h, n, _ = inputs.x_bhnd.shape
        with no_autocast(grad_y.device):
            part = _Part(inputs, whole, problem, dtype)
            e = grad_y.reshape(b * h, n, -1).to(dtype)
            dx, dfeatures, shares = _backward(part, e, _Kept(rounds, pooled, inverse_sum), problem, rows)
            sets = [
                unit_backward(r.to(dtype), share.view(b, h, part.m, -1).sum(0)).to(r.dtype)
                for r, share in zip((inputs.gather_hmk, inputs.scatter_hmk), shares, strict=False)
                if r is not None
            ]
        features = None
        if inputs.features_bhnk is not None:
            features = dfeatures.view(inputs.features_bhnk.shape).to(inputs.features_bhnk.dtype)
        scatter = sets[1] if len(sets) > 1 else None
        return dx.view(inputs.x_bhnd.shape).to(inputs.x_bhnd.dtype), features, sets[0], scatter, *(None,) * 6


def split_attention(whole: Inputs, problem: SetProblem, rows: Rows) -> torch.Tensor:
    """Return y (b, h, n / p, d) of this part's tokens. Collective over the group, forward and backward.

    Args:
        whole: x and features of this part; positions and mask of the whole image.
        problem: the numbers.
        rows: the group.

    Raises:
        ConfigError: the split form cannot compute it.
    """
    reason = why_not(problem, whole.x_bhnd.dtype)
    if reason is not None:
        raise ConfigError(f"SeT attention over several ranks: {reason}")
    inputs, known = part_of(whole, problem, rows)
    y: torch.Tensor = _SplitAttention.apply(*inputs, known, problem, rows)
    return y
