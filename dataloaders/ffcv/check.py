"""Whether FFCV works here, and if not, why: asked by `setformer doctor`, by `make ffcv` and before a run uses it."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from typing import Any

from setformer_dist.core.errors import ConfigError

# The parts of FFCV that `dataloaders.ffcv.pipeline` drives are those of this version, the last one published.
FFCV_VERSION = "1.0.2"
REPAIR = "`make ffcv` builds it (Debian or Ubuntu)"

_TIMEOUT_S = 120


def ffcv_problem() -> str:
    """Return why FFCV cannot be used, or "" if it can; imports it in a process of its own, some seconds."""
    if problem := _version_problem():
        return problem
    command = [sys.executable, "-c", "import dataloaders.ffcv.pipeline"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it does not import within {_TIMEOUT_S} s"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if not done.returncode else said[-1] if said else f"its import ended with code {done.returncode}"


def _version_problem() -> str:
    try:
        version = importlib.metadata.version("ffcv")
    except importlib.metadata.PackageNotFoundError:
        return "it is not installed"
    return "" if version == FFCV_VERSION else f"version {version} is installed, {FFCV_VERSION} is needed"


def load_ffcv_engine() -> Any:
    """Import and return `dataloaders.ffcv.engine`: the one place where a run comes to need FFCV.

    Raises:
        ConfigError: FFCV is missing or does not work, with the reason.
    """
    problem = _version_problem()
    if not problem:
        try:
            return importlib.import_module("dataloaders.ffcv.engine")
        except (ImportError, OSError) as error:  # OSError: a system library that FFCV was built against is gone
            problem = str(error)
    raise ConfigError(
        f'data.engine = "ffcv" needs FFCV, which does not work here ({problem}): {REPAIR}, or set it to "native"'
    )
