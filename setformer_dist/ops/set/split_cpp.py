"""The split form of SeT attention by the C++ kernel for CPUs (csrc/split.h): passes over this part's tokens.

`forward` and `backward` take and give what those of split_torch.py do. `cpp.supports` says for both forms whether the
kernel can compute a problem.

Each pass is one call for all heads of all images; between two of them their sums travel. A pass needs the kernel matrix
K of each head and set. Those of as many heads as KEPT_BYTES hold stay in memory; of the others each pass computes K
again, tile by tile, which takes longer. So memory is O(n) + O(m d) for each head and a constant, whatever the image.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from setformer_dist.ops import cpp_library
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import cpp
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem
from setformer_dist.ops.set.split_common import Kept, Whole, last_sums, message_for, needs_last, parts_of_message

# For kernel matrices that stay in memory from one pass to the next, in each forward or backward of a block.
KEPT_BYTES = 256 << 20
_PAD = 16  # numbers; the kernel pads to this or to its half

_ROUND, _SCATTER, _SCATTER_BACKWARD, _GATHER_BACKWARD, _ROUND_BACKWARD, _TOKENS_BACKWARD = range(6)


class _Part(ctypes.Structure):
    """`Part` of the C++ file, field by field."""

    _fields_ = (
        ("call", cpp.Call),
        *((name, ctypes.c_int64) for name in ("round", "kept")),
        *((name, ctypes.c_void_p) for name in ("kernels", "pooled", "pooled_sums")),
        ("columns", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("rows", "grad_pooled", "along", "y")),
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


def forward(
    inputs: Inputs, whole: Whole, problem: SetProblem, rows: Rows, dtype: torch.dtype
) -> tuple[torch.Tensor, Kept]:
    """Return y (b, h, n / p, d) of this part's tokens in the dtype of x, and what `backward` needs.

    Args are those of `split_torch.forward`; `cpp.supports` has accepted them.
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

    Args are those of `split_torch.backward`; `cpp.supports` has accepted them.
    """
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
    dpooled = dpooled * every[-1, :, last].unsqueeze(-1)
    t = dpooled * kept.inverse_sum
    # Renormalised, gathering does not see its v; otherwise its columns' sums follow from what all ranks have.
    dg, along = (pooled * dpooled).sum(-1), (t * pooled).sum(-1)
    (along if not problem.renormalise else dg).zero_()
    dgs = torch.stack([dg, dg_back]) if sets == 2 else (dg + dg_back).unsqueeze(0)

    state: dict[str, Any] = {"pooled": pooled, "grad_pooled": t, "along": along, "rows": row_state}
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
