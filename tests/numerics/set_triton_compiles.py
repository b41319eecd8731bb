"""Compile every kernel for a GPU where there is none: `python -m tests.numerics.set_triton_compiles DTYPE FORM SM`.

FORM is "whole", "short" or "split", SM the compute capability: 80 (A100), 89 (a GPU for desktops), 90 (H100) or 100
(B200).

Interpreted, a kernel may do what the compiler refuses, such as changing a variable's type in a branch. The driver
launches nothing; Triton itself refuses what needs more shared memory than the GPU would have.
"""

from __future__ import annotations

import sys

import torch
from triton.runtime import driver

from benchmarks.host import Stub
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import split_triton
from setformer_dist.ops.set import triton as set_triton
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.set.split_common import part_of
from setformer_dist.ops.sinkhorn import working_dtype


class First:
    """The first of two ranks, which gets its own sums back."""

    index, count = 0, 2

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def shift(self, values: torch.Tensor, down: bool) -> torch.Tensor:
        raise AssertionError(down)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        raise AssertionError(values)


def by_parts(given: Inputs, problem: SetProblem, splits: int) -> None:
    """Run forward and backward of the split form."""
    n = given.x_bhnd.shape[2] * First.count
    positions = None if given.positions_bna is None else torch.zeros(1, n, given.positions_bna.shape[2])
    mask = None if given.mask_bn is None else torch.ones(2, n, dtype=torch.bool)
    rows = Rows(First())
    part, whole = part_of(given._replace(positions_bna=positions, mask_bn=mask), problem, rows)
    dtype = working_dtype(given.x_bhnd.dtype, problem.epsilon)
    assert dtype is not None
    _, kept = split_triton.forward(part, whole, problem, rows, dtype, splits)
    split_triton.backward(given.x_bhnd, part, whole, kept, problem, rows, dtype, splits)


# Tokens, references and width of a head; the second case's fill what a set may take in operands of bf16.
SIZES = {"whole": ((400, 49, 32), (400, 25, 256)), "short": ((196, 25, 32),) * 2, "split": ((400, 49, 32),) * 3}
# How often as much a reference set takes of other dtypes: products of fp16 are in TF32, each of fp32 is three.
TIMES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 4}


def main(dtype: torch.dtype, form: str, capability: int) -> None:
    gpu = Stub(capability)
    driver.set_active(gpu)
    set_triton._may_wait = lambda device, splits: True  # as on a GPU
    cases = [(2, 2, 0.0, False, 4, 0.1), (1, 1, 0.6, True, 1, 0.1)]
    if form == "split":  # whose messages are in fp64 where epsilon is small
        cases.append((2, 2, 0.0, False, 4, 0.02))
    for (n, m, d), (sets, axes, sigma, masked, splits, epsilon) in zip(SIZES[form], cases, strict=True):
        d = min(d, 256 // TIMES[dtype])
        x = torch.zeros(2, 3, n, d, dtype=dtype)
        references = torch.zeros(3, m, d, dtype=dtype)
        given = Inputs(
            x, None, references, references if sets == 2 else None, torch.zeros(1, n, axes), torch.zeros(m, axes),
            torch.ones(2, n, dtype=torch.bool) if masked else None,
        )  # fmt: skip
        problem = SetProblem(epsilon, sigma, 0.25, 5, renormalise=sets == 2)
        assert set_triton.why_not(given, problem) is None
        if form == "split":
            by_parts(given, problem, splits)
            continue
        of_splits = None if form == "short" else splits
        _, kept = set_triton.forward(given, problem, of_splits)
        set_triton.backward(x, given, kept, problem, of_splits)
    for name in sorted({kernel.name for kernel in gpu.compiled}):
        shared = max(kernel.shared for kernel in gpu.compiled if kernel.name == name)
        print(f"{name} compiled, {shared} bytes of shared memory")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), sys.argv[2], int(sys.argv[3]))
