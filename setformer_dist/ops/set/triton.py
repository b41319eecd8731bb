"""SeT attention in fused Triton kernels: buffers and launches around `triton_kernels`, one forward, one backward.

Same tensors in, same numbers out as `reference`; everything but the operands of products is fp32 (fp64 for fp64
inputs). Only the column potentials of the rounds and what the references gathered are kept for the backward, which is
the exact derivative of the rounds that were run. Beyond inputs and outputs the memory is a few buffers of size m x d
for each head, image and split, and one number per token and head; nothing of size n x m exists. Results are the same
every time, and an image's whatever shares its batch; only the gradients of references are sums over it.

Letters: b = images, h = heads, n = tokens, m = references, k = features, d = values of one head, s = sets.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from setformer_dist.ops.set import triton_kernels as kernels
from setformer_dist.ops.set import triton_short_kernels as short_kernels
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem

# Bytes of one reference set of one head, at most. Compiled, the backward needs ten times as much shared memory at most,
# so on a chip with less of it than an A100 the limit is a tenth of what a program can have there (`_set_limit`).
SET_BYTES = 16384
# Bytes of operands in a tile of tokens by references, features or values: what registers and shared memory hold.
TILE_BYTES = 8192
# Warps of a program: no thread has more than 32 numbers of a tile.
WARPS = 4
# Numbers of a tile of all tokens by all references, at most, for which one program does everything on chip
# (triton_short_kernels.py); 0 takes the other kernels for all.
SHORT = 8192
# Tokens of a program, at least: a fixed size, so that sums have the same order whatever shares the batch.
RUN = 512
# Weights as small as exp(-MAX_EXPONENT) are still normal numbers of fp32, which end at exp(-87).
MAX_EXPONENT = 80.0
# What a program reads to merge the splits of its group, in numbers.
MAX_MERGE = 4096
# Numbers of the references' gradients that a program adds up at once, for each reference it has.
PART_NUMBERS = 2048
# Programs that share a group, at most: as many as wait for each other on a large GPU (`_may_wait`).
MAX_SPLITS = 64


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
    if x.dtype == torch.float32:
        size *= 2  # a product that is three of TF32 has each operand in two parts
    most = _set_limit(x.device)
    if size > most:
        return f"{m} references of {k} features take {size} bytes, more than the {most} that fit on chip"
    return None


def _set_limit(device: torch.device) -> int:
    """Return the bytes of a reference set that fit on this device."""
    if device.type != "cuda":
        return SET_BYTES
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return min(SET_BYTES, int(shared) // 10)


def kept_shape(inputs: Inputs, problem: SetProblem) -> tuple[int]:
    """Return the shape of what `forward` keeps, in fp32 (fp64 for fp64 inputs): potentials, and what was gathered."""
    b, h, _, d = inputs.x_bhnd.shape
    m = inputs.gather_hmk.shape[1]
    return (_potentials(inputs, problem) + b * h * _padded(m) * _padded(d),)


def forward(inputs: Inputs, problem: SetProblem, splits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the tokens into m references and scatter them back.

    Args:
        inputs: see `problem.Inputs`; masked tokens are never read, and an image may be all masked.
        problem: the numbers; `why_not` must have nothing against them.
        splits: programs that share the tokens of one head and image, a power of two; None chooses, and takes the
            kernels for few tokens where they can.

    Returns:
        y (b, h, n, d) in dtype and layout of x, 0 at masked tokens; and what `backward` takes, `kept_shape`.
    """
    with torch.no_grad(), torch.cuda.device(inputs.x_bhnd.get_device()):
        call = Call.of(inputs, problem, splits, _is_short(inputs, problem, splits))
        y = torch.empty_like(inputs.x_bhnd)
        kept = torch.empty(kept_shape(inputs, problem), dtype=call.acc, device=y.device)
        potentials, pooled = call.parts_of(kept)
        if call.is_short:
            call.launch_short(short_kernels.forward, FORWARD, view(y), potentials, pooled)
            return y, kept
        call.launch(kernels.forward, FORWARD, view(y), potentials, pooled)
    return y, kept


