"""What a host says of itself to the supervisor that wants to train on it. torch is not imported."""

from __future__ import annotations

import hashlib
import importlib.metadata
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

_HOME = Path(__file__).resolve().parents[2]
_PACKAGES = ("setformer_dist", "dataloaders", "checkpoints", "launch")
LIBRARIES = ("torch", "deepspeed", "timm", "numpy", "safetensors", "pydantic")


def facts() -> dict[str, Any]:
    """Return what must be alike on all hosts, and what a user wants to see of each."""
    memory = psutil.virtual_memory()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": sys.version.split()[0],
        "code": code_digest(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "addresses": addresses(),
        "cores": usable_cores(),
        "gpus": gpus() if has_gpu(os.environ) else 0,
        "memory": memory.total,
        "shared_memory_free": _free("/dev/shm"),
        "clock": time.time(),
    }


def code_digest() -> str:
    """Return a digest of this project's own code as it lies on this host."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_HOME / package).rglob("*.py")):
            digest.update(path.relative_to(_HOME).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def gpus() -> int:
    """Return the GPUs of this host, by their device files."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(list(Path("/dev/dri").glob("renderD*")))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _free(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0
