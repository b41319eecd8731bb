"""The parts of a transformer block on both sides of its attention, for GPUs: each one autograd function.

    enter    x -> x and norm1(x), which attention gets
    leave    x, y -> x' = x + keep1 scale1 output(y),   x' + keep2 scale2 fc2(gelu(fc1(norm2(x'))))

With PyTorch's operators, residual sums, layer scale, drop path, norms and, backward, the sums over all tokens for the
gradients of norms, scales and biases read the tokens once each. Here a residual sum and the norm behind it are one
pass, these gradients are summed where the tokens are read anyway, and products are PyTorch's. Results are the same
every time.

CPUs, which have no Triton, compute by PyTorch's operators, and so do compiled graphs: a compiler fuses by itself.

Letters: S = samples, R = rows (tokens of all samples), C = channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from setformer_dist.ops.set.op import PLAIN, runs_triton, watched

try:
    from setformer_dist.ops import block_kernels as kernels
except ImportError:  # a PyTorch without Triton
    kernels = None  # type: ignore[assignment]

Maybe = torch.Tensor | None
Again = Literal["none", "cheap", "mlp"]

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

    @classmethod
    def of(
        cls, output: nn.Linear, scale1: Maybe, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, scale2: Maybe
    ) -> Weights:
        """Return the weights of layers for which `available` holds."""
        linear = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return cls(output.weight, output.bias, scale1, norm.weight, norm.bias, *linear, scale2)


def available(x: torch.Tensor, layers: Sequence[nn.Module], scales: Sequence[Maybe] = ()) -> bool:
    """Return whether these functions can stand for the layers here, and nobody looks at how they compute.

    Args:
        x: what the block gets, (S, ..., C).
        layers: linear layers and norms whose weights are taken.
        scales: layer scales, or None.
    """
    return (
        kernels is not None
        and runs_triton(x.device.type)
        and 0 < x.shape[-1] <= WIDEST
        and x.numel() > 0
        and not watched((x,))
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        and all(_is_plain(layer, x) for layer in layers)
        and all(scale is None or (scale.shape == x.shape[-1:] and _readable(scale, x)) for scale in scales)
    )


def _is_plain(layer: nn.Module, x: torch.Tensor) -> bool:
    """Return whether a layer does what its class says and no more, with weights that kernels can read."""
    own = layer._parameters  # attributes of a module are slow, and every block asks
    weight = own.get("weight")
    if weight is None or altered(layer):
        return False
    known = type(layer) is nn.Linear or (type(layer) is nn.LayerNorm and weight.shape == x.shape[-1:])
    return known and _readable(weight, x) and _readable(own.get("bias"), x)


def _readable(weight: Maybe, x: torch.Tensor) -> bool:
    """Return whether kernels can read a weight where it lies: an ordinary tensor like x, in memory order."""
    return weight is None or (
        type(weight) in PLAIN
        and weight.dtype is x.dtype
        and weight.is_contiguous()
        and weight.get_device() == x.get_device()
    )


def altered(module: nn.Module) -> bool:
    """Return whether somebody sees what a module gets or returns, or gave it another forward than its class's."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
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


