"""Attention operators side by side: time and memory, forward and forward + backward, against SDPA.

    python -m benchmarks.attention [--tokens 196 784 3136 12544 50176] [--threads 2] [--picture FILE.png]

4 heads of 32 channels, m = 49 references, 5 rounds; batch 2 and fp32 on a CPU, batch 16 and bf16 on a GPU, which fill
them. "SeT" is the paper's operator (one reference set, no filter) by the fused kernel (C++ or Triton), "SeT default"
ours (two sets, separable filter), "SeT split" the same by the passes of ranks that share an image, in a group of one,
"SDPA" PyTorch's, on a GPU by the fastest of its backends. Gradients are the exact
ones of what was computed. Quadratic operators stop at --quadratic tokens. On a GPU, times are those of replayed CUDA
graphs, and "called" is the time of forward + backward called from Python, as long as launches and Python may take.

Besides times: the exponent with which time and memory grow from 784 tokens on; memory as a multiple of inputs and
outputs (tokens, output and their gradients); the share of two limits measured in the same run: products against the
FLOP/s of a large product, and reading the inputs and writing the outputs once against the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import describe
from benchmarks.measure import (
    DEVICE,
    bandwidth_limit,
    matmul_limit,
    measured_apart,
    peak_bytes,
    replayed,
    seconds,
    slope,
    write,
)
from setformer_dist.ops.cast_attention import cast_attention
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set.attention import SetAttentionConfig, set_attention
from setformer_dist.ops.soft_attention import pool_grid, soft_attention

BATCH, HEADS, WIDTH, REFERENCES = 2 if DEVICE == "cpu" else 16, 4, 32, 49
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
QUADRATIC = ("SDPA",)
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
FUSED = "cpp" if DEVICE == "cpu" else "triton"
DEFAULT = SetAttentionConfig(references=REFERENCES, implementation=FUSED)
PLAIN = SetAttentionConfig(references=REFERENCES, reference_sets=1, position_filter="none", implementation=FUSED)
Operator = Callable[..., torch.Tensor]


class Alone:
    """A group of one rank, as `ops.parts.Parts`."""

    index, count = 0, 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return them."""
        return values.clone()

    def shift(self, values: torch.Tensor, down: bool) -> torch.Tensor:
        """Return what is beyond the edge."""
        return torch.zeros_like(values)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return them as those of one part."""
        return values.unsqueeze(0).clone()


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention with the kernel elu(x) + 1 (Katharopoulos et al. 2020)."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)


@functools.cache
def surrogates(clusters: int) -> torch.Tensor:
    """Return CAST's surrogate tokens; the same ones again, as a graph that is replayed copies nothing from the host."""
    return torch.randn(HEADS, clusters, WIDTH, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)


