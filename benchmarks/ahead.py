"""Compile the Triton kernels that other benchmarks launch, before they do and side by side.

    python -m benchmarks.ahead [--processes 8] [--capability 90]

A process compiles one kernel after the other, 2 to 3 s each: a minute of a model's first step, minutes of
`benchmarks.attention`. Here each case has a process of its own and nothing is launched, so no GPU is needed; the
kernels are found again in Triton's cache (TRITON_CACHE_DIR) by the same versions of Triton and of this project.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401  (registers the models)
from benchmarks import attention as operators
from benchmarks.host import Stub, on_stub
from benchmarks.machine import describe
from benchmarks.measure import write
from launch.run.config import load_run

# Name, side of an image and images of what `benchmarks.step_profile` measures; the last one is a run's config.
MODELS = (
    ("setformer_tiny", 224, 256), ("setformer_small", 224, 256), ("setformer_base", 224, 256),
    ("setformer_tiny", 384, 64), ("setformer_tiny", 512, 16), ("setformer_tiny", 768, 16), ("cifar10", 32, 128),
)  # fmt: skip
TOKENS = (49, 196, 784, 3136, 12544, 50176)
OPERATORS = ("SeT", "SeT default", "SeT split")


def step_of(name: str, size: int, batch: int, **arguments: Any) -> Callable[[], None]:
    """Return a model's training step in bf16, on tensors without memory."""
    model = timm.create_model(name, **arguments).to("meta", torch.bfloat16).train()
    images = torch.empty(batch, 3, size, size, device="meta", dtype=torch.bfloat16)
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    return lambda: F.cross_entropy(model(images).float(), labels).backward()


def compile_case(case: tuple[Any, ...], capability: int) -> dict[str, Any]:
    """Compile what a model's step (name, size, batch) or an operator (name, tokens) launches."""
    torch.set_num_threads(1)
    gpu, began = Stub(capability), time.monotonic()
    on_stub(gpu)
    if case[0] in OPERATORS:
        operators.BATCH, operators.DTYPE = 16, torch.bfloat16  # as on a GPU
        on_gpu = {"implementation": "triton"}
        operators.PLAIN, operators.DEFAULT = (c.model_copy(update=on_gpu) for c in (operators.PLAIN, operators.DEFAULT))
        operators.work(*case)[1]()
    else:
        name, size, batch = case
        preset = None if name.startswith("setformer") else load_run(Path(f"configs/runs/{name}.toml"), []).model
        step_of(name if preset is None else preset.name, size, batch, **(preset.args if preset else {}))()
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
