"""Local files, opened and read so that none can stall a process or take its memory.

    regular files alone    pipes, sockets and devices are opened without waiting, looked at, and refused
    size first             a file is held against a limit before room is made for it
    folders by inode       a link to a folder that it lies in is an error, and so is a web of links
    JSON by its parts      brackets and commas are counted before anything is built of them

All errors of files are `OSError`s whose `strerror` is a sentence, so the caller that names the file adds it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setformer_dist.core.errors import DataError

# Bytes of one stored image, mask or table of boxes: an uncompressed one of as many pixels as are decoded fits.
LARGEST_SAMPLE = 1 << 29

# Values (brackets and commas) of a JSON file that is parsed before its digest is known: some 0.3 GB when built.
MOST_VALUES = 4_000_000

# Bytes of such a file: an index of 100 million samples has 10 MB.
LARGEST_TABLE = 1 << 28

# Ways by which links may lead to one folder.
_MOST_WAYS = 100

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class OddFileError(OSError):
    """A file that is not read for what it is: no regular one, or too large."""


def check_regular(facts: os.stat_result, path: object) -> None:
    """Refuse what is no regular file.

    Raises:
        OddFileError: saying what it is.
    """
    if not stat.S_ISREG(facts.st_mode):
        kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "something else")
        code = errno.EISDIR if kind == "a folder" else errno.EINVAL
        raise OddFileError(code, f"it is no regular file but {kind}", str(path))


def check_size(size: int, limit: int, path: object) -> None:
    """Refuse a file that is larger than anything of its kind.

    Raises:
        OddFileError: it is.
    """
    if size > limit:
        raise OddFileError(errno.EFBIG, f"it has {size} bytes, more than the {limit} that are read", str(path))


def open_regular(path: str | Path, *, follow: bool = True) -> int:
    """Open a regular file for reading and return its descriptor; never waits for a writer of a pipe.

    Args:
        path: of the file.
        follow: whether the last part of the path may be a link.

    Raises:
        OSError: it cannot be opened.
        OddFileError: it is no regular file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    file = os.open(path, flags)
    try:
        check_regular(os.fstat(file), path)
    except BaseException:
        os.close(file)
        raise
    return file


def read_whole(path: str | Path, limit: int, *, follow: bool = True) -> bytes:
    """Return a regular file's bytes, at most `limit` of them.

    Raises:
        OSError: it cannot be read.
        OddFileError: it is no regular file, or larger.
    """
    file = open_regular(path, follow=follow)
    try:
        size = os.fstat(file).st_size
        check_size(size, limit, path)
        parts, got = [], 0
        while block := os.read(file, min(max(size - got, 0) + 1, 1 << 24)):  # a byte more: it may grow meanwhile
            parts.append(block)
            got += len(block)
            check_size(got, limit, path)
        return b"".join(parts)
    finally:
        os.close(file)


def open_new(path: Path) -> int:
    """Make a new file for writing, in place of what has its name; a link is replaced and not followed."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def parse_json(data: bytes) -> Any:
    """Return what unverified JSON says.

    Raises:
        ValueError: it is not JSON, has a key twice, is nested too deep, or has more than `MOST_VALUES` values.
    """
    values = sum(data.count(sign) for sign in (b"[", b"{", b","))
    if values > MOST_VALUES:
        raise ValueError(f"it has {values} values, more than the {MOST_VALUES} that are read")
    try:
        return json.loads(data, object_pairs_hook=table_of)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def table_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a table of JSON; raises ValueError where a key is there twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        double = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"key {double[:40]!r} is there twice")
    return table


def is_plain_name(name: object) -> bool:
    """Return whether a name is that of a file in the folder itself: no slash, no `..`, nothing that ends it."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def walk(top: str) -> Iterator[tuple[str, list[os.DirEntry[str]], list[os.DirEntry[str]]]]:
    """Yield (path within `top`, folders, other entries) of each folder; links to folders are followed.

    Who iterates may remove folders from the list, as with os.walk: these are not entered.

    Raises:
        DataError: a folder cannot be read, a link leads to a folder that it lies in, or links lead to one folder in
            more than `_MOST_WAYS` ways.
    """
    ways: dict[tuple[int, int], int] = {}
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while todo:
        inside, above = todo.pop()
        path = os.path.join(top, inside) if inside else top  # noqa: PTH118  (as often as there are folders)
        try:
            facts = os.stat(path)  # noqa: PTH116
            here = (facts.st_dev, facts.st_ino)
            if here in above:
                raise DataError(f"folder {path} in the source is a link to a folder that it lies in: remove the link")
            ways[here] = ways.get(here, 0) + 1
            if ways[here] > _MOST_WAYS:
                raise DataError(
                    f"folder {path} in the source is reached by links in more than {_MOST_WAYS} ways: remove the links"
                )
            folders: list[os.DirEntry[str]] = []
            others: list[os.DirEntry[str]] = []
            with os.scandir(path) as entries:
                for entry in entries:
                    (folders if entry.is_dir() else others).append(entry)
        except OSError as error:
            raise DataError(
                f"{error.filename or path} in the source cannot be read ({error.strerror}): repair or remove it"
            ) from None
        folders.sort(key=lambda entry: entry.name)
        yield inside, folders, others
        todo += [(f"{inside}/{one.name}" if inside else one.name, (*above, here)) for one in reversed(folders)]
