"""Keeps what nobody asked for out of a rank's memory.

DeepSpeed imports its autotuner, and that imports MLflow where it is installed, with pandas and Arrow: 1.4 of 7.7 s
of a rank's start, and threads, with which a process cannot be forked. Nothing here autotunes.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

# package -> the one module that does without it
UNWANTED = {"mlflow": "deepspeed.autotuning.autotuner"}


class _Finder(MetaPathFinder):
    """Finds nothing, and ends the search for a package that the module which is just imported does without."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        importer = sys.modules.get(UNWANTED.get(fullname, ""))
        if importer is not None and getattr(importer.__spec__, "_initializing", False):
            raise ModuleNotFoundError(f"{importer.__name__} does without {fullname} here", name=fullname)
        return None


def import_lean() -> None:
    """Have DeepSpeed imported, later, without what it does not need. No other import changes. May be called again."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
