"""How much of its device every rank of this host uses: cores, its readers included, and its GPU where there is one.

Cores come from /proc: each rank leads a process group, and its readers are in it. The group's members are looked up
every ten seconds and their times read once a second, which costs some hundred microseconds. GPUs come from NVML where
the extra `gpu` is installed (nvidia-ml-py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.ranks.environment import has_gpu

_EVERY_S = 0.9
_MEMBERS_EVERY_S = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Use:
    """What a rank uses of its device.

    Attributes:
        cores: busy on average since the last look, of the rank and its readers; None where it cannot be told.
        gpu: share of time in which its GPU computed, 0 to 1; None where there is none, or NVML cannot be asked.
    """

    cores: float | None = None
    gpu: float | None = None


class Usage:
    """Looks at the ranks of this host.

    Args:
        environ: of the ranks, for the GPUs that they see.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._gpus = Gpus(environ) if has_gpu(environ) else None
        self._looked_at: float | None = None
        self._found_at: float | None = None
        self._leaders: set[int] = set()
        self._members: dict[int, list[int]] = {}  # leader -> processes of its group
        self._ticks: dict[int, int] = {}  # of each of them
        self._cores: dict[int, float | None] = {}

    def of(self, leader: int, local_rank: int) -> Use:
        """Return what a rank uses.

        Args:
            leader: its process.
            local_rank: its number on this host.
        """
        self._look(leader)
        return Use(self._cores.get(leader), self._gpus.share(local_rank) if self._gpus is not None else None)

    def _look(self, leader: int) -> None:
        now = time.monotonic()
        if leader in self._leaders and self._looked_at is not None and now - self._looked_at < _EVERY_S:
            return
        if leader not in self._leaders or self._found_at is None or now - self._found_at > _MEMBERS_EVERY_S:
            self._leaders.add(leader)
            groups = _groups()
            self._leaders &= groups.keys()
            self._members, self._found_at = {one: groups[one] for one in self._leaders}, now
        ticks = {pid: spent for pids in self._members.values() for pid in pids if (spent := _spent(pid)) is not None}
        if self._looked_at is not None and now > self._looked_at:
            self._cores = {one: self._busy(pids, ticks, now) for one, pids in self._members.items()}
        self._ticks, self._looked_at = ticks, now

    def _busy(self, pids: list[int], ticks: Mapping[int, int], now: float) -> float | None:
        """Return the cores that processes kept busy since the last look; None for processes that are new."""
        assert self._looked_at is not None
        known = [pid for pid in pids if pid in ticks and pid in self._ticks]
        if not known:
            return None
        return sum(ticks[pid] - self._ticks[pid] for pid in known) / _TICKS / (now - self._looked_at)


class Gpus:
    """NVML's view of the GPUs that ranks see; nothing where it cannot be asked."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        self._nvml = _nvml()

    def share(self, local_rank: int) -> float | None:
        """Return the share of time in which a rank's GPU computed lately."""
        if self._nvml is None:
            return None
        name = str(local_rank)
        if self._visible:
            if local_rank >= len(self._visible):
                return None
            name = self._visible[local_rank]
        try:
            if name.isdigit():
                handle = self._nvml.nvmlDeviceGetHandleByIndex(int(name))
            else:
                handle = self._nvml.nvmlDeviceGetHandleByUUID(name)
            return float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
        except self._nvml.NVMLError:
            return None


@functools.cache
def _nvml() -> Any:
    """Return NVML, ready, None where it is not installed or finds no driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _groups() -> dict[int, list[int]]:
    """Return the processes of this host by process group, of groups whose leader lives."""
    found: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(path.name))) is not None:
            found.setdefault(int(fields[2]), []).append(int(path.name))
    return {leader: pids for leader, pids in found.items() if leader in pids}


def _spent(pid: int) -> int | None:
    """Return the clock ticks that a process has computed, None for one that has ended."""
    fields = _stat(pid)
    return None if fields is None else int(fields[11]) + int(fields[12])


def _stat(pid: int) -> list[str] | None:
    """Return a process's state, parent, group, session and so on, as /proc has them; None for one that has ended."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        # Where nobody reaps orphans, as in many containers, an ended process stays as a zombie.
        return fields if len(fields) > 12 and fields[0] not in "ZX" else None
    return None
