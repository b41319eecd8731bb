"""Names that a user's own code registers."""

from __future__ import annotations

from typing import Any

import pytest

import setformer
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.registry import register


def made(module: str) -> Any:
    def mine() -> None: ...

    mine.__module__ = module
    return mine


def test_a_cell_of_a_notebook_may_run_again_and_another_module_may_not_take_the_name() -> None:
    table: dict[str, Any] = {}
    again = made("__main__")
    for item in (made("__main__"), again):
        register(table, "task", "mine", item)
    assert table == {"mine": again}
    with pytest.raises(ConfigError, match="task 'mine' is registered twice"):
        register(table, "task", "mine", made("elsewhere"))
    assert table == {"mine": again}


@pytest.mark.parametrize("kind", ["task", "callback", "augmentation"])
def test_what_is_no_function_or_class_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"register_{kind} takes a name and .*, and got str and int"):
        getattr(setformer, f"register_{kind}")("mine", 3)
