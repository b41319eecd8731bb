"""`core.strictjson` for checkpoints: what it refuses is damage."""

from __future__ import annotations

from typing import Any

from checkpoints.errors import DamagedError
from setformer_dist.core import strictjson


def parse(data: bytes, source: str) -> Any:
    """Read JSON text.

    Args:
        data: UTF-8; its length must have been bounded before.
        source: where it is from, for the error.

    Raises:
        DamagedError: see `core.strictjson.parse`.
    """
    try:
        return strictjson.parse(data)
    except ValueError as error:
        raise DamagedError(f"{source} {error}") from None
