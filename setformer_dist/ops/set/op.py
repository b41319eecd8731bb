"""SeT attention as PyTorch operators: `torch.ops.setformer.set_attention` and its backward.

Registered with fake kernels, autograd and a formula for the FLOP counter, so torch.compile, activation checkpointing
and ZeRO-3 see one opaque operator instead of a loop, and `torch.library.opcheck` accepts both. The implementation is an
argument, "triton", "cpp", "torch" or "cpp or torch": the C++ kernel where this machine has a compiler, otherwise
PyTorch. That is found out when the operator runs, as a compiled graph may run on another machine; which one fits the
device and the numbers was found before (attention.py).

Where no mode or tracer is active, `differentiable` skips the dispatcher's way through Python, which costs as much as
attention over a hundred tokens. It runs the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from setformer_dist.ops.set import cpp, in_torch
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem
from setformer_dist.ops.sinkhorn import working_dtype

try:
    from setformer_dist.ops.set import triton as _set_triton
except ImportError:  # a PyTorch without Triton
    _set_triton = None  # type: ignore[assignment]

# The module of the Triton kernels, or None.
TRITON: Any = _set_triton

# The C++ kernel, or PyTorch where there is no compiler.
CPP_OR_TORCH = "cpp or torch"

Maybe = torch.Tensor | None


def runs_triton(device: str) -> bool:
    """Return whether Triton kernels run on this type of device: a GPU, or a CPU that interprets them."""
    return device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def no_triton(inputs: Inputs, problem: SetProblem) -> str | None:
    """Return why the Triton kernels cannot compute this here, None where they can.

    Args:
        inputs: the tensors; their device, dtypes and shapes are looked at.
        problem: the numbers.
    """
    device = inputs.x_bhnd.device.type
    if TRITON is None:
        return "this PyTorch has no Triton"
    if not runs_triton(device):
        return f"device {device!r} has no Triton kernels"
    reason: str | None = TRITON.why_not(inputs, problem)
    return reason


@torch.library.custom_op("setformer::set_attention", mutates_args=())
def set_attention_op(
    x: torch.Tensor,
    features: torch.Tensor | None,
    gather: torch.Tensor,
    scatter: torch.Tensor | None,
    positions: torch.Tensor | None,
    places: torch.Tensor | None,
    mask: torch.Tensor | None,
    numbers: Sequence[float],
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, what the backward needs of the rounds).

    Args are the fields of `Inputs`, `SetProblem.numbers` and the implementation's name.
    """
    inputs = Inputs(x, features, gather, scatter, positions, places, mask)
    return _forward(inputs, SetProblem.of(numbers), implementation)


