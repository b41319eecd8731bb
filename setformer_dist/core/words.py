"""Numbers in sentences, and texts that others wrote: names of runs, hosts and classes, lines of logs, errors.

Such a text may hold escape sequences that repaint a terminal, characters that turn the direction of writing, or half
characters that cannot be encoded. Whatever is shown goes through `plain`: rich's output in `core.terminal`, log lines
in `core.secrets`, pages in `report` and `launch.sweep.report`.
"""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 shard", "1,200 shards".

    Args:
        number: how many.
        noun: for one.
        plural: for any other number, where it is not the noun with an "s".
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def plain(text: object) -> str:
    """Return a text with its control characters and half characters written out as escapes."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain_page(text: str) -> str:
    """Return a text of lines, each of them `plain`; line ends stay."""
    return "\n".join(map(plain, text.split("\n")))


def plain_lines(text: str) -> str:
    """Return a message of several lines, the later ones indented by two spaces, each of them `plain`."""
    return "\n  ".join(plain(line) for line in text.split("\n  "))
