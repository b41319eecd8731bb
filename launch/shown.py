"""Texts from files on a terminal: names of runs, classes, models and errors, no matter who wrote them.

A file may hold escape sequences that repaint a terminal, half characters that cannot be encoded, or rich's markup.
"""

from __future__ import annotations

from rich.text import Text


def plain(text: object) -> str:
    """Return a text with its control characters and half characters written out as escapes."""
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in str(text))


def plain_lines(text: str) -> str:
    """Return a message of several lines, the later ones indented by two spaces, each of them `plain`."""
    return "\n  ".join(plain(line) for line in text.split("\n  "))


def cell(text: object, style: str = "") -> Text:
    """Return a table's cell that shows a text as it is."""
    return Text(plain(text), style=style)
