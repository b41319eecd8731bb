"""What this host says of itself: system, devices, versions, and the environment variables that can change a result.

Everything comes from files of the system and package metadata: torch is not imported, and no tool is run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from launch.ranks.environment import usable_cores
from setformer_dist import __version__
from setformer_dist.core.secrets import names_secret, redacted

_HOME = Path(__file__).resolve().parents[2]
_PACKAGES = ("setformer_dist", "dataloaders", "checkpoints", "launch")
LIBRARIES = (
    "torch", "torchvision", "deepspeed", "timm", "numpy", "safetensors", "pydantic", "triton", "pillow", "simplejpeg",
    "fsspec", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "ffcv",
)  # fmt: skip

# Variables that can change what is computed, how fast, or where: of libraries, devices and schedulers.
_PREFIXES = (
    "OMP_", "MKL_", "KMP_", "OPENBLAS_", "GLOO_", "NCCL_", "UCX_", "FI_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_",
    "HIP_", "ROCR_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "DS_", "SETFORMER_", "SLURM_", "PYTHON",
)  # fmt: skip
_NAMES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "CC", "CXX", "TOKENIZERS_PARALLELISM", "MALLOC_ARENA_MAX")
# Set by a supervisor for its own ranks: they say nothing of the host.
_OWN = ("SETFORMER_HEARTBEAT_FD", "SETFORMER_SCRATCH", "SETFORMER_LOG_DIR")
_LONGEST = 4096  # characters of a value


def machine_facts(environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Return what a record holds of this host; a value is None where it cannot be told.

    Args:
        environ: of the ranks.
    """
    return {
        "host": socket.gethostname(),
        "system": _system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpu_names(),
        "driver": driver(),
        "code": code_digest(),
        "versions": versions(),
        "environment": mattering(environ),
    }


def mattering(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables that can matter, without the values of those that name a secret (SLURM_JWT)."""
    found = {n: v for n, v in environ.items() if (n.startswith(_PREFIXES) or n in _NAMES) and n not in _OWN}
    return {name: None if names_secret(name) else redacted(value)[:_LONGEST] for name, value in sorted(found.items())}


def versions() -> dict[str, str]:
    """Return the versions of this project and of the libraries that are installed."""
    found = {name: version_of(name) for name in LIBRARIES}
    return {"setformer_dist": __version__} | {name: version for name, version in found.items() if version is not None}


def version_of(name: str) -> str | None:
    """Return the version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_digest() -> str:
    """Return a digest of this project's own code as it lies on this host."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_HOME / package).rglob("*.py")):
            digest.update(path.relative_to(_HOME).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def gpu_names(driver_files: Path = Path("/proc/driver/nvidia")) -> list[str]:
    """Return the names of this host's GPUs as the driver has them."""
    names = []
    for path in sorted(driver_files.glob("gpus/*/information")):
        model = _field(path, "Model")
        names.append(model or "NVIDIA")
    if names:
        return names
    amd = sorted(Path("/sys/class/drm").glob("card[0-9]*/device/product_name"))
    return [_text(path) or "AMD" for path in amd]


def driver(driver_files: Path = Path("/proc/driver/nvidia")) -> str | None:
    """Return the version of the GPU driver."""
    text = _text(driver_files / "version")
    words = text.split("Kernel Module", 1)[-1].split() if text else []
    version = next((word for word in words if word[:1].isdigit()), None)
    return version or _text(Path("/sys/module/amdgpu/version"))


@functools.cache
def _cpu() -> str | None:
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine() or None


@functools.cache
def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _field(path: Path, name: str) -> str | None:
    """Return the first value of a file with lines NAME : VALUE."""
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
