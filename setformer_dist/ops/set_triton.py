"""SeT attention in fused Triton kernels: buffers, launches and sums over splits around `set_triton_kernels`.

Same tensors in, same numbers out as `set_reference`, in the log domain, so any epsilon is safe; everything but the
operands of products is fp32 (fp64 for fp64 inputs). Only the column potentials of the rounds are kept for the
backward, which is the exact derivative of the rounds that were run. Beyond inputs and outputs the memory is a few
buffers of size m x d for each head, image and split; nothing of size n x m exists. Results are the same every time, and
an image's whatever shares its batch; only the gradients of references are sums over it.

Letters: b = images, h = heads, n = tokens, m = references, k = features, d = values of one head, s = sets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from setformer_dist.ops import set_triton_kernels as kernels
from setformer_dist.ops.kernels import at_least_fp32
from setformer_dist.ops.set_fast import Gradients, Inputs
from setformer_dist.ops.set_problem import SetProblem

# Bytes of one reference set of one head: with more, compiled for Hopper, the backward needs more shared memory than the
# chip has.
SET_BYTES = 16384
# Bytes of operands in a tile of tokens by references: what registers and shared memory hold.
TILE_BYTES = 8192
# Tokens of a program, at least: a fixed size, so that sums have the same order whatever shares the batch.
RUN = 512
# What a program reads to merge the splits of its group, in numbers.
MAX_MERGE = 4096


def why_not(inputs: Inputs, problem: SetProblem) -> str | None:
    """Return why the kernels cannot compute this, None where they can (on a device that has Triton)."""
    if problem.implicit or problem.tolerance > 0:
        return "its gradient is that of the rounds that are run: gradient = 'implicit' and tolerance are not for it"
    x = inputs.x_bhnd
    if x.dtype not in _PRODUCTS:
        return f"dtype {x.dtype} has no kernel"
    if x.dtype == torch.float64 and x.is_cuda:
        return "fp64 is for Triton's interpreter only, as its compiler fails on some products of fp64"
    m, k = inputs.gather_hmk.shape[1:]
    size = _padded(m) * _padded(max(k, x.shape[-1])) * _width(x.dtype)
    if size > SET_BYTES:
        return f"{m} references of {k} features take {size} bytes, more than the {SET_BYTES} that fit on chip"
    return None


def potentials_shape(inputs: Inputs, problem: SetProblem) -> tuple[int, int, int, int, int]:
    """Return the shape (s, b, h, rounds + 2, m) of what `forward` keeps, in fp32 (fp64 for fp64 inputs)."""
    b, h = inputs.x_bhnd.shape[:2]
    return 1 if inputs.scatter_hmk is None else 2, b, h, problem.iterations + 2, inputs.gather_hmk.shape[1]


def forward(inputs: Inputs, problem: SetProblem, splits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the tokens into m references and scatter them back.

    Args:
        inputs: see `set_reference.forward`; masked tokens are never read, and an image may be all masked.
        problem: the numbers; `why_not` must have nothing against them.
        splits: programs that share the tokens of one head and image, a power of two; None chooses.

    Returns:
        y (b, h, n, d) in dtype and layout of x, 0 at masked tokens; and the potentials for `backward`.
    """
    with torch.no_grad(), torch.cuda.device(inputs.x_bhnd.get_device()):
        call = _Call.of(inputs, problem, splits)
        y = torch.empty_like(inputs.x_bhnd)
        potentials = torch.empty(potentials_shape(inputs, problem), dtype=call.acc, device=y.device)
        call.rounds(potentials)
        pooled = call.pooled(potentials)
        kernels.scatter[call.grid](_view(y), pooled, potentials, call.data, call.constants)
    return y, potentials


def backward(
    grad_y: torch.Tensor, inputs: Inputs, potentials: torch.Tensor, problem: SetProblem, splits: int | None = None
) -> Gradients:
    """Return the gradients of everything that `forward` got.

    Args:
        grad_y: (b, h, n, d); never read at masked tokens.
        inputs: as `forward` got them.
        potentials: what it returned.
        problem: likewise.
        splits: as for `forward`; another number changes the last digits.
    """
    with torch.no_grad(), torch.cuda.device(inputs.x_bhnd.get_device()):
        call = _Call.of(inputs, problem, splits)
        dy = _view(grad_y)
        adjoint = call.adjoint(dy, potentials)
        call.adjoint_rounds(dy, adjoint)
        dx = torch.empty_like(inputs.x_bhnd)
        dfeatures = None if inputs.features_bhnk is None else torch.empty_like(inputs.features_bhnk)
        sets, b, h, _, m = potentials.shape
        dr = call.buffer(sets, b, h, call.spec.SPLITS, call.spec.MP, call.spec.KP)
        view = None if dfeatures is None else _view(dfeatures)
        kernels.gradients[call.grid](_view(dx), view, dr, dy, call.data, adjoint, call.constants, num_warps=8)
        dr = dr.sum((1, 3))[:, :, :m, : call.spec.K]
    scatter = None if inputs.scatter_hmk is None else dr[1].to(inputs.scatter_hmk.dtype, copy=True)
    return Gradients(dx, dfeatures, dr[0].to(inputs.gather_hmk.dtype, copy=True), scatter)