def backward(
    grad_y: torch.Tensor, inputs: Inputs, kept: torch.Tensor, problem: SetProblem, splits: int | None = None
) -> Gradients:
    """Return the gradients of everything that `forward` got.

    Args:
        grad_y: (b, h, n, d); never read at masked tokens.
        inputs: as `forward` got them.
        kept: what it returned.
        problem: likewise.
        splits: as for `forward`; another number changes the last digits.
    """
    with torch.no_grad(), torch.cuda.device(inputs.x_bhnd.get_device()):
        call = Call.of(inputs, problem, splits, _is_short(inputs, problem, splits))
        spec, groups = call.spec, call.data.groups
        potentials, pooled = call.parts_of(kept)
        b, h = inputs.x_bhnd.shape[:2]
        dx = torch.empty_like(inputs.x_bhnd)
        dfeatures = None if inputs.features_bhnk is None else torch.empty_like(inputs.features_bhnk)
        of_features = None if dfeatures is None else view(dfeatures)
        d_units = call.buffer(spec.SETS, b, h, spec.SPLITS, spec.MP, spec.KP)
        if call.is_short:
            call.launch_short(
                short_kernels.backward, {}, view(dx), of_features, d_units, view(grad_y), potentials, pooled
            )
            return Gradients(dx, dfeatures, *call.of_references(inputs, d_units))
        columns = call.buffer(spec.SETS, groups, spec.ROUNDS + 1, 2, spec.MP)
        d_pooled, along = call.buffer(groups, spec.MP, spec.DP), call.buffer(groups, spec.MP)
        adjoint = kernels.Adjoint(potentials, columns, pooled, d_pooled, along)
        call.launch(kernels.backward, {}, view(dx), of_features, d_units, view(grad_y), adjoint)
        return Gradients(dx, dfeatures, *call.of_references(inputs, d_units))


def view(tensor: torch.Tensor) -> kernels.View:
    """Return a tensor (b, h, n, channels) as kernels take it."""
    return kernels.View(tensor, *tensor.stride())


