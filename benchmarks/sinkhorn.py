"""Transport plans: ours against POT's batched solvers at the same marginal error.

    python -m benchmarks.sinkhorn [--problems 32] [--threads 2] [--picture FILE.png]

For each size, epsilon and wanted marginal error, each solver gets the fewest rounds that reach the error (every solver
alternates the same two half rounds), and is timed from the similarity to the plan, without gradients, fp32. POT runs
plain and log-domain projections (`ot.batch`) with its NumPy and its torch backend; the fastest is the peer.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from ot.backend import NumpyBackend, TorchBackend
from ot.batch import bregman_log_projection_batch, bregman_projection_batch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import seconds, write
from setformer_dist.ops.kernels import unit
from setformer_dist.ops.sinkhorn import transport_plan

SIZES = [(196, 49), (784, 49), (3136, 49), (1024, 64)]
MOST = 2000
Solver = Callable[[int], Any]


def solvers(similarity: torch.Tensor, epsilon: float) -> dict[str, Solver]:
    """Return, by name, a solver from the number of rounds to the plans (z, n, m)."""
    z, n, m = similarity.shape
    numbers = similarity.numpy()
    backends = {
        "torch": (TorchBackend(), similarity, torch.full((z, n), 1 / n), torch.full((z, m), 1 / m), torch.exp),
        "NumPy": (
            NumpyBackend(),
            numbers,
            np.full((z, n), 1 / n, np.float32),
            np.full((z, m), 1 / m, np.float32),
            np.exp,
        ),
    }
    found: dict[str, Solver] = {"ours": lambda rounds: transport_plan(similarity, epsilon, rounds)}
    for label, (nx, s, a, b, exp) in backends.items():
        found[f"POT, {label}"] = lambda rounds, nx=nx, s=s, a=a, b=b, exp=exp: bregman_projection_batch(
            exp(s / epsilon), a, b, nx=nx, max_iter=rounds, tol=0.0
        )["T"]
        found[f"POT log, {label}"] = lambda rounds, nx=nx, s=s, a=a, b=b: bregman_log_projection_batch(
            s / epsilon, a, b, nx=nx, max_iter=rounds, tol=0.0
        )["T"]
    return found


def error_of(plan: Any) -> float:
    """Return the largest relative error of a row sum."""
    plan = torch.as_tensor(plan)
    return float((plan.sum(-1) * plan.shape[-2] - 1).abs().max())


def rounds_for(solver: Solver, wanted: float) -> int | None:
    """Return the fewest rounds that reach an error, None if none of up to MOST do."""
    low, high = 0, 1
    while not error_of(solver(high)) <= wanted:  # NaN has not converged
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_of(solver(middle)) <= wanted else (middle, high)
    return high


def compare(n: int, m: int, epsilon: float, wanted: float, problems: int) -> dict[str, Any]:
    """Time all solvers on one kind of problem."""
    rng = torch.Generator().manual_seed(0)
    x, y = (unit(torch.randn(problems, count, 32, generator=rng)) for count in (n, m))
    times, rounds = {}, {}
    for name, solver in solvers(x @ y.mT, epsilon).items():
        needed = rounds_for(solver, wanted)
        if needed is not None:
            rounds[name], times[name] = needed, seconds(lambda s=solver, k=needed: s(k), 0.5)
    peer = min((t, name) for name, t in times.items() if name != "ours")
    return {
        "n": n,
        "m": m,
        "epsilon": epsilon,
        "error": wanted,
        "problems": problems,
        "rounds": rounds,
        "seconds": times,
        "peer": peer[1],
        "ratio": peer[0] / times["ours"],
    }


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(
        "n × m",
        "ε",
        "error",
        "rounds",
        "ours ms",
        "fastest POT",
        "its rounds",
        "its ms",
        "ours faster",
        title=describe(),
    )
    for r in rows:
        table.add_row(
            f"{r['n']} × {r['m']}", f"{r['epsilon']}", f"{r['error']:.0e}", str(r["rounds"]["ours"]),
            f"{1e3 * r['seconds']['ours']:.2f}", r["peer"], str(r["rounds"][r["peer"]]),
            f"{1e3 * r['seconds'][r['peer']]:.2f}", f"{r['ratio']:.1f}×",
        )  # fmt: skip
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios."""
    figure = matplotlib.figure.Figure(figsize=(8, 0.3 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{r['n']}×{r['m']}, ε {r['epsilon']}, error {r['error']:.0e}" for r in rows]
    axes.barh(labels, [r["ratio"] for r in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the fastest POT path")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=32, help="per batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--errors", type=float, nargs="+", default=[1e-2, 1e-4])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/sinkhorn.json"))
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/out/sinkhorn.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="ot")
    console = Console(width=120)
    rows = [
        compare(n, m, epsilon, wanted, arguments.problems)
        for n, m in SIZES
        for epsilon in arguments.epsilon
        for wanted in arguments.errors
    ]
    report(rows, console)
    plot(rows, arguments.picture)
    write(arguments.out, {"machine": describe(), "threads": arguments.threads, "rows": rows})
    console.print(f"written to {arguments.out} and {arguments.picture}")


if __name__ == "__main__":
    main()
