"""Triton kernels of SeT attention: tiles of tokens stream through, references and column potentials stay on chip.

No kernel writes anything of size n x m. A program owns one head of one image (a group) and one run of its tokens (a
split). Forward and backward are one launch each, in phases; what a phase sums over tokens goes to a buffer with one
place per split, the splits of a group wait for each other, and the next phase adds up the places in fixed order. No
sum is atomic, so results are the same every time. Where programs cannot wait for each other, in Triton's interpreter
and on a GPU too small to run all splits of a group at once, each phase is a launch of its own.

With M = s / epsilon, a round t sets f_i = -log n - LSE_j(M_ij + g_j), then g_j = -log m - LSE_i(M_ij + f_i). Only g is
kept, in `potentials` (sets, groups, rounds + 2, m): row 0 is zero, row t the g of round t, and the last row is what
takes the place of g in the gathering weights, -log m - LSE_i(M + f + log F) where they are renormalised.

    R_t       R_ij = softmax_j(M + g_(t-1)) = n exp(M + f_t + g_(t-1))         rows sum to 1
    gather    G_ij = m exp(M + f + log F + last row)                            columns sum to 1 if renormalised
    scatter   W_ij = softmax_j(M + g + log F), or n exp(M + f + g + log F)

A round takes one exponential for each pair: g_t = g_(t-1) - log m + log n - log sum_i R_t.

Backward: with dlog the gradient of log P + log F, each half round is a negative logsumexp, so it passes its gradient
on by a softmax, R_t or C_t = m exp(M + f_t + g_t) = R_t (m / n) exp(g_t - g_(t-1)), whose columns sum to 1:

    df_t = -C dg_t (+ row sums of dlog for the last t),  dg_(t-1) = -R^T df_t,  dM = dlog - sum_t (C dg_t + R df_t)

The exponentials are taken of M - 1 / epsilon <= 0 and of g less its largest number. Their products stay within fp32
as long as epsilon is not small and the filter not narrow; otherwise (LOGS) everything is added up as logarithms.

Letters: b = images, h = heads, n = tokens, m = references, k = features, d = values. Upper case is known when a kernel
is compiled; MP, KP, DP are M, K, D rounded up to a power of two. In padding columns exp(g) is 0, or with LOGS the
exponent FLOOR, so their weights vanish; hidden and absent tokens are never read, and get weight 0.
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
# What sums of weights are divided by at least: above the least normal fp32, below any sum that is not 0.
TINY = tl.constexpr(1e-37)
# Vectors shorter than this are divided by it instead of by their length; that of `kernels.unit`.
SHORTEST = tl.constexpr(1e-6)
LOG2_E = tl.constexpr(1.4426950408889634)


class View(NamedTuple):
    """A tensor (b, h, n, channels) by its strides, in elements; a stride of 1 is compiled in."""

    at: torch.Tensor
    b: int
    h: int
    n: int
    c: int


class Data(NamedTuple):
    """Inputs of both kernels, and the buffers by which programs speak to each other.

    Attributes:
        x: values.
        features: what is compared with the references; None takes x of unit length.
        gather: references that gather, (h, m, k), contiguous, of any length.
        scatter: those that scatter, likewise and of the same dtype; None where one set does both.
        positions: (b or 1, n, axes), contiguous, or None.
        positions_b: stride from one image's positions to the next; 0 where all share them.
        places: (m, axes), contiguous, or None.
        mask: (b, n) bytes, not 0 for valid tokens, or None.
        counts: (b,) number of valid tokens, given with `mask`; where ranks share images, always, and of whole images.
        inverses: (groups, n), 1 / length of each token of x, written by the first phase; None with `features`, and
            where a tile is loaded once (triton_short_kernels.py).
        slots: (rounds + 1, sets, groups, SPLITS, MP), sums over the tokens of a split.
        parts: (groups, SPLITS, MP, DP), likewise; both None where nothing is left for later (triton_short_kernels.py).
        gate: (1 + groups,) zeros: a counter that names programs, and for each group how many have arrived; None where
            no program waits.
        totals: (sets, groups, m), where ranks share images: what all of them had to say of the round before, instead of
            what the splits left (triton_split_kernels.py); None where a rank has its images whole.
        groups: heads of all images.
        heads: h.
        n: tokens.
        run: tokens of one split, a multiple of BLOCK.
    """

    x: View
    features: View | None
    gather: torch.Tensor
    scatter: torch.Tensor | None
    positions: torch.Tensor | None
    positions_b: int
    places: torch.Tensor | None
    mask: torch.Tensor | None
    counts: torch.Tensor | None
    inverses: torch.Tensor | None
    slots: torch.Tensor | None
    parts: torch.Tensor | None
    gate: torch.Tensor | None
    totals: torch.Tensor | None
    groups: int
    heads: int
    n: int
    run: int


class Spec(NamedTuple):
    """What a kernel is compiled for; a kernel gets each as a tl.constexpr.

    Attributes:
        M, MP, K, KP, D, DP: sizes and their padded forms.
        BLOCK: tokens of one tile.
        SETS: reference sets, 1 or 2.
        ROUNDS: Sinkhorn rounds.
        SPLITS: programs that share the tokens of a group, a power of two.
        TOGETHER: all phases are one launch, and the splits of a group wait for each other.
        LOGS: weights could leave fp32's range on the way and are added up as logarithms.
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
    TOGETHER: bool
    LOGS: bool
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
    columns = tl.arange(0, PADDED).to(tl.int64)  # channels may lie far apart, too
    return start + rows.to(tl.int64)[:, None] * view.n + columns[None, :] * view.c