def leave(
    x: torch.Tensor, y: torch.Tensor, keep_2s: Maybe, weights: Weights, eps: float, again: Again = "none"
) -> torch.Tensor:
    """Return what a block returns.

    Args:
        x: (S, ..., C).
        y: (S, ..., K), of attention, before its output map.
        keep_2s: (2, S) drop path factors, or None.
        weights: see `Weights`.
        eps: of the norm.
        again: what the backward pass computes again, with the same bits: nothing, norm and GELU, or the whole MLP.
    """
    out: torch.Tensor = _Leave.apply(x, y, keep_2s, eps, again, *weights)
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
    def of(cls, x: torch.Tensor) -> Rows:
        """Return tiles of whole rows of a tensor."""
        channels = x.shape[-1]
        padded = max(16, 1 << (channels - 1).bit_length())
        tile = max(1, TILE // padded)
        return cls(x.numel() // channels, channels, padded, tile, max(1, SUMMED // padded // tile))

    def by_columns(self, channels: int) -> Rows:
        """Return the same programs for another width, in tiles of `COLUMNS` columns."""
        of_program = self.tile * self.tiles
        tile = min(of_program, TILE // COLUMNS)
        return Rows(self.rows, channels, COLUMNS, tile, of_program // tile)

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


def add_norm_backward(
    d_total: Maybe, d_normed: Maybe, of: Normed | None, y: Maybe, scale: Maybe, keep: Maybe, weight: Maybe,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x and y of `add_norm`; they are one tensor where they are equal.

    Args:
        d_total: gradient of the sum, contiguous, or None.
        d_normed: of the norm, likewise.
        of: what `add_norm` returned; None where d_normed is.
        y: as it got it; None where it had none, or nobody needs the gradient of scale.
        scale: likewise.
        keep: likewise.
        weight: likewise.
        sums: (programs, 4 C) gets what each program sums over its rows: gradients of y's bias, of scale, of weight and
            of shift; without a norm (programs, 2 C), the first two.
    """
    given = d_normed if d_total is None else d_total
    assert given is not None
    rows = Rows.of(given)
    dx = None if d_normed is None else torch.empty_like(given)  # else it is that of the sum
    dy = None if scale is None and keep is None else torch.empty_like(given)
    total, mean, inverse = (None, None, None) if of is None else (of.total, of.mean, of.inverse)
    kernels.add_norm_backward[(rows.programs,)](
        d_total, d_normed, total, mean, inverse, weight, y, scale, keep, dx, dy, sums, rows.rows,
        _rows_of_sample(rows, keep), sums.stride(0), *_constants(rows, given),
    )  # fmt: skip
    dx = given if dx is None else dx
    return dx, dx if dy is None else dy


def gelu_backward(dy: torch.Tensor, x: torch.Tensor, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
    """Return the gradient of what an exact GELU got.

    Args:
        dy: (R, C), contiguous, as is x.
        x: what it got.
        rows: of the block's tokens.
        sums: (programs, C) gets its sums over each program's rows.
    """
    rows = rows.by_columns(x.shape[-1])
    dx = torch.empty_like(x)
    kernels.gelu_backward[(rows.programs, -(-rows.channels // COLUMNS))](
        dy, x, dx, sums, rows.rows, sums.stride(0), *_constants(rows, x)
    )
    return dx


def _sums(rows: Rows, width: int, x: torch.Tensor) -> torch.Tensor:
    """Return a place for each program's sums."""
    return torch.empty(rows.programs, width, dtype=_accumulator(x), device=x.device)


def _summed(sums: torch.Tensor, x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Return the sums over all programs, cut into vectors."""
    return torch.split(sums.sum(0).to(x.dtype), list(sizes))


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
            rows, c = Rows.of(total), total.shape[-1]
            sums = _sums(rows, 4 * c, total)
            dx, _ = add_norm_backward(_whole(dx), d_normed.contiguous(), of, None, None, None, weight, sums)
            d_weight, d_shift = _summed(sums[:, 2 * c :], total, (c, c))
        return dx, d_weight, _as(shift, d_shift), None


# What a policy makes again.
_AGAIN: dict[Again, tuple[str, ...]] = {
    "none": (), "cheap": ("normed", "active"), "mlp": ("normed", "hidden", "active", "branch2"),
}  # fmt: skip


class _Kept(NamedTuple):
    """What `_Leave` computes on its way, and keeps unless the backward pass makes it again."""

    y: Maybe
    branch1: Maybe
    total: torch.Tensor
    normed: Maybe
    mean: torch.Tensor
    inverse: torch.Tensor
    hidden: Maybe
    active: Maybe
    branch2: Maybe

    def without(self, again: Again, needed: Weights) -> _Kept:
        """Return what is to be kept: nothing that is for the gradient of one weight alone, where nobody needs that."""
        uses = {"y": needed.output, "branch1": needed.scale1, "normed": needed.fc1, "active": needed.fc2}
        unused = [name for name, use in {**uses, "branch2": needed.scale2}.items() if not use]
        return self._replace(**dict.fromkeys([*_AGAIN[again], *unused]))  # type: ignore[arg-type]

    def whole(self, w: Weights, needed: Weights, eps: float) -> _Kept:
        """Return it with what is not kept and is needed, the same bits."""
        _, _, total, normed, _, _, hidden, active, branch = self
        if normed is None and (needed.fc1 or hidden is None):
            normed = add_norm(total, None, None, None, w.norm, w.norm_bias, eps).normed
        if hidden is None:
            hidden = F.linear(normed, w.fc1, w.fc1_bias)  # type: ignore[arg-type]
        again = branch is None and needed.scale2
        if active is None and (needed.fc2 or again):
            active = F.gelu(hidden)
        if again:
            branch = F.linear(active, w.fc2, w.fc2_bias)  # type: ignore[arg-type]
        return self._replace(normed=normed, hidden=hidden, active=active, branch2=branch)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, keep_2s: Maybe, eps: float, again: Again, *weights: Any
    ) -> torch.Tensor:
        w = Weights(*weights)
        shape, x = x.shape, x.reshape(-1, x.shape[-1]).contiguous()
        y = y.reshape(-1, y.shape[-1])
        keep_2s = _whole(keep_2s)
        keep1, keep2 = (None, None) if keep_2s is None else keep_2s
        with torch.cuda.device(x.get_device()):
            branch1 = F.linear(y, w.output, w.output_bias)
            total, normed, mean, inverse = add_norm(x, branch1, w.scale1, keep1, w.norm, w.norm_bias, eps)
            hidden = F.linear(normed, w.fc1, w.fc1_bias)  # type: ignore[arg-type]
            active = F.gelu(hidden)
            branch2 = F.linear(active, w.fc2, w.fc2_bias)
            # Of the shape that is returned, as no view may be changed in place.
            out = add_norm(total.view(shape), branch2, w.scale2, keep2).total
        kept = _Kept(y, branch1, total, normed, mean, inverse, hidden, active, branch2)  # type: ignore[arg-type]
        needed = Weights(*ctx.needs_input_grad[-len(w) :])
        ctx.save_for_backward(*kept.without(again, needed), keep_2s, *weights)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
        saved, fields = ctx.saved_tensors, len(_Kept._fields)
        kept, keep_2s, w = _Kept(*saved[:fields]), saved[fields], Weights(*saved[fields + 1 :])
        needed = Weights(*ctx.needs_input_grad[-len(w) :])
        keep1, keep2 = (None, None) if keep_2s is None else keep_2s
        shape, d_out = d_out.shape, d_out.reshape(-1, d_out.shape[-1]).contiguous()
        with torch.cuda.device(d_out.get_device()):
            y, branch1, total, normed, mean, inverse, hidden, active, branch2 = kept.whole(w, needed, ctx.eps)
            sum1 = Normed(total, None, mean, inverse)
            assert hidden is not None
            rows, c, hidden_c = Rows.of(d_out), d_out.shape[-1], hidden.shape[-1]
            sums = _sums(rows, 6 * c + hidden_c, d_out)
            _, d_branch2 = add_norm_backward(d_out, None, None, branch2, w.scale2, keep2, None, sums)
            d_hidden = gelu_backward(d_branch2 @ w.fc2, hidden, rows, sums[:, 6 * c :])
            dx, d_branch1 = add_norm_backward(
                d_out, d_hidden @ w.fc1, sum1, branch1, w.scale1, keep1, w.norm, sums[:, 2 * c :]
            )
            d_fc2_bias, d_scale2, d_output_bias, d_scale1, d_norm, d_norm_bias, d_fc1_bias = _summed(
                sums, d_out, (*(c,) * 6, hidden_c)
            )
            gradients = Weights(
                output=_product(d_branch1, y, needed.output),
                output_bias=_as(w.output_bias, d_output_bias),
                scale1=_as(w.scale1, d_scale1),
                norm=d_norm,
                norm_bias=_as(w.norm_bias, d_norm_bias),
                fc1=_product(d_hidden, normed, needed.fc1),
                fc1_bias=_as(w.fc1_bias, d_fc1_bias),
                fc2=_product(d_branch2, active, needed.fc2),
                fc2_bias=_as(w.fc2_bias, d_fc2_bias),
                scale2=_as(w.scale2, d_scale2),
            )
            dy = d_branch1 @ w.output
        return dx.view(shape), dy.view(*shape[:-1], -1), None, None, None, *gradients


def _product(d: torch.Tensor, given: Maybe, needed: object) -> Any:
    """Return the gradient of a linear layer's weight, or None where nobody needs it."""
    return torch.mm(d.t(), given) if needed and given is not None else None


def _whole(tensor: Maybe) -> Maybe:
    return None if tensor is None else tensor.contiguous()


def _as(vector: Maybe, gradient: torch.Tensor) -> Maybe:
    """Return a gradient in its vector's dtype, as a rule the tokens'; None without one."""
    return None if vector is None else gradient.to(vector.dtype)
