"""Which machine a figure was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Return processor (or GPU), cores and versions in one line."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    else:
        names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
        device = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
