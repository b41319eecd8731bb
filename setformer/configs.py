"""The config of a run: from a TOML file, from keywords, or both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.run.config import RunConfig, shipped
from setformer_dist.core import config as base


def load_config(path: str | Path | None = None, *overrides: str, **tables: Any) -> RunConfig:
    """Return the config of a run; later arguments have the last word, key by key.

    Args:
        path: a TOML file, or the name of a shipped one, such as "demo"; None begins with the defaults.
        overrides: as on the command line: "optim.lr=1e-3", "~schedule.epochs".
        tables: tables of the config by name: `optim={"lr": 1e-3}, data={"root": Path("data/digits")}`. Paths become
            strings.

    Returns:
        The config, frozen and checked. `setformer config` lists every key.

    Raises:
        ConfigError: the file does not exist or is not TOML; a key is unknown, or a value impossible.
    """
    if path is None:
        return base.load(RunConfig, None, overrides, _plain({"model": {}, **tables}))
    return base.load(RunConfig, shipped(Path(path)), overrides, _plain(tables))


def _plain(value: Any) -> Any:
    """Return nested values as TOML would have them: paths as strings, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
