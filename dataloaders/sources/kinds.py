"""What a folder without an index holds: shards, class folders, or something that a sentence can name.

The one place that decides it, for training, packing and looking alike.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from dataloaders.pixels.formats import suffixes_read
from dataloaders.sources.files import walk
from dataloaders.sources.index import ARRAYS_NAME
from dataloaders.sources.passed import Passed, is_ignored, is_image
from setformer_dist.core.errors import DataError

SHARD_SUFFIX = ".tar"

# Endings of tars that are no shards: compressed ones have no places to read at, and case decides elsewhere too.
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")

# Folders that are looked into for shards one level deeper.
_LOOKED_INTO = 1000

Kind = Literal["shards", "images", ""]


def kind_of(folder: Path) -> tuple[Kind, Passed]:
    """Return what a folder holds ("" for neither), and what in it is skipped where it holds shards.

    Raises:
        DataError: it holds shards that are not read, and none that are; or it cannot be read.
    """
    passed, folders, unread, shards = Passed(), [], [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_ignored(entry.name):
                    passed.ignore(entry.name)
                elif entry.is_dir():
                    folders.append(entry.path)
                elif entry.name.endswith(SHARD_SUFFIX):
                    shards += 1
                elif is_other_tar(entry.name):
                    unread.append(entry.name)
                elif is_image(entry.name):
                    passed.others["loose images"] += 1
    except OSError as error:
        raise DataError(f"data folder {folder} cannot be read ({error.strerror}): repair its permissions") from None
    if shards:
        _count_others(passed, folders, unread)
        # Shards of a packing that lost its index; they are tars like others, but it must not pass unseen.
        return ("" if (folder / ARRAYS_NAME).exists() else "shards"), passed
    if unread:
        raise DataError(
            f"data folder {folder} holds {len(unread)} shards of another suffix, the first {sorted(unread)[0]}: shards "
            "are plain tars named *.tar; unpack or rename them, or pack them with `setformer data pack`"
        )
    deeper = {path: count for path in sorted(folders)[:_LOOKED_INTO] if (count := _tars_in(path))}
    if deeper:
        first = Path(min(deeper))
        raise DataError(
            f"data folder {folder} holds {sum(deeper.values())} shards one folder deeper, the first in {first.name}: "
            "name them by a pattern such as */*.tar, or name one of the folders"
        )
    return ("images" if any(map(_has_image, folders)) else ""), passed


def is_other_tar(name: str) -> bool:
    """Return whether a name is that of a tar that is not read as a shard."""
    return not name.endswith(SHARD_SUFFIX) and name.lower().endswith((SHARD_SUFFIX, *_COMPRESSED))


def _count_others(passed: Passed, folders: list[str], unread: list[str]) -> None:
    for name in unread:
        passed.others[f"shards of another suffix (such as {sorted(unread)[0]}; *.tar is read)"] += name != ""
    deeper = sum(_tars_in(path) for path in folders[:_LOOKED_INTO])
    if deeper:
        passed.others["shards one folder deeper"] = deeper
    if folders:
        passed.others["folders next to the shards"] = len(folders)


def _tars_in(folder: str) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(
                entry.name.endswith(SHARD_SUFFIX) and not is_ignored(entry.name) and not entry.is_dir()
                for entry in entries
            )
    except OSError:
        return 0


def _has_image(folder: str) -> bool:
    """Return whether there is an image at any depth."""
    for _, folders, others in walk(folder):
        if any(is_image(entry.name) and not is_ignored(entry.name) for entry in others):
            return True
        folders[:] = [entry for entry in folders if not is_ignored(entry.name)]
    return False


def nothing_read(folder: Path) -> str:
    """Say that a folder holds nothing that is read."""
    return f"data folder {folder} holds no shards (*.tar) and no images that are read ({suffixes_read()})"
