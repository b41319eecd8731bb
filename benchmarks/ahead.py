"""Compile the Triton kernels that other benchmarks launch, before they do and side by side.

    python -m benchmarks.ahead [--processes 8] [--capability 90]

A process compiles one kernel after the other, 2 to 3 s each: a minute of a model's first step, minutes of
`benchmarks.attention`. Here each case has a process of its own and nothing is launched, so no GPU is needed; the
kernels are found again in Triton's cache (TRITON_CACHE_DIR) by the same versions of Triton and of this project.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import driver

import setformer_dist.models  # noqa: F401  (registers the models)
from benchmarks import attention as operators
from benchmarks.host import Stub
from benchmarks.machine import describe
from benchmarks.measure import write
from launch.run.config import load_run
from setformer_dist.ops.set import attention, op, split
from setformer_dist.ops.set import triton as set_triton
from setformer_dist.ops.set.problem import Inputs, SetProblem

# Name, side of an image and images of what `benchmarks.step_profile` measures; the last one is a run's config.
MODELS = (
    ("setformer_tiny", 224, 256), ("setformer_small", 224, 256), ("setformer_base", 224, 256),
    ("setformer_tiny", 384, 64), ("setformer_tiny", 768, 16), ("cifar10", 32, 128),
)  # fmt: skip
TOKENS = (49, 196, 784, 3136, 12544, 50176)
OPERATORS = ("SeT", "SeT default", "SeT split")
Call = tuple[Inputs, SetProblem]


def on_stub(capability: int) -> Stub:
    """Return a GPU that launches nothing, and have the operator take it for one."""
    gpu = Stub(capability)
    driver.set_active(gpu)
    set_triton._may_wait = lambda device, splits: True
    for module in (op, attention, split):
        module.no_triton = lambda inputs, problem: set_triton.why_not(inputs, problem)
    attention.choose_implementation = lambda inputs, problem, wanted="auto": "triton"
    return gpu


def calls_of(name: str, size: int, batch: int) -> list[Call]:
    """Return a model's calls of the operator in bf16, on fake tensors."""
    found: list[Call] = []

    def kept(inputs: Inputs, problem: SetProblem, implementation: str) -> torch.Tensor:
        found.append((inputs, problem))
        return torch.empty_like(inputs.x_bhnd)

    differentiable, attention.differentiable = attention.differentiable, kept
    arguments: dict[str, Any] = {}
    if not name.startswith("setformer"):
        config = load_run(Path(f"configs/runs/{name}.toml"), []).model
        name, arguments = config.name, dict(config.args)
    model = timm.create_model(name, **arguments).to(torch.bfloat16).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.ones(batch, 3, size, size, dtype=torch.bfloat16))
    attention.differentiable = differentiable
    return found


def compile_call(inputs: Inputs, problem: SetProblem) -> None:
    """Run forward and backward of a call on memory of the same shapes, which is not written."""
    made = Inputs(*(None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in inputs))
    leaves = [t.requires_grad_() for t in (made.x_bhnd, made.gather_hmk, made.scatter_hmk) if t is not None]
    y = op.differentiable(made, problem, "triton")
    torch.autograd.grad(y, leaves, torch.empty_strided(y.shape, made.x_bhnd.stride(), dtype=y.dtype))


def compile_case(case: tuple[Any, ...], capability: int) -> dict[str, Any]:
    """Compile what a model's step (name, size, batch) or an operator (name, tokens) launches."""
    torch.set_num_threads(1)
    gpu, began = on_stub(capability), time.monotonic()
    if case[0] in OPERATORS:
        operators.BATCH, operators.DTYPE = 16, torch.bfloat16  # as on a GPU
        on_gpu = {"implementation": "triton"}
        operators.PLAIN, operators.DEFAULT = (c.model_copy(update=on_gpu) for c in (operators.PLAIN, operators.DEFAULT))
        operators.work(*case)[1]()
    else:
        for inputs, problem in {repr(found): found for found in calls_of(*case)}.values():
            compile_call(inputs, problem)
    return {
        "case": " ".join(map(str, case)),
        "kernels": len(gpu.compiled),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--capability", type=int, default=90, help="80 (A100), 89, 90 (H100, H200) or 100 (B200)")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their names")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/ahead.json"))
    arguments = parser.parse_args()
    cases = [*MODELS, *((name, n) for n in TOKENS for name in OPERATORS)]
    asked = [case for case in cases if arguments.only in " ".join(map(str, case))]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(compile_case, case, arguments.capability) for case in asked]):
            rows.append(future.result())
            print(rows[-1], flush=True)
            write(arguments.out, {"machine": describe(), "rows": rows})


if __name__ == "__main__":
    main()
