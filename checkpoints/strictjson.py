"""JSON from files that nobody vouches for: no key twice, no depth or number that exhausts the reader."""

from __future__ import annotations

import json
from typing import Any

from checkpoints.errors import DamagedError

MAX_DEPTH = 64


def parse(data: bytes, source: str) -> Any:
    """Read JSON text.

    Args:
        data: UTF-8; its length must have been bounded before.
        source: where it is from, for the error.

    Raises:
        DamagedError: it is not JSON, names a key twice in one object, or is nested too deeply.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object)
        _refuse_depth(value)
    except RecursionError:
        raise DamagedError(f"{source} is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DamagedError(f"{source} is not JSON: {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} is there twice")
    return found


def _refuse_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")
