"""Compile every kernel for a GPU where there is none: `python -m tests.numerics.set_triton_compiles DTYPE FORM SM`.

FORM is "whole" or "split", SM the compute capability: 80 (A100), 90 (H100) or 100 (B200).

Interpreted, a kernel may do what the compiler refuses, such as changing a variable's type in a branch. The driver
here knows its target and launches nothing; `launch` stands where Triton would run what it has compiled.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import split_triton
from setformer_dist.ops.set import triton as set_triton
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.set.split_common import part_of
from setformer_dist.ops.sinkhorn import working_dtype

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program can have


class First:
    """The first of two ranks, which gets its own sums back."""

    index, count = 0, 2

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def shift(self, values: torch.Tensor, down: bool) -> torch.Tensor:
        raise AssertionError(down)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        raise AssertionError(values)


class Target(DriverBase):
    """What the compiler asks a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise AssertionError("kernels are only compiled here: nothing may be timed")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


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


def main(dtype: torch.dtype, form: str, capability: int) -> None:
    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.setdefault(self.__name__, []).append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(Target(capability))
    JITFunction.run = launch
    set_triton._may_wait = lambda device, splits: True  # as on a GPU
    cases = [(2, 2, 0.0, False, 4, 0.1), (1, 1, 0.6, True, 1, 0.1)]
    if form == "split":  # whose messages are in fp64 where epsilon is small
        cases.append((2, 2, 0.0, False, 4, 0.02))
    n, m = (196, 25) if form == "short" else (400, 49)
    for sets, axes, sigma, masked, splits, epsilon in cases:
        x = torch.zeros(2, 3, n, 32, dtype=dtype)
        references = torch.zeros(3, m, 32, dtype=dtype)
        given = Inputs(
            x, None, references, references if sets == 2 else None, torch.zeros(1, n, axes), torch.zeros(m, axes),
            torch.ones(2, n, dtype=torch.bool) if masked else None,
        )  # fmt: skip
        problem = SetProblem(epsilon, sigma, 0.25, 5, renormalise=sets == 2)
        if form == "split":
            by_parts(given, problem, splits)
            continue
        of_splits = None if form == "short" else splits
        _, kept = set_triton.forward(given, problem, of_splits)
        set_triton.backward(x, given, kept, problem, of_splits)
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.metadata.shared <= SHARED_MEMORY[capability], (name, kernel.metadata.shared)
            assert "cubin" in kernel.asm
        print(f"{name} compiled, {max(k.metadata.shared for k in kernels)} bytes of shared memory")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), sys.argv[2], int(sys.argv[3]))
