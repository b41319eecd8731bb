"""SeT attention of images cut by rows: messages and bytes of a block against the formula, and what they cost here.

    python -m benchmarks.sequence [--ranks 2] [--stages 1 2 3 4] [--side 224 448]

Each rank is a process; they exchange over gloo. For the attention of one block of each stage of setformer_base, one
image, fp32: messages and bytes as counted where they are sent, forward and backward, beside `ops.set.split.traffic`;
the time of forward and backward by each implementation of the split form; of that, the time within the exchange; and
the time that this rank takes for the whole image with the C++ kernel. The larger image has four times the tokens and
the same traffic. With as many ranks as cores, give each rank one thread (OMP_NUM_THREADS=1), so that whole and split
form use the same.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import write
from launch.testing.ranks import run_ranks
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import RowGroup, connect, disconnect
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set.attention import SetAttentionConfig, problem_of, set_attention
from setformer_dist.ops.set.split import traffic

# Of setformer_base: heads, references, and image pixels per token along one axis.
STAGES = {1: (4, 49, 4), 2: (8, 49, 8), 3: (16, 25, 16), 4: (32, 25, 32)}
WIDTH = 32  # channels of a head


class Timed:
    """`Parts` that add up the time within their sums."""

    def __init__(self, parts: RowGroup) -> None:
        self._parts = parts
        self.index, self.count = parts.index, parts.count
        self.seconds = 0.0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over the group."""
        start = time.perf_counter()
        total = self._parts.sum(values)
        self.seconds += time.perf_counter() - start
        return total

    def shift(self, values: torch.Tensor, down: bool) -> torch.Tensor:
        """Return the neighbour's values."""
        return self._parts.shift(values, down)


def measure(cases: list[list[Any]], repeats: int) -> list[dict[str, Any]]:
    """Measure each case, [stage, side, gradient, implementation], on this rank of one group; one after the other."""
    ranks = RankInfo.from_env()
    connect(ranks, os.environ["SETFORMER_RENDEZVOUS"])
    timed = Timed(RowGroup(ranks, ranks.world_size))
    found = [_measured(timed, *case, repeats) for case in cases]
    disconnect()
    return found


def _measured(timed: Timed, stage: int, side: int, gradient: str, how: str, repeats: int) -> dict[str, Any]:
    heads, m, pixels = STAGES[stage]
    grid = (side // pixels, side // pixels)
    config = SetAttentionConfig.model_validate({"references": m, "gradient": gradient, "implementation": how})
    generator = torch.Generator().manual_seed(timed.index)
    n = grid[0] * grid[1] // timed.count
    x = torch.randn(1, heads, n, WIDTH, generator=generator).requires_grad_()
    same = torch.Generator().manual_seed(7)
    sets = [torch.randn(heads, m, WIDTH, generator=same).requires_grad_() for _ in range(2)]
    rows = Rows(timed)
    times, inside = [], []
    for _ in range(repeats + 1):
        timed.sum(torch.zeros(1))  # begin together
        timed.seconds, rows.messages, rows.bytes = 0.0, 0, 0
        start = time.perf_counter()
        y = set_attention(x, sets[0], config, return_references_hmd=sets[1], grid=grid, rows=rows)
        forward = rows.messages, rows.bytes
        y.backward(torch.ones_like(y))
        times.append(time.perf_counter() - start)
        inside.append(timed.seconds)
    whole = torch.randn(1, heads, grid[0] * grid[1], WIDTH, generator=generator).requires_grad_()
    alone = []
    for _ in range(repeats + 1):
        timed.sum(torch.zeros(1))
        start = time.perf_counter()
        y = set_attention(whole, sets[0], SetAttentionConfig(references=m), return_references_hmd=sets[1], grid=grid)
        y.backward(torch.ones_like(y))
        alone.append(time.perf_counter() - start)
    expected = traffic(problem_of(config), 2, m, WIDTH)
    size = 8 if gradient == "implicit" else 4  # a linear system travels in fp64, and all of its message with it
    return {
        "stage": stage, "side": side, "tokens": grid[0] * grid[1], "gradient": gradient,
        "implementation": how,
        "forward_messages": forward[0], "backward_messages": rows.messages - forward[0],
        "forward_bytes": forward[1], "backward_bytes": rows.bytes - forward[1],
        "expected_messages": [expected.forward_messages, expected.backward_messages],
        "expected_bytes": [4 * heads * expected.forward, size * heads * expected.backward],
        "block_us": 1e6 * sorted(times[1:])[repeats // 2], "exchange_us": 1e6 * sorted(inside[1:])[repeats // 2],
        "whole_us": 1e6 * sorted(alone[1:])[repeats // 2],
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", choices=sorted(STAGES), default=sorted(STAGES))
    parser.add_argument("--side", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/sequence.json"))
    options = parser.parse_args()
    ways = (("exact", "torch"), ("exact", "cpp"), ("implicit", "torch"), ("implicit", "cpp"))
    cases = [[s, side, *way] for s in options.stages for side in options.side for way in ways]
    found = run_ranks(measure, options.ranks, cases, options.repeats, timeout=1800)[0]
    names = (
        "stage",
        "tokens",
        "gradient",
        "by",
        "messages",
        "KB forward",
        "KB backward",
        "µs",
        "of it exchange",
        "whole image",
        "as formula",
    )
    table = Table(*names, title=f"{options.ranks} gloo ranks, {describe()}")
    for row in found:
        messages = [row["forward_messages"], row["backward_messages"]]
        row["as_expected"] = messages == row["expected_messages"] and [
            row["forward_bytes"], row["backward_bytes"]
        ] == row["expected_bytes"]  # fmt: skip
        table.add_row(
            str(row["stage"]), f"{row['tokens']:,}", row["gradient"], row["implementation"],
            f"{messages[0]} + {messages[1]}",
            f"{row['forward_bytes'] / 1e3:.1f}", f"{row['backward_bytes'] / 1e3:.1f}",
            f"{row['block_us']:,.0f}", f"{row['exchange_us']:,.0f}",
            f"{row['whole_us']:,.0f}", "yes" if row["as_expected"] else "NO",
        )  # fmt: skip
    Console(width=120).print(table)
    write(options.out, {"machine": describe(), "ranks": options.ranks, "rows": found})


if __name__ == "__main__":
    main()
