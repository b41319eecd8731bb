"""What DeepSpeed launches for an optimizer step besides the model, with its own update and with ours.

    OMP_NUM_THREADS=1 python -m benchmarks.update [--model setformer_tiny] [--dtype bf16] [--out FILE]

One rank, one image of 64 x 64. Kernels are operators that compute or copy: on a GPU each is a launch of its own, or
several. "Added to backward" is what DeepSpeed adds to the forward and backward pass of the model alone; the update is
`engine.step()`. On a CPU the milliseconds are mostly arithmetic.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import Kernels, wait, write
from launch.run.compiled import whole_blocks
from launch.testing.ranks import run_ranks
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine import deepspeed_engine
from setformer_dist.engine.batch_plan import solve
from setformer_dist.engine.comm import connect, disconnect
from setformer_dist.engine.config import BatchConfig, OptimConfig, PrecisionConfig, ZeroConfig
from setformer_dist.engine.zero import deepspeed_config
from setformer_dist.models.build import build_model

SIDE, CLASSES, REPEATS = 64, 10, 7


def counted(work: Callable[[], object]) -> int:
    """Return the kernels of a piece of work."""
    kernels = Kernels()
    with kernels:
        work()
    return kernels.count


def measure(model: str, dtype: str, stage: int, ours: bool) -> dict[str, Any]:
    """Return the kernels of a step, and the milliseconds of its update, on this rank."""
    torch.set_num_threads(1)
    connect(RankInfo.from_env(), os.environ["SETFORMER_RENDEZVOUS"])
    if not ours:
        deepspeed_engine.quicken = lambda engine: None
    plan = solve(BatchConfig(global_size=1, micro=1), 1)
    json = deepspeed_config(PrecisionConfig(dtype=dtype), ZeroConfig(stage=stage), plan, 1.0, {})
    built = build_model(ModelConfig(name=model), CLASSES, SIDE, 0)
    engine = deepspeed_engine.initialize(built, OptimConfig(), json, whole_blocks(built) if ours else ())
    images = torch.randn(1, 3, SIDE, SIDE).to(engine.device, deepspeed_engine.DTYPES[dtype])
    label = torch.tensor([1], device=engine.device)
    parameters = len(list(engine.module.parameters()))

    def passes() -> None:
        engine.backward(torch.nn.functional.cross_entropy(engine(images).float(), label))

    def alone() -> None:
        torch.nn.functional.cross_entropy(twin(images).float(), label).backward()

    updates, steps = [], []
    for _ in range(REPEATS):
        wait()
        begun = time.perf_counter()
        passes()
        wait()
        passed = time.perf_counter()
        engine.step()
        wait()
        updates.append(1e3 * (time.perf_counter() - passed))
        steps.append(1e3 * (time.perf_counter() - begun))
    both, update = counted(passes), counted(engine.step)
    twin = build_model(ModelConfig(name=model), CLASSES, SIDE, 0).to(images)
    kernels = counted(alone)
    disconnect()
    counts = {"parameters": parameters, "model": kernels, "backward": both - kernels, "update": update}
    return {**counts, "update_ms": statistics.median(updates[1:]), "step_ms": statistics.median(steps[1:])}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="setformer_tiny")
    parser.add_argument("--dtype", default="bf16", choices=sorted(deepspeed_engine.DTYPES))
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    rows = []
    where = {"DS_ACCELERATOR": get_accelerator().device_name()}
    for stage in arguments.stages:
        for ours in (False, True):
            words = (arguments.model, arguments.dtype, stage, ours)
            [found] = run_ranks(measure, 1, *words, timeout=300, env=where, cold=True)
            rows.append({"stage": stage, "loop": "ours" if ours else "DeepSpeed alone", **found})
            if arguments.out is not None:
                head = {"machine": describe(), "model": arguments.model, "dtype": arguments.dtype}
                write(arguments.out, {**head, "rows": rows})
    parameters, kernels = rows[0]["parameters"], rows[0]["model"]
    title = f"{arguments.model}, {arguments.dtype}, {parameters} parameters; the model: {kernels} kernels"
    table = Table("ZeRO", "update", "kernels added to backward", "of the update", "its ms", "step, ms", title=title)
    for row in rows:
        table.add_row(
            str(row["stage"]),
            row["loop"],
            str(row["backward"]),
            str(row["update"]),
            f"{row['update_ms']:.1f}",
            f"{row['step_ms']:.1f}",
        )
    Console().print(table, describe())


if __name__ == "__main__":
    main()
