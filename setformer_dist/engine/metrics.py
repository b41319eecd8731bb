"""Where a step's time goes, and the run's record: callbacks receive the same metrics (`core.callback`).

    runs/<run>/metrics.jsonl   one JSON object a line, kind "train", "eval", "guard" or "refresh"; after a resume steps
                               may repeat, and the last line of a step counts; what is no finite number is null
    runs/<run>/samples.jsonl   with run.record_samples: the sample ids of every optimizer step

Only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from setformer_dist.core import ledger
from setformer_dist.core.files import finite, open_record
from setformer_dist.core.heartbeat import Heartbeat
from setformer_dist.core.phases import ON_HOST, SECTIONS, Section
from setformer_dist.engine.comm import CommMeter

log = logging.getLogger(__name__)

# Dense bf16 peak without sparsity, in FLOP/s, by a part of the device's name (vendors' data sheets).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the device's bf16 peak in FLOP/s, or None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


class StepClock:
    """Adds up seconds by section since the last `take`.

    On a CPU what collectives cost is taken out of the other sections. A device that runs asynchronously (a GPU) is
    measured by events on its stream; there collectives overlap with the computation and cannot be separated.
    """

    def __init__(self, meter: CommMeter | None, heartbeat: Heartbeat | None = None) -> None:
        self._heartbeat = heartbeat
        self._asynchronous = not get_accelerator().is_synchronized_device()
        self._meter = None if self._asynchronous else meter
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._events: list[tuple[Section, Any, Any]] = []
        self._comm_seen = self._meter.seconds if self._meter else 0.0
        self._start = time.perf_counter()

    @contextmanager
    def section(self, name: Section) -> Iterator[None]:
        """Count the time spent inside under `name`, and let the supervisor know that it begins."""
        if self._heartbeat is not None:
            self._heartbeat.beat(name)
        host_only = name in ON_HOST
        if self._asynchronous and not host_only:
            begin, end = (get_accelerator().Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        if self._asynchronous and name != "data":
            get_accelerator().synchronize()  # what the device still computes belongs to the sections before
        comm = self._meter.seconds if self._meter else 0.0
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        if self._meter and not host_only:
            spent -= self._meter.seconds - comm
        self._seconds[name] += spent
        if self._meter and host_only:
            self._comm_seen += self._meter.seconds - comm  # evaluation's own collectives stay in evaluation

    def take(self) -> tuple[dict[Section, float], float]:
        """Return (seconds by section, wall seconds) since the last call, and start again."""
        if self._events:
            get_accelerator().synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events.clear()
        if self._meter:
            self._seconds["communication"] += self._meter.seconds - self._comm_seen
            self._comm_seen = self._meter.seconds
        now = time.perf_counter()
        wall = now - self._start
        seconds = dict(self._seconds)
        seconds["other"] = max(0.0, wall - sum(seconds.values()))
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._start = now
        return seconds, wall


def peak_memory_mib() -> float:
    """Return this process's peak memory: of the device on GPUs, resident on CPUs; MiB."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return float(torch.accelerator.memory.max_memory_allocated() / 2**20)


class RunRecord:
    """Writes metrics.jsonl, samples.jsonl and the ledger on rank 0, nothing elsewhere."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        self._folder = folder
        self._is_main = is_main
        self._file: FileIO | None = None

    def _open(self) -> FileIO:
        """Open on the first line, so that a run that never begins leaves nothing."""
        path = self._folder / "metrics.jsonl"
        self._file = FileIO(open_record(path), "ab")  # a line is one write
        if self._file.tell() and not _ends_with_newline(path):
            self._file.write(b"\n")  # the last process died within a line
        return self._file

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line; it survives a death of this process.

        A full disk costs the line, and a warning, but not the run.
        """
        if not self._is_main:
            return
        try:
            file = self._file or self._open()
            line = json.dumps(finite({"kind": kind, "step": step, **values}), allow_nan=False)
            file.write(line.encode() + b"\n")
        except OSError as error:
            log.warning("metrics of step %d could not be written: %s", step, error)

    def write_samples(self, step: int, ids: list[int]) -> None:
        """Append the sample ids of one optimizer step, in the order of the stream, to samples.jsonl."""
        if not self._is_main:
            return
        line = json.dumps({"step": step, "ids": ids}).encode() + b"\n"
        try:
            path = self._folder / "samples.jsonl"
            with FileIO(open_record(path), "ab") as file:
                file.write(line if _ends_with_newline(path) else b"\n" + line)
        except OSError as error:
            log.warning("the samples of step %d could not be written: %s", step, error)

    def note(self, event: str, **values: object) -> None:
        """Append an event to the run's ledger (`core.ledger`)."""
        if self._is_main:
            ledger.record(self._folder, event, **values)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
