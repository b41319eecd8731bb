"""Checkpoints against DeepSpeed's own and against the disk, in one run on two gloo ranks.

    python -m benchmarks.checkpoint [--sizes small large] [--repeats 3] [--folder runs]

For each model (a vision transformer of about 7 and 57 million parameters, fp32, ZeRO 2, two ranks, real engines):

* how long a save holds training up: ours in the background (first, with memory that the system has not given yet, and
  later ones), ours in the foreground, DeepSpeed's `save_checkpoint` (which does not make its files durable);
* bytes/s of a whole save and of a load, against writing and fsyncing, and reading, as many bytes with plain system
  calls by two processes in the same folder; caches are dropped before each reading (posix_fadvise);
* verification from the page cache, and the resume: finding, verifying and loading, against reading the bytes.

Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import write as write_json
from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.reader import verified
from launch.testing.ranks import run_ranks
from setformer_dist.core.config import build
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.store import Snapshot
from setformer_dist.engine.batch_plan import solve
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.config import BatchConfig, OptimConfig, PrecisionConfig, ZeroConfig
from setformer_dist.engine.deepspeed_engine import initialize
from setformer_dist.engine.master import MasterState
from setformer_dist.engine.zero import deepspeed_config

SIZES = {"small": (384, 4), "large": (768, 8)}  # width and depth
_CHUNK = 8 << 20


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the bytes of all files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def raw_write(path: Path, size: int) -> None:
    """Write and fsync as many bytes as a rank's file has."""
    block = os.urandom(_CHUNK)
    with path.open("wb", buffering=0) as file:
        for first in range(0, size, _CHUNK):
            file.write(block[: min(_CHUNK, size - first)])
        os.fsync(file.fileno())


def raw_read(path: Path) -> None:
    """Read a file from its beginning to its end into one buffer."""
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):  # type: ignore[attr-defined]
            pass


