"""Modules that cost seconds to import, imported by the one command that needs them.

`import torch` alone takes longer than all of `setformer --help` should, and the supervisor that `setformer train`
becomes should not hold it in memory at all. This is the one place where our packages are imported late.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any


def load(module: str) -> Any:
    """Import a module now; its names are not typed here."""
    # DeepSpeed warns on import where there is no GPU; nobody who asks for a list of files is helped by that.
    logging.getLogger("DeepSpeed").addFilter(_is_no_guess)
    return importlib.import_module(module)


def _is_no_guess(record: logging.LogRecord) -> bool:
    return record.funcName != "get_accelerator"
