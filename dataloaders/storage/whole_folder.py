"""A folder that appears whole or not at all: work happens next to it, and a rename gives it its name.

    .train.partial/     locked while a process works in it; what a killed process left there is thrown away, save what
                        its packer can continue
    .train.replaced/    what had the name before, while it is replaced; a kill between two renames leaves it there, and
                        the next work puts it back
    train/              the folder above, renamed

What is in the folder is its packer's; so is the index, whose presence says that the folder is whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from setformer_dist.core.errors import DataError


def check_destination(destination: Path, force: bool, is_ours: Callable[[str], bool]) -> None:
    """Refuse a destination that holds anything, unless it is to be replaced and all in it is ours.

    Args:
        destination: folder that is to appear.
        force: replace what is there.
        is_ours: whether a file of this name can have been written by us.

    Raises:
        DataError: the destination is in use.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise DataError(f"destination {destination} is a file: name a folder")
    names = [entry.name for entry in destination.iterdir()]
    if not names:
        return
    if not force:
        raise DataError(f"destination {destination} is not empty: name another folder, or replace it with --force")
    foreign = sorted(name for name in names if not is_ours(name))
    if foreign:
        raise DataError(
            f"destination {destination} holds {foreign[0]!r}, which no packing wrote: --force replaces packed "
            "splits only"
        )


def work_name(destination: Path) -> Path:
    """Return the folder in which work for a destination continues."""
    return destination.with_name(f".{destination.name}.partial")


@contextmanager
def work_folder(destination: Path, keep: Callable[[Path, str], bool] = lambda work, name: False) -> Iterator[Path]:
    """Yield a folder next to the destination, locked; it is gone afterwards, renamed or removed.

    Args:
        destination: folder that is to appear.
        keep: whether a file of this name is of use to the next work for the same destination: such files are left
            where they are, by those who were killed and by those who failed.

    Raises:
        DataError: it cannot be written, or another process is at work there.
    """
    work = work_name(destination)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"destination {destination} cannot be written: {error}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process is packing into {destination}: wait for it") from None
        _settle_old(destination)
        _clear(work, keep)
        try:
            yield work
        finally:
            if work.exists():
                _clear(work, keep)
                if not any(work.iterdir()):
                    work.rmdir()
    finally:
        os.close(lock)


def _clear(work: Path, keep: Callable[[Path, str], bool]) -> None:
    useless = [entry for entry in work.iterdir() if not keep(work, entry.name)]
    for entry in useless:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def commit_folder(work: Path, destination: Path) -> None:
    """Give the whole folder its name; an old one of that name is set aside first, and removed at the very end."""
    commit_folders((work, destination))


def commit_folders(*pairs: tuple[Path, Path]) -> None:
    """Give whole folders, (work, destination) each, their names: all of them or, where one cannot have it, none.

    All old ones are set aside before, so that a kill never leaves a new folder next to an old one.
    """
    for work, _ in pairs:
        _sync_folder(work)
    moves = [(destination, _old_name(destination)) for _, destination in pairs if destination.exists()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in (*moves, *pairs):
            source.rename(target)
            done.append((source, target))
    except OSError:
        for source, target in reversed(done):
            target.rename(source)
        raise
    for _, destination in pairs:
        _sync_folder(destination.parent)
        _remove(_old_name(destination))


def _old_name(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.replaced")


def _settle_old(destination: Path) -> None:
    """Put back, or remove, what a commit that was killed had set aside."""
    old = _old_name(destination)
    if destination.exists():
        _remove(old)
    elif old.exists():
        old.rename(destination)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
