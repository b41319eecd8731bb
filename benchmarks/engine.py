"""What training through our loop costs, against DeepSpeed alone and against PyTorch's DDP and FSDP2.

    python -m benchmarks.engine [--config configs/runs/demo.toml] [--data DIR] [--ranks 2] [--blocks 12]
    python -m benchmarks.engine --ranks 1 --dtype bf16 --set model.name=setformer_tiny    on a GPU, if there is one

For each ZeRO stage, on the same model and the same batches of our stream:
  ours       the trainer's loop with everything in it: clock, metrics, agreement to stop, drop-path keys
  DeepSpeed  forward, backward and step of the same engine, with our update, and nothing else
  DDP        torch's DistributedDataParallel with fused AdamW and clipping, no DeepSpeed at all: a peer of stage 0
  FSDP2      torch's fully_shard of each block and the rest, the same otherwise: a peer of stage 3
Ours and DeepSpeed take turns in blocks of steps in the same processes, so that noise of the machine hits both;
the overhead is the median over pairs of neighbouring blocks. Averaging of weights is off, since DDP has none. In bf16,
DeepSpeed holds weights in bf16, DDP computes by autocast from fp32 ones, and FSDP2 gathers fp32 ones as bf16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import describe
from benchmarks.measure import write
from dataloaders.reading.device import Prepare
from dataloaders.reading.streams import ShardTrainStream
from launch.examples.demo import prepare_data
from launch.run.compiled import whole_blocks
from launch.run.compose import compose, open_splits
from launch.run.config import ResolvedRun, load_run, resolve
from launch.testing.ranks import run_ranks
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.deepspeed_engine import DTYPES
from setformer_dist.engine.metrics import peak_memory_mib
from setformer_dist.engine.optim import optimizer_of, parameter_groups
from setformer_dist.engine.progress import RunProgress
from setformer_dist.engine.signals import StopRequest
from setformer_dist.engine.stop_vote import StopVote
from setformer_dist.engine.trainer import Trainer
from setformer_dist.models.build import build_model
from setformer_dist.tasks.build import build_task
from setformer_dist.tasks.classification import soft_cross_entropy

STEPS = 10  # per block


def prepare(config: str, overrides: list[str]) -> tuple[ResolvedRun, TorchCollectives]:
    """Join the ranks and resolve the run."""
    ranks = RankInfo.from_env()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
    run = resolve(load_run(Path(config), overrides), ranks.world_size)
    connect(ranks, os.environ["SETFORMER_RENDEZVOUS"])
    return run, TorchCollectives(ranks)


def timed(comm: TorchCollectives, work: Any) -> float:
    """Return the wall seconds of a piece of work that all ranks do."""
    comm.barrier()
    start = time.perf_counter()
    work()
    if get_accelerator().device_name() != "cpu":
        get_accelerator().synchronize()
    comm.barrier()
    return time.perf_counter() - start


def ours_and_deepspeed(config: str, overrides: list[str], blocks: int) -> dict[str, Any]:
    """Take turns between our loop and DeepSpeed alone; return seconds of each block and peak memory."""
    run, comm = prepare(config, overrides)
    run.config.folder.mkdir(parents=True, exist_ok=True)
    splits = open_splits(run)
    c = run.config
    task = build_task(c.task, splits.train.classes)
    model = build_model(c.model, len(task.outputs), c.data.image_size, 0)
    trainer: Trainer = compose(run, splits, task, model, comm)
    parts = trainer._c
    ours: list[float] = []
    bare: list[float] = []
    with StopRequest() as signals, RunProgress(1_000_000, 0, visible=False) as progress:
        stop = StopVote(signals, comm, parts.store, parts.callbacks)
        parts.callbacks.start(0, STEPS * (blocks + 1), None, progress.say)
        batches = parts.stream.micro_batches(0)
        trainer.train_until(STEPS, batches, stop, progress)
        for block in range(blocks):
            target = STEPS * (block + 2)
            ours.append(timed(comm, lambda t=target: trainer.train_until(t, batches, stop, progress)))
            bare.append(timed(comm, lambda: deepspeed_steps(parts, batches)))
    parts.stream.close()
    memory = comm.gather_json(peak_memory_mib())
    disconnect()
    return {"ours": ours, "deepspeed": bare, "memory_mib": memory}


def deepspeed_steps(parts: Any, batches: Iterator[MicroBatch]) -> None:
    """Run STEPS optimizer steps with nothing but DeepSpeed."""
    for _ in range(STEPS * parts.plan.accumulation):
        images, targets = parts.prepare(next(batches), train=True)
        parts.engine.backward(soft_cross_entropy(parts.engine(images), targets))
        parts.engine.step()


def fully_sharded(model: torch.nn.Module, device: torch.device, dtype: torch.dtype, ranks: int) -> FSDPModule:
    """Return a model whose blocks FSDP2 shards, each as a whole."""
    mesh = init_device_mesh(device.type, (ranks,))
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, dtype)
    for block in whole_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def peer(name: str, config: str, overrides: list[str], blocks: int) -> dict[str, Any]:
    """Return seconds of each block and peak memory of a bare loop of "DDP" or "FSDP2"."""
    run, comm = prepare(config, overrides)
    splits = open_splits(run)
    c = run.config
    stream = ShardTrainStream(splits.train, c.data, c.run.seed, comm.ranks, run.plan.global_size, run.plan.micro)
    device, dtype = torch.device(get_accelerator().current_device_name()), DTYPES[c.precision.dtype]
    make = Prepare(c.data, len(splits.train.classes), device, torch.float32)
    model = build_model(c.model, len(splits.train.classes), c.data.image_size, 0).to(device)
    sharded = fully_sharded(model, device, dtype, comm.ranks.world_size) if name == "FSDP2" else None
    optimizer = optimizer_of(parameter_groups(model, c.optim), c.optim)
    parallel = DistributedDataParallel(model) if sharded is None else model
    batches = stream.micro_batches(0)

    def steps() -> None:
        for _ in range(STEPS):
            for micro in range(run.plan.accumulation):
                images, targets = make(next(batches), train=True)
                last = micro == run.plan.accumulation - 1
                if sharded is None:
                    parallel.require_backward_grad_sync = last
                else:
                    sharded.set_requires_gradient_sync(last)
                with torch.autocast(device.type, dtype, enabled=sharded is None and dtype != torch.float32):
                    loss = soft_cross_entropy(parallel(images), targets)
                (loss / run.plan.accumulation).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    steps()
    seconds = [timed(comm, steps) for _ in range(blocks)]
    stream.close()
    memory = comm.gather_json(peak_memory_mib())
    disconnect()
    return {"seconds": seconds, "memory_mib": memory}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/runs/demo.toml")
    parser.add_argument("--data", type=Path, help="packed data of the config; by default the demo's digits")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=12, help="pairs of blocks per stage, two or more")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the config")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/engine.json"))
    arguments = parser.parse_args()
    if arguments.blocks < 2:
        parser.error("--blocks: the quartiles need two blocks or more")
    console = Console()
    data = arguments.data or Path("runs/demo-data")
    if arguments.data is None:
        prepare_data(data, console)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"data.root={data}", f"run.out={folder}", f"precision.dtype={arguments.dtype}", "ema.decay=0",
            "eval.every_epochs=0", "checkpoint.every_steps=1000000", "schedule.epochs=1000", "run.log_every=10",
            *arguments.set,
        ]  # fmt: skip
        where = {"DS_ACCELERATOR": get_accelerator().device_name()}

        def measure_peer(name: str) -> None:
            words = (name, arguments.config, common, arguments.blocks)
            found = run_ranks(peer, arguments.ranks, *words, timeout=600, env=where, cold=True)[0]
            speed = STEPS / statistics.median(found["seconds"])
            rows.append({"loop": name, "stage": None, "steps_per_s": speed, "memory_mib": max(found["memory_mib"])})
            keep(rows, arguments)

        measure_peer("DDP")
        for stage in arguments.stages:
            words = [*common, f"zero.stage={stage}", f"run.name=stage{stage}"]
            found = run_ranks(
                ours_and_deepspeed, arguments.ranks, arguments.config, words, arguments.blocks, timeout=900, env=where,
                cold=True,
            )[0]  # fmt: skip
            ratios = [a / b for a, b in zip(found["ours"], found["deepspeed"], strict=True)]
            rows.append(
                {
                    "loop": "ours",
                    "stage": stage,
                    "steps_per_s": STEPS / statistics.median(found["ours"]),
                    "deepspeed_steps_per_s": STEPS / statistics.median(found["deepspeed"]),
                    "overhead": statistics.median(ratios) - 1,
                    "overhead_quartiles": [q - 1 for q in statistics.quantiles(ratios, n=4)[::2]],
                    "memory_mib": max(found["memory_mib"]),
                }
            )
            keep(rows, arguments)
        measure_peer("FSDP2")
    report(rows, arguments, console)


def keep(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write the JSON."""
    write(arguments.out, {"machine": describe(), "config": arguments.config, "ranks": arguments.ranks, "rows": rows})


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace, console: Console) -> None:
    """Print the table."""
    peers = [row for row in rows if row["stage"] is None]
    against = [f"against {row['loop']}" for row in peers]
    table = Table("loop", "steps/s", *against, "over DeepSpeed alone", "peak MiB per rank", title=describe())
    for row in rows:
        name = f"bare {row['loop']}" if row["stage"] is None else f"ours, ZeRO-{row['stage']}"
        low, high = row.get("overhead_quartiles", (0.0, 0.0))
        over = f"{row['overhead']:+.1%} (quartiles {low:+.1%} to {high:+.1%})" if "overhead" in row else ""
        speed = row["steps_per_s"]
        ratios = [f"{speed / other['steps_per_s']:.2f}×" for other in peers]
        table.add_row(name, f"{speed:.2f}", *ratios, over, f"{row['memory_mib']:.0f}")
    console.print(table)
    console.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
