"""Steps of two hosts on a slow link: means of gradients by DeepSpeed and by ours, with zero.overlap_comm and without.

    sudo python -m benchmarks.reduction [--gbit 2] [--model setformer_mini] [--side 96] [--out FILE]

Two ranks of one thread in network namespaces whose links have that rate (root, `ip`, `sshd` and `tc`: see
`launch.drill.namespaces`). All loops have their engine in the same two processes and take turns, five steps each, so
that what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import write
from launch.drill.namespaces import Cluster, why_impossible
from launch.run.compiled import whole_blocks
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine import deepspeed_engine, fused_update
from setformer_dist.engine.batch_plan import solve
from setformer_dist.engine.comm import connect, disconnect
from setformer_dist.engine.config import BatchConfig, OptimConfig, PrecisionConfig, ZeroConfig
from setformer_dist.engine.protocol import Engine
from setformer_dist.engine.zero import deepspeed_config
from setformer_dist.models.build import build_model

CLASSES, TURN = 10, 5
LOOPS = [
    (stage, overlap, ours)
    for stage in (0, 1, 2)
    for overlap in (False, True)
    for ours in (False, True)
    if (stage, overlap, ours) != (0, True, False)  # DeepSpeed overlaps nothing there
]


def engine_of(asked: argparse.Namespace, stage: int, overlap: bool, ours: bool) -> Engine:
    """Return an engine whose gradients are reduced by DeepSpeed, or by ours."""
    zero = ZeroConfig(stage=stage, overlap_comm=overlap, bucket_mib=asked.bucket_mib if overlap else 256)
    plan = solve(BatchConfig(global_size=2 * asked.micro, micro=asked.micro), 2)
    settings = deepspeed_config(PrecisionConfig(dtype=asked.dtype), zero, plan, 1.0, {})
    model = build_model(ModelConfig(name=asked.model), CLASSES, asked.side, 0)
    usual = fused_update.reduce_together
    if not ours:
        fused_update.reduce_together = lambda engine: None
    engine = deepspeed_engine.initialize(model, OptimConfig(), settings, whole_blocks(model))
    fused_update.reduce_together = usual
    return engine


def rank(asked: argparse.Namespace) -> None:
    """Measure on one rank; rank 0 writes the seconds of each step."""
    torch.set_num_threads(1)
    connect(RankInfo.from_env(), f"file://{asked.folder}/meet")
    engines = [engine_of(asked, *loop) for loop in LOOPS]
    dtype = deepspeed_engine.DTYPES[asked.dtype]
    images, labels = torch.randn(asked.micro, 3, asked.side, asked.side).to(dtype), torch.arange(asked.micro) % CLASSES
    seconds: list[list[float]] = [[] for _ in engines]
    for turn in range(asked.turns + 1):
        for engine, mine in zip(engines, seconds, strict=True):
            for _ in range(TURN):
                torch.distributed.barrier()
                begun = time.perf_counter()
                engine.backward(torch.nn.functional.cross_entropy(engine(images).float(), labels))
                engine.step()
                if turn:  # the first warms up
                    mine.append(time.perf_counter() - begun)
    torch.distributed.barrier()
    disconnect()
    if RankInfo.from_env().is_main:
        (Path(asked.folder) / "seconds.json").write_text(json.dumps(seconds))


def run(arguments: list[str], gbit: float) -> list[list[float]]:
    """Return the seconds of the steps of each loop, from two hosts."""
    with tempfile.TemporaryDirectory() as folder, Cluster(2) as cluster:
        processes = []
        for index, name in enumerate(cluster.names):
            cluster.slow(name, round(gbit * 1e6))
            ranks = {"RANK": index, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
            environment = {**os.environ, **{k: str(v) for k, v in ranks.items()}, "GLOO_SOCKET_IFNAME": "eth0"}
            command = ["ip", "netns", "exec", cluster.namespace(name), sys.executable, "-m", "benchmarks.reduction"]
            command += [*arguments, "--folder", folder]
            processes.append(subprocess.Popen(command, env={**environment, "DS_ACCELERATOR": "cpu"}))
        try:
            failed = max(process.wait(timeout=1800) for process in processes)
        finally:
            for process in processes:
                process.kill()
        if failed:
            raise SystemExit("error: a rank ended with an error, see above")
        found: list[list[float]] = json.loads((Path(folder) / "seconds.json").read_text())
        return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gbit", type=float, default=2.0, help="Gbit/s of each host's link, both ways")
    parser.add_argument("--model", default="setformer_mini")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--micro", type=int, default=8, help="images of a rank and step")
    parser.add_argument("--dtype", default="fp32", choices=sorted(deepspeed_engine.DTYPES))
    parser.add_argument("--bucket-mib", type=int, default=25, help="zero.bucket_mib with overlap_comm; 256 without")
    parser.add_argument("--turns", type=int, default=4, help=f"of {TURN} steps for each loop")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder is not None:
        rank(asked)
        return
    reason = why_impossible()
    if reason is not None:
        raise SystemExit(f"error: two hosts cannot be made here: {reason}")
    seconds = run(sys.argv[1:], asked.gbit)
    medians = [1e3 * statistics.median(mine) for mine in seconds]
    parts = [dict(zip(("stage", "overlap", "ours"), loop, strict=True)) for loop in LOOPS]
    rows: list[dict[str, Any]] = [{**part, "step_ms": ms} for part, ms in zip(parts, medians, strict=True)]
    title = (
        f"{asked.model} at {asked.side}², {asked.micro} images a rank, {asked.dtype}, links of {asked.gbit:g} Gbit/s"
    )
    table = Table("ZeRO", "overlap_comm", "reduced by", "step, ms", "of DeepSpeed without overlap", title=title)
    for row in rows:
        [first] = [r["step_ms"] for r in rows if (r["stage"], r["overlap"], r["ours"]) == (row["stage"], False, False)]
        by, overlap = "ours" if row["ours"] else "DeepSpeed", "true" if row["overlap"] else "false"
        table.add_row(str(row["stage"]), overlap, by, f"{row['step_ms']:.0f}", f"{row['step_ms'] / first:.2f}")
    Console().print(table, describe())
    if asked.out is not None:
        write(asked.out, {"machine": describe(), "asked": title, "rows": rows})


if __name__ == "__main__":
    main()
