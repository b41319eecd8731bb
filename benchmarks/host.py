"""Host time on a machine that needs no GPU: what a call of the Triton operator costs before a GPU begins, and a step.

    python -m benchmarks.host [--json FILE]

Kernels are compiled for Hopper, and a driver that launches nothing stands where CUDA's would. All else runs as on a
GPU: autograd, our Python, Triton's choice of the compiled kernel. PyTorch's own small kernels take a CPU's time.
SeTformer-Tiny's four stages, one image, bf16, two sets, the filter, 5 rounds. A call's launches do not depend on the
batch. "Kernels" are ours and PyTorch's; on a GPU each is a launch of its own.

A step is forward, cross entropy and backward of a whole model in fp32, one image of 56 x 56 and as few channels as it
can have, so that computing takes little: what is left is Python, autograd and launches. "One by one" is SeTformer-Tiny
without `ops/block.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

import setformer_dist.models  # noqa: F401  (registers the models)
from benchmarks.machine import describe
from benchmarks.measure import Kernels, write
from setformer_dist.ops import block
from setformer_dist.ops.set import attention, op, split
from setformer_dist.ops.set import triton as set_triton
from setformer_dist.ops.set.problem import Inputs, SetProblem

# Tokens, heads and references of a block of each stage of SeTformer-Tiny at 224 x 224.
STAGES = ((3136, 2, 49), (784, 4, 25), (196, 8, 9), (49, 16, 9))
WIDTH = 32
PROBLEM = SetProblem(epsilon=0.1, sigma=0.0, tau=0.25, iterations=5)
REPEATS = 1000
STEPS = 40
# Models as narrow as they can be, with all their blocks.
NARROW: dict[str, dict[str, Any]] = {
    "setformer_tiny": {"embed_dim": 16, "num_heads": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 8, "num_heads": (1, 1, 1, 1)},
    "convnext_tiny": {"dims": (8, 16, 32, 64)},
}
# Bytes that a program can have, by compute capability.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


class Device:
    """What Triton asks of a device, and the loader of binaries."""

    def __init__(self, shared_memory: int) -> None:
        self._shared_memory = shared_memory

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what is asked for; Triton refuses a kernel that needs more shared memory."""
        return {"max_shared_mem": self._shared_memory, "multiprocessor_count": 132}

    def load_binary(self, *binary: object) -> tuple[int, ...]:
        """Return module, function, registers, spills and the most threads."""
        return 1, 2, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Nothing was loaded."""


class Stub(DriverBase):
    """A GPU that launches nothing and counts.

    Attributes:
        launches: so far.
        compiled: Triton's description of every kernel that was compiled.
    """

    def __init__(self, capability: int = 90) -> None:
        """Stand for a GPU of a compute capability: 80 (A100), 89 (for desktops), 90 (H100) or 100 (B200)."""
        self._capability = capability
        self.utils = Device(SHARED_MEMORY[capability])
        self.launches = 0
        self.compiled: list[Any] = []

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """Return what stands for a launch."""
        self.compiled.append(metadata)
        return self._launch

    def _launch(self, *arguments: object) -> None:
        self.launches += 1

    @classmethod
    def is_active(cls) -> bool:
        """Return whether this driver is to be used."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return a type of the launcher, which has none here."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self._capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """Return where the tensors are."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Refuse."""
        raise AssertionError("nothing runs here that could be timed")

    def get_current_device(self) -> int:
        """Return the device."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Return the stream."""
        return 0


def on_stub(gpu: Stub) -> None:
    """Take a GPU that launches nothing for a real one, also for tensors that are not on it."""
    driver.set_active(gpu)
    set_triton._may_wait = lambda device, splits: True
    for module in (op, attention, split):
        module.no_triton = lambda inputs, problem: set_triton.why_not(inputs, problem)
    attention.choose_implementation = lambda inputs, problem, wanted="auto": "triton"
    block.runs_triton = lambda device: True
    torch.is_autocast_enabled = lambda *device: False  # which knows no tensors without memory


def microseconds(work: Callable[[], Any]) -> float:
    """Return the lower quartile: another program can make a call longer, none shorter."""
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return 1e6 * statistics.quantiles(found, n=4)[0]


def stage(n: int, heads: int, m: int, gpu: Stub) -> dict[str, Any]:
    """Measure a block's call of the operator."""
    x = torch.randn(1, n, heads * WIDTH).bfloat16().view(1, n, heads, WIDTH).transpose(1, 2).requires_grad_()
    gather, scatter = (torch.randn(heads, m, WIDTH).requires_grad_() for _ in range(2))
    inputs = Inputs(x, None, gather, scatter, torch.rand(1, n, 2), torch.rand(m, 2), None)
    grad_y = torch.randn(1, heads, n, WIDTH).bfloat16()

    def forward() -> torch.Tensor:
        return op.differentiable(inputs, PROBLEM, "triton")

    def both() -> None:
        torch.autograd.grad(forward(), (x, gather, scatter), grad_y)

    both()  # compiles
    gpu.launches = 0
    both()
    ours, forward_us, both_us = gpu.launches, microseconds(forward), microseconds(both)
    with torch.no_grad(), Kernels() as others:
        _, kept = set_triton.forward(inputs, PROBLEM)
        set_triton.backward(grad_y, inputs, kept, PROBLEM)
    found = {"tokens": n, "heads": heads, "references": m, "forward_us": forward_us, "both_us": both_us}
    return {**found, "triton_kernels": ours, "torch_kernels": others.count}


def step(name: str, one_by_one: bool = False) -> dict[str, Any]:
    """Measure a model's training step; the time of this thread alone, as other programs take the cores' time."""
    model = timm.create_model(name, **NARROW[name]).train()
    image, label = torch.randn(1, 3, 56, 56), torch.tensor([1])
    parameters = list(model.parameters())
    found = []
    with mock.patch.object(block, "WIDEST", 0 if one_by_one else block.WIDEST):
        for _ in range(3 + STEPS):
            begun = time.thread_time()
            torch.autograd.grad(F.cross_entropy(model(image), label), parameters, allow_unused=True)
            found.append(1e3 * (time.thread_time() - begun))
    shown = f"{name}, one by one" if one_by_one else name
    return {"model": shown, "step_ms": statistics.quantiles(found[3:], n=4)[0]}


def main() -> None:
    """Measure all stages, and whole models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/host.json"))
    args = parser.parse_args()
    gpu = Stub()
    on_stub(gpu)
    torch.set_num_threads(1)
    rows = [stage(*sizes, gpu) for sizes in STAGES]
    table = Table("tokens", "heads", "forward µs", "forward + backward µs", "kernels", "of PyTorch", title=describe())
    for r in rows:
        kernels, times = r["triton_kernels"] + r["torch_kernels"], (f"{r['forward_us']:.0f}", f"{r['both_us']:.0f}")
        table.add_row(str(r["tokens"]), str(r["heads"]), *times, str(kernels), str(r["torch_kernels"]))
    Console().print(table)
    steps = [step("setformer_tiny"), step("setformer_tiny", one_by_one=True), *map(step, list(NARROW)[1:])]
    table = Table("model", "host time of a step, ms")
    for r in steps:
        table.add_row(r["model"], f"{r['step_ms']:.1f}")
    Console().print(table)
    write(args.json, {"machine": describe(), "stages": rows, "steps": steps})


if __name__ == "__main__":
    main()
