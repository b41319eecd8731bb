"""What ranks find in their environment, and what this machine has for them. torch is not imported here."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from setformer_dist.core.errors import LaunchError

HOST = "127.0.0.1"

# How often an OpenMP thread looks for work before it sleeps. GCC's library, which torch's CPU kernels use, looks
# 300,000 times; where other programs use the same cores, threads then wait for ones that cannot run.
_SPINS = "1000"


def rank_environment(ranks: int, port: int, threads_per_rank: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that all ranks share; what the user has set stays."""
    made = dict(environ)
    for name in (
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
    ):  # all ranks are on this host: no other host may reach them
        made.setdefault(name, "lo")
    made |= {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }
    # DeepSpeed's launcher sets LOCAL_SIZE; where it equals WORLD_SIZE each rank leaves 69 MB in /dev/shm for ever.
    made.pop("LOCAL_SIZE", None)
    if threads_per_rank is not None:
        made["OMP_NUM_THREADS"] = str(threads_per_rank)
    else:
        made.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    if "OMP_WAIT_POLICY" not in made:
        made.setdefault("GOMP_SPINCOUNT", _SPINS)
    if not has_gpu(environ):
        made.setdefault("DS_ACCELERATOR", "cpu")
    return made


def usable_cores() -> int:
    """Return the cores this process may use: its affinity, and the container's share where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # "max" is no number: no limit
    return max(1, cores)


def has_gpu(environ: Mapping[str, str]) -> bool:
    """Whether this host seems to have a GPU that the user did not hide; found without importing torch."""
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    device_files = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return device_files or shutil.which("nvidia-smi") is not None


def choose_port(port: int | None) -> int:
    """Return a free TCP port, or the given one if nothing listens there.

    Raises:
        LaunchError: the port is taken or not a port.
    """
    if port is not None and not 0 < port < 2**16:
        raise LaunchError(f"{port} is not a TCP port: give 1 to 65535, or none to have a free one chosen")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free to listen on
        try:
            probe.bind((HOST, port or 0))
        except OSError as error:
            raise LaunchError(
                f"port {port} cannot be used ({error.strerror}): another job runs there; give another port, "
                "or none to have a free one chosen"
            ) from None
        found = probe.getsockname()[1]
    assert isinstance(found, int)
    return found
