"""SeT attention by a C++ kernel for CPUs (csrc/set_attention.cpp): the same functions as in_torch.py, fused.

`forward` and `backward` take and give what those of `in_torch` do, so one may run forward by this and backward by that.
`supports` says whether they can compute a problem; nobody asks them otherwise (ops/cpp_library.py
builds the kernel). The split form calls it by split_cpp.py, which shares `Call` and what is around it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from setformer_dist.ops import cpp_library
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_LARGE = 8 << 20  # bytes; below, an allocator has such memory at hand


# -------------------------------------------------------------------------------------------------------- the call


class _Tokens(ctypes.Structure):
    """`Tokens` of the C++ file: a tensor (b, h, n, d) of any strides."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 4),
    )


class Call(ctypes.Structure):
    """`Call` of the C++ file, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "heads", "tokens", "references", "features", "values")),
        *((name, ctypes.c_int64) for name in ("axes", "rounds", "two_sets", "renormalise", "own_places")),
        *((name, ctypes.c_double) for name in ("epsilon", "sigma", "tau")),
        *((name, _Tokens) for name in ("x", "compared", "y", "grad_x", "grad_compared")),
        *((name, ctypes.c_void_p) for name in ("gather", "scatter", "positions", "places", "mask", "scalings")),
        *((name, ctypes.c_void_p) for name in ("grad_gather", "grad_scatter", "valid", "nearest")),
    )


def tokens(tensor: torch.Tensor | None) -> _Tokens:
    """Return a tensor (b, h, n, d), or None, as a field of `Call`."""
    if tensor is None:
        return _Tokens()
    return _Tokens(tensor.data_ptr(), _TYPES[tensor.dtype], tensor.stride())


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Return where a contiguous tensor lies, or None."""
    return None if tensor is None else tensor.data_ptr()


def call_of(
    inputs: Inputs, problem: SetProblem, dtype: torch.dtype, **more: Any
) -> tuple[Call, dict[str, torch.Tensor | None]]:
    """Return the call, and tensors that must live as long as it does.

    Args:
        inputs: the tensors.
        problem: the numbers.
        dtype: in which to work.
        more: the remaining fields of `Call`, tensors that the caller holds.
    """

    def plain(tensor: torch.Tensor | None, as_type: torch.dtype = dtype) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().to(as_type).contiguous()

    small = {
        "gather": plain(inputs.gather_hmk),
        "scatter": plain(inputs.scatter_hmk),
        "positions": plain(inputs.positions_bna),
        "places": plain(inputs.places_ma),
        "mask": plain(inputs.mask_bn, torch.uint8),
    }
    b, h, n, d = inputs.x_bhnd.shape
    positions = inputs.positions_bna
    call = Call(
        images=b,
        heads=h,
        tokens=n,
        references=inputs.gather_hmk.shape[1],
        features=inputs.gather_hmk.shape[2],
        values=d,
        axes=0 if positions is None else positions.shape[2],
        rounds=problem.iterations,
        two_sets=inputs.scatter_hmk is not None,
        renormalise=problem.renormalise,
        own_places=positions is not None and positions.shape[0] > 1,
        epsilon=problem.epsilon,
        sigma=problem.sigma,
        tau=problem.tau,
        x=tokens(inputs.x_bhnd),
        compared=tokens(inputs.features_bhnk),
        **{name: pointer(tensor) for name, tensor in small.items()},
        **more,
    )
    return call, small


def _run(inputs: Inputs, problem: SetProblem, dtype: torch.dtype, backward: bool, **more: Any) -> None:
    """Call the kernel; `more` as in `call_of`."""
    library = cpp_library.library()
    assert isinstance(library, ctypes.CDLL), library
    call, _held = call_of(inputs, problem, dtype, **more)
    if library.setformer_set_attention(ctypes.byref(call), int(dtype == torch.float64), int(backward)):
        raise MemoryError(f"no memory for SeT attention of {call.tokens} tokens and {call.references} references")


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return memory for an output; a large one in huge pages, as the system gives them out zeroed page by page."""
    return _in_huge_pages(torch.empty_like(tensor))


def empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return working memory, likewise."""
    return _in_huge_pages(like.new_empty(shape, dtype=dtype))


def _in_huge_pages(out: torch.Tensor) -> torch.Tensor:
    library = cpp_library.library()
    assert isinstance(library, ctypes.CDLL), library
    if out.nbytes >= _LARGE:
        library.setformer_prefer_huge_pages(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.nbytes))
    return out


