"""A user's own modules: models registered with timm, tasks, augmentations. They run because the config or the command
line names them.

A checkpoint's config names them too, and is not obeyed: who evaluates a run with code of its own says
so again (`--import`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from setformer_dist.core.errors import ConfigError


def bring(modules: Iterable[str]) -> None:
    """Import modules, from where Python finds them or from the working directory.

    Args:
        modules: dotted names.

    Raises:
        ConfigError: one is not there, or raises an error of its own.
    """
    here = str(Path.cwd())
    for module in modules:
        if here not in sys.path:
            sys.path.append(here)  # last, so that nothing there hides an installed package
        try:
            importlib.import_module(module)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"module {module!r}, named in run.imports or by --import, cannot be imported: {why}"
            ) from error
