"""What is in a source and is not read: classified by one list of names, counted, and reported in one line.

Training, packing and looking use this alone, so a folder holds the same samples to all of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dataloaders.pixels.formats import IMAGE_SUFFIXES
from setformer_dist.core.words import counted

# Files and folders that systems and tools leave behind, in lower case; every name with a leading dot is one too
# (.ipynb_checkpoints, .DS_Store, .git, ._image.jpg of macOS's archives, our own .setformer-index).
IGNORED = frozenset(
    {
        "__macosx",
        "@eadir",  # Synology's thumbnails
        "#recycle",
        "#snapshot",
        "@recycle",  # QNAP
        "@recently-snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
    }
)

# The folder of our own index, next to the shards that it is of.
OUR_INDEX = ".setformer-index"

# Folders of which it is remembered that they hold files that are not read; of more only the number is.
_MOST_FOLDERS = 100_000

# Names that one line lists of each kind.
_NAMED = 4


def is_ignored(name: str) -> bool:
    """Return whether one part of a path is a system's or hidden."""
    return name.startswith(".") or name.lower() in IGNORED


def is_visible(path: str) -> bool:
    """Return whether no part of a path is ignored; a leading `./` is none."""
    return not any(is_ignored(part) for part in path.split("/") if part not in ("", "."))


@dataclass
class Passed:
    """What was skipped in one source.

    Attributes:
        ignored: names of hidden and system files and folders -> how many.
        unread: suffixes of files that are no images -> how many.
        odd: kinds of entries that are no files (pipes, devices, broken links) -> how many.
        others: further sentences' beginnings -> how many, such as "images outside class folders".
        folders: folders with files that are not read -> their suffixes.
    """

    ignored: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    odd: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    folders: dict[str, set[str]] = field(default_factory=dict)

    def ignore(self, name: str) -> None:
        """Count a hidden or system file or folder; our own index is not counted."""
        if name == OUR_INDEX:
            return
        self.ignored["._*" if name.startswith("._") else name] += 1

    def not_read(self, name: str) -> None:
        """Count a file that is no image, by its path within the source."""
        path = PurePosixPath(name)
        suffix = path.suffix.lower() or "no suffix"
        self.unread[suffix] += 1
        self.hold(path.parent.as_posix(), suffix)

    def hold(self, folder: str, suffix: str = "") -> None:
        """Remember a folder, by its path within the source, that may hold nothing that is read."""
        if folder in self.folders or len(self.folders) < _MOST_FOLDERS:
            self.folders.setdefault(folder, set()).update({suffix} - {""})

    def __bool__(self) -> bool:
        return bool(self.ignored or self.unread or self.odd or self.others)

    def line(self) -> str:
        """Return all of it in one line; "" if there is nothing."""
        parts = []
        if self.unread:
            parts.append(_counted(self.unread, "file that is no image", "files that are no images"))
        if self.ignored:
            parts.append(
                _counted(self.ignored, "hidden or system file or folder", "hidden or system files and folders")
            )
        if self.odd:
            parts.append(_counted(self.odd, "entry that is no file", "entries that are no files"))
        parts += [f"{count} {what}" for what, count in sorted(self.others.items())]
        return ", ".join(parts)


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image that is read."""
    dot = name.rfind(".")
    return dot > name.rfind("/") and name[dot:].lower() in IMAGE_SUFFIXES


def _counted(counts: Counter[str], one: str, more: str) -> str:
    return f"{counted(counts.total(), one, more)} ({_listed(counts)})"


def _listed(counts: Counter[str]) -> str:
    named = ", ".join(
        f"{count} {name!r}" if "\r" in name else f"{count} {name}" for name, count in counts.most_common(_NAMED)
    )
    return named + (f" and {len(counts) - _NAMED} kinds more" if len(counts) > _NAMED else "")
