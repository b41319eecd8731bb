"""Triton kernels of SeT attention: tiles of tokens stream through, references and column potentials stay on chip.

No kernel writes anything of size n x m. A program owns one head of one image (a group) and one run of its tokens (a
split); what it sums over tokens goes to a buffer with one place per split, which the next launch adds up in fixed
order. There are no atomics, so results are the same every time.

With M = s / epsilon, a round t sets f_i = -log n - LSE_j(M_ij + g_j), then g_j = -log m - LSE_i(M_ij + f_i). Only g is
kept, in `potentials` (sets, groups, rounds + 2, m): row 0 is zero, row t the g of round t, and the last row is what
takes the place of g in the gathering weights, -log m - LSE_i(M + f + log F) where they are renormalised.

    gather    G_ij = m exp(M + f + log F + last row)                   columns sum to 1 if renormalised
    scatter   W_ij = softmax_j(M + g + log F), or n exp(M + f + g + log F)

Backward: with dlog the gradient of log P + log F, each half round is a negative logsumexp, so it passes its gradient
on by a softmax: C = m exp(M + f_t + g_t) (columns sum to 1) and R = n exp(M + f_t + g_(t-1)) (rows do).

    df_t = -C dg_t (+ row sums of dlog for the last t),  dg_(t-1) = -R^T df_t,  dM = dlog - sum_t (C dg_t + R df_t)

Letters: b = images, h = heads, n = tokens, m = references, k = features, d = values. Upper case is known when a kernel
is compiled; MP, KP, DP are M, K, D rounded up to a power of two. Padding columns have a similarity of FLOOR, so their
weights vanish; hidden and absent tokens are never read, and get weight 0.
"""

# Arguments of compiled functions are Triton's tensors, tuples and constants, which have no types in Python.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# Far below any exponent, far above the least fp32, and so small that adding to it changes nothing.
FLOOR = tl.constexpr(-1e30)
# Vectors shorter than this are divided by it instead of by their length; that of `kernels.unit`.
SHORTEST = tl.constexpr(1e-6)


class View(NamedTuple):
    """A tensor (b, h, n, channels) by its strides, in elements; a stride of 1 is compiled in."""

    at: torch.Tensor
    b: int
    h: int
    n: int
    c: int


class Data(NamedTuple):
    """Inputs of every kernel.

    Attributes:
        x: values.
        features: what is compared with the references; None takes x of unit length.
        references: (sets, h, m, k), contiguous.
        positions: (b or 1, n, axes), contiguous, or None.
        positions_b: stride from one image's positions to the next; 0 where all share them.
        places: (m, axes), contiguous, or None.
        mask: (b, n) bytes, not 0 for valid tokens, or None.
        log_counts: (b,) logarithm of the number of valid tokens.
        heads: h.
        n: tokens.
        run: tokens of one split, a multiple of BLOCK.
    """

    x: View
    features: View | None
    references: torch.Tensor
    positions: torch.Tensor | None
    positions_b: int
    places: torch.Tensor | None
    mask: torch.Tensor | None
    log_counts: torch.Tensor
    heads: int
    n: int
    run: int


class Spec(NamedTuple):
    """What a kernel is compiled for; a kernel gets each as a tl.constexpr.

    Attributes:
        M, MP, K, KP, D, DP: sizes and their padded forms.
        BLOCK: tokens of one tile.
        SETS: reference sets, 1 or 2.
        ROUNDS: Sinkhorn rounds of the whole problem.
        SPLITS: programs that share the tokens of a group, a power of two.
        EPSILON, SIGMA, TAU: see SetProblem.
        LOG_M: log(m).
        AXES: coordinates of a position; 0 without a position filter.
        RENORMALISE: see SetProblem.
        ROUND: dtype to which the operands of products are rounded.
        DOT: dtype in which they are multiplied: the same, or a wider one.
        ACC: dtype of everything else.
        PRECISION: Triton's input_precision of products of fp32.
    """

    M: int
    MP: int
    K: int
    KP: int
    D: int
    DP: int
    BLOCK: int
    SETS: int
    ROUNDS: int
    SPLITS: int
    EPSILON: float
    SIGMA: float
    TAU: float
    LOG_M: float
    AXES: int
    RENORMALISE: bool
    ROUND: Any
    DOT: Any
    ACC: Any
    PRECISION: str