@dataclass(frozen=True)
class Call:
    """One call's inputs as the kernels take them; split_triton.py makes its calls by it, too."""

    data: kernels.Data
    spec: kernels.Spec
    acc: torch.dtype
    is_short: bool = False

    @classmethod
    def of(cls, inputs: Inputs, problem: SetProblem, splits: int | None, is_short: bool = False) -> Call:
        """Return a call; buffers and arguments are those of `forward`, `is_short` is for the kernels of few tokens."""
        x = inputs.x_bhnd
        b, h, n, _ = x.shape
        groups = b * h
        acc = torch.promote_types(x.dtype, torch.float32)
        spec = _spec(inputs, problem, 1 if is_short else _splits(inputs) if splits is None else splits)
        if is_short:
            spec = spec._replace(BLOCK=_padded(n))
        positions, places, mask = inputs.positions_bna, inputs.places_ma, inputs.mask_bn
        buffer = functools.partial(_buffer, acc, x.device)
        gather, scatter = inputs.gather_hmk, inputs.scatter_hmk
        if scatter is not None and scatter.dtype != gather.dtype:
            wider = torch.promote_types(gather.dtype, scatter.dtype)
            gather, scatter = gather.to(wider), scatter.to(wider)
        data = kernels.Data(
            x=view(x),
            features=None if inputs.features_bhnk is None else view(inputs.features_bhnk),
            gather=gather.contiguous(),
            scatter=None if scatter is None else scatter.contiguous(),
            positions=None if positions is None else positions.to(acc).contiguous(),
            positions_b=0 if positions is None or positions.shape[0] == 1 else n * spec.AXES,
            places=None if places is None else places.to(acc).contiguous(),
            mask=None if mask is None else mask.contiguous().view(torch.uint8),
            counts=None if mask is None else mask.sum(-1).clamp_min(1).to(acc),
            inverses=None if is_short or inputs.features_bhnk is not None else buffer(groups, n),
            slots=None if is_short else buffer(spec.ROUNDS + 1, spec.SETS, groups, spec.SPLITS, spec.MP),
            parts=None if is_short else buffer(groups, spec.SPLITS, spec.MP, spec.DP),
            gate=torch.zeros(1 + groups, dtype=torch.int32, device=x.device) if spec.TOGETHER else None,
            totals=None,
            groups=groups,
            heads=h,
            n=n,
            run=triton.cdiv(triton.cdiv(n, spec.BLOCK), spec.SPLITS) * spec.BLOCK,
        )
        return cls(data, spec, acc, is_short)

    def buffer(self, *shape: int) -> torch.Tensor:
        """Return an uninitialised buffer of the accumulators' dtype."""
        return _buffer(self.acc, self.data.x.at.device, *shape)

    def parts_of(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return potentials (s, groups, rounds + 2, m), and after them pooled (groups, MP, DP), out of `kept`."""
        return kept, kept[kept.numel() - self.data.groups * self.spec.MP * self.spec.DP :]

    def of_references(self, inputs: Inputs, d_units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return both sets' gradients, in their dtypes, from those of their unit vectors (s, b, h, splits, MP, KP).

        A part's sums give that part's share: bringing to unit length is linear in the gradient.
        """
        data, spec = self.data, self.spec
        d_gather = torch.empty_like(data.gather)
        d_scatter = None if data.scatter is None else torch.empty_like(data.scatter)
        rows = _rows_of_program(spec)
        grid = (triton.cdiv(spec.M, rows), spec.SETS * data.heads)
        sets = (d_gather, d_scatter, d_units, data.gather, data.scatter)
        sizes = (spec.M, spec.MP, spec.K, spec.KP, spec.SPLITS, rows, max(1, PART_NUMBERS // spec.KP), spec.ACC)
        parts = d_units.shape[1] * spec.SPLITS
        kernels.references_backward[grid](*sets, data.heads, parts, *sizes, num_warps=WARPS)
        if d_scatter is not None and inputs.scatter_hmk is not None:
            d_scatter = d_scatter.to(inputs.scatter_hmk.dtype)
        return d_gather.to(inputs.gather_hmk.dtype), d_scatter

    def launch_short(self, kernel: Any, options: dict[str, int], *arguments: Any) -> None:
        """Run a kernel of few tokens: no thread has more than 32 numbers of a tile."""
        spec = self.spec
        warps = WARPS if spec.BLOCK * max(spec.MP, spec.KP, spec.DP) <= SHORT // 2 else 2 * WARPS
        kernel[(self.data.groups,)](*arguments, self.data, _constants(spec), num_warps=warps, **options)

    def launch(
        self, kernel: Any, options: dict[str, int], *arguments: Any, first: int = 0, end: int | None = None
    ) -> None:
        """Run phases: in one launch where programs may wait for each other or have nobody to wait for.

        Args:
            kernel: what to launch.
            options: of the compiler.
            arguments: before those that every kernel takes.
            first: phase to begin with.
            end: phase to end before; None runs all those of a whole forward or backward.
        """
        spec = _constants(self.spec)
        end = self.spec.ROUNDS + 2 if end is None else end
        grid = (self.data.groups * self.spec.SPLITS,)
        together = self.spec.TOGETHER or self.spec.SPLITS == 1
        for begin, stop in [(first, end)] if together else [(i, i + 1) for i in range(first, end)]:
            kernel[grid](*arguments, self.data, begin, stop, spec, num_warps=WARPS, **options)


def _rows_of_program(spec: kernels.Spec) -> int:
    """Return of how many references a program adds up gradients; interpreted, it costs more than what it computes."""
    return spec.MP if triton.knobs.runtime.interpret else 1


def _buffer(dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _potentials(inputs: Inputs, problem: SetProblem) -> int:
    """Return the numbers in the potentials, padded so that what follows them is aligned."""
    b, h = inputs.x_bhnd.shape[:2]
    sets = 1 if inputs.scatter_hmk is None else 2
    return -(-sets * b * h * (problem.iterations + 2) * inputs.gather_hmk.shape[1] // 32) * 32


def _padded(size: int) -> int:
    """Return the power of two that holds a size; 16 is the least side of a product."""
    return max(16, 1 << (size - 1).bit_length())


def _block(inputs: Inputs) -> int:
    """Return the tokens of a tile."""
    n, d = inputs.x_bhnd.shape[2:]
    _, m, k = inputs.gather_hmk.shape
    largest = TILE_BYTES // (max(map(_padded, (m, k, d))) * _width(inputs.x_bhnd.dtype))
    return max(16, min(128, largest, _padded(n)))


def _is_short(inputs: Inputs, problem: SetProblem, splits: int | None) -> bool:
    """Return whether the kernels of few tokens compute it: a function of n, m and widths alone, and of the numbers."""
    _, m, k = inputs.gather_hmk.shape
    n, d = inputs.x_bhnd.shape[2:]
    axes = 0 if inputs.positions_bna is None else inputs.positions_bna.shape[-1]
    if splits is not None or _exponents(problem, axes) > MAX_EXPONENT:
        return False
    most = SHORT // 2 if _width(inputs.x_bhnd.dtype) == 4 else SHORT  # else 128 KiB on chip, which not all GPUs have
    return _padded(n) * max(_padded(m), _padded(k), _padded(d)) <= most


def _splits(inputs: Inputs) -> int:
    """Return how many programs share the tokens of a group, a power of two: a function of n, m and widths alone."""
    n, m = inputs.x_bhnd.shape[2], inputs.gather_hmk.shape[1]
    tiles = -(-n // _block(inputs))
    wanted = min(n // RUN, tiles // 2, MAX_MERGE // _padded(m), MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def _spec(inputs: Inputs, problem: SetProblem, splits: int) -> kernels.Spec:
    x = inputs.x_bhnd
    _, m, k = inputs.gather_hmk.shape
    sets = 1 if inputs.scatter_hmk is None else 2
    axes = 0 if inputs.positions_bna is None else inputs.positions_bna.shape[-1]
    sizes = (x.shape[-1], m, k, _block(inputs), sets, splits, axes)
    together = splits > 1 and _may_wait(x.device, splits)
    # `torch.get_float32_matmul_precision` raises where a precision was set for one backend.
    return _spec_of(problem, sizes, together, x.dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")


@functools.lru_cache(maxsize=256)
def _spec_of(
    problem: SetProblem, sizes: tuple[int, ...], together: bool, dtype: torch.dtype, allows_tf32: bool
) -> kernels.Spec:
    d, m, k, block, sets, splits, axes = sizes
    rounded, precision = _products(dtype, allows_tf32)
    return kernels.Spec(
        M=m,
        MP=_padded(m),
        K=k,
        KP=_padded(k),
        D=d,
        DP=_padded(d),
        BLOCK=block,
        SETS=sets,
        ROUNDS=problem.iterations,
        SPLITS=splits,
        TOGETHER=together,
        LOGS=_exponents(problem, axes) > MAX_EXPONENT,
        EPSILON=problem.epsilon,
        SIGMA=problem.sigma,
        TAU=problem.tau,
        LOG_M=math.log(m),
        AXES=axes,
        RENORMALISE=problem.renormalise,
        ROUND=rounded,
        # Triton's interpreter multiplies the bits of bf16 as integers; widened, bf16 has the same products.
        DOT=tl.float32 if triton.knobs.runtime.interpret and rounded == tl.bfloat16 else rounded,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        PRECISION=precision,
    )


def _may_wait(device: torch.device, splits: int) -> bool:
    """Return whether the splits of a group can all run at once, so that they may wait for each other.

    A multiprocessor holds at least one program. Twice as many leave room for the same kernel on another stream, which
    may have begun a group, too, and wait for the rest of it. Otherwise each phase is a launch: the same bits.
    """
    if device.type != "cuda":  # Triton's interpreter, which runs one program after another
        return False
    return torch.cuda.get_device_properties(device).multi_processor_count >= 2 * splits


def _exponents(problem: SetProblem, axes: int) -> float:
    """Return a bound of the exponents in M + g + log F less the largest: g differs by as much as M, places by 1."""
    similarities = 1.0 if problem.sigma > 0 else 2.0
    return 2 * similarities / problem.epsilon + axes / problem.tau**2


@functools.lru_cache(maxsize=256)
def _constants(spec: kernels.Spec) -> kernels.Spec:
    """Return each number as what a kernel is compiled for; the same objects for the same numbers, found by identity."""
    return kernels.Spec(*map(tl.constexpr, spec))


# More programs at once are worth more to the forward than the registers they take from it (NVIDIA's compiler alone can
# be told so), and than loads ahead of their use.
FORWARD = {"num_stages": 1} | ({"maxnreg": 128} if torch.version.cuda else {})

# The dtype and precision of products. Weights of 1 / n and their gradients would vanish in fp16: TF32 has its ten bits
# of mantissa and fp32's range. Products of fp32 are three of TF32 each, as good as fp32's own and on tensor cores.
_PRODUCTS = {
    torch.bfloat16: (tl.bfloat16, "ieee"),
    torch.float16: (tl.float32, "tf32"),
    torch.float32: (tl.float32, "tf32x3"),
    torch.float64: (tl.float64, "ieee"),
}


def _products(dtype: torch.dtype, allows_tf32: bool) -> tuple[tl.dtype, str]:
    """Return dtype and precision of products; fp32's follow torch's setting."""
    if dtype == torch.float32 and allows_tf32:
        return tl.float32, "tf32"
    return _PRODUCTS[dtype]


def _width(dtype: torch.dtype) -> int:
    """Return the bytes of an operand of a product."""
    return int(_PRODUCTS[dtype][0].primitive_bitwidth) // 8
