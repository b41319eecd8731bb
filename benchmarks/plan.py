"""What `setformer plan` predicts of memory, against peaks of running ranks on a CPU.

    python -m benchmarks.plan [--models setformer_mini …] [--sizes 160 224] [--stages 0 1 2 3] [--micro 4]

Each layout runs in two fresh gloo ranks, which train three steps on random images. A peak is how far the resident set
rises above what a rank takes after it has imported, connected and trained a tiny model, so that libraries are loaded;
memory that is freed goes back to the system at once (mallopt).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import resident, write
from launch.plan.hardware import DEVICES
from launch.plan.rows import rank_memory
from launch.plan.subject import Subject, subject_of
from launch.run.config import ResolvedRun, load_run, resolve
from launch.run.inputs import inputs_of
from launch.testing.ranks import run_ranks
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import connect, disconnect
from setformer_dist.engine.deepspeed_engine import DTYPES, initialize
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.master import MasterState
from setformer_dist.tasks.classification import soft_cross_entropy

CONFIG = "configs/runs/imagenet_tiny.toml"
CLASSES = 1000
TINY = ("model.name=setformer_nano", "data.image_size=32")
MODELS = ("setformer_mini", "swin_tiny_patch4_window7_224", "convnext_tiny")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def run_of(words: list[str], ranks: int) -> ResolvedRun:
    """Return the run that words describe."""
    return resolve(load_run(Path(CONFIG), words), ranks)


def peak(words: list[str]) -> dict[str, int]:
    """Train on this rank; return how far its memory rises, in bytes: at rest, and at the most in a later step."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_MMAP_THRESHOLD, 32 * 1024)  # such blocks and larger ones are mapped again and given back when freed
    libc.mallopt(_TRIM_THRESHOLD, 0)
    ranks = RankInfo.from_env()
    connect(ranks, os.environ["SETFORMER_RENDEZVOUS"])
    run = run_of(words, ranks.world_size)
    dtype = DTYPES[run.config.precision.dtype]
    step, held = _trainer(run_of([*words, *TINY], ranks.world_size), dtype)
    step()
    del step, held
    _give_back()
    before, _ = resident()
    step, held = _trainer(run, dtype)
    for _ in range(2):
        step()
    _give_back()
    at_rest, _ = resident(begin=True)
    step()
    _, most = resident()
    disconnect()
    return {"at_rest": at_rest - before, "peak": most - before, "fragments": len(held)}


def _trainer(run: ResolvedRun, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """Return what trains a step, and what must stay alive for it."""
    c = run.config
    inputs: Any = inputs_of(c.data)
    model = inputs.build_model(c.model, CLASSES, {}, 0)
    engine = initialize(model, c.optim, run.deepspeed_json())
    master = MasterState(engine)
    average = Ema(master, c.ema) if c.ema.decay else None
    images = torch.randn(run.plan.micro, 3, *c.data.shape, dtype=dtype)
    targets = torch.full((run.plan.micro, CLASSES), 1 / CLASSES)

    def step() -> None:
        for _ in range(run.plan.accumulation):
            engine.backward(soft_cross_entropy(engine(images), targets))
            engine.step()
        if average is not None:
            average.update(0)

    return step, [engine, master, average]


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def predicted(subject: Subject, run: ResolvedRun) -> dict[str, int]:
    """Return what the plan says of the same layout."""
    checkpointed = run.config.model.recomputes_blocks
    memory = rank_memory(subject, DEVICES["cpu"], run.config.zero.stage, run.plan, checkpointed)
    return {"peak": memory.total, "working": memory.working, "held": memory.parameters + memory.masters}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--words", nargs="*", default=[], help="further overrides, such as precision.dtype=bf16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/plan.json"))
    arguments = parser.parse_args()
    console = Console(width=130)
    table = Table("model", "size", "ZeRO", "at rest MiB", "peak MiB", "predicted MiB", "error", title=describe())
    rows = []
    for name in arguments.models:
        for size in arguments.sizes:
            subject = None
            for stage in arguments.stages:
                words = [
                    f"model.name={name}", f"data.image_size={size}", f"zero.stage={stage}",
                    f"batch.global_size={arguments.micro * arguments.ranks}", f"batch.micro={arguments.micro}",
                    "precision.dtype=fp32", "precision.grad_accum=auto", "data.augment.mix_group=2", *arguments.words,
                ]  # fmt: skip
                found = run_ranks(peak, arguments.ranks, words, timeout=600)
                run = run_of(words, arguments.ranks)
                subject = subject or subject_of(run.config)
                foretold = predicted(subject, run)
                most = max(one["peak"] for one in found)
                rows.append({"model": name, "size": size, "stage": stage, "ranks": found, "predicted": foretold})
                console.print(f"{name} {size} {stage}: {found} {foretold}", style="dim")
                table.add_row(
                    name, str(size), str(stage), f"{max(one['at_rest'] for one in found) / 2**20:,.0f}",
                    f"{most / 2**20:,.0f}", f"{foretold['peak'] / 2**20:,.0f}", f"{foretold['peak'] / most - 1:+.1%}",
                )  # fmt: skip
                rows[-1]["error"] = foretold["peak"] / most - 1
    console.print(table)
    write(arguments.out, {"machine": describe(), "words": arguments.words, "rows": rows})
    console.print(f"largest error {max(abs(row['error']) for row in rows):.1%}; written to {arguments.out}")


if __name__ == "__main__":
    main()
