"""The split form of SeT attention by the C++ kernel for CPUs (csrc/split.h): passes over this part's tokens.

`forward` and `backward` take and give what those of split_torch.py do; `supports` says whether they can.

Each pass is one call for all heads of all images; between two of them their sums travel. A pass needs the kernel matrix
K of each head and set. Those of as many heads as KEPT_BYTES hold stay in memory; of the others each pass computes K
again, tile by tile, which takes longer. So memory is O(n) + O(m d) for each head and a constant, whatever the image.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import torch

from setformer_dist.ops import cpp_library
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import cpp
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem
from setformer_dist.ops.set.split_common import (
    Kept,
    Whole,
    last_sums,
    message_for,
    needs_last,
    parts_of_message,
    sum_all,
)
from setformer_dist.ops.sinkhorn import implicit_system

# For kernel matrices that stay in memory from one pass to the next, in each forward or backward of a block.
KEPT_BYTES = 256 << 20
_PAD = 16  # numbers; the kernel pads to this or to its half

_ROUND, _SCATTER, _SCATTER_BACKWARD, _GATHER_BACKWARD, _ROUND_BACKWARD, _TOKENS_BACKWARD = range(6)
_IMPLICIT_SYSTEM, _IMPLICIT_SIDE, _IMPLICIT_TOKENS = range(6, 9)


class _Part(ctypes.Structure):
    """`Part` of the C++ file, field by field."""

    _fields_ = (
        ("call", cpp.Call),
        *((name, ctypes.c_int64) for name in ("round", "kept")),
        *((name, ctypes.c_void_p) for name in ("kernels", "pooled", "pooled_sums")),
        ("columns", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("rows", "grad_pooled", "along", "y", "system", "gram", "side")),
    )


class _Passes:
    """The passes of one forward or backward, and the memory that lives as long as they do."""

    def __init__(
        self, inputs: Inputs, whole: Whole, problem: SetProblem, dtype: torch.dtype, rounds: torch.Tensor, **more: Any
    ) -> None:
        """Prepare; `more` are further fields of `Call`, tensors that the caller holds."""
        x, m = inputs.x_bhnd, inputs.gather_hmk.shape[1]
        b, _, n, _ = x.shape
        self.sets, self.z = rounds.shape[:2]
        self.padded_n = _padded(n)
        self._wide = int(dtype == torch.float64)
        valid = torch.full((b,), whole.tokens) if whole.mask_bn is None else whole.mask_bn.sum(-1)
        nearest = None if whole.nearest_b1m is None else whole.nearest_b1m.contiguous()
        self._call, held = cpp.call_of(
            inputs,
            problem,
            dtype,
            scalings=cpp.pointer(rounds),
            valid=cpp.pointer(valid),
            nearest=cpp.pointer(nearest),
            **more,
        )
        one = self.sets * self.padded_n * _padded(m) * dtype.itemsize
        self._kept = min(self.z, KEPT_BYTES // one)
        self._kernels = cpp.empty(x, (self._kept * one // dtype.itemsize,), dtype)
        self._held = held, valid, nearest, rounds

    def run(self, which: int, *, columns: tuple[torch.Tensor | None, ...] = (), round: int = 0, **tensors: Any) -> None:
        """Make one pass; `columns` are places for the sums of each set, and the tensors further fields of `Part`."""
        part = _Part(call=self._call, round=round, kept=self._kept, kernels=cpp.pointer(self._kernels))
        for index, place in enumerate(columns):
            part.columns[index] = cpp.pointer(place)
        for name, tensor in tensors.items():
            assert tensor is None or tensor.is_contiguous(), name
            setattr(part, name, cpp.pointer(tensor))
        library = cpp_library.library()
        assert isinstance(library, ctypes.CDLL), library
        if library.setformer_split_attention(ctypes.byref(part), self._wide, ctypes.c_int64(which)):
            raise MemoryError(f"no memory for SeT attention of {self._call.tokens} tokens of a part")


def _padded(size: int) -> int:
    return -(-size // _PAD) * _PAD


def supports(inputs: Inputs, problem: SetProblem) -> str | None:
    """Return why the kernel cannot compute the problem, or None where it can: as the whole form, and implicitly.

    Args:
        inputs: as those of `cpp.supports`.
        problem: likewise.
    """
    return cpp.supports(inputs, dataclasses.replace(problem, implicit=False))


def forward(
    inputs: Inputs, whole: Whole, problem: SetProblem, rows: Rows, dtype: torch.dtype
) -> tuple[torch.Tensor, Kept]:
    """Return y (b, h, n / p, d) of this part's tokens in the dtype of x, and what `backward` needs.

    Args are those of `split_torch.forward`; `supports` has accepted them.
    """
    x = inputs.x_bhnd
    b, h, _, d = x.shape
    z, sets, m, last = b * h, 1 if inputs.scatter_hmk is None else 2, inputs.gather_hmk.shape[1], problem.iterations
    y = cpp.empty_like(x)
    every = x.new_ones((sets, z, last + 1, m), dtype=dtype)
    passes = _Passes(inputs, whole, problem, dtype, every, y=cpp.tokens(y))
    for number in range(1, last):
        columns = x.new_empty((sets, z, m), dtype=dtype)
        passes.run(_ROUND, round=number, columns=tuple(columns))
        every[:, :, number] = (1.0 / m) / rows.sum(columns.view(-1)).view(sets, z, m)

    first = 0 if needs_last(problem, sets) else 1  # nothing looks at a v that is not needed
    shapes = last_sums(problem, sets, z, m, d)
    message, places = message_for(x, shapes, dtype)
    norms = places[1] if problem.renormalise else None
    columns_last = (*[None] * first, *places[-1])
    passes.run(_ROUND, round=last, columns=columns_last, pooled=places[0], pooled_sums=norms)
    pooled, *sums, total = parts_of_message(rows.sum(message), shapes)
    every[first:, :, last] = (1.0 / m) / total
    if problem.renormalise:
        inverse_sum = sums[0].clamp_min(torch.finfo(dtype).tiny).reciprocal_().unsqueeze(-1)
    else:
        inverse_sum = (every[0, :, last] * m).unsqueeze(-1)
    kept = Kept(every, pooled * inverse_sum, inverse_sum)
    passes.run(_SCATTER, pooled=kept.pooled)
    return y, kept


def backward(
    grad_y: torch.Tensor, inputs: Inputs, whole: Whole, kept: Kept, problem: SetProblem, rows: Rows, dtype: torch.dtype
) -> Gradients:
    """Return the gradients of this part's x and features, and this part's share of those of the reference sets.

    Args are those of `split_torch.backward`; `supports` has accepted them.
    """
    if problem.implicit:
        return _implicit_backward(grad_y, inputs, whole, kept, problem, rows, dtype)
    x, every = inputs.x_bhnd, kept.rounds.contiguous()
    sets, z, last, m = every.shape[0], every.shape[1], problem.iterations, every.shape[3]
    gradients = cpp.Outputs(inputs, dtype)
    passes = _Passes(inputs, whole, problem, dtype, every, y=cpp.tokens(grad_y), **gradients.fields())
    row_state = cpp.empty(x, (sets, z, 2 * last + 1, passes.padded_n), dtype)
    pooled = kept.pooled.contiguous()

    shapes = [tuple(pooled.shape), (z, m)]
    message, (dpooled, columns) = message_for(x, shapes, dtype)
    passes.run(
        _SCATTER_BACKWARD, pooled=pooled, grad_pooled=dpooled, rows=row_state, columns=(*[None] * (sets - 1), columns)
    )
    dpooled, dg_back = parts_of_message(rows.sum(message), shapes)
    state, dgs = _after_scattering(dpooled, dg_back, kept, problem)
    state |= {"pooled": pooled, "rows": row_state}
    ys = x.new_empty((sets, z, last, m), dtype=dtype)
    for number in range(last, 0, -1):
        ys[:, :, number - 1] = every[:, :, number] * dgs * m
        sums = x.new_empty((sets, z, m), dtype=dtype)
        if number == last:
            passes.run(_GATHER_BACKWARD, columns=tuple(sums), y=ys, **state)
        elif number > 1:
            passes.run(_ROUND_BACKWARD, round=number, columns=tuple(sums), y=ys, **state)
        if number > 1:
            dgs = -every[:, :, number - 1] * rows.sum(sums.view(-1)).view(sets, z, m)
    passes.run(_TOKENS_BACKWARD, y=ys, **state)
    return gradients.found()


def _after_scattering(
    dpooled: torch.Tensor, dg_back: torch.Tensor, kept: Kept, problem: SetProblem
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what the first message brings: fields of `Part`, and the gradients of log v of each set, (sets, z, m)."""
    dpooled = dpooled * kept.rounds[-1, :, -1].unsqueeze(-1)
    t = dpooled * kept.inverse_sum
    # Renormalised, gathering does not see its v; otherwise its columns' sums follow from what all ranks have.
    dg, along = (kept.pooled * dpooled).sum(-1), (t * kept.pooled).sum(-1)
    (along if not problem.renormalise else dg).zero_()
    dgs = torch.stack([dg, dg_back]) if len(kept.rounds) == 2 else (dg + dg_back).unsqueeze(0)
    return {"grad_pooled": t, "along": along}, dgs