@triton.jit
def _load_tile(view, b, h, rows, shown, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    inside = shown[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]
    return tl.load(_tile_at(view, b, h, rows, PADDED), mask=inside, other=0.0)


@triton.jit
def _store_tile(view, b, h, rows, present, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    inside = present[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]
    tl.store(_tile_at(view, b, h, rows, PADDED), tile.to(view.at.dtype.element_ty), mask=inside)


@triton.jit
def _square_at(at, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to matrix `index` of a contiguous stack (., ROWS, COLUMNS) without padding."""
    inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return at + index.to(tl.int64) * (ROWS * COLUMNS) + inner


@triton.jit
def _references(data, s, h, spec):
    """References of one set and head, brought to unit length, (MP, KP), zeros in the padding."""
    j = tl.arange(0, spec.MP)
    k = tl.arange(0, spec.KP)
    at = _set_at(data.gather, data.scatter, s) + (h * spec.M + j)[:, None] * spec.K + k[None, :]
    found = tl.load(at, mask=(j < spec.M)[:, None] & (k < spec.K)[None, :], other=0.0).to(spec.ACC)
    return found * _inverse_length(tl.sum(found * found, 1))[:, None]


@triton.jit
def _set_at(gather, scatter, s):
    """Pointer to what belongs to set s."""
    return gather if scatter is None else tl.where(s == 0, gather, scatter)


@triton.jit
def _inverse_length(square):
    """1 / length of references from their square sums; a shorter one than SHORTEST is divided by that."""
    return 1.0 / tl.sqrt(tl.maximum(square, SHORTEST * SHORTEST))


@triton.jit
def _row_at(at, row, s, group, data, ROWS: tl.constexpr, WIDTH: tl.constexpr, spec):
    """Pointers to a row of (sets, groups, ROWS, WIDTH)."""
    return at + ((group + data.groups * s).to(tl.int64) * ROWS + row) * WIDTH + tl.arange(0, spec.MP)


@triton.jit
def _load_potential(potentials, t, s, group, data, spec):
    """Row t of the potentials of a set, zeros in the padding."""
    at = _row_at(potentials, t, s, group, data, spec.ROUNDS + 2, spec.M, spec)
    return tl.load(at, mask=tl.arange(0, spec.MP) < spec.M, other=0.0)


@triton.jit
def _store_potential(potentials, t, s, group, values, data, spec):
    at = _row_at(potentials, t, s, group, data, spec.ROUNDS + 2, spec.M, spec)
    tl.store(at, values, mask=tl.arange(0, spec.MP) < spec.M)


@triton.jit
def _slots_at(data, t, s, group, spec):
    """Pointer to what the first split of a group has to say of round t."""
    place = group + data.groups * s + data.groups * spec.SETS * t
    return data.slots + place.to(tl.int64) * (spec.SPLITS * spec.MP)


@triton.jit
def _all_splits(data, t, s, group, j, spec):
    """What every split had to say of references j, (SPLITS, references)."""
    inner = tl.arange(0, spec.SPLITS)[:, None] * spec.MP + j[None, :]
    return tl.load(_slots_at(data, t, s, group, spec) + inner)


@triton.jit
def _leave(data, t, s, group, split, values, spec):
    """Say something about round t."""
    tl.store(_slots_at(data, t, s, group, spec) + split * spec.MP + tl.arange(0, spec.MP), values)


# --------------------------------------------------------------------------------------------------------- programs


@triton.jit
def _place(data, spec):
    """Return image, head, group and split of this program.

    Programs take their places in the order in which they begin. So, whenever one waits, those that it waits for have
    begun or are next, and earlier groups wait for nobody that has not begun: the wait ends, as a group fits on the
    device (`triton._may_wait`).
    """
    index = tl.program_id(0)
    if spec.TOGETHER:
        index = tl.atomic_add(data.gate, 1)
    group = index // spec.SPLITS
    return group // data.heads, group % data.heads, group, index % spec.SPLITS


@triton.jit
def _meet(data, group, meetings, spec):
    """Wait until all splits of the group came here; then each sees what the others stored before."""
    tl.debug_barrier()
    if spec.TOGETHER:
        arrived = tl.atomic_add(data.gate + 1 + group, 1, sem="acq_rel") + 1
        while arrived < meetings * spec.SPLITS:
            arrived = tl.atomic_add(data.gate + 1 + group, 0, sem="acquire")
        tl.debug_barrier()


@triton.jit
def _end(data, split, spec):
    """Return the token after the last one of a split."""
    return tl.minimum((split + 1) * data.run, data.n)


@triton.jit
def _log_count(data, b, spec):
    """Logarithm of the number of valid tokens of an image."""
    count = tl.full((), 0.0, spec.ACC)
    if data.counts is not None:
        count += tl.load(data.counts + b)
    else:
        count += data.n
    return tl.log(count)


@triton.jit
def _measure(data, b, h, group, split, spec):
    """Leave 1 / length of each token, for all later phases of this program."""
    if data.features is None:
        for start in range(split * data.run, _end(data, split, spec), spec.BLOCK):
            rows = start + tl.arange(0, spec.BLOCK)
            x = _load_tile(data.x, b, h, rows, _shown(data, b, rows), spec.D, spec.DP)
            at = data.inverses + group.to(tl.int64) * data.n + rows
            tl.store(at, _inverse_lengths(x, spec), mask=rows < data.n)
        tl.debug_barrier()


@triton.jit
def _inverse_lengths(x, spec):
    """1 / length of each row, brought near 1 by a power of two before its squares are summed: they cannot overflow."""
    largest = tl.max(tl.abs(x.to(tl.float32)), 1)
    scale = tl.exp2(-tl.floor(tl.log2(tl.maximum(largest, SHORTEST)))).to(spec.ACC)
    wide = x.to(spec.ACC) * scale[:, None]
    length = tl.sqrt(tl.sum(wide * wide, 1))
    return scale / tl.maximum(length, scale * SHORTEST)


# ------------------------------------------------------------------------------------------------------ one tile


@triton.jit
def _shown(data, b, rows):
    """True for tokens that are there and valid."""
    shown = rows < data.n
    if data.mask is not None:
        shown = shown & (tl.load(data.mask + b.to(tl.int64) * data.n + rows, mask=shown, other=0) != 0)
    return shown


@triton.jit
def _features(data, b, h, group, rows, shown, spec):
    """What is compared: (tile, factor of each row); f_i = factor_i * tile_i, so that products see x itself."""
    if data.features is not None:
        tile = _load_tile(data.features, b, h, rows, shown, spec.K, spec.KP)
        factor = tl.full((spec.BLOCK,), 1.0, spec.ACC)
    else:
        tile = _load_tile(data.x, b, h, rows, shown, spec.D, spec.DP)
        if data.inverses is None:
            factor = _inverse_lengths(tile, spec)
        else:
            factor = tl.load(data.inverses + group.to(tl.int64) * data.n + rows, mask=shown, other=0.0)
    return tile.to(spec.ROUND), factor


@triton.jit
def _cosine(tile, factor, references, spec):
    """Cosines f_i . r_j, (BLOCK, MP)."""
    return _dot(tile, tl.trans(references), spec) * factor[:, None]


@triton.jit
def _kernel(cosine, spec):
    """exp(M - 1 / epsilon), at most 1; with LOGS the exponents M themselves, FLOOR in the padding."""
    similarity = cosine
    if spec.SIGMA > 0:
        similarity = tl.exp2((cosine - 1.0) * (LOG2_E / (spec.SIGMA * spec.SIGMA)))
    if spec.LOGS:
        kernel = tl.where((tl.arange(0, spec.MP) < spec.M)[None, :], similarity * (1.0 / spec.EPSILON), FLOOR)
    else:
        kernel = tl.exp2((similarity - 1.0) * (LOG2_E / spec.EPSILON))
    return kernel


@triton.jit
def _filter(data, b, rows, shown, spec):
    """Position filter F, with LOGS its logarithm, (BLOCK, MP); anything without one."""
    j = tl.arange(0, spec.MP)
    found = tl.zeros((spec.BLOCK, spec.MP), spec.ACC)
    if spec.AXES > 0:
        of_rows = tl.zeros((spec.BLOCK,), spec.ACC)
        of_columns = tl.zeros((spec.MP,), spec.ACC)
        for axis in tl.static_range(spec.AXES):
            at = data.positions + b.to(tl.int64) * data.positions_b + rows * spec.AXES + axis
            position = tl.load(at, mask=shown, other=0.0) * (1.0 / spec.TAU)
            place = tl.load(data.places + j * spec.AXES + axis, mask=j < spec.M, other=0.0) * (1.0 / spec.TAU)
            if spec.LOGS:
                apart = position[:, None] - place[None, :]
                found -= apart * apart
            else:  # the same expanded: one multiplication and addition a pair
                found += (position * (2.0 * LOG2_E))[:, None] * place[None, :]
                of_rows += position * position * LOG2_E
                of_columns += place * place * LOG2_E
        if not spec.LOGS:
            found = tl.exp2(found - of_rows[:, None] - of_columns[None, :])
    return found


@triton.jit
def _filtered(kernel, near, spec):
    """K F, with LOGS the sum of their logarithms."""
    if spec.AXES > 0:
        if spec.LOGS:
            kernel += near
        else:
            kernel *= near
    return kernel


@triton.jit
def _columns(g, spec):
    """What `_rows` takes of g: exp(g), the largest 1, zeros in the padding; with LOGS g itself."""
    columns = g
    if not spec.LOGS:
        valid = tl.arange(0, spec.MP) < spec.M
        columns = tl.where(valid, tl.exp(g - tl.max(tl.where(valid, g, FLOOR), 0)), 0.0)
    return columns


@triton.jit
def _rows(kernel, columns, shown, spec):
    """Softmax over j of M + g as (e, u, f): R_ij = e_ij u_i, 0 in hidden rows, and f_i + log n, with LOGS only."""
    if spec.LOGS:
        logit = kernel + columns[None, :]
        top = tl.max(logit, 1)
        e = tl.exp(logit - top[:, None])
        total = tl.sum(e, 1)
        f = -top - tl.log(total)
    else:
        e = kernel * columns[None, :]
        total = tl.sum(e, 1)
        f = total
    return e, tl.where(shown, 1.0 / total, 0.0), f


@triton.jit
def _scale(g, g_before, log_count):
    """What turns exp(M + f + g_before) n into exp(M + f + g), column by column."""
    return tl.exp(g - g_before - log_count)


@triton.jit
def _gather_weights(kernel, near, before, last, log_count, shown, spec):
    """G_ij = m exp(M + f + log F + last row of the potentials); `before` is the g from which f came."""
    e, u, f = _rows(kernel, _columns(before, spec), shown, spec)
    if spec.LOGS:
        weights = tl.exp(_filtered(kernel, near, spec) + f[:, None] + (last + spec.LOG_M - log_count)[None, :])
        weights = tl.where(shown[:, None], weights, 0.0)
    else:
        weights = _filtered(e * u[:, None], near, spec) * _scale(last + spec.LOG_M, before, log_count)[None, :]
    return weights


@triton.jit
def _scatter_weights(kernel, near, before, g, shown, spec):
    """W_ij = softmax_j(M + g + log F), or n P F."""
    if spec.RENORMALISE:
        e, u, _ = _rows(_filtered(kernel, near, spec), _columns(g, spec), shown, spec)
        weights = e * u[:, None]
    else:
        e, u, f = _rows(kernel, _columns(before, spec), shown, spec)
        if spec.LOGS:
            weights = tl.exp(_filtered(kernel, near, spec) + g[None, :] + f[:, None])
            weights = tl.where(shown[:, None], weights, 0.0)
        else:
            weights = _filtered(e * u[:, None], near, spec) * tl.exp(g - before)[None, :]
    return weights


# ---------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _merged(lses):
    """Logsumexp over splits of theirs, (SPLITS, .) -> (.,)."""
    top = tl.max(lses, 0)
    return top + tl.log(tl.sum(tl.exp(lses - top[None, :]), 0))


@triton.jit
def _potential(lse, spec):
    """g_j = -log m - LSE_i; 0 for padding, and where no token is valid."""
    return tl.where(lse > 0.5 * FLOOR, -spec.LOG_M - lse, 0.0)


@triton.jit
def _potential_of(t, s, group, data, spec):
    """Return g of round t >= 1, from what the splits left, or from what all ranks had to say."""
    if data.totals is None:
        g = _potential(_merged(_all_splits(data, t - 1, s, group, tl.arange(0, spec.MP), spec)), spec)
    else:
        g = _potential_of_sums(_sums_of_ranks(data.totals, s, group, data, spec), spec)
    return g


@triton.jit
def _sums_of_ranks(totals, s, group, data, spec):
    """One number for each reference of (sets, groups, m), in its dtype, 0 in the padding."""
    j = tl.arange(0, spec.MP)
    return tl.load(totals + (group + data.groups * s) * spec.M + j, mask=j < spec.M, other=0.0)


@triton.jit
def _potential_of_sums(sums, spec):
    """As `_potential`, of sum_i exp(M + f), which may be in a wider dtype."""
    return tl.where(sums > 0.0, -spec.LOG_M - tl.log(tl.where(sums > 0.0, sums, 1.0)), 0.0).to(spec.ACC)


@triton.jit
def _add_to_lse(logit, shown, top, total):
    """Add a tile to a running logsumexp over tokens, kept as its largest term and a sum relative to it.

    Returns both, what the terms are relative to the largest, and what the sum before shrank by.
    """
    logit = tl.where(shown[:, None], logit, FLOOR)
    higher = tl.maximum(top, tl.max(logit, 0))
    terms = tl.where(shown[:, None], tl.exp(logit - higher[None, :]), 0.0)
    shrunk = tl.exp(top - higher)
    return higher, total * shrunk + tl.sum(terms, 0), terms, shrunk


@triton.jit
def _lse(total, g, log_count):
    """LSE_i(M + f) from column sums of R; FLOOR where nothing was added up."""
    return tl.where(total > 0.0, tl.log(tl.maximum(total, TINY)) - g - log_count, FLOOR)


@triton.jit
def _round(potentials, t, LAST: tl.constexpr, b, h, group, split, data, spec):
    """Round t + 1 of a split: leave LSE_i(M + f) in slot t; the last one gathers, too.

    It leaves the mean of x by the gathering weights, and LSE_i(M + f + log F) in slot ROUNDS.
    """
    log_count = _log_count(data, b, spec)
    for s in range(spec.SETS):
        references = _references(data, s, h, spec)
        g = tl.zeros((spec.MP,), spec.ACC)
        if t > 0:
            g = _potential_of(t, s, group, data, spec)
        if split == 0:
            _store_potential(potentials, t, s, group, g, data, spec)
        columns = _columns(g, spec)
        # Summed over tiles in place, and over the tokens of a tile once at the end; with LOGS, one row is in use.
        sums = tl.zeros((1 if spec.LOGS else spec.BLOCK, spec.MP), spec.ACC)
        near_sums = tl.zeros((1 if spec.LOGS or spec.AXES == 0 else spec.BLOCK, spec.MP), spec.ACC)
        top = tl.full((spec.MP,), FLOOR, spec.ACC)
        near_top = top
        total = tl.zeros((spec.MP,), spec.ACC)
        near_total = total
        part = tl.zeros((spec.MP, spec.DP), spec.ACC)
        for start in range(split * data.run, _end(data, split, spec), spec.BLOCK):
            rows = start + tl.arange(0, spec.BLOCK)
            shown = _shown(data, b, rows)
            tile, factor = _features(data, b, h, group, rows, shown, spec)
            kernel = _kernel(_cosine(tile, factor, references, spec), spec)
            e, u, f = _rows(kernel, columns, shown, spec)
            if spec.LOGS:
                top, total, weights, _ = _add_to_lse(kernel + f[:, None], shown, top, total)
            else:
                weights = e * u[:, None]
                sums += weights
            if LAST and (s == 0):
                near = _filter(data, b, rows, shown, spec)
                x = _load_tile(data.x, b, h, rows, shown, spec.D, spec.DP)
                if spec.LOGS:
                    logit = _filtered(kernel, near, spec) + f[:, None]
                    near_top, near_total, weights, shrunk = _add_to_lse(logit, shown, near_top, near_total)
                    part *= shrunk[:, None]
                elif spec.AXES > 0:
                    weights = _filtered(weights, near, spec)
                    near_sums += weights
                part += _dot(tl.trans(weights), x, spec)
        if spec.LOGS:
            lse = top + tl.log(tl.maximum(total, 1.0)) - log_count
            near_lse = near_top + tl.log(tl.maximum(near_total, 1.0)) - log_count
        else:
            total = tl.sum(sums, 0)
            near_total = total if spec.AXES == 0 else tl.sum(near_sums, 0)
            lse = _lse(total, g, log_count)
            near_lse = _lse(near_total, g, log_count)
        _leave(data, t, s, group, split, lse, spec)
        if LAST and s == 0:
            _leave(data, spec.ROUNDS, 0, group, split, near_lse, spec)
            part = part / tl.maximum(near_total, TINY)[:, None]
            tl.store(_square_at(data.parts, group * spec.SPLITS + split, spec.MP, spec.DP), part)


@triton.jit
def _parts_of_some(data, j, group, spec):
    """Rows j of what every split left in `parts`, (SPLITS, rows, DP)."""
    splits = tl.arange(0, spec.SPLITS)[:, None, None] * spec.MP + j[None, :, None]
    first = group.to(tl.int64) * (spec.SPLITS * spec.MP * spec.DP)
    return tl.load(data.parts + first + splits * spec.DP + tl.arange(0, spec.DP)[None, None, :])


@triton.jit
def _some(split, spec):
    """The references whose parts this split adds up: an equal share, or one of the first splits one each."""
    SHARE: tl.constexpr = spec.MP // spec.SPLITS if spec.SPLITS <= spec.MP else 1
    return tl.minimum(split, spec.MP - 1) * SHARE + tl.arange(0, SHARE)


@triton.jit
def _some_at(at, j, group, spec):
    """Pointers to rows j of matrix `group` of (., MP, DP)."""
    return at + group.to(tl.int64) * (spec.MP * spec.DP) + j[:, None] * spec.DP + tl.arange(0, spec.DP)[None, :]


@triton.jit
def _settle(potentials, pooled, group, split, data, spec):
    """Write the last potentials and G^T x, (groups, MP, DP), each split a share of its rows."""
    if split == 0:
        near_lse = _merged(_all_splits(data, spec.ROUNDS, 0, group, tl.arange(0, spec.MP), spec))
        for s in tl.static_range(spec.SETS):
            g = _potential_of(spec.ROUNDS, s, group, data, spec)
            _store_potential(potentials, spec.ROUNDS, s, group, g, data, spec)
            last = _potential(near_lse, spec) if spec.RENORMALISE else g
            _store_potential(potentials, spec.ROUNDS + 1, s, group, last, data, spec)
    j = _some(split, spec)
    lses = _all_splits(data, spec.ROUNDS, 0, group, j, spec)
    lse = _merged(lses)
    shares = tl.exp(lses - lse[None, :])
    if not spec.RENORMALISE:
        g = _potential(_merged(_all_splits(data, spec.ROUNDS - 1, 0, group, j, spec)), spec)
        shares = shares * tl.exp(lse + g + spec.LOG_M)[None, :]
    found = tl.sum(_parts_of_some(data, j, group, spec) * shares[:, :, None], 0)
    tl.store(_some_at(pooled, j, group, spec), found)


@triton.jit
def _spread(y, potentials, pooled, b, h, group, split, data, spec):
    """Write y = W pooled, 0 for hidden tokens."""
    references = _references(data, spec.SETS - 1, h, spec)
    before = _load_potential(potentials, spec.ROUNDS - 1, spec.SETS - 1, group, data, spec)
    g = _load_potential(potentials, spec.ROUNDS, spec.SETS - 1, group, data, spec)
    values = tl.load(_square_at(pooled, group, spec.MP, spec.DP))
    for start in range(split * data.run, _end(data, split, spec), spec.BLOCK):
        rows = start + tl.arange(0, spec.BLOCK)
        shown = _shown(data, b, rows)
        tile, factor = _features(data, b, h, group, rows, shown, spec)
        kernel = _kernel(_cosine(tile, factor, references, spec), spec)
        weights = _scatter_weights(kernel, _filter(data, b, rows, shown, spec), before, g, shown, spec)
        _store_tile(y, b, h, rows, rows < data.n, _dot(weights, values, spec), spec.D, spec.DP)


@triton.jit
def forward(y, potentials, pooled, data, FIRST: tl.constexpr, END: tl.constexpr, spec):
    """Run phases FIRST ... END - 1 of ROUNDS + 2: the rounds, the sums over splits, the way back."""
    b, h, group, split = _place(data, spec)
    LAST: tl.constexpr = spec.ROUNDS - 1
    if FIRST == 0:
        _measure(data, b, h, group, split, spec)
    for t in range(FIRST, END if END < LAST else LAST):
        _round(potentials, t, False, b, h, group, split, data, spec)
        _meet(data, group, t + 1, spec)
    if FIRST <= LAST and END > LAST:
        _round(potentials, LAST, True, b, h, group, split, data, spec)
        _meet(data, group, LAST + 1, spec)
    if FIRST <= LAST + 1 and END > LAST + 1:
        _settle(potentials, pooled, group, split, data, spec)
        _meet(data, group, LAST + 2, spec)
    if END > LAST + 2:
        _spread(y, potentials, pooled, b, h, group, split, data, spec)


# --------------------------------------------------------------------------------------------------------- backward


class Adjoint(NamedTuple):
    """What the backward needs beyond Data.

    Attributes:
        potentials: as the forward left them.
        columns: (sets, groups, rounds + 1, 2, MP), what round t's rows and gradients are made of, row 0 unused: see
            `_columns_of`.
        pooled: (groups, MP, DP), as the forward left it.
        d_pooled: its gradient.
        along: (groups, MP), their dot product.
    """

    potentials: torch.Tensor
    columns: torch.Tensor
    pooled: torch.Tensor
    d_pooled: torch.Tensor
    along: torch.Tensor


@triton.jit
def _scatter_gradient(weights, dy, pooled, spec):
    """Gradient of log P F through the scattering weights."""
    d_weights = _dot(dy, tl.trans(pooled), spec)
    if spec.RENORMALISE:
        d_weights -= tl.sum(weights * d_weights, 1)[:, None]
    return weights * d_weights


@triton.jit
def _spread_adjoint(dy, adjoint, b, h, group, split, data, spec):
    """Leave W^T dy in `parts` and the column sums of dlog, the gradient of the last g, in slot ROUNDS."""
    references = _references(data, spec.SETS - 1, h, spec)
    before = _load_potential(adjoint.potentials, spec.ROUNDS - 1, spec.SETS - 1, group, data, spec)
    g = _load_potential(adjoint.potentials, spec.ROUNDS, spec.SETS - 1, group, data, spec)
    pooled = tl.load(_square_at(adjoint.pooled, group, spec.MP, spec.DP))
    part = tl.zeros((spec.MP, spec.DP), spec.ACC)
    sums = tl.zeros((spec.BLOCK, spec.MP), spec.ACC)
    for start in range(split * data.run, _end(data, split, spec), spec.BLOCK):
        rows = start + tl.arange(0, spec.BLOCK)
        shown = _shown(data, b, rows)
        tile, factor = _features(data, b, h, group, rows, shown, spec)
        kernel = _kernel(_cosine(tile, factor, references, spec), spec)
        weights = _scatter_weights(kernel, _filter(data, b, rows, shown, spec), before, g, shown, spec)
        gradient = _load_tile(dy, b, h, rows, shown, spec.D, spec.DP)
        part += _dot(tl.trans(weights), gradient, spec)
        sums += _scatter_gradient(weights, gradient, pooled, spec)
    tl.store(_square_at(data.parts, group * spec.SPLITS + split, spec.MP, spec.DP), part)
    _leave(data, spec.ROUNDS, spec.SETS - 1, group, split, tl.sum(sums, 0), spec)


@triton.jit
def _settle_adjoint(adjoint, group, split, data, spec):
    """Write dpooled and its product with pooled, each split a share of the rows."""
    j = _some(split, spec)
    d_pooled = tl.sum(_parts_of_some(data, j, group, spec), 0)
    pooled = tl.load(_some_at(adjoint.pooled, j, group, spec))
    tl.store(_some_at(adjoint.d_pooled, j, group, spec), d_pooled)
    tl.store(adjoint.along + group.to(tl.int64) * spec.MP + j, tl.sum(pooled * d_pooled, 1))


@triton.jit
def _along(adjoint, group, spec):
    return tl.load(adjoint.along + group.to(tl.int64) * spec.MP + tl.arange(0, spec.MP))


@triton.jit
def _gradient_of(t, s, adjoint, group, data, spec):
    """Return dg of round t, from what the splits left, or from what all ranks had to say."""
    dg = tl.zeros((spec.MP,), spec.ACC)
    if t < spec.ROUNDS:
        if data.totals is None:
            dg += tl.sum(_all_splits(data, t, s, group, tl.arange(0, spec.MP), spec), 0)
        else:
            sums = _sums_of_ranks(data.totals, s, group, data, spec)
            g = _load_potential(adjoint.potentials, t, s, group, data, spec)
            dg -= (tl.exp(g.to(sums.dtype)) * sums).to(spec.ACC)
    else:
        if s == spec.SETS - 1:
            if data.totals is None:
                dg += tl.sum(_all_splits(data, spec.ROUNDS, s, group, tl.arange(0, spec.MP), spec), 0)
            else:
                dg += _sums_of_ranks(data.totals, 0, group, data, spec).to(spec.ACC)
        if not spec.RENORMALISE and s == 0:  # renormalised gathering weights do not feel their own column potential
            dg += _along(adjoint, group, spec)
    return dg


@triton.jit
def _columns_of(t, s, adjoint, group, log_count, data, spec):
    """What `_half_round` takes of round t: (columns of R_t, of C_t dg_t relative to R_t); with LOGS g_(t-1) and dg."""
    dg = _gradient_of(t, s, adjoint, group, data, spec)
    before = _load_potential(adjoint.potentials, t - 1, s, group, data, spec)
    if not spec.LOGS:
        g = _load_potential(adjoint.potentials, t, s, group, data, spec)
        dg *= _scale(g + spec.LOG_M, before, log_count)
    return _columns(before, spec), dg


@triton.jit
def _half_round(kernel, columns, dg, t, s, adjoint, group, log_count, shown, data, spec):
    """Round t of a tile by `_columns_of`: (e, u, C dg), where R = e u; C dg as its row sums and, with LOGS, itself."""
    e, u, f = _rows(kernel, columns, shown, spec)
    if spec.LOGS:
        g = _load_potential(adjoint.potentials, t, s, group, data, spec)
        c = tl.exp(kernel + f[:, None] + (g + spec.LOG_M - log_count)[None, :]) * dg[None, :]
        c = tl.where(shown[:, None], c, 0.0)
        along = tl.sum(c, 1)
    else:
        c = kernel
        along = u * tl.sum(e * dg[None, :], 1)
    return e, u, c, along


@triton.jit
def _of_gathering(adjoint, group, data, spec):
    """What `_gather_side` needs for every tile: two potentials, dpooled, and its product with pooled."""
    before = _load_potential(adjoint.potentials, spec.ROUNDS - 1, 0, group, data, spec)
    last = _load_potential(adjoint.potentials, spec.ROUNDS + 1, 0, group, data, spec)
    d_pooled = tl.load(_square_at(adjoint.d_pooled, group, spec.MP, spec.DP))
    return before, last, d_pooled, _along(adjoint, group, spec)


@triton.jit
def _gather_side(kernel, near, gathering, b, h, rows, shown, log_count, data, spec):
    """Return the gathering weights of a tile and the gradient of their logarithms; along_j = pooled_j . dpooled_j."""
    before, last, d_pooled, along = gathering
    weights = _gather_weights(kernel, near, before, last, log_count, shown, spec)
    x = _load_tile(data.x, b, h, rows, shown, spec.D, spec.DP)
    d_weights = _dot(x, tl.trans(d_pooled), spec)
    if spec.RENORMALISE:
        d_weights -= along[None, :]
    return weights, weights * d_weights


@triton.jit
def _of_scattering(adjoint, group, data, spec):
    """What `_scatter_side` needs for every tile: two potentials and pooled."""
    before = _load_potential(adjoint.potentials, spec.ROUNDS - 1, spec.SETS - 1, group, data, spec)
    g = _load_potential(adjoint.potentials, spec.ROUNDS, spec.SETS - 1, group, data, spec)
    return before, g, tl.load(_square_at(adjoint.pooled, group, spec.MP, spec.DP))


@triton.jit
def _scatter_side(kernel, near, scattering, b, h, rows, shown, dy, data, spec):
    """Return the gradient of the logarithms of the scattering weights of a tile."""
    before, g, pooled = scattering
    weights = _scatter_weights(kernel, near, before, g, shown, spec)
    return _scatter_gradient(weights, _load_tile(dy, b, h, rows, shown, spec.D, spec.DP), pooled, spec)


@triton.jit
def _round_adjoint(t, LAST: tl.constexpr, dy, adjoint, b, h, group, split, data, spec):
    """Pass gradients from g of round t to that of round t - 1; leave them in slot t - 1."""
    log_count = _log_count(data, b, spec)
    if LAST:
        gathering, scattering = _of_gathering(adjoint, group, data, spec), _of_scattering(adjoint, group, data, spec)
    for s in range(spec.SETS):
        references = _references(data, s, h, spec)
        columns, dg = _columns_of(t, s, adjoint, group, log_count, data, spec)
        if split == 0:
            at = _row_at(adjoint.columns, 2 * t, s, group, data, 2 * (spec.ROUNDS + 1), spec.MP, spec)
            tl.store(at, columns)
            tl.store(at + spec.MP, dg)
        sums = tl.zeros((spec.BLOCK, spec.MP), spec.ACC)
        for start in range(split * data.run, _end(data, split, spec), spec.BLOCK):
            rows = start + tl.arange(0, spec.BLOCK)
            shown = _shown(data, b, rows)
            tile, factor = _features(data, b, h, group, rows, shown, spec)
            kernel = _kernel(_cosine(tile, factor, references, spec), spec)
            e, u, _, along = _half_round(kernel, columns, dg, t, s, adjoint, group, log_count, shown, data, spec)
            df = -along
            if LAST:
                near = _filter(data, b, rows, shown, spec)
                if s == 0:
                    _, dlog = _gather_side(kernel, near, gathering, b, h, rows, shown, log_count, data, spec)
                    df += tl.sum(dlog, 1)
                if s == spec.SETS - 1:
                    df += tl.sum(_scatter_side(kernel, near, scattering, b, h, rows, shown, dy, data, spec), 1)
            sums -= e * (u * df)[:, None]
        _leave(data, t - 1, s, group, split, tl.sum(sums, 0), spec)


@triton.jit
def _less_round(total, kernel, columns, dg, t, s, of_dlog, adjoint, group, log_count, shown, data, spec):
    """Take C dg + R df of round t from the gradient of a tile's exponents."""
    e, u, c, along = _half_round(kernel, columns, dg, t, s, adjoint, group, log_count, shown, data, spec)
    df = tl.where(t == spec.ROUNDS, of_dlog, 0.0) - along
    if spec.LOGS:
        total -= c + e * (u * df)[:, None]
    else:
        total -= e * (u[:, None] * dg[None, :] + (u * df)[:, None])
    return total


@triton.jit
def _cosine_gradient(dlog, cosine, kernel, columns, dg, s, adjoint, group, log_count, shown, data, spec):
    """Gradient of the cosines of a tile: dM = dlog - sum_t (C dg_t + R df_t), through epsilon and the Gaussian.

    `columns` and `dg` are those of round 1.
    """
    of_dlog = tl.sum(dlog, 1)
    total = _less_round(dlog, kernel, columns, dg, 1, s, of_dlog, adjoint, group, log_count, shown, data, spec)
    for t in range(2, spec.ROUNDS + 1):
        at = _row_at(adjoint.columns, 2 * t, s, group, data, 2 * (spec.ROUNDS + 1), spec.MP, spec)
        its, its_dg = tl.load(at), tl.load(at + spec.MP)
        total = _less_round(total, kernel, its, its_dg, t, s, of_dlog, adjoint, group, log_count, shown, data, spec)
    return _of_exponents(total, cosine, spec)


@triton.jit
def _of_exponents(total, cosine, spec):
    """Gradient of the cosines from that of the exponents."""
    if spec.SIGMA > 0:
        VARIANCE: tl.constexpr = spec.SIGMA * spec.SIGMA
        total *= tl.exp2((cosine - 1.0) * (LOG2_E / VARIANCE)) * (1.0 / (VARIANCE * spec.EPSILON))
    else:
        total *= 1.0 / spec.EPSILON
    return total


@triton.jit
def _store_gradients(d_features, dx_values, tile, factor, b, h, rows, dx, dfeatures, data, spec):
    """Write dx and dfeatures, or dx with what reaches it through the unit vectors."""
    present = rows < data.n
    if data.features is not None:
        _store_tile(dfeatures, b, h, rows, present, d_features, spec.K, spec.KP)
    else:
        # A vector that was divided by SHORTEST, not by its length, has no direction to stay tangent to.
        units = tile.to(spec.ACC) * factor[:, None]
        along = tl.where(factor * SHORTEST < 0.999999, tl.sum(d_features * units, 1), 0.0)
        dx_values += (d_features - units * along[:, None]) * factor[:, None]
    _store_tile(dx, b, h, rows, present, dx_values, spec.D, spec.DP)


@triton.jit
def _gradients(dx, dfeatures, d_references, dy, adjoint, b, h, group, split, data, spec):
    """Write dx, dfeatures, and each split's part of the gradient of the references, (sets, groups, SPLITS, MP, KP)."""
    log_count = _log_count(data, b, spec)
    gathering, scattering = _of_gathering(adjoint, group, data, spec), _of_scattering(adjoint, group, data, spec)
    references = _references(data, 0, h, spec)
    columns, dg = _columns_of(1, 0, adjoint, group, log_count, data, spec)
    d_gather = tl.zeros((spec.MP, spec.KP), spec.ACC)
    if spec.SETS == 2:
        its_references = _references(data, 1, h, spec)
        its_columns, its_dg = _columns_of(1, 1, adjoint, group, log_count, data, spec)
        d_scatter = tl.zeros((spec.MP, spec.KP), spec.ACC)
    for start in range(split * data.run, _end(data, split, spec), spec.BLOCK):
        rows = start + tl.arange(0, spec.BLOCK)
        shown = _shown(data, b, rows)
        tile, factor = _features(data, b, h, group, rows, shown, spec)
        near = _filter(data, b, rows, shown, spec)
        cosine = _cosine(tile, factor, references, spec)
        kernel = _kernel(cosine, spec)
        weights, dlog = _gather_side(kernel, near, gathering, b, h, rows, shown, log_count, data, spec)
        dx_values = _dot(weights, gathering[2], spec)
        if spec.SETS == 1:
            dlog += _scatter_side(kernel, near, scattering, b, h, rows, shown, dy, data, spec)
        d_cosine = _cosine_gradient(dlog, cosine, kernel, columns, dg, 0, adjoint, group, log_count, shown, data, spec)
        d_features = _dot(d_cosine, references, spec)
        d_gather += _dot(tl.trans(d_cosine * factor[:, None]), tile, spec)
        if spec.SETS == 2:
            cosine = _cosine(tile, factor, its_references, spec)
            kernel = _kernel(cosine, spec)
            dlog = _scatter_side(kernel, near, scattering, b, h, rows, shown, dy, data, spec)
            d_cosine = _cosine_gradient(
                dlog, cosine, kernel, its_columns, its_dg, 1, adjoint, group, log_count, shown, data, spec
            )
            d_features += _dot(d_cosine, its_references, spec)
            d_scatter += _dot(tl.trans(d_cosine * factor[:, None]), tile, spec)
        _store_gradients(d_features, dx_values, tile, factor, b, h, rows, dx, dfeatures, data, spec)
    place = group * spec.SPLITS + split
    tl.store(_square_at(d_references, place, spec.MP, spec.KP), d_gather)
    if spec.SETS == 2:
        tl.store(_square_at(d_references, data.groups * spec.SPLITS + place, spec.MP, spec.KP), d_scatter)


@triton.jit
def backward(dx, dfeatures, d_references, dy, adjoint, data, FIRST: tl.constexpr, END: tl.constexpr, spec):
    """Run phases FIRST ... END - 1 of ROUNDS + 2: the way back, sums over splits, rounds ROUNDS ... 2, gradients."""
    b, h, group, split = _place(data, spec)
    LAST: tl.constexpr = spec.ROUNDS + 1
    if FIRST == 0:
        _measure(data, b, h, group, split, spec)
        _spread_adjoint(dy, adjoint, b, h, group, split, data, spec)
        _meet(data, group, 1, spec)
    if FIRST <= 1 and END > 1:
        _settle_adjoint(adjoint, group, split, data, spec)
        _meet(data, group, 2, spec)
    if LAST > 2 and FIRST <= 2 and END > 2:
        _round_adjoint(spec.ROUNDS, True, dy, adjoint, b, h, group, split, data, spec)
        _meet(data, group, 3, spec)
    for phase in range(FIRST if FIRST > 3 else 3, END if END < LAST else LAST):
        _round_adjoint(LAST + 1 - phase, False, dy, adjoint, b, h, group, split, data, spec)
        _meet(data, group, phase + 1, spec)
    if END > LAST:
        _gradients(dx, dfeatures, d_references, dy, adjoint, b, h, group, split, data, spec)


@triton.jit
def references_backward(
    d_gather,
    d_scatter,
    d_units,
    gather,
    scatter,
    heads,
    parts,
    M: tl.constexpr,
    MP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of the references from all parts of those of their unit vectors, added up in fixed order.

    A program has ROWS references of one set and head. Further arguments:
        d_units: what `backward` wrote, (sets, b, heads, SPLITS, MP, KP).
        parts: b * SPLITS.
        PARTS: how many of them are loaded at once.
    """
    first = tl.program_id(0) * ROWS
    s, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    j, k = first + tl.arange(0, ROWS), tl.arange(0, KP)
    inside = (j < M)[:, None] & (k < K)[None, :]
    total = tl.zeros((PARTS, ROWS, KP), ACC)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        group = s * (parts // SPLITS) * heads + (part // SPLITS) * heads + h
        place = (group * SPLITS + part % SPLITS).to(tl.int64) * (MP * KP)
        at = d_units + place[:, None, None] + (j[:, None] * KP + k[None, :])[None, :, :]
        total += tl.load(at, mask=(part < parts)[:, None, None] & inside[None, :, :], other=0.0)
    gradient = tl.sum(total, 0)
    own = (h * M + j)[:, None] * K + k[None, :]
    reference = tl.load(_set_at(gather, scatter, s) + own, mask=inside, other=0.0).to(ACC)
    square = tl.sum(reference * reference, 1)
    inverse = _inverse_length(square)
    along = tl.sum(gradient * reference, 1) * inverse * inverse
    along = tl.where(square < SHORTEST * SHORTEST, 0.0, along)
    found = (gradient - reference * along[:, None]) * inverse[:, None]
    tl.store(_set_at(d_gather, d_scatter, s) + own, found.to(d_gather.dtype.element_ty), mask=inside)
