"""Triton kernels of block.py: residual sum, layer norm and GELU's gradient, each in one pass over the tokens.

Rows are tokens, columns channels. A program of a backward pass takes a fixed number of rows (`block.SUMMED`) and
leaves its sums over them, so that a gradient has the same bits whatever GPU computes it.

Letters: R = rows, C = channels.
"""

# Arguments of compiled functions are Triton's tensors, tuples and constants, which have no types in Python.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def _tile(row, rows, C: tl.constexpr, CP: tl.constexpr, TILE: tl.constexpr):
    """Return a tile's rows, its columns, where it lies, and what of it there is."""
    r = row + tl.arange(0, TILE)
    c = tl.arange(0, CP)
    there = (r < rows)[:, None] & (c < C)[None, :]
    return r, c, r.to(tl.int64)[:, None] * C + c[None, :], there


@triton.jit
def _channels(vector, c, C: tl.constexpr, ACC: tl.constexpr):
    """Return a vector of channels as a row."""
    return tl.load(vector + c, c < C, 0.0).to(ACC)[None, :]


@triton.jit
def _factors(keep, r, rows, rows_of_sample, ACC: tl.constexpr):
    """Return each row's drop path factor as a column."""
    return tl.load(keep + r // rows_of_sample, r < rows, 0.0).to(ACC)[:, None]


@triton.jit
def add_norm(
    x, y, scale, keep, weight, shift, total, normed, mean, inverse, rows, rows_of_sample, eps,
    C: tl.constexpr, CP: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write x + keep * scale * y, where there is a y, and its layer norm, where there is a weight."""
    r, c, at, there = _tile(tl.program_id(0) * TILE, rows, C, CP, TILE)
    value = tl.load(x + at, there, 0.0).to(ACC)
    if y is not None:
        added = tl.load(y + at, there, 0.0).to(ACC)
        if scale is not None:
            added *= _channels(scale, c, C, ACC)
        if keep is not None:
            added *= _factors(keep, r, rows, rows_of_sample, ACC)
        # The norm is that of the sum as it is stored, which is all that the backward pass has.
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + at, rounded, there)
        value = rounded.to(ACC)
    if weight is not None:
        m = tl.sum(value, 1) / C
        centred = tl.where(there, value - m[:, None], 0.0)
        i = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
        unit = centred * i[:, None] * _channels(weight, c, C, ACC)
        if shift is not None:
            unit += _channels(shift, c, C, ACC)
        tl.store(normed + at, unit.to(normed.dtype.element_ty), there)
        tl.store(mean + r, m, r < rows)
        tl.store(inverse + r, i, r < rows)


@triton.jit
def add_norm_backward(
    d_total, d_normed, total, mean, inverse, weight, y, scale, keep, dx, dy, sums, rows, rows_of_sample,
    stride, C: tl.constexpr, CP: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of x and of y, and this program's sums over its rows.

    Sums are the gradients of a bias that y holds, of scale, and, with a norm, of its weight and shift, C numbers each.
    `d_total`, the gradient of the sum, and `d_normed`, that of the norm, may be None. `mean` and `inverse` are those of
    `total`. `y` is None where nobody needs the gradient of scale. `dx` is None where it is d_total, without a norm, and
    `dy` where it is dx. `stride` leads from the sums of one program to those of the next.
    """
    of_weight = tl.zeros((TILE, CP), ACC)
    of_shift = tl.zeros((TILE, CP), ACC)
    of_bias = tl.zeros((TILE, CP), ACC)
    of_scale = tl.zeros((TILE, CP), ACC)
    for i in range(TILES):
        r, c, at, there = _tile((tl.program_id(0) * TILES + i) * TILE, rows, C, CP, TILE)
        d = tl.zeros((TILE, CP), ACC)
        if d_total is not None:
            d += tl.load(d_total + at, there, 0.0).to(ACC)
        if d_normed is not None:
            d_out = tl.load(d_normed + at, there, 0.0).to(ACC)
            m = tl.load(mean + r, r < rows, 0.0)[:, None]
            inv = tl.load(inverse + r, r < rows, 0.0)[:, None]
            unit = tl.where(there, (tl.load(total + at, there, 0.0).to(ACC) - m) * inv, 0.0)
            weighted = d_out * _channels(weight, c, C, ACC)
            along = tl.sum(weighted * unit, 1)[:, None] / C
            # What is beyond the channels is not stored, and counts for no sum.
            d += (weighted - tl.sum(weighted, 1)[:, None] / C - unit * along) * inv
            of_weight += d_out * unit
            of_shift += d_out
            tl.store(dx + at, d.to(dx.dtype.element_ty), there)
        d = tl.where(there, d, 0.0)
        if keep is not None:
            d *= _factors(keep, r, rows, rows_of_sample, ACC)
        if scale is not None:
            if y is not None:
                of_scale += d * tl.load(y + at, there, 0.0).to(ACC)
            d *= _channels(scale, c, C, ACC)
        if dy is not None:
            tl.store(dy + at, d.to(dy.dtype.element_ty), there)
        of_bias += d
    c = tl.arange(0, CP)
    own = sums + tl.program_id(0).to(tl.int64) * stride + c
    tl.store(own, tl.sum(of_bias, 0), c < C)
    tl.store(own + C, tl.sum(of_scale, 0), c < C)
    if d_normed is not None:
        tl.store(own + 2 * C, tl.sum(of_weight, 0), c < C)
        tl.store(own + 3 * C, tl.sum(of_shift, 0), c < C)


@triton.jit
def gelu_backward(
    dy, x, dx, sums, rows, stride, C: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of GELU's input, and its sums over this program's rows; stride as in `add_norm_backward`."""
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    summed = tl.zeros((TILE, COLUMNS), ACC)
    for i in range(TILES):
        r = (tl.program_id(0) * TILES + i) * TILE + tl.arange(0, TILE)
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        there = (r < rows)[:, None] & (c < C)[None, :]
        value = tl.load(x + at, there, 0.0).to(ACC)
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        d = tl.load(dy + at, there, 0.0).to(ACC)
        d *= 0.5 * (1 + tl.erf(value * 0.7071067811865476)) + value * density
        tl.store(dx + at, d.to(dx.dtype.element_ty), there)
        summed += d
    tl.store(sums + tl.program_id(0).to(tl.int64) * stride + c, tl.sum(summed, 0), c < C)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of the dtype that kernels add in."""
    return tl.float64 if dtype == torch.float64 else tl.float32
