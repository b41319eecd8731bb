"""Where indexes and fetched files may be, and which of those places are trusted.

An index in a cache says which label a sample has; nothing but its folder vouches for that, where it is not bound to
what was just read. So a cache folder is used only if no other user can write to it:

    <cache>/indexes, <cache>/shards    made with mode 0700; owned by this user or root, no link, not writable by others
    .setformer-index next to shards     as safe as the shards: owned by their folder's owner, this user or root, no
                                       link, and writable only by users who can write there

A folder of this user that others may write to is closed to them; one of another user is skipped with a warning.
Within such folders files are opened without following links.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from dataloaders.sources.passed import OUR_INDEX
from setformer_dist.core.errors import DataError

_log = logging.getLogger(__name__)

INDEX_FOLDER = OUR_INDEX
_INDEXES = "indexes"
_OTHERS = stat.S_IWGRP | stat.S_IWOTH

# Who vouches for a path besides this user.
_ROOT = 0


def user_cache() -> Path:
    """Return the user's cache folder for indexes, by the XDG convention; without a home one of the user's in /tmp."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "setformer"
    try:
        return Path.home() / ".cache" / "setformer"
    except RuntimeError:  # neither HOME nor an entry of this user in passwd
        return Path("/tmp") / f"setformer-{os.geteuid()}"


def why_not_private(folder: Path) -> str:
    """Return why a cache folder that exists is not to be believed; "" if it is.

    One of this user that others may write to is closed to them first.
    """
    try:
        facts = folder.lstat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and facts.st_mode & _OTHERS:
            folder.chmod(stat.S_IMODE(facts.st_mode) & ~_OTHERS)
            facts = folder.lstat()
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    return _why_not(facts, (os.geteuid(), _ROOT), 0)


def _why_not(facts: os.stat_result, owners: tuple[int, ...], writable: int) -> str:
    if not stat.S_ISDIR(facts.st_mode):
        return "is a link, or no folder"
    if facts.st_uid not in owners:
        return f"belongs to another user ({facts.st_uid})"
    return "can be written by others" if facts.st_mode & _OTHERS & ~writable else ""


def make_private(folder: Path) -> None:
    """Make a folder that is this user's alone, or refuse the one that is there.

    Raises:
        DataError: it is not to be believed.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if why := why_not_private(folder):
        raise DataError(f"cache folder {folder} {why}, so it is not trusted: set data.cache to a folder of yours")


def trusted(home: Path) -> bool:
    """Return whether an index in a folder may be believed: what `own_folder` would return, or its parent."""
    top = next((path for path in (home, *home.parents) if path.name in (_INDEXES, INDEX_FOLDER)), home)
    if not os.path.lexists(top):
        return False
    why = _why_not_beside(top) if top.name == INDEX_FOLDER else why_not_private(top)
    if why:
        _log.warning("indexes in %s are not trusted: it %s", top, why)
    return not why


def _why_not_beside(folder: Path) -> str:
    try:
        facts, around = folder.lstat(), folder.parent.stat()
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    return _why_not(facts, (os.geteuid(), _ROOT, around.st_uid), around.st_mode & _OTHERS)


def own_folder(homes: list[Path], shown: str) -> Path:
    """Return the first of several folders for indexes that can be written, made where it is missing.

    Args:
        homes: best first; each below `indexes` of a cache, or `.setformer-index` itself.
        shown: what the index is of, for messages.

    Raises:
        DataError: none can.
    """
    problem = ""
    for home in homes:
        try:
            top = next((path for path in (home, *home.parents) if path.name == _INDEXES), None)
            if top is not None:
                make_private(top)
            if not home.is_symlink():
                home.mkdir(parents=True, exist_ok=True)
            if not trusted(home):
                problem = f"{home} (which is not trusted)"
                continue
            os.close(os.open(home / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        except OSError as error:
            problem = f"{home} ({error.strerror})"
        except DataError as error:
            problem = str(error)
        else:
            return home
    raise DataError(
        f"the index of {shown} cannot be written anywhere, not even to {problem}: set data.cache to a folder of yours"
    )
