"""The parts of a transformer block on both sides of its attention, for GPUs: each one autograd function.

    enter    x -> x and norm1(x), which attention gets
    leave    x, y -> x' = x + keep1 scale1 output(y),   x' + keep2 scale2 fc2(gelu(fc1(norm2(x'))))

By PyTorch's operators residual sums, layer scale, drop path, norms and, backward, the sums over all tokens for the
gradients of weights and biases read and write the tokens once each, and autograd spends more of the host's time than
the kernels last. Here a residual sum and the norm behind it are one pass, gradients of vectors are summed where the
tokens are read anyway, and products are PyTorch's. Results are the same every time.

None of this is for compiled graphs: a compiler fuses the same by itself. On CPUs PyTorch's operators are as fast.

Letters: S = samples, R = rows (tokens of all samples), C = channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from setformer_dist.ops.set.op import runs_triton, watched

try:
    from setformer_dist.ops import block_kernels as kernels
except ImportError:  # a PyTorch without Triton
    kernels = None  # type: ignore[assignment]

Maybe = torch.Tensor | None

# Numbers of a tile: 8 for each thread of 4 warps, in each of about eight tiles that a backward pass holds.
TILE = 1024
# Numbers of the tiles that a program sums over, a fixed number, so that a sum has the same bits on every GPU.
SUMMED = 16384
# Channels of a row that is one tile, at most; 0 takes PyTorch's operators for all.
WIDEST = 4096
# Channels of GELU's tiles, which do not depend on each other: 128 bytes of two-byte numbers.
COLUMNS = 64


class Weights(NamedTuple):
    """Of `leave`: linear layers as (out, in) and (out,), norms and layer scales as (C,); None for what is not there."""

    output: torch.Tensor
    output_bias: Maybe
    scale1: Maybe
    norm: torch.Tensor
    norm_bias: Maybe
    fc1: torch.Tensor
    fc1_bias: Maybe
    fc2: torch.Tensor
    fc2_bias: Maybe
    scale2: Maybe


def available(x: torch.Tensor, layers: Sequence[nn.Module]) -> bool:
    """Return whether these functions can stand for the layers here, and nobody looks at how they compute.

    Args:
        x: what the block gets, (S, ..., C).
        layers: linear layers and norms whose weights are taken.
    """
    return (
        kernels is not None
        and runs_triton(x.device.type)
        and 0 < x.shape[-1] <= WIDEST
        and x.numel() > 0
        and not watched((x,))
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.nn.modules.module._has_any_global_hook()
        and all(_is_plain(layer, x) for layer in layers)
    )


def _is_plain(layer: nn.Module, x: torch.Tensor) -> bool:
    """Return whether a layer does what its class says and no more: no hooks, no other forward, one dtype."""
    if type(layer) is nn.LayerNorm:
        known = len(layer.normalized_shape) == 1 and layer.weight is not None
    else:
        known = type(layer) is nn.Linear
    return known and layer.weight.dtype == x.dtype and not hooked(layer) and "forward" not in vars(layer)


def hooked(module: nn.Module) -> bool:
    """Return whether somebody sees what a module gets or returns."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def enter(x: torch.Tensor, norm: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x, for `leave`, and its layer norm: their gradients meet in one kernel.

    Args:
        x: (S, ..., C).
        norm: over the channels.
    """
    x, normed = _Enter.apply(x, norm.weight, norm.bias, norm.eps)
    return x, normed


def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    """Apply a layer norm, by the kernels of `enter` where they can."""
    if available(x, (layer,)):
        return enter(x, layer)[1]
    y: torch.Tensor = layer(x)
    return y


def leave(x: torch.Tensor, y: torch.Tensor, keep_2s: Maybe, weights: Weights, eps: float) -> torch.Tensor:
    """Return what a block returns.

    Args:
        x: (S, ..., C).
        y: (S, ..., K), of attention, before its output map.
        keep_2s: (2, S) drop path factors, or None.
        weights: see `Weights`.
        eps: of the norm.
    """
    out: torch.Tensor = _Leave.apply(x, y, keep_2s, eps, *weights)
    return out


# ---------------------------------------------------------------------------------------------------- one pass each


class Rows(NamedTuple):
    """How rows are cut into tiles, and tiles into programs."""

    rows: int
    channels: int
    padded: int
    tile: int
    tiles: int

    @classmethod
    def of(cls, x: torch.Tensor, columns: int | None = None) -> Rows:
        """Return tiles of whole rows, or of so many columns."""
        channels = x.shape[-1]
        padded = max(16, 1 << (channels - 1).bit_length()) if columns is None else columns
        tile = max(1, TILE // padded)
        return cls(x.numel() // channels, channels, padded, tile, max(1, SUMMED // padded // tile))

    @property
    def programs(self) -> int:
        """Of a pass that sums over rows."""
        return -(-self.rows // (self.tile * self.tiles))


class Normed(NamedTuple):
    """A sum, its norm, and what the norm's backward needs of it: mean and inverse deviation of each row."""

    total: torch.Tensor
    normed: Maybe
    mean: Maybe
    inverse: Maybe


