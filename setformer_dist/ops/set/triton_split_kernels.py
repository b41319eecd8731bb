"""Triton kernels of the split form of SeT attention: phases of triton_kernels.py, and what ranks tell each other.

Ranks of a group share each image, and what they need of each other are sums over tokens (split.py). A kernel here is
one pass between two messages: it takes in the sums of the message before, does a phase of the whole form on the tokens
that this rank has, and writes its own sums for the next message. There is no tile of tokens in this file: whatever
touches tokens is a function of triton_kernels.py, which finds in `Data.totals` what all ranks had to say of the round
before.

    forward_round     g from the totals; the rounds' sums u K, in the last round N, P and u K
    forward_tokens    pooled = P / N and the last g from the totals; y
    backward_tokens   the sums (K_t F)^T e and the column sums of dlogits_t
    backward_round    dpooled and dg from the totals; the sums x K
    gradients         dg of round 1 from the totals; dx, df, and this rank's share of the references' gradients

Messages hold the numbers of split_torch.py, without padding and in its dtype, so K and F have its scale: K any, as no
sum depends on it, F relative to its largest entry in a column where weights are renormalised. Splits of a group meet
within a pass as in the whole form, and each writes the sums of a share of the references, added up in fixed order.
"""

# Arguments of compiled functions are Triton's tensors, tuples and constants, which have no types in Python.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from setformer_dist.ops.set.triton_kernels import (
    _all_splits,
    _gradients,
    _load_potential,
    _measure,
    _meet,
    _merged,
    _parts_of_some,
    _place,
    _potential_of_sums,
    _round,
    _round_adjoint,
    _some,
    _some_at,
    _spread,
    _spread_adjoint,
    _store_potential,
    _sums_of_ranks,
)


class Message(NamedTuple):
    """Places of what travels together, contiguous and without padding, in one dtype.

    Attributes:
        square: (groups, m, d).
        norms: (groups, m), or None.
        columns: (sets, groups, m), of the last sets if not of all.
    """

    square: torch.Tensor
    norms: torch.Tensor | None
    columns: torch.Tensor


class Nearest(NamedTuple):
    """Logarithm of the position filter's largest entry in each column, (b or 1, m), or None for 0; stride of b."""

    at: torch.Tensor | None
    b: int


@triton.jit
def _nearest_of(nearest, b, j, spec):
    """Of references j."""
    found = tl.zeros(j.shape, spec.ACC)
    if nearest.at is not None:
        found += tl.load(nearest.at + b.to(tl.int64) * nearest.b + j, mask=j < spec.M, other=0.0).to(spec.ACC)
    return found


@triton.jit
def _say(at, s, group, j, values, data, spec):
    """Write a number for each of references j into (sets, groups, m)."""
    tl.store(at + (group + data.groups * s) * spec.M + j, values, mask=j < spec.M)


@triton.jit
def _rows_of_square(square, j, group, spec):
    """Pointers to rows j of a message's square, and where they are no padding."""
    c = tl.arange(0, spec.DP)
    at = square + (group.to(tl.int64) * spec.M + j)[:, None] * spec.D + c[None, :]
    return at, (j < spec.M)[:, None] & (c < spec.D)[None, :]


# ---------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _report_round(message, nearest, t, LAST: tl.constexpr, b, group, split, data, spec):
    """Add up over the splits what round t + 1 left, and write it into the message."""
    WIDE: tl.constexpr = message.columns.dtype.element_ty
    UNNEEDED: tl.constexpr = 1 if LAST and spec.SETS == 2 and spec.RENORMALISE else 0
    j = _some(split, spec)
    for s in tl.static_range(UNNEEDED, spec.SETS):
        lse = _merged(_all_splits(data, t, s, group, j, spec))
        _say(message.columns, s - UNNEEDED, group, j, tl.exp(lse.to(WIDE)), data, spec)
    if LAST:
        lses = _all_splits(data, spec.ROUNDS, 0, group, j, spec)
        shares = tl.exp((lses - _nearest_of(nearest, b, j, spec)[None, :]).to(WIDE))
        found = tl.sum(_parts_of_some(data, j, group, spec).to(WIDE) * shares[:, :, None], 0)
        at, inside = _rows_of_square(message.square, j, group, spec)
        tl.store(at, found, mask=inside)
        if spec.RENORMALISE:
            _say(message.norms, 0, group, j, tl.sum(shares, 0), data, spec)


