"""The config of a run: from a TOML file, from keywords, or both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.run.config import RunConfig, shipped
from setformer_dist.core import config as base
from setformer_dist.core.errors import ConfigError


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
        ConfigError: the file does not exist or is not TOML; a key is unknown, or a value impossible; an override is no
            text.
    """
    if wrong := [given for given in overrides if not isinstance(given, str)]:
        raise ConfigError(
            f"load_config takes overrides as text, such as 'optim.lr=1e-3', and got {type(wrong[0]).__name__}: give "
            "tables as keywords, such as optim={'lr': 1e-3}"
        )
    if path is None:
        return base.load(RunConfig, None, overrides, _plain({"model": {}, **tables}))
    return base.load(RunConfig, shipped(Path(path)), overrides, _plain(tables))


def check_config(config: object) -> None:
    """Check that a function of the library got a config and not what makes one.

    Raises:
        ConfigError: it is a name, a path or a table.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"config must be a run config, and is {type(config).__name__}: make one with setformer.load_config"
        )


def _plain(value: Any) -> Any:
    """Return nested values as TOML would have them: paths as strings, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
