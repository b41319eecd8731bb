"""Packages behind extras: checked where the run is built, imported where it begins."""

from __future__ import annotations

import importlib.util

from setformer_dist.core.errors import ConfigError


def require(package: str, key: str, extra: str) -> None:
    """Check that a package is installed, without importing it.

    Args:
        package: as it is imported.
        key: of the config, that asks for it.
        extra: of this distribution, that brings it.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{key} needs the package {package!r}, which is not installed: pip install 'setformer_dist[{extra}]', or "
            "leave the key out"
        )