@triton.jit(do_not_specialize=["t"])
def forward_round(
    message, nearest, potentials, t, LAST: tl.constexpr, data, FIRST: tl.constexpr, END: tl.constexpr, spec
):
    """Round t + 1, in two phases: its sums over the tokens of each split, and over the splits."""
    b, h, group, split = _place(data, spec)
    if FIRST == 0:
        if t == 0:
            _measure(data, b, h, group, split, spec)
        _round(potentials, t, LAST, b, h, group, split, data, spec)
        _meet(data, group, 1, spec)
    if END > 1:
        _report_round(message, nearest, t, LAST, b, group, split, data, spec)


@triton.jit
def _settle_totals(total, nearest, potentials, pooled, b, group, split, data, spec):
    """Write the last potentials and pooled from the last round's totals, each split a share of pooled's rows."""
    UNNEEDED: tl.constexpr = 1 if spec.SETS == 2 and spec.RENORMALISE else 0
    if split == 0:
        for s in tl.static_range(spec.SETS):
            if s >= UNNEEDED:
                g = _potential_of_sums(_sums_of_ranks(total.columns, s - UNNEEDED, group, data, spec), spec)
            else:  # what is multiplied by it is 0, and so it must be finite
                g = _load_potential(potentials, spec.ROUNDS - 1, s, group, data, spec)
            _store_potential(potentials, spec.ROUNDS, s, group, g, data, spec)
            if s == 0:
                last = g
                if spec.RENORMALISE:
                    last = _potential_of_sums(_sums_of_ranks(total.norms, 0, group, data, spec), spec)
                    last -= _nearest_of(nearest, b, tl.arange(0, spec.MP), spec)
                _store_potential(potentials, spec.ROUNDS + 1, 0, group, last, data, spec)
    j = _some(split, spec)
    at, inside = _rows_of_square(total.square, j, group, spec)
    found = tl.load(at, mask=inside, other=0.0)
    divisors = total.norms if spec.RENORMALISE else total.columns
    sums = tl.load(divisors + group * spec.M + j, mask=j < spec.M, other=1.0)
    found = tl.where((sums > 0.0)[:, None], found / tl.where(sums > 0.0, sums, 1.0)[:, None], 0.0)
    tl.store(_some_at(pooled, j, group, spec), found.to(spec.ACC))


@triton.jit
def forward_tokens(y, total, nearest, potentials, pooled, data, FIRST: tl.constexpr, END: tl.constexpr, spec):
    """The way back to tokens, in two phases: from the totals to pooled, and to y."""
    b, h, group, split = _place(data, spec)
    if FIRST == 0:
        _settle_totals(total, nearest, potentials, pooled, b, group, split, data, spec)
        _meet(data, group, 1, spec)
    if END > 1:
        _spread(y, potentials, pooled, b, h, group, split, data, spec)


# --------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _potential_of_some(potentials, t, s, j, group, data, spec):
    """Row t of the potentials of a set at references j."""
    at = potentials + ((group + data.groups * s).to(tl.int64) * (spec.ROUNDS + 2) + t) * spec.M + j
    return tl.load(at, mask=j < spec.M, other=0.0)


