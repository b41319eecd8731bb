"""Modules that cost seconds to import, imported by the one command that needs them.

`import torch` alone takes longer than all of `setformer --help` should, and the supervisor that `setformer train`
becomes should not hold it in memory at all. This is the one place where our packages are imported late.
"""

from __future__ import annotations

import importlib
from typing import Any


def load(module: str) -> Any:
    """Import a module now; its names are not typed here."""
    return importlib.import_module(module)
