"""SeT attention of an image whose rows lie on several ranks: exact, by 2 L small sums, whatever the image's size.

Each rank holds K = exp(s / epsilon) of its own tokens; a = 1 / n of the whole image. The sets g (gather) and t
(scatter), all heads and all images travel together. F: position filter.

    round l < L    u = a / (K v);                        SUM  u_g K_g, u_t K_t                  2 m     -> v = 1/(m sum)
    round L        u_g, u_t;                             SUM  N = u_g (K F), P = (K F)^T (u_g x), u_t K_t    m (d + 2)
                   pooled = P / N;  y = (K_t F) (v_t pooled) / ((K_t F) v_t)                    nothing
    backward       e = dy / D;                           SUM  (K_t F)^T e, column sums of dlogits_t          m (d + 1)
                   dx, dlogits_g, df_g                                                          nothing
    round l > 1    x = (df - u (K y)) / (K v_(l-1));     SUM  x_g K_g, x_t K_t                  2 m     -> dg of l - 1

The gradient of a reference set stays a partial sum on each rank: the ordinary reduction of gradients adds it up.
Letters as in in_torch.py; z = heads x images, p = parts.

    split_torch.py   "torch": any device; kernel matrices of all heads are held at once
    split_cpp.py     "cpp": the C++ kernel for CPUs, pass by pass
    split_triton.py  "triton": kernels for GPUs, one launch between two messages
    split_common.py  what they share
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import no_autocast
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import split_cpp, split_torch
from setformer_dist.ops.set.op import no_triton, watched
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.set.split_common import needs_last, part_of
from setformer_dist.ops.sinkhorn import working_dtype

try:
    from setformer_dist.ops.set import split_triton as _split_triton
except ImportError:  # a PyTorch without Triton, which `no_triton` says
    _split_triton = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Traffic:
    """Numbers that a rank puts into the sums of one attention, for each head of an image, and the sums themselves."""

    forward: int
    backward: int
    forward_messages: int
    backward_messages: int


def traffic(problem: SetProblem, sets: int, m: int, d: int) -> Traffic:
    """Return what an attention exchanges; n is not in it.

    Args:
        problem: the numbers.
        sets: 1 or 2 reference sets.
        m: references of a set.
        d: values of a head.
    """
    rounds = problem.iterations
    last = m * d + m * _column_sums(problem, sets)
    forward = sets * m * (rounds - 1) + last
    first = m * d + m
    if not problem.implicit:
        return Traffic(forward, first + sets * m * (rounds - 1), rounds, rounds)
    seen = sets if not problem.renormalise else 1  # potentials of rows that have a gradient
    return Traffic(forward, first + sets * (m * m + m) + seen * m, rounds, 2)


def _column_sums(problem: SetProblem, sets: int) -> int:
    """Return how many rows of m numbers the last round's message has besides P."""
    return (sets if needs_last(problem, sets) else sets - 1) + problem.renormalise


def why_not(problem: SetProblem, dtype: torch.dtype) -> str | None:
    """Return why the split form cannot compute it, None where it can."""
    if problem.tolerance > 0:
        return f"tolerance = {problem.tolerance} stops rounds by the errors of all tokens: set attn.tolerance = 0"
    if working_dtype(dtype, problem.epsilon) is None:
        return f"epsilon = {problem.epsilon} is below 0.01, where only logarithms are safe: raise attn.epsilon"
    return None


def _implementation(inputs: Inputs, problem: SetProblem, wanted: str) -> ModuleType:
    """Return the module that computes it: the kernels of this device where they can, unless PyTorch is asked for.

    Ranks of a group may differ in it: all send the same numbers.

    Raises:
        ConfigError: kernels are asked for that cannot.
    """
    if wanted not in ("auto", "cpp", "triton"):
        return split_torch
    by_triton = wanted == "triton" or (wanted == "auto" and inputs.x_bhnd.device.type != "cpu")
    reason = no_triton(inputs, problem) if by_triton else split_cpp.supports(inputs, problem)
    if reason is not None and wanted != "auto":
        raise ConfigError(f"implementation = {wanted!r} cannot compute this: {reason}; set implementation = 'auto'")
    no_memory = watched(inputs) or inputs.x_bhnd.shape[0] == 0
    if reason is not None or no_memory:
        return split_torch
    return _split_triton if by_triton else split_cpp


class _SplitAttention(torch.autograd.Function):
    """y of this part's tokens; gradients of x and features are this part's, those of the sets its share."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        inputs, (whole, problem, rows, by) = Inputs(*arguments[:7]), arguments[7:]
        dtype = working_dtype(inputs.x_bhnd.dtype, problem.epsilon)
        assert dtype is not None
        with no_autocast(inputs.x_bhnd.device):
            y, kept = by.forward(inputs, whole, problem, rows, dtype)
        ctx.rest, ctx.kept_as = (whole, problem, rows, dtype, by), type(kept)
        ctx.save_for_backward(*kept, *inputs)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a recomputed block gives each of them once
        kept, inputs = ctx.kept_as(*saved[:-7]), Inputs(*saved[-7:])
        whole, problem, rows, dtype, by = ctx.rest
        with no_autocast(grad_y.device):
            found = by.backward(grad_y, inputs, whole, kept, problem, rows, dtype)
        return found.x, found.features, found.gather, found.scatter, *(None,) * 7


def split_attention(whole: Inputs, problem: SetProblem, rows: Rows, wanted: str = "auto") -> torch.Tensor:
    """Return y (b, h, n / p, d) of this part's tokens. Collective over the group, forward and backward.

    Args:
        whole: x and features of this part; positions and mask of the whole image.
        problem: the numbers.
        rows: the group.
        wanted: "cpp" and "triton" take those kernels, "auto" those of this device where they can; others stand for
            PyTorch.

    Raises:
        ConfigError: the split form cannot compute it, or the kernels that are asked for.
    """
    reason = why_not(problem, whole.x_bhnd.dtype)
    if reason is not None:
        raise ConfigError(f"SeT attention over several ranks: {reason}")
    inputs, known = part_of(whole, problem, rows)
    by = _implementation(inputs, problem, wanted)
    y: torch.Tensor = _SplitAttention.apply(*inputs, known, problem, rows, by)
    return y
