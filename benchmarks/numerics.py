"""How exact each implementation of SeT attention is: published fp64 targets, POT, the reference, every dtype.

python -m benchmarks.numerics

POT       x_ij = sin(i + 2j), y_ij = sin(0.7i + 1.3j + 0.5), 8 tokens, 3 references,
          converged; largest error of the output S x with S = n m P P^T against POT's plan
output    largest error of the output against the reference in fp64 on the rounded inputs, relative to its
          largest entry; n = 784, m = 49, d = 32, the default operator (two sets, filter, 5 rounds)
gradient  the same of the worst of all gradients
rows      how far constant values come back from themselves: the rows' sums
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ot
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import DEVICE, write
from setformer_dist.core.errors import ConfigError
from setformer_dist.ops import set_reference
from setformer_dist.ops.kernels import at_least_fp32, grid_places, unit
from setformer_dist.ops.set_attention import SetAttentionConfig, set_attention
from setformer_dist.ops.set_problem import SetProblem

IMPLEMENTATIONS = ("reference", "fast", "cpp", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPSILONS = (0.01, 0.05, 0.1, 0.5)


def waves(a: float, b: float, c: float, n: int) -> torch.Tensor:
    """Return unit vectors sin(a i + b j + c), (n, 4)."""
    i, j = torch.meshgrid(torch.arange(n).double(), torch.arange(4).double(), indexing="ij")
    return unit(torch.sin(a * i + b * j + c))


def against_pot(implementation: str, dtype: torch.dtype, epsilon: float) -> float:
    """Return the largest error of S x against POT's converged plan."""
    x, y = waves(1, 2, 0, 8), waves(0.7, 1.3, 0.5, 3)
    plan = torch.from_numpy(
        ot.sinkhorn(
            np.full(8, 1 / 8), np.full(3, 1 / 3), -(x @ y.T).numpy(), epsilon, stopThr=1e-15, numItermax=100_000
        )
    )
    config = SetAttentionConfig(
        references=3, epsilon=epsilon, iterations=1000, position_filter="none", reference_sets=1,
        implementation=implementation,
    )  # fmt: skip
    found = set_attention(x.to(DEVICE, dtype)[None, None], y.to(DEVICE, dtype)[None], config)[0, 0]
    return float((found.cpu().double() - 24 * plan @ plan.T @ x).abs().max())


def run(implementation: str, epsilon: float, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return output and gradients."""
    config = SetAttentionConfig(references=49, epsilon=epsilon, implementation=implementation)
    x, gather, scatter = (t.detach().clone().requires_grad_() for t in tensors)
    y = set_attention(x, gather, config, return_references_hmd=scatter, grid=(28, 28))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, (x, gather, scatter), upstream)]


def rows_of(implementation: str, epsilon: float, x: torch.Tensor, *sets: torch.Tensor) -> torch.Tensor:
    """Return what becomes of values that are all 1, for the plans of these tokens."""
    gather, scatter = (unit(at_least_fp32(s)) for s in sets)
    dtype = gather.dtype
    positions, places = (grid_places((side, side), dtype, x.device) for side in (28, 7))
    tensors = (torch.ones_like(x), unit(at_least_fp32(x)).to(x.dtype), gather, scatter, positions[None], places, None)
    if implementation == "reference":
        return set_reference.forward(*tensors, SetProblem(epsilon, 0.0, 0.25, 5))
    return torch.ops.setformer.set_attention(*tensors, epsilon, 0.0, 0.25, 5, 0.0, False, True, implementation)[0]


def row(implementation: str, dtype: torch.dtype, epsilon: float) -> dict[str, Any]:
    """Measure one implementation in one dtype.

    Raises:
        ConfigError: it cannot compute this.
    """
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 784, 32), (4, 49, 32), (4, 49, 32)]
    tensors = [torch.randn(shape, generator=rng).to(DEVICE, dtype) for shape in shapes]
    found = run(implementation, epsilon, tensors)
    wanted = run("reference", epsilon, [t.double() for t in tensors])
    errors = [float((f.double() - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)]
    constant = rows_of(implementation, epsilon, *tensors)
    return {
        "implementation": implementation,
        "dtype": str(dtype).removeprefix("torch."),
        "epsilon": epsilon,
        "pot": against_pot(implementation, dtype, epsilon) if epsilon >= 0.1 else None,
        "output": errors[0],
        "gradient": max(errors[1:]),
        "rows": float((constant.double() - 1.0).abs().max()),
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/numerics.json"))
    arguments = parser.parse_args()
    console = Console(width=120)
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for implementation in IMPLEMENTATIONS:
        for dtype in DTYPES:
            for epsilon in EPSILONS:
                try:
                    rows.append(row(implementation, dtype, epsilon))
                except ConfigError as error:
                    refused[f"{implementation}, {str(dtype).removeprefix('torch.')}, {epsilon}"] = str(error)
    table = Table("implementation", "dtype", "ε", "against POT", "output", "worst gradient", "rows", title=describe())
    for r in rows:
        figures = ["" if r[k] is None else f"{r[k]:.1e}" for k in ("pot", "output", "gradient", "rows")]
        table.add_row(r["implementation"], r["dtype"], str(r["epsilon"]), *figures)
    console.print(table)
    for reason in dict.fromkeys(refused.values()):
        names = [name for name, why in refused.items() if why == reason]
        console.print(f"{len(names)} not measured ({names[0]} …): {reason}")
    write(arguments.out, {"machine": describe(), "rows": rows, "refused": refused})
    console.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