@triton.jit
def _report_tokens(message, potentials, group, split, data, spec):
    """Write (K_t F)^T e and the column sums of the scattering weights' gradient into the message."""
    WIDE: tl.constexpr = message.columns.dtype.element_ty
    j = _some(split, spec)
    g = _potential_of_some(potentials, spec.ROUNDS, spec.SETS - 1, j, group, data, spec)
    found = tl.sum(_parts_of_some(data, j, group, spec), 0).to(WIDE) * tl.exp(-g.to(WIDE))[:, None]
    at, inside = _rows_of_square(message.square, j, group, spec)
    tl.store(at, found, mask=inside)
    sums = tl.sum(_all_splits(data, spec.ROUNDS, spec.SETS - 1, group, j, spec), 0)
    _say(message.columns, 0, group, j, sums, data, spec)


@triton.jit
def backward_tokens(message, dy, adjoint, data, FIRST: tl.constexpr, END: tl.constexpr, spec):
    """The way back to tokens differentiated, in two phases: sums over the tokens of each split, and over the splits."""
    b, h, group, split = _place(data, spec)
    if FIRST == 0:
        _measure(data, b, h, group, split, spec)
        _spread_adjoint(dy, adjoint, b, h, group, split, data, spec)
        _meet(data, group, 1, spec)
    if END > 1:
        _report_tokens(message, adjoint.potentials, group, split, data, spec)


@triton.jit
def _settle_adjoint_totals(square, adjoint, group, split, data, spec):
    """Write dpooled and its product with pooled from the totals, each split a share of the rows."""
    j = _some(split, spec)
    g = _potential_of_some(adjoint.potentials, spec.ROUNDS, spec.SETS - 1, j, group, data, spec)
    at, inside = _rows_of_square(square, j, group, spec)
    sums = tl.load(at, mask=inside, other=0.0)
    d_pooled = (sums * tl.exp(g.to(sums.dtype))[:, None]).to(spec.ACC)
    pooled = tl.load(_some_at(adjoint.pooled, j, group, spec))
    tl.store(_some_at(adjoint.d_pooled, j, group, spec), d_pooled)
    tl.store(adjoint.along + group.to(tl.int64) * spec.MP + j, tl.sum(pooled * d_pooled, 1))


@triton.jit
def _report_adjoint(columns, t, potentials, group, split, data, spec):
    """Write x K of round t, the gradient of g of round t - 1 over - v, into the message."""
    WIDE: tl.constexpr = columns.dtype.element_ty
    j = _some(split, spec)
    for s in tl.static_range(spec.SETS):
        g = _potential_of_some(potentials, t - 1, s, j, group, data, spec)
        sums = tl.sum(_all_splits(data, t - 1, s, group, j, spec), 0).to(WIDE)
        _say(columns, s, group, j, -sums * tl.exp(-g.to(WIDE)), data, spec)


@triton.jit(do_not_specialize=["t"])
def backward_round(
    columns, square, dy, adjoint, t, LAST: tl.constexpr, data, FIRST: tl.constexpr, END: tl.constexpr, spec
):
    """Round t differentiated, in three phases: dpooled (in the last round), sums over tokens, sums over splits."""
    b, h, group, split = _place(data, spec)
    if FIRST == 0:
        _settle_adjoint_totals(square, adjoint, group, split, data, spec)
        _meet(data, group, 1, spec)
    if FIRST <= 1 and END > 1:
        if LAST:
            _round_adjoint(spec.ROUNDS, True, dy, adjoint, b, h, group, split, data, spec)
        else:
            _round_adjoint(t, False, dy, adjoint, b, h, group, split, data, spec)
        _meet(data, group, 2 - FIRST, spec)
    if END > 2:
        _report_adjoint(columns, t, adjoint.potentials, group, split, data, spec)


@triton.jit
def gradients(dx, dfeatures, d_references, square, dy, adjoint, data, FIRST: tl.constexpr, END: tl.constexpr, spec):
    """All gradients, in two phases: dpooled (where there was but one round), and the gradients."""
    b, h, group, split = _place(data, spec)
    if FIRST == 0:
        _settle_adjoint_totals(square, adjoint, group, split, data, spec)
        _meet(data, group, 1, spec)
    if END > 1:
        _gradients(dx, dfeatures, d_references, dy, adjoint, b, h, group, split, data, spec)