def _view(tensor: torch.Tensor) -> kernels.View:
    return kernels.View(tensor, *tensor.stride())


@dataclass(frozen=True)
class _Call:
    """One call's inputs as the kernels take them, and the launches that forward and backward share."""

    data: kernels.Data
    spec: kernels.Spec
    constants: kernels.Spec
    groups: int
    acc: torch.dtype

    @classmethod
    def of(cls, inputs: Inputs, problem: SetProblem, splits: int | None) -> _Call:
        x = inputs.x_bhnd
        b, h, n, _ = x.shape
        sets = [r for r in (inputs.gather_hmk, inputs.scatter_hmk) if r is not None]
        acc = at_least_fp32(x[:0]).dtype
        spec = _spec(inputs, problem, len(sets), _splits(inputs) if splits is None else splits)
        positions, places, mask = inputs.positions_bna, inputs.places_ma, inputs.mask_bn
        if mask is None:
            log_counts = torch.full((b,), math.log(n), dtype=acc, device=x.device)
        else:
            log_counts = mask.sum(-1).clamp_min(1).to(acc).log()
        data = kernels.Data(
            x=_view(x),
            features=None if inputs.features_bhnk is None else _view(inputs.features_bhnk),
            references=torch.stack(sets),
            positions=None if positions is None else positions.to(acc).contiguous(),
            positions_b=0 if positions is None or positions.shape[0] == 1 else n * spec.AXES,
            places=None if places is None else places.to(acc).contiguous(),
            mask=None if mask is None else mask.contiguous().view(torch.uint8),
            log_counts=log_counts,
            heads=h,
            n=n,
            run=triton.cdiv(triton.cdiv(n, spec.BLOCK), spec.SPLITS) * spec.BLOCK,
        )
        return cls(data, spec, kernels.Spec(*map(tl.constexpr, spec)), b * h, acc)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of a kernel that serves all sets at once."""
        return self.groups, self.spec.SPLITS

    def buffer(self, *shape: int) -> torch.Tensor:
        """Return an uninitialised buffer of the accumulators' dtype."""
        return torch.empty(shape, dtype=self.acc, device=self.data.x.at.device)

    def rounds(self, potentials: torch.Tensor) -> None:
        """Fill the potentials: one launch where a program sees all tokens, otherwise one a round and one to settle."""
        sets, splits, total = self.spec.SETS, self.spec.SPLITS, self.spec.ROUNDS
        here, before = (self.buffer(sets, self.groups, splits, 2, self.spec.MP) for _ in range(2))
        if splits == 1:
            kernels.rounds[self.groups, 1, sets](potentials, here, before, self.data, 0, total, self.constants)
            return
        for t in range(total):
            kernels.rounds[self.groups, splits, sets](potentials, here, before, self.data, t, 1, self.constants)
            here, before = before, here
        kernels.rounds[self.groups, 1, sets](potentials, here, before, self.data, total, 0, self.constants)

    def pooled(self, potentials: torch.Tensor) -> torch.Tensor:
        """Return G^T x, (groups, MP, DP)."""
        parts = self.buffer(*self.grid, self.spec.MP, self.spec.DP)
        kernels.gather[self.grid](parts, potentials, self.data, self.constants)
        return parts.sum(1)

    def adjoint(self, dy: kernels.View, potentials: torch.Tensor) -> kernels.Adjoint:
        """Return what the last kernels need, with the gradients of the last potentials in place."""
        spec = self.spec
        pooled = self.pooled(potentials)
        parts, columns = self.buffer(*self.grid, spec.MP, spec.DP), self.buffer(*self.grid, spec.MP)
        kernels.scatter_adjoint[self.grid](parts, columns, dy, pooled, potentials, self.data, self.constants)
        d_pooled = parts.sum(1)
        along = (pooled * d_pooled).sum(-1)
        d_potentials = self.buffer(spec.SETS, self.groups, spec.ROUNDS + 1, spec.M)
        last = d_potentials[:, :, -1]
        # Renormalised gathering weights do not feel their own column potential.
        last[0] = 0.0 if spec.RENORMALISE else along[:, : spec.M]
        columns = columns.sum(1)[:, : spec.M]
        if spec.SETS == 1:
            last[0] += columns
        else:
            last[1] = columns
        return kernels.Adjoint(potentials, d_potentials, pooled, d_pooled, along)

    def adjoint_rounds(self, dy: kernels.View, adjoint: kernels.Adjoint) -> None:
        """Fill the gradients of the potentials of rounds L - 1 ... 1, launched like the rounds."""
        sets, splits, total = self.spec.SETS, self.spec.SPLITS, self.spec.ROUNDS
        if total == 1:
            return
        here, before = (self.buffer(sets, self.groups, splits, self.spec.MP) for _ in range(2))
        if splits == 1:
            kernels.adjoint_rounds[self.groups, 1, sets](
                here, before, dy, self.data, adjoint, total, total - 1, self.constants, num_warps=8
            )
            return
        for t in range(total, 1, -1):
            kernels.adjoint_rounds[self.groups, splits, sets](
                here, before, dy, self.data, adjoint, t, 1, self.constants, num_warps=8
            )
            here, before = before, here
        kernels.adjoint_rounds[self.groups, 1, sets](here, before, dy, self.data, adjoint, 1, 0, self.constants)


