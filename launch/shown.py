"""Cells of tables that show texts from files as they are: no rich markup in them, no control characters."""

from __future__ import annotations

from rich.text import Text

from setformer_dist.core.words import plain


def cell(text: object, style: str = "") -> Text:
    """Return a table's cell that shows a text as it is."""
    return Text(plain(text), style=style)