# ------------------------------------------------------------------------------------------------- loads and stores


@triton.jit
def _dot(left, right, spec):
    left, right = left.to(spec.ROUND).to(spec.DOT), right.to(spec.ROUND).to(spec.DOT)
    return tl.dot(left, right, input_precision=spec.PRECISION, out_dtype=spec.ACC)


@triton.jit
def _tile_at(view, b, h, rows, PADDED: tl.constexpr):
    """Pointers to a tile (rows, PADDED)."""
    start = view.at + b.to(tl.int64) * view.b + h.to(tl.int64) * view.h
    return start + rows.to(tl.int64)[:, None] * view.n + tl.arange(0, PADDED)[None, :] * view.c


@triton.jit
def _load_tile(view, b, h, rows, shown, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    inside = shown[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]
    return tl.load(_tile_at(view, b, h, rows, PADDED), mask=inside, other=0.0)


@triton.jit
def _store_tile(view, b, h, rows, present, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    inside = present[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]
    tl.store(_tile_at(view, b, h, rows, PADDED), tile.to(view.at.dtype.element_ty), mask=inside)


@triton.jit
def _load_square(at, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load matrix `index` of a contiguous stack (., ROWS, COLUMNS) without padding."""
    inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(at + index.to(tl.int64) * (ROWS * COLUMNS) + inner)


@triton.jit
def _store_square(at, index, matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(at + index.to(tl.int64) * (ROWS * COLUMNS) + inner, matrix)


@triton.jit
def _references(data, s, h, spec):
    """References of one set and head, (MP, KP), zeros in the padding."""
    j = tl.arange(0, spec.MP)
    k = tl.arange(0, spec.KP)
    at = data.references + ((data.heads * s + h) * spec.M + j)[:, None] * spec.K + k[None, :]
    return tl.load(at, mask=(j < spec.M)[:, None] & (k < spec.K)[None, :], other=0.0)


@triton.jit
def _potential_at(at, group, s, row, ROWS: tl.constexpr, spec):
    return at + ((tl.num_programs(0) * s + group).to(tl.int64) * ROWS + row) * spec.M + tl.arange(0, spec.MP)


@triton.jit
def _load_potential(at, group, s, row, ROWS: tl.constexpr, spec):
    """Row of (sets, groups, ROWS, m), zeros in the padding."""
    return tl.load(_potential_at(at, group, s, row, ROWS, spec), mask=tl.arange(0, spec.MP) < spec.M, other=0.0)


@triton.jit
def _store_potential(at, group, s, row, values, ROWS: tl.constexpr, spec):
    tl.store(_potential_at(at, group, s, row, ROWS, spec), values, mask=tl.arange(0, spec.MP) < spec.M)


@triton.jit
def _place_of_split(group, s, SLOTS: tl.constexpr, spec):
    """Offset of the first split in a buffer (sets, groups, SPLITS, SLOTS, MP)."""
    return (tl.num_programs(0) * s + group).to(tl.int64) * (spec.SPLITS * SLOTS * spec.MP)


@triton.jit
def _all_splits(at, group, s, slot, SLOTS: tl.constexpr, spec):
    """Load what every split left in a slot, (SPLITS, MP)."""
    splits = tl.arange(0, spec.SPLITS)[:, None] * (SLOTS * spec.MP)
    return tl.load(
        at + _place_of_split(group, s, SLOTS, spec) + splits + slot * spec.MP + tl.arange(0, spec.MP)[None, :]
    )


@triton.jit
def _leave(at, group, s, split, slot, values, SLOTS: tl.constexpr, spec):
    """Store what this split has to say in a slot."""
    offset = _place_of_split(group, s, SLOTS, spec) + (split * SLOTS + slot) * spec.MP
    tl.store(at + offset + tl.arange(0, spec.MP), values)


# ------------------------------------------------------------------------------------------------------ one tile


@triton.jit
def _shown(data, b, rows):
    """True for tokens that are there and valid."""
    shown = rows < data.n
    if data.mask is not None:
        shown = shown & (tl.load(data.mask + b.to(tl.int64) * data.n + rows, mask=shown, other=0) != 0)
    return shown


@triton.jit
def _features(data, b, h, rows, shown, spec):
    """What is compared: (tile, factor of each row, power of two by which x was scaled); f_i = factor_i * tile_i.

    x is brought near 1 by a power of two, which is exact in every dtype, before its squares are summed: they cannot
    overflow, and products see x itself and not a rounded unit vector.
    """
    if data.features is not None:
        tile = _load_tile(data.features, b, h, rows, shown, spec.K, spec.KP)
        one = tl.full((spec.BLOCK,), 1.0, spec.ACC)
        return tile.to(spec.ROUND), one, one
    x = _load_tile(data.x, b, h, rows, shown, spec.D, spec.DP)
    largest = tl.max(tl.abs(x.to(tl.float32)), 1)
    scale = tl.exp2(-tl.floor(tl.log2(tl.maximum(largest, SHORTEST)))).to(spec.ACC)
    tile = (x.to(spec.ACC) * scale[:, None]).to(spec.ROUND)
    wide = tile.to(spec.ACC)
    length = tl.sqrt(tl.sum(wide * wide, 1))
    return tile, 1.0 / tl.maximum(length, scale * SHORTEST), scale


@triton.jit
def _compare(tile, factor, references, spec):
    """Cosines f_i . r_j and exponents M_ij = s_ij / epsilon, (BLOCK, MP)."""
    cosine = _dot(tile, tl.trans(references), spec) * factor[:, None]
    if spec.SIGMA > 0:
        exponent = tl.exp((cosine - 1.0) * (1.0 / (spec.SIGMA * spec.SIGMA))) * (1.0 / spec.EPSILON)
    else:
        exponent = cosine * (1.0 / spec.EPSILON)
    return cosine, tl.where((tl.arange(0, spec.MP) < spec.M)[None, :], exponent, FLOOR)


@triton.jit
def _row_potential(exponent, g, log_count):
    """f_i = -log n - LSE_j(M_ij + g_j)."""
    logit = exponent + g[None, :]
    top = tl.max(logit, 1)
    return -log_count - top - tl.log(tl.sum(tl.exp(logit - top[:, None]), 1))


@triton.jit
def _column_potential(lse, spec):
    """g_j = -log m - LSE_i; 0 for padding, and where no token is valid."""
    return tl.where(lse > 0.5 * FLOOR, -spec.LOG_M - lse, 0.0)


@triton.jit
def _add_to_lse(logit, shown, top, total):
    """Add a tile to a running logsumexp over tokens, kept as its largest term and a sum relative to it."""
    logit = tl.where(shown[:, None], logit, FLOOR)
    higher = tl.maximum(top, tl.max(logit, 0))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[None, :]), 0)


@triton.jit
def _merged_lse(lses):
    """Logsumexp over splits of theirs, (SPLITS, MP) -> (MP,)."""
    top = tl.max(lses, 0)
    return top + tl.log(tl.sum(tl.exp(lses - top[None, :]), 0))


@triton.jit
def _log_filter(data, b, rows, spec):
    """Logarithm of the position filter, (BLOCK, MP); zeros without one."""
    total = tl.zeros((spec.BLOCK, spec.MP), spec.ACC)
    j = tl.arange(0, spec.MP)
    for axis in tl.static_range(spec.AXES):
        at = data.positions + b.to(tl.int64) * data.positions_b + rows * spec.AXES + axis
        position = tl.load(at, mask=rows < data.n, other=0.0)
        place = tl.load(data.places + j * spec.AXES + axis, mask=j < spec.M, other=0.0)
        apart = (position[:, None] - place[None, :]) * (1.0 / spec.TAU)
        total -= apart * apart
    return total


@triton.jit
def _gather_weights(exponent, near, f, last, shown, spec):
    """G_ij = m exp(M + f + log F + last row of the potentials)."""
    weights = tl.exp(exponent + f[:, None] + near + (last + spec.LOG_M)[None, :])
    return tl.where(shown[:, None], weights, 0.0)


@triton.jit
def _scatter_weights(exponent, near, g_before, g, log_count, shown, spec):
    """W_ij = softmax_j(M + g + log F), or n P F."""
    logit = exponent + g[None, :] + near
    if spec.RENORMALISE:
        weights = tl.exp(logit - tl.max(logit, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
    else:
        weights = tl.exp(logit + (_row_potential(exponent, g_before, log_count) + log_count)[:, None])
    return tl.where(shown[:, None], weights, 0.0)


# -------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["first"])
def rounds(potentials, left, left_before, data, first, COUNT: tl.constexpr, spec):
    """Run Sinkhorn rounds first + 1 ... first + COUNT; grid (groups, SPLITS, sets).

    With one split, one launch runs them all. With several, a launch runs one: it merges what the splits left in
    `left_before`, (sets, groups, SPLITS, 2, MP), and leaves its own in `left`; a last launch with COUNT = 0 settles
    the last potentials.
    """
    group, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = group // data.heads, group % data.heads
    ROWS: tl.constexpr = spec.ROUNDS + 2
    FILTERED: tl.constexpr = spec.AXES > 0 and spec.RENORMALISE
    references = _references(data, s, h, spec)
    log_count = tl.load(data.log_counts + b)
    g = tl.zeros((spec.MP,), spec.ACC)
    last = g
    if first > 0:
        g = _column_potential(_merged_lse(_all_splits(left_before, group, s, 0, 2, spec)), spec)
        last = _column_potential(_merged_lse(_all_splits(left_before, group, s, 1, 2, spec)), spec)
    for t in range(first, first + COUNT):
        if split == 0:
            _store_potential(potentials, group, s, t, g, ROWS, spec)
        top = tl.full((spec.MP,), FLOOR, spec.ACC)
        total = tl.zeros((spec.MP,), spec.ACC)
        near_top, near_total = top, total
        for start in range(split * data.run, tl.minimum((split + 1) * data.run, data.n), spec.BLOCK):
            rows = start + tl.arange(0, spec.BLOCK)
            shown = _shown(data, b, rows)
            tile, factor, _ = _features(data, b, h, rows, shown, spec)
            _, exponent = _compare(tile, factor, references, spec)
            logit = exponent + _row_potential(exponent, g, log_count)[:, None]
            top, total = _add_to_lse(logit, shown, top, total)
            if FILTERED:  # noqa: SIM102 - the outer one is decided when the kernel is compiled
                if (t == spec.ROUNDS - 1) & (s == 0):
                    near = _log_filter(data, b, rows, spec)
                    near_top, near_total = _add_to_lse(logit + near, shown, near_top, near_total)
        # A sum relative to its largest term is at least 1, unless there was nothing to add.
        lse = top + tl.log(tl.maximum(total, 1.0))
        near_lse = lse
        if FILTERED:
            near_lse = near_top + tl.log(tl.maximum(near_total, 1.0))
        if spec.SPLITS == 1:
            g, last = _column_potential(lse, spec), _column_potential(near_lse, spec)
        else:
            _leave(left, group, s, split, 0, lse, 2, spec)
            _leave(left, group, s, split, 1, near_lse, 2, spec)
    if spec.SPLITS == 1 or COUNT == 0:
        _store_potential(potentials, group, s, first + COUNT, g, ROWS, spec)
        _store_potential(potentials, group, s, spec.ROUNDS + 1, last, ROWS, spec)


@triton.jit
def gather(pooled, potentials, data, spec):
    """Leave each split's part of G^T x in `pooled`, (groups, SPLITS, MP, DP); grid (groups, SPLITS)."""
    group, split = tl.program_id(0), tl.program_id(1)
    b, h = group // data.heads, group % data.heads
    ROWS: tl.constexpr = spec.ROUNDS + 2
    references = _references(data, 0, h, spec)
    log_count = tl.load(data.log_counts + b)
    before = _load_potential(potentials, group, 0, spec.ROUNDS - 1, ROWS, spec)
    last = _load_potential(potentials, group, 0, spec.ROUNDS + 1, ROWS, spec)
    total = tl.zeros((spec.MP, spec.DP), spec.ACC)
    for start in range(split * data.run, tl.minimum((split + 1) * data.run, data.n), spec.BLOCK):
        rows = start + tl.arange(0, spec.BLOCK)
        shown = _shown(data, b, rows)
        tile, factor, _ = _features(data, b, h, rows, shown, spec)
        _, exponent = _compare(tile, factor, references, spec)
        f = _row_potential(exponent, before, log_count)
        weights = _gather_weights(exponent, _log_filter(data, b, rows, spec), f, last, shown, spec)
        x = _load_tile(data.x, b, h, rows, shown, spec.D, spec.DP)
        total += _dot(tl.trans(weights), x, spec)
    _store_square(pooled, group * spec.SPLITS + split, total, spec.MP, spec.DP)


@triton.jit
def scatter(y, pooled, potentials, data, spec):
    """Write y = W pooled, 0 for hidden tokens; `pooled` is (groups, MP, DP); grid (groups, SPLITS)."""
    group, split = tl.program_id(0), tl.program_id(1)
    b, h = group // data.heads, group % data.heads
    ROWS: tl.constexpr = spec.ROUNDS + 2
    references = _references(data, spec.SETS - 1, h, spec)
    log_count = tl.load(data.log_counts + b)
    before = _load_potential(potentials, group, spec.SETS - 1, spec.ROUNDS - 1, ROWS, spec)
    g = _load_potential(potentials, group, spec.SETS - 1, spec.ROUNDS, ROWS, spec)
    values = _load_square(pooled, group, spec.MP, spec.DP)
    for start in range(split * data.run, tl.minimum((split + 1) * data.run, data.n), spec.BLOCK):
        rows = start + tl.arange(0, spec.BLOCK)
        shown = _shown(data, b, rows)
        tile, factor, _ = _features(data, b, h, rows, shown, spec)
        _, exponent = _compare(tile, factor, references, spec)
        near = _log_filter(data, b, rows, spec)
        weights = _scatter_weights(exponent, near, before, g, log_count, shown, spec)
        _store_tile(y, b, h, rows, rows < data.n, _dot(weights, values, spec), spec.D, spec.DP)


# ------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _gather_gradient(weights, x, d_pooled, along, spec):
    """Gradient of log P F through the gathering weights; along_j = pooled_j . dpooled_j."""
    d_weights = _dot(x, tl.trans(d_pooled), spec)
    if spec.RENORMALISE:
        d_weights -= along[None, :]
    return weights * d_weights


@triton.jit
def _scatter_gradient(weights, dy, pooled, spec):
    """Gradient of log P F through the scattering weights."""
    d_weights = _dot(dy, tl.trans(pooled), spec)
    if spec.RENORMALISE:
        d_weights -= tl.sum(weights * d_weights, 1)[:, None]
    return weights * d_weights


@triton.jit
def scatter_adjoint(d_pooled, left, dy, pooled, potentials, data, spec):
    """Leave each split's part of dpooled = W^T dy and of the column sums of dlog; grid (groups, SPLITS).

    `d_pooled` is (groups, SPLITS, MP, DP), `left` (groups, SPLITS, MP).
    """
    group, split = tl.program_id(0), tl.program_id(1)
    b, h = group // data.heads, group % data.heads
    ROWS: tl.constexpr = spec.ROUNDS + 2
    references = _references(data, spec.SETS - 1, h, spec)
    log_count = tl.load(data.log_counts + b)
    before = _load_potential(potentials, group, spec.SETS - 1, spec.ROUNDS - 1, ROWS, spec)
    g = _load_potential(potentials, group, spec.SETS - 1, spec.ROUNDS, ROWS, spec)
    values = _load_square(pooled, group, spec.MP, spec.DP)
    d_values = tl.zeros((spec.MP, spec.DP), spec.ACC)
    columns = tl.zeros((spec.MP,), spec.ACC)
    for start in range(split * data.run, tl.minimum((split + 1) * data.run, data.n), spec.BLOCK):
        rows = start + tl.arange(0, spec.BLOCK)
        shown = _shown(data, b, rows)
        tile, factor, _ = _features(data, b, h, rows, shown, spec)
        _, exponent = _compare(tile, factor, references, spec)
        near = _log_filter(data, b, rows, spec)
        weights = _scatter_weights(exponent, near, before, g, log_count, shown, spec)
        gradient = _load_tile(dy, b, h, rows, shown, spec.D, spec.DP)
        d_values += _dot(tl.trans(weights), gradient, spec)
        columns += tl.sum(_scatter_gradient(weights, gradient, values, spec), 0)
    _store_square(d_pooled, group * spec.SPLITS + split, d_values, spec.MP, spec.DP)
    _leave(left, group, 0, split, 0, columns, 1, spec)


class Adjoint(NamedTuple):
    """What the last kernels need beyond Data.

    Attributes:
        potentials: as `rounds` left them.
        d_potentials: (sets, groups, rounds + 1, m), gradients of the g of each round; row 0 is never read.
        pooled: (groups, MP, DP).
        d_pooled: its gradient.
        along: (groups, MP), their dot product.
    """

    potentials: torch.Tensor
    d_potentials: torch.Tensor
    pooled: torch.Tensor
    d_pooled: torch.Tensor
    along: torch.Tensor


@triton.jit
def _gather_side(exponent, near, b, h, group, rows, shown, log_count, data, adjoint, spec):
    """Return the gathering weights of a tile and the gradient of their logarithms."""
    ROWS: tl.constexpr = spec.ROUNDS + 2
    before = _load_potential(adjoint.potentials, group, 0, spec.ROUNDS - 1, ROWS, spec)
    last = _load_potential(adjoint.potentials, group, 0, spec.ROUNDS + 1, ROWS, spec)
    f = _row_potential(exponent, before, log_count)
    weights = _gather_weights(exponent, near, f, last, shown, spec)
    x = _load_tile(data.x, b, h, rows, shown, spec.D, spec.DP)
    d_pooled = _load_square(adjoint.d_pooled, group, spec.MP, spec.DP)
    along = tl.load(adjoint.along + group.to(tl.int64) * spec.MP + tl.arange(0, spec.MP))
    return weights, _gather_gradient(weights, x, d_pooled, along, spec)


@triton.jit
def _scatter_side(exponent, near, b, h, group, rows, shown, log_count, dy, adjoint, spec):
    """Return the gradient of the logarithms of the scattering weights of a tile."""
    ROWS: tl.constexpr = spec.ROUNDS + 2
    before = _load_potential(adjoint.potentials, group, spec.SETS - 1, spec.ROUNDS - 1, ROWS, spec)
    g = _load_potential(adjoint.potentials, group, spec.SETS - 1, spec.ROUNDS, ROWS, spec)
    weights = _scatter_weights(exponent, near, before, g, log_count, shown, spec)
    d_y = _load_tile(dy, b, h, rows, shown, spec.D, spec.DP)
    return _scatter_gradient(weights, d_y, _load_square(adjoint.pooled, group, spec.MP, spec.DP), spec)


@triton.jit
def _half_rounds(exponent, g_before, g, dg, df, log_count, shown, spec):
    """One round's C and R of a tile, and df - C dg; hidden rows are 0."""
    f = _row_potential(exponent, g_before, log_count)
    visible = shown[:, None]
    by_column = tl.where(visible, tl.exp(exponent + f[:, None] + (g + spec.LOG_M)[None, :]), 0.0)
    by_row = tl.where(visible, tl.exp(exponent + g_before[None, :] + (f + log_count)[:, None]), 0.0)
    return by_column, by_row, df - tl.sum(by_column * dg[None, :], 1)


@triton.jit(do_not_specialize=["first"])
def adjoint_rounds(left, left_before, dy, data, adjoint, first, COUNT: tl.constexpr, spec):
    """Pass gradients from g of round `first` to g of round first - COUNT; grid (groups, SPLITS, sets).

    Launched like `rounds`, from the last round down to the first; buffers (sets, groups, SPLITS, MP).
    """
    group, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = group // data.heads, group % data.heads
    ROWS: tl.constexpr = spec.ROUNDS + 2
    references = _references(data, s, h, spec)
    log_count = tl.load(data.log_counts + b)
    if first == spec.ROUNDS:
        dg = _load_potential(adjoint.d_potentials, group, s, first, ROWS - 1, spec)
    else:
        dg = tl.sum(_all_splits(left_before, group, s, 0, 1, spec), 0)
        if split == 0:
            _store_potential(adjoint.d_potentials, group, s, first, dg, ROWS - 1, spec)
    for back in range(COUNT):
        t = first - back
        g = _load_potential(adjoint.potentials, group, s, t, ROWS, spec)
        g_before = _load_potential(adjoint.potentials, group, s, t - 1, ROWS, spec)
        total = tl.zeros((spec.MP,), spec.ACC)
        for start in range(split * data.run, tl.minimum((split + 1) * data.run, data.n), spec.BLOCK):
            rows = start + tl.arange(0, spec.BLOCK)
            shown = _shown(data, b, rows)
            tile, factor, _ = _features(data, b, h, rows, shown, spec)
            _, exponent = _compare(tile, factor, references, spec)
            df = tl.zeros((spec.BLOCK,), spec.ACC)
            if t == spec.ROUNDS:
                near = _log_filter(data, b, rows, spec)
                if s == 0:
                    _, dlog = _gather_side(exponent, near, b, h, group, rows, shown, log_count, data, adjoint, spec)
                    df += tl.sum(dlog, 1)
                if s == spec.SETS - 1:
                    dlog = _scatter_side(exponent, near, b, h, group, rows, shown, log_count, dy, adjoint, spec)
                    df += tl.sum(dlog, 1)
            _, by_row, df = _half_rounds(exponent, g_before, g, dg, df, log_count, shown, spec)
            total -= tl.sum(by_row * df[:, None], 0)
        if spec.SPLITS == 1:
            dg = total
            _store_potential(adjoint.d_potentials, group, s, t - 1, dg, ROWS - 1, spec)
        else:
            _leave(left, group, s, split, 0, total, 1, spec)


@triton.jit
def _cosine_gradient(dlog, exponent, group, s, log_count, shown, adjoint, spec):
    """Gradient of the cosines of a tile: dM = dlog - sum_t (C dg_t + R df_t), through epsilon and the Gaussian."""
    ROWS: tl.constexpr = spec.ROUNDS + 2
    total = dlog
    g_before = _load_potential(adjoint.potentials, group, s, 0, ROWS, spec)
    for t in range(1, spec.ROUNDS + 1):
        g = _load_potential(adjoint.potentials, group, s, t, ROWS, spec)
        dg = _load_potential(adjoint.d_potentials, group, s, t, ROWS - 1, spec)
        df = tl.where(t == spec.ROUNDS, tl.sum(dlog, 1), 0.0)
        by_column, by_row, df = _half_rounds(exponent, g_before, g, dg, df, log_count, shown, spec)
        total -= by_column * dg[None, :] + by_row * df[:, None]
        g_before = g
    # Gaussian: M = s / epsilon and ds / dcosine = s / sigma^2, so dM / dcosine = M / sigma^2.
    slope = exponent * (1.0 / (spec.SIGMA * spec.SIGMA)) if spec.SIGMA > 0 else 1.0 / spec.EPSILON
    return total * slope


@triton.jit
def _store_gradients(d_features, dx_values, tile, factor, scale, along, b, h, rows, dx, dfeatures, data,
                     spec):  # fmt: skip
    """Write dx and dfeatures, or dx with what reaches it through the unit vectors."""
    present = rows < data.n
    if data.features is not None:
        _store_tile(dfeatures, b, h, rows, present, d_features, spec.K, spec.KP)
    else:
        # A vector that was divided by SHORTEST, not by its length, has no direction to stay tangent to.
        tangent = tl.where(factor * SHORTEST * scale < 1.0, along * factor, 0.0)
        unit_tile = tile.to(spec.ACC)
        dx_values += (d_features - unit_tile * tangent[:, None]) * (factor * scale)[:, None]
    _store_tile(dx, b, h, rows, present, dx_values, spec.D, spec.DP)


@triton.jit
def gradients(dx, dfeatures, d_references, dy, data, adjoint, spec):
    """Write dx, dfeatures, and each split's part of the gradient of the references; grid (groups, SPLITS).

    `d_references` is (sets, groups, SPLITS, MP, KP).
    """
    group, split = tl.program_id(0), tl.program_id(1)
    b, h = group // data.heads, group % data.heads
    log_count = tl.load(data.log_counts + b)
    gathering = _references(data, 0, h, spec)
    scattering = _references(data, spec.SETS - 1, h, spec)
    d_gathering = tl.zeros((spec.MP, spec.KP), spec.ACC)
    d_scattering = d_gathering
    for start in range(split * data.run, tl.minimum((split + 1) * data.run, data.n), spec.BLOCK):
        rows = start + tl.arange(0, spec.BLOCK)
        shown = _shown(data, b, rows)
        tile, factor, scale = _features(data, b, h, rows, shown, spec)
        near = _log_filter(data, b, rows, spec)
        cosine, exponent = _compare(tile, factor, gathering, spec)
        weights, dlog = _gather_side(exponent, near, b, h, group, rows, shown, log_count, data, adjoint, spec)
        dx_values = _dot(weights, _load_square(adjoint.d_pooled, group, spec.MP, spec.DP), spec)
        if spec.SETS == 1:
            dlog += _scatter_side(exponent, near, b, h, group, rows, shown, log_count, dy, adjoint, spec)
        d_cosine = _cosine_gradient(dlog, exponent, group, 0, log_count, shown, adjoint, spec)
        d_features = _dot(d_cosine, gathering, spec)
        along = tl.sum(d_cosine * cosine, 1)
        d_gathering += _dot(tl.trans(d_cosine * factor[:, None]), tile, spec)
        if spec.SETS == 2:
            cosine, exponent = _compare(tile, factor, scattering, spec)
            dlog = _scatter_side(exponent, near, b, h, group, rows, shown, log_count, dy, adjoint, spec)
            d_cosine = _cosine_gradient(dlog, exponent, group, 1, log_count, shown, adjoint, spec)
            d_features += _dot(d_cosine, scattering, spec)
            along += tl.sum(d_cosine * cosine, 1)
            d_scattering += _dot(tl.trans(d_cosine * factor[:, None]), tile, spec)
        _store_gradients(d_features, dx_values, tile, factor, scale, along, b, h, rows, dx, dfeatures, data, spec)
    place = group * spec.SPLITS + split
    _store_square(d_references, place, d_gathering, spec.MP, spec.KP)
    if spec.SETS == 2:
        _store_square(d_references, tl.num_programs(0) * spec.SPLITS + place, d_scattering, spec.MP, spec.KP)
