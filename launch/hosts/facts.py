"""What a host says of itself to the supervisor that wants to train on it. torch is not imported."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from launch.ranks.environment import has_gpu, usable_cores
from launch.ranks.network import addresses
from launch.record.machine import machine_facts, version_of

LIBRARIES = ("torch", "deepspeed", "timm", "numpy", "safetensors", "pydantic")


def facts() -> dict[str, Any]:
    """Return what must be alike on all hosts, and what a user wants to see of each."""
    memory, machine = psutil.virtual_memory(), machine_facts()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": sys.version.split()[0],
        "code": machine["code"],
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "addresses": addresses(),
        "cores": usable_cores(),
        "gpus": gpus() if has_gpu(os.environ) else 0,
        "memory": memory.total,
        "shared_memory_free": _free("/dev/shm"),
        "clock": time.time(),
        "machine": machine,
    }


def gpus() -> int:
    """Return the GPUs of this host, by their device files."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(list(Path("/dev/dri").glob("renderD*")))


def _free(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0
