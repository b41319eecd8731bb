"""Whether the package ray is there, which is an extra, and a cluster; the package is not imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setformer_dist.core.errors import LaunchError


def require_ray() -> None:
    """Check that the package is there.

    Raises:
        LaunchError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise LaunchError("Ray is not installed: pip install 'setformer_dist[ray]'")


_HOME = Path(__file__).resolve().parents[2]
_PROBE_S = 120.0


def check_reachable(address: str) -> None:
    """Check that this machine can be a driver of a cluster, by a process that is one for a moment.

    Args:
        address: host:port, or "auto".

    Raises:
        LaunchError: it cannot; the message says why.
    """
    require_ray()
    path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "launch.ray.cluster", address]
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=_PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LaunchError(f"the Ray cluster at {address} did not answer within {_PROBE_S:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise LaunchError(lines[-1] if lines else f"the Ray cluster at {address} cannot be used from here")
