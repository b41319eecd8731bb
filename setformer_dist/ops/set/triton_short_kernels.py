"""Triton kernels of SeT attention over few tokens: one program has a whole head of an image, on chip throughout.

The kernels of triton_kernels.py compute K again in every round, tile by tile, and leave sums in the device's memory
between them, as they must for many tokens. Where all tokens are one tile, K and F are computed once for each set and
stay in registers through all rounds, forward and backward. The numbers are the same but for rounding, and so is what
is kept for the backward: either form's backward takes what either forward has kept.

Weights are products of K here: small epsilon, which needs logarithms, is for the other kernels.
"""

# Arguments of compiled functions are Triton's tensors, tuples and constants, which have no types in Python.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from setformer_dist.ops.set.triton_kernels import (
    _columns,
    _cosine,
    _dot,
    _features,
    _filter,
    _filtered,
    _gather_weights,
    _kernel,
    _load_potential,
    _load_tile,
    _log_count,
    _lse,
    _of_exponents,
    _potential,
    _references,
    _rows,
    _scale,
    _scatter_gradient,
    _scatter_weights,
    _shown,
    _square_at,
    _store_gradients,
    _store_potential,
    _store_tile,
)


@triton.jit
def _tokens(data, spec):
    """Return image, head and group of this program, and its tokens: all of them, and which are valid."""
    group = tl.program_id(0)
    b, h = group // data.heads, group % data.heads
    rows = tl.arange(0, spec.BLOCK)
    return b, h, group, rows, _shown(data, b, rows)


@triton.jit
def _rounds(kernel, s, log_count, shown, potentials, group, data, spec):
    """Run all rounds of a set, keep their potentials, and return the last two."""
    g = tl.zeros((spec.MP,), spec.ACC)
    before = g
    for t in range(spec.ROUNDS):
        _store_potential(potentials, t, s, group, g, data, spec)
        e, u, _ = _rows(kernel, _columns(g, spec), shown, spec)
        before = g
        g = _potential(_lse(tl.sum(e * u[:, None], 0), g, log_count), spec)
    _store_potential(potentials, spec.ROUNDS, s, group, g, data, spec)
    return before, g


@triton.jit
def forward(y, potentials, pooled, data, spec):
    """Gather the tokens into the references and scatter them back."""
    b, h, group, rows, shown = _tokens(data, spec)
    log_count = _log_count(data, b, spec)
    x = _load_tile(data.x, b, h, rows, shown, spec.D, spec.DP)
    tile, factor = _features(data, b, h, group, rows, shown, spec)
    near = _filter(data, b, rows, shown, spec)

    kernel = _kernel(_cosine(tile, factor, _references(data, 0, h, spec), spec), spec)
    before, g = _rounds(kernel, 0, log_count, shown, potentials, group, data, spec)
    e, u, _ = _rows(kernel, _columns(before, spec), shown, spec)
    weights = _filtered(e * u[:, None], near, spec)
    last = g
    if spec.RENORMALISE:
        last = _potential(_lse(tl.sum(weights, 0), before, log_count), spec)
    _store_potential(potentials, spec.ROUNDS + 1, 0, group, last, data, spec)
    # Weights of a mean, which are large enough for narrow operands; the rest of their scale comes after the product.
    values = _dot(tl.trans(weights), x, spec) * _scale(last + spec.LOG_M, before, log_count)[:, None]
    tl.store(_square_at(pooled, group, spec.MP, spec.DP), values)

    if spec.SETS == 2:
        kernel = _kernel(_cosine(tile, factor, _references(data, 1, h, spec), spec), spec)
        before, g = _rounds(kernel, 1, log_count, shown, potentials, group, data, spec)
    weights = _scatter_weights(kernel, near, before, g, shown, spec)
    _store_tile(y, b, h, rows, rows < data.n, _dot(weights, values, spec), spec.D, spec.DP)