def add_norm(
    x: torch.Tensor, y: Maybe, scale: Maybe, keep: Maybe, weight: Maybe = None, shift: Maybe = None, eps: float = 0.0
) -> Normed:
    """Return x + keep * scale * y, or x itself without y, and its layer norm where there is a weight.

    Args:
        x: (S, ..., C), contiguous, as is y.
        y: what is added, or None.
        scale: (C,), or None.
        keep: (S,), or None.
        weight: (C,) of the norm, or None for no norm.
        shift: (C,) of the norm, or None.
        eps: of the norm.
    """
    rows = Rows.of(x)
    total = x if y is None else torch.empty_like(x)
    normed = mean = inverse = None
    if weight is not None:
        normed = torch.empty_like(x)
        mean, inverse = torch.empty(2, rows.rows, dtype=_accumulator(x), device=x.device).unbind()
    kernels.add_norm[(-(-rows.rows // rows.tile),)](
        x, y, scale, keep, weight, shift, total, normed, mean, inverse, rows.rows, _rows_of_sample(rows, keep), eps,
        *_constants(rows, x)[:4],
    )  # fmt: skip
    return Normed(total, normed, mean, inverse)


class Sums(NamedTuple):
    """Gradients of vectors, in the accumulator's dtype: of the norm, of a bias that y holds, of the layer scale."""

    weight: torch.Tensor
    shift: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor


def add_norm_backward(
    d_total: Maybe, d_normed: Maybe, of: Normed | None, y: Maybe, scale: Maybe, keep: Maybe, weight: Maybe
) -> tuple[torch.Tensor, torch.Tensor, Sums]:
    """Return the gradients of x and y of `add_norm`, and sums over rows.

    Args:
        d_total: gradient of the sum, contiguous, or None.
        d_normed: of the norm, likewise.
        of: what `add_norm` returned; None where d_normed is.
        y: as it got it; None where it had none or has no scale.
        scale: likewise.
        keep: likewise.
        weight: likewise.
    """
    given = d_normed if d_total is None else d_total
    assert given is not None
    rows = Rows.of(given)
    dx = None if d_normed is None else torch.empty_like(given)  # else it is that of the sum
    dy = None if scale is None and keep is None else torch.empty_like(given)
    sums = torch.empty(rows.programs, 4, rows.channels, dtype=_accumulator(given), device=given.device)
    total, mean, inverse = (None, None, None) if of is None else (of.total, of.mean, of.inverse)
    kernels.add_norm_backward[(rows.programs,)](
        d_total, d_normed, total, mean, inverse, weight, y, scale, keep, dx, dy, sums, rows.rows,
        _rows_of_sample(rows, keep), *_constants(rows, given),
    )  # fmt: skip
    dx = given if dx is None else dx
    return dx, dx if dy is None else dy, Sums(*sums.sum(0).unbind())


def gelu_backward(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of what an exact GELU got, and its sum over rows in the accumulator's dtype.

    Args:
        dy: (R, C), contiguous, as is x.
        x: what it got.
    """
    rows = Rows.of(x, COLUMNS)
    dx = torch.empty_like(x)
    sums = torch.empty(rows.programs, rows.channels, dtype=_accumulator(x), device=x.device)
    kernels.gelu_backward[(rows.programs, -(-rows.channels // COLUMNS))](
        dy, x, dx, sums, rows.rows, *_constants(rows, x)
    )
    return dx, sums.sum(0)


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _constants(rows: Rows, x: torch.Tensor) -> tuple[Any, ...]:
    """Return what kernels are compiled for."""
    return rows.channels, rows.padded, rows.tile, kernels.accumulator(x.dtype), rows.tiles


def _rows_of_sample(rows: Rows, keep: Maybe) -> int:
    return 1 if keep is None else rows.rows // keep.numel()


# ------------------------------------------------------------------------------------------------------- functions


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, shift: Maybe, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.cuda.device(x.get_device()):
            done = add_norm(x.contiguous(), None, None, None, weight, shift, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(done.total, done.mean, done.inverse, weight, shift)
        return x, done.normed  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Maybe, d_normed: Maybe) -> tuple[Maybe, ...]:
        if d_normed is None:
            return dx, None, None, None
        total, mean, inverse, weight, shift = ctx.saved_tensors
        of = Normed(total, None, mean, inverse)
        with torch.cuda.device(total.get_device()):
            dx, _, sums = add_norm_backward(_whole(dx), d_normed.contiguous(), of, None, None, None, weight)
        return dx, _as(weight, sums.weight), _as(shift, sums.shift), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, keep_2s: Maybe, eps: float, *weights: Any
    ) -> torch.Tensor:
        w = Weights(*weights)
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        y = y.reshape(-1, y.shape[-1])
        keep1, keep2 = (None, None) if keep_2s is None else keep_2s
        with torch.cuda.device(x.get_device()):
            branch1 = F.linear(y, w.output, w.output_bias)
            sum1 = add_norm(x, branch1, w.scale1, keep1, w.norm, w.norm_bias, eps)
            hidden = F.linear(sum1.normed, w.fc1, w.fc1_bias)  # type: ignore[arg-type]
            active = F.gelu(hidden)
            branch2 = F.linear(active, w.fc2, w.fc2_bias)
            out = add_norm(sum1.total, branch2, w.scale2, keep2).total
        branches = (None if w.scale1 is None else branch1, None if w.scale2 is None else branch2)
        ctx.save_for_backward(y, *sum1, hidden, active, *branches, keep_2s, *weights)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
        y, total, normed, mean, inverse, hidden, active, branch1, branch2, keep_2s, *weights = ctx.saved_tensors
        w = Weights(*weights)
        keep1, keep2 = (None, None) if keep_2s is None else keep_2s
        shape, d_out = d_out.shape, d_out.reshape(-1, d_out.shape[-1]).contiguous()
        with torch.cuda.device(d_out.get_device()):
            _, d_branch2, sums2 = add_norm_backward(d_out, None, None, branch2, w.scale2, keep2, None)
            d_hidden, d_fc1_bias = gelu_backward(d_branch2 @ w.fc2, hidden)
            sum1 = Normed(total, normed, mean, inverse)
            dx, d_branch1, sums1 = add_norm_backward(
                d_out, d_hidden @ w.fc1, sum1, branch1, w.scale1, keep1, w.norm
            )
            gradients = Weights(
                output=d_branch1.t() @ y,
                output_bias=_as(w.output_bias, sums1.bias),
                scale1=_as(w.scale1, sums1.scale),
                norm=sums1.weight.to(w.norm.dtype),
                norm_bias=_as(w.norm_bias, sums1.shift),
                fc1=d_hidden.t() @ normed,
                fc1_bias=_as(w.fc1_bias, d_fc1_bias),
                fc2=d_branch2.t() @ active,
                fc2_bias=_as(w.fc2_bias, sums2.bias),
                scale2=_as(w.scale2, sums2.scale),
            )
            dy = d_branch1 @ w.output
        return dx.view(shape), dy.view(*shape[:-1], -1), None, None, *gradients


def _whole(gradient: Maybe) -> Maybe:
    return None if gradient is None else gradient.contiguous()


def _as(vector: Maybe, gradient: torch.Tensor) -> Maybe:
    """Return a gradient in its vector's dtype; None without one."""
    return None if vector is None else gradient.to(vector.dtype)
