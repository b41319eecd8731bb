"""Keeps what nobody asked for out of a rank's memory.

DeepSpeed imports its autotuner, and that imports MLflow where it is installed, with pandas and Arrow: 1.4 of 7.7 s
of a rank's start, and threads, with which a process cannot be forked. Nothing here autotunes.

timm imports W&B where it is installed, for loggers of its own: 0.3 s, and two temporary folders that stay where the
process is killed. Our commands and ranks do without; a script that imports this package may want those loggers.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

# package -> the one module that does without it
UNWANTED = {"mlflow": "deepspeed.autotuning.autotuner"}
UNWANTED_IN_COMMANDS = {"wandb": "timm.utils.summary"}


class _Finder(MetaPathFinder):
    """Finds nothing, and ends the search for a package that the module which is just imported does without."""

    def __init__(self, unwanted: dict[str, str]) -> None:
        self._unwanted = unwanted

    def add(self, unwanted: dict[str, str]) -> None:
        """Do without more."""
        self._unwanted |= unwanted

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        importer = sys.modules.get(self._unwanted.get(fullname, ""))
        if importer is not None and getattr(importer.__spec__, "_initializing", False):
            raise ModuleNotFoundError(f"{importer.__name__} does without {fullname} here", name=fullname)
        return None


def import_lean(in_commands: bool = False) -> None:
    """Have DeepSpeed imported, later, without what it does not need. No other import changes. May be called again.

    Args:
        in_commands: timm as well: this process is one of ours.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(dict(UNWANTED)))
    if in_commands:
        next(finder for finder in sys.meta_path if isinstance(finder, _Finder)).add(UNWANTED_IN_COMMANDS)
