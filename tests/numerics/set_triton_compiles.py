"""Compile every kernel for a Hopper GPU where there is none: `python -m tests.numerics.set_triton_compiles DTYPE`.

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

from setformer_dist.ops.set import triton as set_triton
from setformer_dist.ops.set.problem import Inputs, SetProblem

SHARED_MEMORY = 227 * 1024  # bytes that a program can have on Hopper


class Hopper(DriverBase):
    """What the compiler asks a driver."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise AssertionError("kernels are only compiled here: nothing may be timed")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def main(dtype: torch.dtype) -> None:
    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.setdefault(self.__name__, []).append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(Hopper())
    JITFunction.run = launch
    set_triton._may_wait = lambda device, splits: True  # as on a GPU
    for sets, axes, sigma, masked, splits in ((2, 2, 0.0, False, 4), (1, 1, 0.6, True, 1)):
        x = torch.zeros(2, 3, 400, 32, dtype=dtype)
        references = torch.zeros(3, 49, 32, dtype=dtype)
        given = Inputs(
            x, None, references, references if sets == 2 else None, torch.zeros(1, 400, axes), torch.zeros(49, axes),
            torch.ones(2, 400, dtype=torch.bool) if masked else None,
        )  # fmt: skip
        problem = SetProblem(0.1, sigma, 0.25, 5, renormalise=sets == 2)
        _, potentials = set_triton.forward(given, problem, splits)
        set_triton.backward(x, given, potentials, problem, splits)
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.metadata.shared <= SHARED_MEMORY, (name, kernel.metadata.shared)
            assert "cubin" in kernel.asm
        print(f"{name} compiled, {max(k.metadata.shared for k in kernels)} bytes of shared memory")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