class Outputs:
    """Memory for the gradients of a call."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype) -> None:
        """Take it; the sums of the reference sets are in the working dtype."""
        x, features = inputs.x_bhnd, inputs.features_bhnk
        self._references = inputs.gather_hmk, inputs.scatter_hmk
        self._x = empty_like(x)
        self._features = None if features is None else empty_like(features)
        self._sums = [None if r is None else r.new_empty((len(x), *r.shape), dtype=dtype) for r in self._references]

    def fields(self) -> dict[str, Any]:
        """Return them as fields of `Call`."""
        return {
            "grad_x": tokens(self._x),
            "grad_compared": tokens(self._features),
            "grad_gather": pointer(self._sums[0]),
            "grad_scatter": pointer(self._sums[1]),
        }

    def found(self) -> Gradients:
        """Return what the kernel has written there."""
        # It leaves the sum over images in the place of the first; a view would keep the others' memory.
        gather, scatter = (
            None if s is None or r is None else s[0].to(r.dtype, copy=True)
            for s, r in zip(self._sums, self._references, strict=True)
        )
        assert gather is not None
        return Gradients(self._x, self._features, gather, scatter)


def unsuitable(inputs: Inputs, problem: SetProblem) -> str | None:
    """Return why this kernel computes no such problem, on whatever machine; None where it does.

    Args:
        inputs: the tensors; only their devices, dtypes and shapes are looked at.
        problem: the numbers.
    """
    if inputs.x_bhnd.device.type != "cpu":
        return f"device {inputs.x_bhnd.device.type!r} is not a CPU"
    if problem.tolerance > 0:
        return f"tolerance = {problem.tolerance} stops rounds early, which only the PyTorch implementation does"
    if problem.implicit:
        return "gradient = 'implicit' is for the PyTorch implementation"
    for tensor in (inputs.x_bhnd, inputs.features_bhnk):
        if tensor is not None and tensor.dtype not in _TYPES:
            return f"dtype {tensor.dtype} is none of {', '.join(map(str, _TYPES))}"
    return None


def supports(inputs: Inputs, problem: SetProblem) -> str | None:
    """Return why this kernel cannot compute the problem, or None where it can. Builds it if asked for the first time.

    Args:
        inputs: as those of `unsuitable`.
        problem: likewise.
    """
    reason = unsuitable(inputs, problem)
    if reason is not None:
        return reason
    library = cpp_library.library()
    return library if isinstance(library, str) else None


def forward(inputs: Inputs, problem: SetProblem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (b, h, n, d) in the dtype of x, and the v of every round (s, b, h, L + 1, m) for `backward`.

    Args:
        inputs: as those of `in_torch.forward`; `supports` has accepted them.
        problem: likewise.
        dtype: in which to work, fp32 or fp64 (`sinkhorn.working_dtype`).
    """
    b, h, _, _ = inputs.x_bhnd.shape
    sets = 1 if inputs.scatter_hmk is None else 2
    y = empty_like(inputs.x_bhnd)
    rounds = inputs.x_bhnd.new_empty((sets, b, h, problem.iterations + 1, inputs.gather_hmk.shape[1]), dtype=dtype)
    _run(inputs, problem, dtype, False, y=tokens(y), scalings=pointer(rounds))
    return y, rounds


def backward(
    grad_y: torch.Tensor, inputs: Inputs, rounds: torch.Tensor, problem: SetProblem, dtype: torch.dtype
) -> Gradients:
    """Return the gradients of everything that `forward` got.

    Args:
        grad_y: (b, h, n, d), of any strides.
        inputs: as `forward` got them.
        rounds: what it returned.
        problem: likewise.
        dtype: likewise.
    """
    outputs = Outputs(inputs, dtype)
    rounds = rounds.contiguous()
    _run(inputs, problem, dtype, True, y=tokens(grad_y), scalings=pointer(rounds), **outputs.fields())
    return outputs.found()


def exponential(numbers: torch.Tensor) -> torch.Tensor:
    """Return exp of each number as the kernel computes it, for numbers below 88 (fp32) or 709 (fp64).

    Args:
        numbers: fp32 or fp64, on the CPU.
    """
    library = cpp_library.library()
    assert isinstance(library, ctypes.CDLL), library
    padded = numbers.new_zeros(-(-numbers.numel() // 16) * 16)
    padded[: numbers.numel()] = numbers.flatten()
    assert padded.data_ptr() % 64 == 0
    library.setformer_exponential(
        ctypes.c_void_p(padded.data_ptr()), ctypes.c_int64(padded.numel()), int(numbers.dtype == torch.float64)
    )
    return padded[: numbers.numel()].view_as(numbers)
