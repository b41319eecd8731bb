"""How exact each implementation of SeT attention is: published fp64 targets, POT, the reference, every dtype.

python -m benchmarks.numerics

First the published targets: small problems of given sines whose fp64 results are known to six digits, by POT, by each
implementation and in each dtype. Then how far each is from the reference at the size of a model:

POT       x_ij = sin(i + 2j), y_ij = sin(0.7i + 1.3j + 0.5), 8 tokens, 3 references,
          converged; largest error of the output S x with S = n m P P^T against POT's plan
output    largest error of the output against the reference in fp64 on the rounded inputs, relative to its
          largest entry; n = 784, m = 49, d = 32, the default operator (two sets, filter, 5 rounds)
gradient  the same of the worst of all gradients
rows      how far constant values come back from themselves: the rows' sums
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
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
from setformer_dist.ops.kernels import at_least_fp32, grid_places, line_places, log_filter, nystrom, unit
from setformer_dist.ops.set import reference as set_reference
from setformer_dist.ops.set.attention import Implementation, SetAttentionConfig, set_attention
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.sinkhorn import sinkhorn_log, transport_plan

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "torch", "cpp", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPSILONS = (0.01, 0.05, 0.1, 0.5)


def waves(a: float, b: float, c: float, n: int) -> torch.Tensor:
    """Return unit vectors sin(a i + b j + c), (n, 4)."""
    i, j = torch.meshgrid(torch.arange(n).double(), torch.arange(4).double(), indexing="ij")
    return unit(torch.sin(a * i + b * j + c))


def against_pot(implementation: Implementation, dtype: torch.dtype, epsilon: float) -> float:
    """Return the largest error of S x against POT's converged plan."""
    x, y = waves(1, 2, 0, 8), waves(0.7, 1.3, 0.5, 3)
    plan = pot_plan(x, y, epsilon)
    found = converged(implementation, dtype, epsilon)
    return float((found.cpu().double() - 24 * plan @ plan.T @ x).abs().max())


# x_ij = sin(i + 2j), y_ij = sin(0.7i + 1.3j + 0.5), z_ij = sin(0.9i + 1.7j + 0.3), rows of unit length; converged plans
# with marginals 1/8 and 1/3, S = 24 P P^T. Computed in fp64 by independent code, on which POT and the authors' code of
# the optimal-transport kernel (Mialon et al. 2021) agree to 2e-16; known to the digits given.
PLANS = {0.1: (0.022395, 0.101074, 0.001532), 0.5: (0.044568, 0.051473, 0.028959), 1.0: (0.043990, 0.045450, 0.035561)}
OUTPUTS = {
    0.1: (0.037300, 0.304046, -0.290356, -0.062385),
    0.5: (0.021555, 0.133019, -0.132266, -0.022935),
    1.0: (0.041484, 0.116495, -0.138443, -0.001271),
}
NYSTROM = {0.6: (0.708004, 0.211212, -0.001237, 0.006130), 1.0: (0.798280, 0.400096, 0.097676, 0.066639)}
FILTER = (0.20961139, 0.01303291, 0.0)


def targets() -> list[dict[str, Any]]:
    """Return one row for each target, and for each way and dtype to compute it."""
    x, y, z = waves(1, 2, 0, 8), waves(0.7, 1.3, 0.5, 3), waves(0.9, 1.7, 0.3, 4)
    rows: list[dict[str, Any]] = []

    def add(what: str, target: Sequence[float], ways: dict[tuple[str, str], torch.Tensor]) -> None:
        wanted = torch.tensor(target, dtype=torch.float64)
        rows.append({"what": what, "by": "target", "dtype": "", "values": list(target), "error": None})
        for (by, dtype), values in ways.items():
            found = values.detach().cpu().double()
            error = float((found - wanted).abs().max())
            rows.append({"what": what, "by": by, "dtype": dtype, "values": found.tolist(), "error": error})

    for epsilon, target in PLANS.items():
        pot = {("POT", "float64"): pot_plan(x, y, epsilon)[0]}
        ours = {
            (way.__name__, name_of(dtype)): way((x @ y.T)[None].to(dtype), epsilon, 1000)[0, 0]
            for way in (sinkhorn_log, transport_plan)
            for dtype in DTYPES
        }
        add(f"P[0, :], ε = {epsilon}", target, pot | ours)
    for epsilon, output in OUTPUTS.items():
        plan = pot_plan(x, y, epsilon)
        ways = {("POT", "float64"): (24 * plan @ plan.T @ x)[0]}
        for implementation in IMPLEMENTATIONS:
            for dtype in DTYPES:
                with contextlib.suppress(ConfigError):  # reported below the second table
                    ways[implementation, name_of(dtype)] = converged(implementation, dtype, epsilon)[0]
        add(f"(S x)[0, :], ε = {epsilon}", output, ways)
    for sigma, feature in NYSTROM.items():
        ways = {("nystrom", name_of(t)): nystrom(x[None].to(t), z[None].to(t), sigma, 0.0)[0, 0] for t in DTYPES[:2]}
        add(f"v(x_0), σ = {sigma}", feature, ways)
    ways = {
        ("log_filter", name_of(t)): log_filter(line_places(8, t), line_places(3, t), 0.1).exp()[1] for t in DTYPES[:2]
    }
    add("M[1, :], τ = 0.1", FILTER, ways)
    return rows