class Bench:
    """One rank of the measurement."""

    def __init__(self, size: str, folder: Path) -> None:
        self.ranks = RankInfo.from_env()
        connect(self.ranks, os.environ["SETFORMER_RENDEZVOUS"])
        self.comm = TorchCollectives(self.ranks)
        self.folder = folder
        width, depth = SIZES[size]
        model = timm.create_model("vit_base_patch16_224", embed_dim=width, depth=depth, num_heads=width // 64)
        self.parameters = sum(p.numel() for p in model.parameters())
        plan = solve(BatchConfig(global_size=2, micro=1), self.ranks.world_size)
        precision, zero = build(PrecisionConfig, {"dtype": "fp32"}, ""), build(ZeroConfig, {"stage": 2}, "")
        self.engine = initialize(model, OptimConfig(), deepspeed_config(precision, zero, plan, 1.0, {}))
        self.master = MasterState(self.engine)

    def timed(self, work: Callable[[], Any]) -> float:
        """Return the wall time until all ranks have done something that they begin together."""
        self.comm.barrier()
        began = time.perf_counter()
        work()
        return self.comm.max(time.perf_counter() - began)

    def fresh(self, name: str) -> Path:
        """Return the path of an empty folder, the same on all ranks."""
        path = self.folder / name
        if self.ranks.is_main:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        self.comm.barrier()
        return path

    def dropped(self) -> None:
        """Make the next reading come from the disk."""
        if self.ranks.is_main:
            drop_cache(self.folder)
        self.comm.barrier()

    def manager(self, root: Path, asynchronous: bool) -> CheckpointManager:
        """Return a manager that keeps one checkpoint."""
        return CheckpointManager(root, self.comm, CheckpointConfig(asynchronous=asynchronous, keep_last=1))

    def begin(self, manager: CheckpointManager, step: int) -> None:
        """Begin a save of masters and optimizer states."""
        fragments = self.master.fragments("param", *self.master.states)
        manager.begin(Snapshot(step, fragments, {"step": step}, {}), Identity(model="bench"))

    def ours(self, asynchronous: bool, repeats: int) -> tuple[list[float], list[float]]:
        """Return how long saves hold the caller up, and how long they take in all."""
        manager = self.manager(self.fresh("ours"), asynchronous)
        blocked, whole = [], []
        for step in range(1, repeats + 2):
            began = time.perf_counter()
            blocked.append(self.timed(lambda step=step: self.begin(manager, step)))
            manager.finish(last=True)
            whole.append(time.perf_counter() - began)
        return blocked, whole

    def deepspeed(self, repeats: int) -> list[float]:
        """Return how long DeepSpeed's own saves take."""
        root = self.fresh("deepspeed")
        found = []
        for step in range(repeats + 1):
            found.append(self.timed(lambda step=step: self.engine.save_checkpoint(str(root), tag=f"t{step % 2}")))
        return found


def measure(size: str, folder: str, repeats: int) -> dict[str, Any]:
    """Measure on one rank; rank 0's answer holds."""
    bench = Bench(size, Path(folder))
    blocked, whole = bench.ours(asynchronous=True, repeats=repeats)
    foreground, _ = bench.ours(asynchronous=False, repeats=repeats)
    theirs = bench.deepspeed(repeats)
    root = bench.folder / "ours"
    step_folder = next(root.glob("step-*"))
    nbytes = sum(path.stat().st_size for path in step_folder.iterdir())
    raw = bench.fresh("raw") / f"rank-{bench.ranks.rank}"
    mine = nbytes // bench.ranks.world_size
    writing = [bench.timed(lambda: raw_write(raw, mine)) for _ in range(repeats)]
    reading, finding, loading, loading_theirs = [], [], [], []
    for _ in range(repeats):
        bench.dropped()
        reading.append(bench.timed(lambda: raw_read(raw)))
        bench.dropped()
        manager = bench.manager(root, asynchronous=True)
        found: list[Any] = []
        finding.append(bench.timed(lambda m=manager, f=found: f.append(m.newest())))
        fragments = bench.master.fragments("param", *bench.master.states)
        loading.append(bench.timed(lambda m=manager, f=found, x=fragments: m.load(f[0], x)))
        bench.dropped()
        loading_theirs.append(bench.timed(lambda: bench.engine.load_checkpoint(str(bench.folder / "deepspeed"))))
    verified(step_folder)  # into the page cache
    cached = bench.timed(lambda: verified(step_folder, workers=2) if bench.ranks.is_main else None)
    began = time.process_time()
    verified(step_folder)
    hashing = time.process_time() - began
    disconnect()
    middle = statistics.median
    return {
        "parameters": bench.parameters,
        "bytes": nbytes,
        "blocked_first_s": blocked[0],
        "blocked_s": middle(blocked[1:]),
        "foreground_s": middle(foreground[1:]),
        "deepspeed_s": middle(theirs[1:]),
        "blocked_of_deepspeed": middle(blocked[1:]) / middle(theirs[1:]),
        "save_s": middle(whole[1:]),
        "raw_write_s": middle(writing),
        "write_of_raw": middle(writing) / middle(whole[1:]),
        "raw_read_s": middle(reading),
        "verify_s": middle(finding),
        "load_s": middle(loading),
        "resume_s": middle([a + b for a, b in zip(finding, loading, strict=True)]),
        "resume_of_reading": middle([a + b for a, b in zip(finding, loading, strict=True)]) / middle(reading),
        "read_of_raw": middle(reading) / middle(finding),
        "deepspeed_load_s": middle(loading_theirs),
        "verify_cached_gb_s": nbytes / cached / 1e9,
        "verify_cpu_gb_s": nbytes / hashing / 1e9,
    }


_LINES = (
    ("save, in the background: training is held up", "blocked_s"),
    ("the same, first save of a process", "blocked_first_s"),
    ("save, in the foreground, durable", "foreground_s"),
    ("DeepSpeed save_checkpoint, not durable", "deepspeed_s"),
    ("save in the background until durable", "save_s"),
    ("writing and fsyncing the bytes, raw", "raw_write_s"),
    ("reading the bytes, raw, cache dropped", "raw_read_s"),
    ("resume: find and verify, cache dropped", "verify_s"),
    ("resume: load", "load_s"),
    ("DeepSpeed load_checkpoint, no verification", "deepspeed_load_s"),
)
_RATIOS = (
    ("held up / DeepSpeed's save (aim: at most 0.10)", "blocked_of_deepspeed"),
    ("write bandwidth / raw (aim: at least 0.80)", "write_of_raw"),
    ("verifying bandwidth / raw reading (aim: at least 0.80)", "read_of_raw"),
    ("resume / reading the bytes (aim: at most 2)", "resume_of_reading"),
    ("verification from the page cache, GB/s, two cores", "verify_cached_gb_s"),
    ("verification, GB per CPU second", "verify_cpu_gb_s"),
)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to be measured")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/checkpoint.json"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    rows = {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            place = str(Path(folder).absolute())
            rows[size] = run_ranks(measure, 2, size, place, arguments.repeats, timeout=280, cold=True)[0]
        kept = [{"size": name, **row} for name, row in rows.items()]
        write_json(arguments.out, {"machine": describe(), "rows": kept})
    table = Table("seconds (median)", *(f"{row['parameters'] / 1e6:.1f} M parameters" for row in rows.values()))
    table.add_row("bytes", *(f"{row['bytes'] / 2**20:.0f} MiB" for row in rows.values()))
    for text, key in _LINES:
        table.add_row(text, *(f"{row[key]:.3f}" for row in rows.values()))
    table.add_section()
    for text, key in _RATIOS:
        table.add_row(text, *(f"{row[key]:.2f}" for row in rows.values()))
    table.title = f"{describe()}, 2 ranks"
    Console().print(table)
    sys.exit(0)


if __name__ == "__main__":
    main()
