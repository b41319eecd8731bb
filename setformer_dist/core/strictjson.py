"""JSON from untrusted files: no key twice, no depth, number or text that exhausts or misleads the reader.

A text of n bytes costs at most some 20 n bytes of memory once it is read: `[` and `{` cost the most, up to a hundred
times their length, so their number is bounded by the length (docs/checkpoints.md, "Budgets").
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 64
_CONTAINERS = (4096, 16)  # so many in any text, and one more for so many bytes of it; ours have one in 30
# Half of a character that UTF-16 writes as two: JSON can escape it alone, and then it can be neither shown nor written.
# Only U+DC80 to U+DCFF stand for something: bytes of a name that are no UTF-8, as Python has them.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(data: bytes) -> Any:
    """Read JSON text.

    Args:
        data: UTF-8; its length must have been bounded before.

    Raises:
        ValueError: it is not JSON, names a key twice in one object, is nested too deeply, has more lists and objects
            than its length allows, or text that is no Unicode; the message ends a sentence that names the source.
    """
    few, each = _CONTAINERS
    if data.count(b"[") + data.count(b"{") > few + len(data) // each:
        raise ValueError(f"has more lists and objects than {len(data)} bytes of ours ever have")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        refuse_depth(value)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeError are ValueErrors
        raise ValueError(f"is not JSON: {error}") from None
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} is there twice")
    return found


def refuse_depth(value: object) -> None:
    """Refuse a value whose lists and tables are nested more than `MAX_DEPTH` deep.

    Raises:
        ValueError: it is.
    """
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
