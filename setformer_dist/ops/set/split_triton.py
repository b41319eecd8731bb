"""The split form of SeT attention in Triton kernels: passes over this part's tokens, of all heads of all images.

`forward` and `backward` take and give what those of split_torch.py do, and send the same numbers. `triton.why_not` says
for both forms whether the kernels can compute a problem. Each pass is one launch (triton_split_kernels.py), which takes
in what the last message brought and writes the next one; nothing waits for the device. Where the splits of a head may
not wait for each other, each of a pass's phases is a launch.

As in the whole form, potentials take the place of scalings, nothing of size n x m exists, and all but operands of
products is fp32. Messages are in the dtype of the split form, fp64 below epsilon = 0.05, as they hold no logarithms.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import triton_kernels as kernels
from setformer_dist.ops.set import triton_split_kernels as split_kernels
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem
from setformer_dist.ops.set.split_common import Whole, last_sums, message_for, parts_of_message
from setformer_dist.ops.set.triton import FORWARD, Call, view


class Kept(NamedTuple):
    """What the backward needs besides the inputs.

    Attributes:
        potentials: (sets, z, L + 2, m), see triton_kernels.py.
        pooled: (z, m, d), padded.
    """

    potentials: torch.Tensor
    pooled: torch.Tensor


class _Passes:
    """The passes of one forward or backward, and the memory that lives as long as they do."""

    def __init__(self, inputs: Inputs, whole: Whole, problem: SetProblem, splits: int | None, passes: int) -> None:
        """Prepare so many passes."""
        call = Call.of(inputs, problem, splits)
        b, device = inputs.x_bhnd.shape[0], inputs.x_bhnd.device
        if whole.mask_bn is None:
            counts = torch.full((b,), whole.tokens, dtype=call.acc, device=device)
        else:
            counts = whole.mask_bn.sum(-1).clamp_min(1).to(call.acc)
        self.call = dataclasses.replace(call, data=call.data._replace(counts=counts))
        self._gates: torch.Tensor | None = None
        if call.spec.TOGETHER:  # one for each pass, each beginning at an address like the others'
            width = -(-(1 + call.data.groups) // 32) * 32
            self._gates = torch.zeros(passes, width, dtype=torch.int32, device=device)
        self._next = 0

    def run(
        self,
        kernel: Any,
        *arguments: Any,
        totals: torch.Tensor,
        first: int = 0,
        end: int = 2,
        compiler: dict[str, int] | None = None,
    ) -> None:
        """Make one pass.

        Args:
            kernel: of triton_split_kernels.
            arguments: before those that every kernel takes.
            totals: what all ranks had to say of each reference; the first pass does not look.
            first: phase to begin with.
            end: phase to end before.
            compiler: its options.
        """
        gate = None if self._gates is None else self._gates[self._next]
        self._next += 1
        data = self.call.data._replace(gate=gate, totals=totals)
        dataclasses.replace(self.call, data=data).launch(kernel, compiler or {}, *arguments, first=first, end=end)


def _nearest(whole: Whole) -> split_kernels.Nearest:
    at = whole.nearest_b1m
    if at is None:
        return split_kernels.Nearest(None, 0)
    return split_kernels.Nearest(at.contiguous(), 0 if at.shape[0] == 1 else at.shape[-1])


def _message(places: list[torch.Tensor]) -> split_kernels.Message:
    """Return what `last_sums` gives the shapes of, as kernels take it."""
    return split_kernels.Message(places[0], places[1] if len(places) == 3 else None, places[-1])


def forward(
    inputs: Inputs,
    whole: Whole,
    problem: SetProblem,
    rows: Rows,
    dtype: torch.dtype,
    splits: int | None = None,
) -> tuple[torch.Tensor, Kept]:
    """Return y (b, h, n / p, d) of this part's tokens in the dtype of x, and what `backward` needs.

    Args are those of `split_torch.forward`; `triton.why_not` has nothing against them. `splits` as in `triton.forward`.
    """
    x = inputs.x_bhnd
    with torch.no_grad(), torch.cuda.device(x.get_device()):
        last = problem.iterations
        passes = _Passes(inputs, whole, problem, splits, last + 1)
        call = passes.call
        spec, z = call.spec, call.data.groups
        potentials, pooled = call.buffer(spec.SETS, z, last + 2, spec.M), call.buffer(z, spec.MP, spec.DP)
        y, nearest = torch.empty_like(x), _nearest(whole)
        sums: list[torch.Tensor] = []
        for t in range(last):
            ends = t == last - 1
            shapes: list[tuple[int, ...]] = (
                last_sums(problem, spec.SETS, z, spec.M, spec.D) if ends else [(spec.SETS, z, spec.M)]
            )
            message, places = message_for(x, shapes, dtype)
            passes.run(
                split_kernels.forward_round, _message(places), nearest, potentials, t, ends,
                totals=sums[-1] if t else places[-1], compiler=FORWARD,
            )  # fmt: skip
            sums = parts_of_message(rows.sum(message), shapes)
        passes.run(
            split_kernels.forward_tokens, view(y), _message(sums), nearest, potentials, pooled, totals=sums[-1],
            compiler=FORWARD,
        )  # fmt: skip
    return y, Kept(potentials, pooled)


def backward(
    grad_y: torch.Tensor,
    inputs: Inputs,
    whole: Whole,
    kept: Kept,
    problem: SetProblem,
    rows: Rows,
    dtype: torch.dtype,
    splits: int | None = None,
) -> Gradients:
    """Return the gradients of this part's x and features, and this part's share of those of the reference sets.

    Args are those of `split_torch.backward`; `triton.why_not` has nothing against them. `splits` as for `forward`.
    """
    x, features, last = inputs.x_bhnd, inputs.features_bhnk, problem.iterations
    with torch.no_grad(), torch.cuda.device(x.get_device()):
        passes = _Passes(inputs, whole, problem, splits, last + 1)
        call = passes.call
        spec, z = call.spec, call.data.groups
        adjoint = kernels.Adjoint(
            potentials=kept.potentials,
            columns=call.buffer(spec.SETS, z, last + 1, 2, spec.MP),
            pooled=kept.pooled,
            d_pooled=call.buffer(z, spec.MP, spec.DP),
            along=call.buffer(z, spec.MP),
        )
        dy = view(grad_y)
        shapes = [(z, spec.M, spec.D), (1, z, spec.M)]
        message, places = message_for(x, shapes, dtype)
        passes.run(split_kernels.backward_tokens, _message(places), dy, adjoint, totals=places[-1])
        square, totals = parts_of_message(rows.sum(message), shapes)
        for t in range(last, 1, -1):
            message, (columns,) = message_for(x, [(spec.SETS, z, spec.M)], dtype)
            passes.run(
                split_kernels.backward_round, columns, square, dy, adjoint, t, t == last, totals=totals,
                first=int(t < last), end=3,
            )  # fmt: skip
            totals = rows.sum(message)
        dx = torch.empty_like(x)
        dfeatures = None if features is None else torch.empty_like(features)
        d_units = call.buffer(spec.SETS, *x.shape[:2], spec.SPLITS, spec.MP, spec.KP)
        of_features = None if dfeatures is None else view(dfeatures)
        passes.run(
            split_kernels.gradients,
            view(dx),
            of_features,
            d_units,
            square,
            dy,
            adjoint,
            totals=totals,
            first=int(last > 1),
        )
        return Gradients(dx, dfeatures, *call.of_references(inputs, d_units))