@triton.jit
def _through_rounds(total, dg, kernel, cosine, s, log_count, shown, potentials, group, data, spec):
    """Return the gradient of a set's cosines, from that of the exponents (with the last f's) and of the last g."""
    df = tl.sum(total, 1)
    for step in range(spec.ROUNDS):
        t = spec.ROUNDS - step
        before = _load_potential(potentials, t - 1, s, group, data, spec)
        g = _load_potential(potentials, t, s, group, data, spec)
        e, u, _ = _rows(kernel, _columns(before, spec), shown, spec)
        scaled = dg * _scale(g + spec.LOG_M, before, log_count)
        df -= u * tl.sum(e * scaled[None, :], 1)
        through = e * (u * df)[:, None]
        total -= e * u[:, None] * scaled[None, :] + through
        dg = -tl.sum(through, 0)
        df = tl.zeros_like(df)
    return _of_exponents(total, cosine, spec)


@triton.jit
def backward(dx, dfeatures, d_units, dy, potentials, pooled, data, spec):
    """Write all gradients; those of the references' unit vectors for each image, (sets, groups, 1, MP, KP)."""
    b, h, group, rows, shown = _tokens(data, spec)
    log_count = _log_count(data, b, spec)
    x = _load_tile(data.x, b, h, rows, shown, spec.D, spec.DP)
    tile, factor = _features(data, b, h, group, rows, shown, spec)
    near = _filter(data, b, rows, shown, spec)
    LAST: tl.constexpr = spec.SETS - 1

    references = _references(data, LAST, h, spec)
    cosine = _cosine(tile, factor, references, spec)
    kernel = _kernel(cosine, spec)
    before = _load_potential(potentials, spec.ROUNDS - 1, LAST, group, data, spec)
    g = _load_potential(potentials, spec.ROUNDS, LAST, group, data, spec)
    values = tl.load(_square_at(pooled, group, spec.MP, spec.DP))
    weights = _scatter_weights(kernel, near, before, g, shown, spec)
    gradient = _load_tile(dy, b, h, rows, shown, spec.D, spec.DP)
    d_pooled = _dot(tl.trans(weights), gradient, spec)
    scattered = _scatter_gradient(weights, gradient, values, spec)
    dg = tl.sum(scattered, 0)
    d_features = tl.zeros((spec.BLOCK, spec.KP), spec.ACC)
    if spec.SETS == 2:
        d_cosine = _through_rounds(scattered, dg, kernel, cosine, 1, log_count, shown, potentials, group, data, spec)
        d_features += _dot(d_cosine, references, spec)
        found = _dot(tl.trans(d_cosine * factor[:, None]), tile, spec)
        tl.store(_square_at(d_units, data.groups + group, spec.MP, spec.KP), found)
        references = _references(data, 0, h, spec)
        cosine = _cosine(tile, factor, references, spec)
        kernel = _kernel(cosine, spec)
        before = _load_potential(potentials, spec.ROUNDS - 1, 0, group, data, spec)
        dg = tl.zeros((spec.MP,), spec.ACC)

    last = _load_potential(potentials, spec.ROUNDS + 1, 0, group, data, spec)
    weights = _gather_weights(kernel, near, before, last, log_count, shown, spec)
    along = tl.sum(values * d_pooled, 1)
    d_weights = _dot(x, tl.trans(d_pooled), spec)
    if spec.RENORMALISE:
        d_weights -= along[None, :]
    else:
        dg += along
    total = weights * d_weights
    if spec.SETS == 1:
        total += scattered
    dx_values = _dot(weights, d_pooled, spec)
    d_cosine = _through_rounds(total, dg, kernel, cosine, 0, log_count, shown, potentials, group, data, spec)
    d_features += _dot(d_cosine, references, spec)
    found = _dot(tl.trans(d_cosine * factor[:, None]), tile, spec)
    tl.store(_square_at(d_units, group, spec.MP, spec.KP), found)
    _store_gradients(d_features, dx_values, tile, factor, b, h, rows, dx, dfeatures, data, spec)