@torch.library.custom_op("setformer::set_attention_backward", mutates_args=())
def set_attention_backward_op(
    grad_y: torch.Tensor,
    rounds: torch.Tensor,
    x: torch.Tensor,
    features: torch.Tensor | None,
    gather: torch.Tensor,
    scatter: torch.Tensor | None,
    positions: torch.Tensor | None,
    places: torch.Tensor | None,
    mask: torch.Tensor | None,
    numbers: Sequence[float],
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, features, gather and scatter; empty tensors stand for inputs that were None."""
    inputs = Inputs(x, features, gather, scatter, positions, places, mask)
    found = _backward(grad_y, rounds, inputs, SetProblem.of(numbers), implementation)
    return found.x, _or_empty(found.features, x), found.gather, _or_empty(found.scatter, x)


def _forward(inputs: Inputs, problem: SetProblem, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, what the backward needs of the rounds)."""
    if implementation == "triton":
        y, kept = TRITON.forward(inputs, problem)
        return y, kept
    chosen = _by_scalings(implementation, inputs, problem)
    y, rounds = chosen.forward(inputs, problem, _working(inputs.x_bhnd, problem.epsilon))
    return y, rounds


def _backward(
    grad_y: torch.Tensor, kept: torch.Tensor, inputs: Inputs, problem: SetProblem, implementation: str
) -> Gradients:
    """Return the gradients of what `_forward` got."""
    if implementation == "triton":
        return TRITON.backward(grad_y, inputs, kept, problem)  # type: ignore[no-any-return]
    chosen = _by_scalings(implementation, inputs, problem)
    found: Gradients = chosen.backward(grad_y, inputs, kept, problem, _working(inputs.x_bhnd, problem.epsilon))
    return found


def _by_scalings(implementation: str, inputs: Inputs, problem: SetProblem) -> ModuleType:
    """Return the module of an implementation by scalings; both keep the same numbers for the backward."""
    if implementation in (CPP_OR_TORCH, "cpu"):  # the latter in graphs that older versions exported
        return in_torch if cpp.supports(inputs, problem) else cpp
    return cpp if implementation == "cpp" else in_torch


def _working(x: torch.Tensor, epsilon: float) -> torch.dtype:
    dtype = working_dtype(x.dtype, epsilon)
    assert dtype is not None, f"epsilon = {epsilon} is below what scalings hold: take the reference"
    return dtype


def _or_empty(tensor: Maybe, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0) if tensor is None else tensor


@set_attention_op.register_fake
def _fake(
    x: torch.Tensor,
    features: Maybe,
    gather: torch.Tensor,
    scatter: Maybe,
    positions: Maybe,
    places: Maybe,
    mask: Maybe,
    numbers: Sequence[float],
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = Inputs(x, features, gather, scatter, positions, places, mask)
    problem = SetProblem.of(numbers)
    if implementation == "triton":
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.empty_like(x), x.new_empty(TRITON.kept_shape(inputs, problem), dtype=wide)
    b, h = x.shape[:2]
    shape = (1 if scatter is None else 2, b, h, problem.iterations + 1, gather.shape[1])
    return torch.empty_like(x), x.new_empty(shape, dtype=_working(x, problem.epsilon))


@set_attention_backward_op.register_fake
def _fake_backward(
    grad_y: torch.Tensor,
    rounds: torch.Tensor,
    x: torch.Tensor,
    features: Maybe,
    gather: torch.Tensor,
    scatter: Maybe,
    *rest: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x),
        x.new_empty(0) if features is None else torch.empty_like(features),
        torch.empty_like(gather, memory_format=torch.contiguous_format),
        x.new_empty(0) if scatter is None else torch.empty_like(scatter, memory_format=torch.contiguous_format),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.rest = inputs[7:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: torch.Tensor | None, _: torch.Tensor | None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * (7 + len(ctx.rest))
    rounds, *tensors = ctx.saved_tensors
    return _differentiate_by_operator(grad_y, rounds, tensors, *ctx.rest)


def _differentiate_by_operator(
    grad_y: torch.Tensor, rounds: torch.Tensor, tensors: Sequence[Maybe], *rest: Any
) -> tuple[Any, ...]:
    """Return a gradient for each argument of the operator, None where there is none."""
    operator = torch.ops.setformer.set_attention_backward
    dx, dfeatures, dgather, dscatter = operator(grad_y, rounds, *tensors, *rest)
    features, scatter = tensors[1], tensors[3]
    return (
        dx,
        None if features is None else dfeatures,
        dgather,
        None if scatter is None else dscatter,
        *(None,) * (3 + len(rest)),
    )


set_attention_op.register_autograd(_differentiate, setup_context=_setup)


# What the counter of operations hands over for a tensor.
_Shape = Sequence[int]
_MaybeShape = _Shape | None


def _products(x: _Shape, gather: _Shape, scatter: _Shape | None) -> tuple[int, int, int, int]:
    """Return (n m b h, features, values, sets) from shapes."""
    b, h, n, d = x
    m, k = gather[1], gather[2]
    return b * h * n * m, k, d, 1 if scatter is None else 2


@register_flop_formula(torch.ops.setformer.set_attention)
def _flops(
    x: _Shape,
    features: _MaybeShape,
    gather: _Shape,
    scatter: _MaybeShape,
    positions: _MaybeShape,
    places: _MaybeShape,
    mask: _MaybeShape,
    numbers: Sequence[float],
    *rest: object,
    **kwargs: object,
) -> int:
    """Similarity with each set, two products a round, gathering, scattering; exponentials are not counted."""
    pairs, k, d, sets = _products(x, gather, scatter)
    return 2 * pairs * (sets * k + 2 * d + 2 * SetProblem.of(numbers).iterations * sets)


@register_flop_formula(torch.ops.setformer.set_attention_backward)
def _backward_flops(
    grad_y: _Shape,
    rounds: _Shape,
    x: _Shape,
    features: _MaybeShape,
    gather: _Shape,
    scatter: _MaybeShape,
    positions: _MaybeShape,
    places: _MaybeShape,
    mask: _MaybeShape,
    numbers: Sequence[float],
    *rest: object,
    **kwargs: object,
) -> int:
    """What is run: the forward's similarities and pooling again, their gradients, the adjoint of the rounds."""
    pairs, k, d, sets = _products(x, gather, scatter)
    return 2 * pairs * (3 * sets * k + 6 * d + 5 * SetProblem.of(numbers).iterations * sets)


# ------------------------------------------------------------------------------------------ without the dispatcher


def differentiable(inputs: Inputs, problem: SetProblem, implementation: str) -> torch.Tensor:
    """Return y, by the operator where something looks at operators, otherwise by the same functions directly.

    On the way through the dispatcher an operator of Python passes four layers of Python; a compiler, fake tensors, a
    counter of operations, function transforms and tracers need them.

    Args:
        inputs: the tensors.
        problem: the numbers.
        implementation: its name.
    """
    if watched(inputs):
        y: torch.Tensor = set_attention_op(*inputs, problem.numbers(), implementation)[0]
        return y
    return _SetAttention.apply(*inputs, problem, implementation)  # type: ignore[no-any-return]


def watched(tensors: Sequence[Maybe]) -> bool:
    """Return whether the call must go through the dispatcher: a mode, transform or tracer is active.

    A kernel reads memory, which knows nothing of a lazy minus sign and does not exist for zeros of autograd.
    """
    return (
        torch.compiler.is_compiling()
        or any(type(t) not in PLAIN for t in tensors)
        or any(t is not None and (t.is_neg() or t._is_zerotensor()) for t in tensors)
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0  # type: ignore[no-untyped-call]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


# What a tensor is that has no kind of its own to say what operators do with it.
PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


class _SetAttention(torch.autograd.Function):
    """The operator's forward and backward; keeps the same tensors, so that recomputation may use either."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        inputs, ctx.rest = Inputs(*arguments[:7]), arguments[7:]
        y, kept = _forward(inputs, *ctx.rest)
        ctx.save_for_backward(kept, *inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, *tensors = ctx.saved_tensors
        batched = torch._C._functorch.is_legacy_batchedtensor(grad_y)  # is_grads_batched, vectorize=True
        if batched or watched((grad_y, *tensors)):
            return _differentiate_by_operator(grad_y, kept, tensors, ctx.rest[0].numbers(), ctx.rest[1])
        found = _backward(grad_y, kept, Inputs(*tensors), *ctx.rest)
        return found.x, found.features, found.gather, found.scatter, *(None,) * (3 + len(ctx.rest))