def operators() -> dict[str, tuple[int, Operator]]:
    """Return, by name, how many token tensors an operator takes and the operator on them and its parameters."""

    def soft(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(q.shape[2])
        landmarks, _ = pool_grid(q, (side, side), (7, 7))
        return soft_attention(q, v, landmarks)

    def cast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        clusters = max(2, round(math.sqrt(n)))
        return cast_attention(q, k, v, surrogates(clusters), size=math.ceil(n / clusters))

    def set_of(config: SetAttentionConfig, rows: Rows | None = None) -> Operator:
        def operator(x: torch.Tensor, *references: torch.Tensor) -> torch.Tensor:
            side = math.isqrt(x.shape[2])
            back = references[1] if config.reference_sets == 2 else None
            return set_attention(x, references[0], config, return_references_hmd=back, grid=(side, side), rows=rows)

        return operator

    return {
        "SDPA": (3, F.scaled_dot_product_attention),
        "SeT": (1, set_of(PLAIN)),
        "SeT default": (1, set_of(DEFAULT)),
        "SeT split": (1, set_of(DEFAULT, Rows(Alone()))),
        "SeT in PyTorch": (1, set_of(PLAIN.model_copy(update={"implementation": "torch"}))),
        "SeT reference": (1, set_of(PLAIN.model_copy(update={"implementation": "reference"}))),
        "SOFT": (2, soft),
        "CAST": (3, cast),
        "linear": (3, linear_attention),
    }


def work(name: str, n: int) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Return (forward, forward and backward, bytes of tokens, output and their gradients)."""
    count, operator = operators()[name]
    torch.manual_seed(0)
    tokens = [torch.randn(BATCH, HEADS, n, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(count)]
    sets = 2 if name in ("SeT default", "SeT split") else 1 if name.startswith("SeT") else 0
    parameters = [torch.randn(HEADS, REFERENCES, WIDTH, device=DEVICE) for _ in range(sets)]
    upstream = torch.randn(BATCH, HEADS, n, WIDTH, device=DEVICE, dtype=DTYPE)
    leaves = [t.clone().requires_grad_() for t in (*tokens, *parameters)]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return operator(*tokens, *parameters)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(operator(*leaves), leaves, upstream)

    return forward, both, 2 * (count + 1) * upstream.numel() * upstream.element_size()


def flops(name: str, n: int) -> int:
    """Return the operations of the products in forward and backward."""
    if name == "SDPA":  # two products forward, five backward; torch does not count the CPU's operator
        return 14 * BATCH * HEADS * n * n * WIDTH
    with FlopCounterMode(display=False) as counter:
        work("SeT default" if name == "SeT split" else name, n)[1]()
    return int(counter.get_total_flops())


def row(name: str, n: int, limits: dict[str, float], threads: int) -> dict[str, Any]:
    """Measure one operator at one length."""
    forward, both, io = work(name, n)
    if DEVICE == "cpu":
        times = {"forward_s": seconds(forward), "both_s": seconds(both)}
        memory = measured_apart("benchmarks.attention", {"name": name, "n": n, "threads": threads})
    else:
        backends = SDPA_BACKENDS if name == "SDPA" else [None]
        times = min((_times_on_device(forward, both, backend) for backend in backends), key=lambda t: t["both_s"])
        memory = memory_of(name, n)
    return {
        "operator": name,
        "n": n,
        **times,
        "io_bytes": io,
        "peak_bytes": memory + io // 2,  # tokens and the gradient from above lay there before
        "of_matmul": flops(name, n) / times["both_s"] / limits["flops"],
        "of_bandwidth": io / times["both_s"] / limits["bytes"],
    }


def _times_on_device(forward: Callable[[], Any], both: Callable[[], Any], backend: SDPBackend | None) -> dict[str, Any]:
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return {
            "forward_s": seconds(replayed(forward), 0.2),
            "both_s": seconds(replayed(both), 0.4),
            "called_s": seconds(both, 0.2),
            "backend": None if backend is None else backend.name,
        }


def memory_of(name: str, n: int) -> int:
    """Return the rise of memory in forward and backward; on a CPU to be called in a process of its own."""
    both = work(name, n)[1]
    both()
    return min(peak_bytes(both) for _ in range(3))


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return exponents by operator, from 784 tokens on."""
    found = []
    for name in dict.fromkeys(r["operator"] for r in rows):
        mine = [r for r in rows if r["operator"] == name and r["n"] >= 784]
        if len(mine) > 1:
            n = [r["n"] for r in mine]
            powers = {key: slope(n, [r[key] for r in mine]) for key in ("forward_s", "both_s", "peak_bytes")}
            found.append({"operator": name, **powers})
    return found


def report(rows: list[dict[str, Any]], exponents: list[dict[str, Any]], console: Console) -> None:
    """Print both tables."""
    base = {r["n"]: r for r in rows if r["operator"] == "SDPA"}
    table = Table(
        "n", "operator", "forward ms", "of SDPA", "fwd + bwd ms", "of SDPA", "peak MiB", "of in + out", "of matmul",
        "of bandwidth", *(["called ms"] if DEVICE == "cuda" else []), title=describe(),
    )  # fmt: skip
    for r in rows:
        sdpa = base.get(r["n"])
        speed = [f"{sdpa[k] / r[k]:.2f}×" if sdpa else "" for k in ("forward_s", "both_s")]
        table.add_row(
            str(r["n"]), r["operator"], f"{1e3 * r['forward_s']:.2f}", speed[0], f"{1e3 * r['both_s']:.2f}", speed[1],
            f"{r['peak_bytes'] / 2**20:.1f}", f"{r['peak_bytes'] / r['io_bytes']:.2f}×", f"{r['of_matmul']:.0%}",
            f"{r['of_bandwidth']:.1%}", *([f"{1e3 * r['called_s']:.2f}"] if DEVICE == "cuda" else []),
        )  # fmt: skip
    console.print(table)
    table = Table("operator", "forward ~ n^", "fwd + bwd ~ n^", "memory ~ n^", title="growth from 784 tokens on")
    for e in exponents:
        table.add_row(e["operator"], *(f"{e[k]:.2f}" for k in ("forward_s", "both_s", "peak_bytes")))
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory over the number of tokens."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(r["operator"] for r in rows):
        mine = [r for r in rows if r["operator"] == name]
        n = [r["n"] for r in mine]
        left.loglog(n, [1e3 * r["both_s"] for r in mine], marker="o", label=name)
        right.loglog(n, [r["peak_bytes"] / 2**20 for r in mine], marker="o", label=name)
    left.set(xlabel="tokens", ylabel="ms", title="forward + backward")
    right.set(xlabel="tokens", ylabel="MiB", title="peak memory")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 784, 3136, 12544, 50176], help="squares")
    longest = 12544 if DEVICE == "cpu" else 50176
    parser.add_argument("--quadratic", type=int, default=longest, help="longest sequence for quadratic operators")
    parser.add_argument("--operators", nargs="+", help="by default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/attention.json"))
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/out/attention.png"))
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.apart:
        asked = json.loads(arguments.apart)
        torch.set_num_threads(asked["threads"])
        print(memory_of(asked["name"], asked["n"]))
        return
    console = Console(width=130)
    limits = {"flops": matmul_limit(), "bytes": bandwidth_limit()}
    rows: list[dict[str, Any]] = []

    def keep() -> None:
        head = {"machine": describe(), "threads": arguments.threads, "limits": limits}
        write(arguments.out, {**head, "rows": rows, "exponents": summarise(rows)})

    for n in arguments.tokens:
        for name in arguments.operators or operators():
            if name in QUADRATIC and n > arguments.quadratic:
                continue
            try:
                rows.append(row(name, n, limits, arguments.threads))
            except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
                console.print(f"{n} {name} left out: {str(error).splitlines()[0]}", style="yellow")
                continue
            console.print(f"{n} {name}: {1e3 * rows[-1]['both_s']:.2f} ms", style="dim")
            keep()
    console.print(f"limits: {limits['flops'] / 1e9:.0f} GFLOP/s, {limits['bytes'] / 1e9:.1f} GB/s")
    report(rows, summarise(rows), console)
    plot(rows, arguments.picture)
    console.print(f"written to {arguments.out} and {arguments.picture}")


if __name__ == "__main__":
    main()