def name_of(dtype: torch.dtype) -> str:
    """Return the name without the library's."""
    return str(dtype).removeprefix("torch.")


def pot_plan(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return POT's converged plan, (n, m) in fp64."""
    marginals = [np.full(len(t), 1 / len(t)) for t in (x, y)]
    return torch.from_numpy(ot.sinkhorn(*marginals, -(x @ y.T).numpy(), epsilon, stopThr=1e-15, numItermax=100_000))


def converged(implementation: Implementation, dtype: torch.dtype, epsilon: float) -> torch.Tensor:
    """Return S x of the waves after 1000 rounds, (8, 4)."""
    config = SetAttentionConfig(
        references=3, epsilon=epsilon, iterations=1000, position_filter="none", reference_sets=1,
        implementation=implementation,
    )  # fmt: skip
    x, y = waves(1, 2, 0, 8), waves(0.7, 1.3, 0.5, 3)
    return set_attention(x.to(DEVICE, dtype)[None, None], y.to(DEVICE, dtype)[None], config)[0, 0]


def run(implementation: Implementation, epsilon: float, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return output and gradients."""
    config = SetAttentionConfig(references=49, epsilon=epsilon, implementation=implementation)
    x, gather, scatter = (t.detach().clone().requires_grad_() for t in tensors)
    y = set_attention(x, gather, config, return_references_hmd=scatter, grid=(28, 28))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, (x, gather, scatter), upstream)]


def rows_of(implementation: str, epsilon: float, x: torch.Tensor, *sets: torch.Tensor) -> torch.Tensor:
    """Return what becomes of values that are all 1, for the plans of these tokens."""
    dtype = at_least_fp32(x).dtype
    positions, places = (grid_places((side, side), dtype, x.device) for side in (28, 7))
    tensors = (torch.ones_like(x), unit(at_least_fp32(x)).to(x.dtype), *sets, positions[None], places, None)
    problem = SetProblem(epsilon, 0.0, 0.25, 5)
    if implementation == "reference":
        return set_reference.forward(Inputs(*tensors), problem)
    found: torch.Tensor = torch.ops.setformer.set_attention(*tensors, problem.numbers(), implementation)[0]
    return found


def row(implementation: Implementation, dtype: torch.dtype, epsilon: float) -> dict[str, Any]:
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
        "dtype": name_of(dtype),
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
                    refused[f"{implementation}, {name_of(dtype)}, {epsilon}"] = str(error)
    known = targets()
    table = Table("target", "by", "dtype", "values", "from the target", title=describe())
    for r in known:
        values = " ".join(f"{value:9.6f}" for value in r["values"])
        apart = "" if r["error"] is None else f"{r['error']:.0e}"
        table.add_row(r["what"] if r["by"] == "target" else "", r["by"], r["dtype"], values, apart)
    console.print(table)
    table = Table("implementation", "dtype", "ε", "against POT", "output", "worst gradient", "rows", title=describe())
    for r in rows:
        figures = ["" if r[k] is None else f"{r[k]:.1e}" for k in ("pot", "output", "gradient", "rows")]
        table.add_row(r["implementation"], r["dtype"], str(r["epsilon"]), *figures)
    console.print(table)
    for reason in dict.fromkeys(refused.values()):
        names = [name for name, why in refused.items() if why == reason]
        console.print(f"{len(names)} not measured ({names[0]} …): {reason}")
    write(arguments.out, {"machine": describe(), "targets": known, "rows": rows, "refused": refused})
    console.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