def _implicit_backward(
    grad_y: torch.Tensor, inputs: Inputs, whole: Whole, kept: Kept, problem: SetProblem, rows: Rows, dtype: torch.dtype
) -> Gradients:
    """As `backward`: the linear systems' sums travel in fp64, with the first message and in a second one."""
    x, ends = inputs.x_bhnd, kept.rounds[:, :, -2:].contiguous()  # what the last round began and ended with
    sets, z, _, m = ends.shape
    gradients, last = cpp.Outputs(inputs, dtype), dataclasses.replace(problem, iterations=1)
    passes = _Passes(inputs, whole, last, dtype, ends, y=cpp.tokens(grad_y), **gradients.fields())
    state: dict[str, Any] = {
        "rows": cpp.empty(x, (sets, z, 3, passes.padded_n), dtype),
        "pooled": kept.pooled.contiguous(),
    }
    dpooled, columns = torch.empty_like(state["pooled"]), x.new_empty((z, m), dtype=dtype)
    passes.run(_SCATTER_BACKWARD, grad_pooled=dpooled, columns=(*[None] * (sets - 1), columns), **state)
    system, gram = (x.new_empty((sets, z, *shape), dtype=torch.float64) for shape in ((m,), (m, m)))
    passes.run(_IMPLICIT_SYSTEM, system=system, gram=gram)
    pairs = [one for pair in zip(system, gram, strict=True) for one in pair]
    dpooled, dg_back, *pairs = sum_all(rows, [dpooled, columns, *pairs])
    more, dgs = _after_scattering(dpooled, dg_back, kept, problem)
    state |= more

    ys = x.new_zeros((sets, z, 1, m), dtype=dtype)
    passes.run(_GATHER_BACKWARD, y=ys, **state)
    side = x.new_empty((sets, z, m), dtype=torch.float64)
    passes.run(_IMPLICIT_SIDE, side=side, rows=state["rows"])
    seen = 1 if problem.renormalise else sets  # renormalised, scattering has no gradient of log u
    sides = dgs.double()
    sides[:seen] -= torch.stack(sum_all(rows, list(side[:seen])))
    for s in range(sets):
        ys[s] = implicit_system(pairs[2 * s], pairs[2 * s + 1], sides[s].unsqueeze(1)) * ends[s, :, 1:]
    passes.run(_IMPLICIT_TOKENS, y=ys, **state)
    return gradients.found()
