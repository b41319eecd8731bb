"""Time, peak memory and the limits of the machine, the same way in every benchmark."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from setformer_dist.core.files import write_json

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# PyTorch's operators that launch nothing on a GPU.
NO_KERNEL = frozenset((
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "narrow", "permute",
    "promote_types", "select", "slice", "split", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
    "_record_function_enter_new", "_record_function_exit",
))  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts PyTorch's operators that are kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one."""
        self.count += func.overloadpacket.__name__ not in NO_KERNEL
        return func(*args, **(kwargs or {}))


def wait() -> None:
    """Let the device finish."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], budget_s: float = 1.0, repeats: int = 30) -> float:
    """Return the median time of a piece of work: after one call to warm up, as often as the budget allows.

    On a GPU the time between the end of one call and that of the next, with the device never waited for in between.
    """
    work()
    wait()
    if DEVICE == "cuda":
        return _seconds_on_device(work, budget_s, repeats)
    found: list[float] = []
    end = time.perf_counter() + budget_s
    while not found or (len(found) < repeats and time.perf_counter() < end):
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _seconds_on_device(work: Callable[[], Any], budget_s: float, repeats: int) -> float:
    start = time.perf_counter()
    work()
    wait()
    repeats = max(3, min(repeats, int(budget_s / (time.perf_counter() - start))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    wait()
    return statistics.median(one.elapsed_time(other) for one, other in itertools.pairwise(events)) / 1e3


def replayed(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return the same work without Python and launches, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def matmul_limit() -> float:
    """Return the FLOP/s of one large fp32 product (bf16 on a GPU)."""
    n, dtype = (2048, torch.float32) if DEVICE == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)


def bandwidth_limit() -> float:
    """Return the bytes/s of a copy far larger than the caches, read and written."""
    a = torch.empty(1 << (27 if DEVICE == "cpu" else 30), dtype=torch.float32, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / seconds(lambda: b.copy_(a))


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return how much the memory of this process (of the device on a GPU) rises during a piece of work.

    On a CPU the rise of the resident set, which the kernel tracks; call it in a process that `measured_apart` began,
    where every large block is mapped again and given back at once, and after a first call of the same work.
    """
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        wait()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def resident(begin: bool = False) -> tuple[int, int]:
    """Return (bytes resident now, most bytes resident so far) of this process; `begin` starts the second again."""
    if begin:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS"), _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured_apart(module: str, arguments: dict[str, Any]) -> Any:
    """Run `python -m module --apart JSON` in a process of its own and return the JSON that it prints last."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", module, "--apart", json.dumps(arguments)]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent p of values ~ sizes^p: the slope of a line through the logarithms."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON of a benchmark, which may be ended at any instant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
