"""Names that a user's own code registers: tasks, callbacks, augmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from setformer_dist.core.errors import ConfigError

CallableT = TypeVar("CallableT", bound=Callable[..., object])


def register(table: dict[str, CallableT], kind: str, name: str, item: CallableT) -> None:
    """Add an item to a table of names. The same item may come again, and so may a notebook's cell that defines it.

    Args:
        table: the items by name; changed in place.
        kind: what the items are, for messages, such as "task".
        name: the new name.
        item: what it stands for.

    Raises:
        ConfigError: the name is no text, the item is not callable, or another item has the name.
    """
    if not isinstance(name, str) or not callable(item):
        raise ConfigError(
            f"register_{kind} takes a name and then a function or class, and got {type(name).__name__} and "
            f"{type(item).__name__}"
        )
    if name in table and table[name] is not item and not _defined_again(table[name], item):
        raise ConfigError(f"{kind} {name!r} is registered twice: give yours another name")
    table[name] = item


def _defined_again(known: object, item: object) -> bool:
    """Return whether both are the same name of the main program: a cell that a notebook ran again."""
    names = [(getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)) for thing in (known, item)]
    return names[0] == names[1] and names[0][0] == "__main__" and names[0][1] is not None
