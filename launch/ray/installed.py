"""Whether the package ray is there: it is an extra."""

from __future__ import annotations

import importlib.util

from setformer_dist.core.errors import LaunchError


def require_ray() -> None:
    """Check that the package is there.

    Raises:
        LaunchError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise LaunchError("Ray is not installed: pip install 'setformer_dist[ray]'")