def _padded(size: int) -> int:
    """Return the power of two that holds a size; 16 is the least side of a product."""
    return max(16, 1 << (size - 1).bit_length())


def _block(inputs: Inputs) -> int:
    """Return the tokens of a tile."""
    largest = TILE_BYTES // (_padded(inputs.gather_hmk.shape[1]) * _width(inputs.x_bhnd.dtype))
    return max(16, min(128, largest, _padded(inputs.x_bhnd.shape[2])))


def _splits(inputs: Inputs) -> int:
    """Return how many programs share the tokens of a group, a power of two: a function of n, m and widths alone."""
    n, m = inputs.x_bhnd.shape[2], inputs.gather_hmk.shape[1]
    tiles = -(-n // _block(inputs))
    wanted = min(n // RUN, tiles // 2, MAX_MERGE // _padded(m))
    return 1 << max(0, wanted.bit_length() - 1)


def _spec(inputs: Inputs, problem: SetProblem, sets: int, splits: int) -> kernels.Spec:
    d = inputs.x_bhnd.shape[-1]
    _, m, k = inputs.gather_hmk.shape
    rounded, precision = _products(inputs.x_bhnd.dtype)
    return kernels.Spec(
        M=m,
        MP=_padded(m),
        K=k,
        KP=_padded(k),
        D=d,
        DP=_padded(d),
        BLOCK=_block(inputs),
        SETS=sets,
        ROUNDS=problem.iterations,
        SPLITS=splits,
        EPSILON=problem.epsilon,
        SIGMA=problem.sigma,
        TAU=problem.tau,
        LOG_M=math.log(m),
        AXES=0 if inputs.positions_bna is None else inputs.positions_bna.shape[-1],
        RENORMALISE=problem.renormalise,
        ROUND=rounded,
        # Triton's interpreter multiplies the bits of bf16 as integers; widened, bf16 has the same products.
        DOT=tl.float32 if triton.knobs.runtime.interpret and rounded == tl.bfloat16 else rounded,
        ACC=tl.float64 if inputs.x_bhnd.dtype == torch.float64 else tl.float32,
        PRECISION=precision,
    )


# The dtype and precision of products. Weights of 1 / n and their gradients would vanish in fp16: TF32 has its ten bits
# of mantissa and fp32's range. Products of fp32 are three of TF32 each, as good as fp32's own and on tensor cores.
_PRODUCTS = {
    torch.bfloat16: (tl.bfloat16, "ieee"),
    torch.float16: (tl.float32, "tf32"),
    torch.float32: (tl.float32, "tf32x3"),
    torch.float64: (tl.float64, "ieee"),
}


def _products(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Return dtype and precision of products; fp32's follow what torch is told."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return tl.float32, "tf32"
    return _PRODUCTS[dtype]


def _width(dtype: torch.dtype) -> int:
    """Return the bytes of an operand of a product."""
    return int(_PRODUCTS[dtype][0].primitive_bitwidth) // 8
