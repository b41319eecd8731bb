"""external WebDataset shards: indexed when they are first seen, then read like packed ones.

    train-0000.tar  train-0001.tar  ...   as they are; never written to
    classes.txt                           names of the classes, if one lies there (or classes.json)
    .setformer-index/                     next to the shards; in the user's cache folder where that cannot be written
      .lock                               held by the process that makes an index; others wait
      6c0e…/index.json, index.safetensors   one index; the digits are of the shards' names, sizes and times, and
                                            those of the class file
      6c0e…-crc/                            one with checksums

An index is written under a temporary name and renamed, so half of one is never seen. A changed shard changes the digits
in the name: the old index is not found, a new one is made, and a log line says so. The same happens where an index is
damaged. Where checksums were kept they are computed again too, and a shard with other contents below the same headers
is refused: a copy changes times, rewriting a shard changes headers, and only damage changes contents alone. The
fingerprint covers headers, positions, labels and classes but no times, so a run may continue with a copy of the
shards.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import string
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import braceexpand

from dataloaders.helpers import begin_helper, helper_context, lean_start
from dataloaders.sources.index import INDEX_NAME, Index, read_index, read_table, write_index
from dataloaders.sources.passed import Passed
from dataloaders.sources.scanning import (
    CLASS_FILES,
    Scanned,
    class_names,
    identity_by,
    identity_of,
    joined,
    labelled,
    left_out_of,
    scan_shard,
    shared_keys,
    without_odd,
)
from dataloaders.sources.shards import ShardDataset
from dataloaders.storage.base import DeniedError, FileFacts, LocalFolder, MissingError, Storage, all_facts
from dataloaders.storage.cache import locked
from dataloaders.storage.homes import INDEX_FOLDER, own_folder, trusted, user_cache
from dataloaders.storage.remote import is_url, join_url, open_storage
from setformer_dist.core.errors import DataError

_log = logging.getLogger(__name__)

# Names of our indexes, and of those in the making.
_OURS = re.compile(r"[0-9a-f]{32}(-skip)?(-crc)?|\.[0-9a-f]{32}(-skip)?(-crc)?\.partial")

# Shards that a pattern may name, and the ranges by which it names them.
_MOST_SHARDS = 1 << 20
_NUMBERS = re.compile(r"-?(\d+)\.\.-?(\d+)(?:\.\.-?\d+)?")
_MOST_DIGITS = 18
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")

# Entries of a folder that a message lists.
_NAMED = 8

# What was left out of shards, of which an index lists so many.
_LEFT_OUT = 100_000

# Images without a readable header that an index lists.
_LISTED = 100


@dataclass(frozen=True)
class Shards:
    """Shards that a pattern named.

    Attributes:
        storage: where they are.
        names: below it, in order.
        facts: size and version of each.
        pattern: that named them within it.
        skip_bad: leave out what in them is no whole sample.
        labels: whether samples must have labels.
    """

    storage: Storage
    names: tuple[str, ...]
    facts: tuple[FileFacts, ...]
    pattern: str
    skip_bad: bool = False
    labels: bool = True

    @property
    def label(self) -> str:
        """Name of their index: the signature, and whether odd members were left out."""
        return self.signature + ("-skip" if self.skip_bad else "")

    @cached_property
    def signature(self) -> str:
        """Digest of names, sizes and versions, the class file's too; raises `UnreadableError`."""
        rows = [(name, facts.size, facts.version) for name, facts in zip(self.names, self.facts, strict=True)]
        for name in CLASS_FILES:
            with suppress(MissingError, DeniedError):
                facts = self.storage.facts((PurePosixPath(self.names[0]).parent / name).as_posix())
                rows.append((name, facts.size, facts.version))
                break
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def find_shards(root: str, pattern: str, timeout: float, skip_bad: bool = False) -> Shards:
    """Find the shards that a pattern names.

    Args:
        root: folder or URL.
        pattern: below the root, or absolute: a folder of .tar files, or names with {0000..0146}, {a,b}, * and ?;
            several are joined by `::`, as WebDataset does.
        timeout: seconds that a read from a URL may take.
        skip_bad: as `Shards.skip_bad`.

    Raises:
        DataError: none is there, or one of those named is missing.
    """
    pieces = [_literal(root, piece) for piece in pattern.split("::")]
    if not is_url(root) and any(piece.startswith("/") for piece in pieces):
        pieces = [str(Path(root, piece).absolute()).lstrip("/") for piece in pieces]
        root = "/"
    storage = open_storage(root, timeout)
    pieces = [_piece(storage, piece) for piece in pieces]
    names = [name for piece in pieces for expanded in _expanded(piece) for name in _named(storage, expanded)]
    double = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if double:
        raise DataError(f"pattern {pattern!r} names shard {storage.shown(double[0])} twice")
    try:
        facts = tuple(all_facts(storage, names))
    except MissingError as error:
        raise DataError(f"{error}; it is one of {len(names)} shards that {pattern!r} names") from None
    parents = {PurePosixPath(name).parent.as_posix() for name in names}
    if parents != {"."} and len(parents) == 1:
        # Named from the folder they lie in, however it was reached: index and fingerprint are the same then.
        folder = parents.pop()
        storage = open_storage(join_url(root, folder) if is_url(root) else str(Path(root) / folder), timeout)
        names = [PurePosixPath(name).name for name in names]
        pieces = [piece.rpartition("/")[2] for piece in pieces]
    return Shards(storage, tuple(names), facts, "::".join(pieces), skip_bad)


def _piece(storage: Storage, piece: str) -> str:
    """Return one part of a pattern, with a folder as the shards in it."""
    if isinstance(storage, LocalFolder) and os.path.isdir(storage.shown(piece)):  # noqa: PTH112 - false also for a name too long
        return str(PurePosixPath(piece, "*.tar"))
    return PurePosixPath(piece).as_posix()


def _literal(root: str, piece: str) -> str:
    """Return a piece with the marks of patterns escaped, where a file or folder is there under just this name."""
    if is_url(root) or not re.search(r"[*?\[{]", piece) or not os.path.exists(Path(root, piece)):  # noqa: PTH110 - as above
        return piece
    return piece if Path(root, piece).is_dir() else glob.escape(piece).replace("{", r"\{").replace("}", r"\}")


def _expanded(pattern: str) -> list[str]:
    """Return the names that braces stand for.

    Raises:
        DataError: they do not match, or stand for more names than a data set has shards.
    """
    many = DataError(f"shard pattern {pattern!r} stands for more than {_MOST_SHARDS:,} shards: check its ranges")
    try:
        if _count(pattern) > _MOST_SHARDS:
            raise many
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"shard pattern {pattern!r} has braces that do not match ({error})") from None
    except RecursionError:
        raise DataError(f"shard pattern {pattern!r} has braces within braces too deep to read") from None


def _count(pattern: str) -> int:
    """Return how many names the braces of a pattern stand for, at most, without making one of them."""
    total, depth, start, parts = 1, 0, 0, 0
    for mark in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        depth -= mark[0] == "}"
        if mark[0] == "{" and depth == 0:
            start, parts = mark.end(), 0
        elif mark[0] == "," and depth == 1:
            parts += _count(pattern[start : mark.start()])
            start = mark.end()
        elif mark[0] == "}" and depth == 0:
            total *= parts + _count_last(pattern[start : mark.start()], parts > 0)
        depth += mark[0] == "{"
    return total


def _count_last(text: str, in_list: bool) -> int:
    """Return how many names the last part of a list stands for, or what stands alone in its braces."""
    if not in_list and _LETTERS.fullmatch(text):
        return 2 * len(string.ascii_lowercase)
    numbers = None if in_list else _NUMBERS.fullmatch(text)
    if numbers is None:
        return _count(text)
    if max(map(len, numbers.groups())) > _MOST_DIGITS:
        return _MOST_SHARDS + 1
    first, last = map(int, text.split("..")[:2])
    step = abs(int(text.split("..")[2])) if text.count("..") == 2 else 1
    return abs(last - first) // max(step, 1) + 1


def _named(storage: Storage, name: str) -> list[str]:
    """Return the shards that one name means: itself, or what it matches."""
    if not re.search(r"[*?[]", name):
        return [name]
    found = [match for match in storage.names(name) if match.endswith(".tar") or not name.endswith("*")]
    if not found:
        raise DataError(f"no shard matches {storage.shown(name)}: {_what_is_there(storage, name)}")
    return found


def _what_is_there(storage: Storage, name: str) -> str:
    folder = name.rpartition("/")[0]
    if isinstance(storage, LocalFolder) and not Path(storage.shown(folder)).is_dir():
        return f"folder {storage.shown(folder)} does not exist"
    there = storage.names(f"{folder}/*".lstrip("/"))
    more = f" and {len(there) - _NAMED} more" if len(there) > _NAMED else ""
    listed = ", ".join(PurePosixPath(entry).name for entry in there[:_NAMED])
    return f"the folder holds {listed}{more}" if there else "the folder is empty"


def open_foreign(shards: Shards, cache: Path, timeout: float) -> ShardDataset:
    """Open shards by their index, which is made where there is none.

    Args:
        shards: as `find_shards` found them.
        cache: folder for the index where it cannot be next to the shards.
        timeout: seconds to wait for another process that makes it, without a sign of life.

    Raises:
        DataError: the shards are damaged, or cannot be parsed into labelled images.
    """
    found = _existing(shards, cache)
    if found is None:
        workers = min(8, os.cpu_count() or 1, len(shards.names) // 8)
        index_foreign(shards, cache, timeout, workers=workers)
        found = _made(shards, cache)
    _tell(shards, found)
    return ShardDataset(shards.storage, found)


def _made(shards: Shards, cache: Path) -> Index:
    found = _existing(shards, cache)
    if found is None:
        raise DataError(f"the shards in {shards.storage.name} change while they are indexed: start again later")
    return found


def _tell(shards: Shards, index: Index) -> None:
    """Say in one line what of the shards is not read; the index lists what was left out."""
    left_out = left_out_of(index)
    parts = [str(said)] if (said := index.options.get("passed")) else []
    if left_out:
        parts.append(f"{len(left_out)} odd members and samples, the first {left_out[0][0]} ({left_out[0][1]})")
    if parts:
        _log.warning("%s: skipped %s", shards.storage.name, ", ".join(parts))


def index_shards(
    root: str,
    pattern: str,
    *,
    cache: Path,
    checksums: bool = False,
    workers: int = 0,
    timeout: float = 60.0,
    on_start: Callable[[int], None] = lambda shards: None,
    on_progress: Callable[[int], None] = lambda shards: None,
) -> Index:
    """Index shards, even where an index without checksums is there and `checksums` are asked for.

    Args:
        root: folder or URL.
        pattern: as `find_shards`.
        cache: folder for the index where it cannot be next to the shards.
        checksums: read every byte, and keep a crc32 of each sample and the sha256 of each shard.
        workers: processes; 0 does it in this one.
        timeout: seconds to wait for a URL, or for another process without a sign of life.
        on_start: called with the number of shards, once.
        on_progress: called with the shards done since the last call.

    Raises:
        DataError: as `find_shards` and `open_foreign`.
    """
    shards = find_shards(root, pattern, timeout)
    found = _existing(shards, cache)
    if found is None or (checksums and "crc32" not in found.columns):
        on_start(len(shards.names))
        index_foreign(shards, cache, timeout, checksums=checksums, workers=workers, on_progress=on_progress)
        found = _made(shards, cache)
    return found


def index_foreign(
    shards: Shards,
    cache: Path,
    timeout: float,
    *,
    checksums: bool = False,
    workers: int = 0,
    on_progress: Callable[[int], None] = lambda shards: None,
) -> None:
    """Make the index of shards, unless another process has made it meanwhile.

    It has checksums if they are asked for, if all bytes pass by anyway, or if an older one of these shards has them.

    Raises:
        DataError: as `open_foreign`, or a shard differs from the checksums of the older one.
    """
    home = own_folder(_homes(shards, cache), shards.storage.name)
    label = shards.label
    lock = home / ".lock"
    with locked(lock, timeout, lambda: lock.stat().st_mtime_ns) as got:
        if not got:
            raise DataError(
                f"the index of {shards.storage.name} is being made by another process, which has shown no progress for "
                f"{timeout:g} s: end that process, or raise data.read_timeout"
            )
        kept = _kept_checksums(shards, cache)
        had = bool(kept) or (home / f"{label}-crc").exists()
        whole = checksums or had or not isinstance(shards.storage, LocalFolder)  # which reads from end to end
        target = home / (label + ("-crc" if whole else ""))
        if _sound(target, shards) is not None:
            return
        if (target / INDEX_NAME).exists():
            _log.warning("the index of %s is damaged and is made again: %s", shards.storage.name, target)
        old = _of_same_pattern(home, shards.pattern)
        if any(not path.name.startswith(shards.signature) for path in old):
            how = ", with checksums, so that all is read" if whole else ""
            _log.warning("the index of %s is older than its shards and is made again%s", shards.storage.name, how)
        with _explained(home):
            _build(shards, target, whole, kept, workers, lambda: os.utime(lock), on_progress, timeout)
            for path in old:
                if path.name.startswith(shards.signature):
                    continue  # another process may be about to open it
                shutil.rmtree(path, ignore_errors=True)


def _homes(shards: Shards, cache: Path) -> list[Path]:
    """Return the folders that the index may be written to, best first."""
    aside = _aside(shards, cache)
    if not isinstance(shards.storage, LocalFolder):
        return [aside]
    return [shards.storage.folder.absolute() / PurePosixPath(shards.names[0]).parent / INDEX_FOLDER, aside]


def _aside(shards: Shards, cache: Path) -> Path:
    root = shards.storage.folder.absolute() if isinstance(shards.storage, LocalFolder) else shards.storage.name
    where = f"{root}\n{shards.pattern}"
    return cache / "indexes" / hashlib.sha256(where.encode()).hexdigest()[:16]


def _existing(shards: Shards, cache: Path) -> Index | None:
    """Return the index of just these shards, one with checksums first; `setformer data index` may have made it."""
    homes = [home for home in (*_homes(shards, cache), _aside(shards, user_cache())) if trusted(home)]
    for suffix in ("-crc", ""):
        for home in homes:
            found = _sound(home / (shards.label + suffix), shards)
            if found is not None:
                return found
    return None


def _sound(folder: Path, shards: Shards) -> Index | None:
    """Return the index in a folder; None where there is none, or one that is damaged or of other shards.

    It is believed as far as it can be held against the shards: their names and sizes, and, unless it is checked chunk
    by chunk, the fingerprint of all that it says.
    """
    if not (folder / INDEX_NAME).exists():
        return None
    with suppress(DataError, KeyError, TypeError, ValueError):
        index = read_index(folder, named=frozenset(shards.names))
        sizes = dict(zip(shards.names, (facts.size for facts in shards.facts), strict=True))
        if any(sizes[shard.name] not in (shard.size, -1) for shard in index.shards):
            return None
        if "crc32" not in index.columns and "passed" not in index.options:
            return None  # of a version that did not count what it skipped
        said = [
            [shard.name, shard.size, headers]
            for shard, headers in zip(index.shards, index.options["headers"], strict=True)
        ]
        if index.chunks or identity_by(said, index.columns, index.classes) == index.fingerprint:
            return index
    return None


@dataclass(frozen=True)
class _Kept:
    """What an index with checksums says of a shard: sha256 of its headers and of all of it, and where that is said."""

    headers: str
    sha256: str
    folder: Path


def _kept_checksums(shards: Shards, cache: Path) -> dict[str, _Kept]:
    """Return what indexes of the same pattern, older or damaged, say of shards that they knew whole."""
    kept: dict[str, _Kept] = {}
    for home in filter(trusted, (*_homes(shards, cache), _aside(shards, user_cache()))):
        for folder in sorted(home.glob("[!.]*-crc")):
            with suppress(DataError, KeyError, TypeError, ValueError):
                table = read_table(folder)
                if table["options"]["pattern"] == shards.pattern:
                    for shard, headers in zip(table["shards"], table["options"]["headers"], strict=True):
                        kept[shard["name"]] = _Kept(headers, shard["sha256"], folder)
    return kept


def _check_kept(scan: Scanned, kept: _Kept | None, root: str) -> None:
    """Refuse a shard whose contents changed while its headers did not."""
    if kept is not None and kept.headers == scan.headers and kept.sha256 != scan.facts.sha256:
        raise DataError(
            f"shard {scan.facts.name} in {root} has the headers but not the sha256 that the index {kept.folder} says, "
            "so samples in it are damaged: restore it, or remove that index if they were changed on purpose"
        )


def _of_same_pattern(home: Path, pattern: str) -> list[Path]:
    """Return the indexes of a pattern in a folder; what killed processes left, and damaged ones, are removed.

    Nothing is touched that does not have the name of an index, and no link is followed.
    """
    found = []
    for path in home.iterdir():
        if not _OURS.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        if path.name.startswith("."):  # of a process that was killed
            shutil.rmtree(path, ignore_errors=True)
            continue
        try:
            if read_table(path)["options"].get("pattern") == pattern:
                found.append(path)
        except DataError:
            shutil.rmtree(path, ignore_errors=True)
    return found


@contextmanager
def _explained(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the index cannot be written to {home} ({error.strerror}): free the disk, or set data.cache"
        ) from None
    except BrokenProcessPool:
        raise DataError(
            "a process that reads headers died, perhaps because memory ran out: use fewer --workers"
        ) from None


def _build(
    shards: Shards,
    target: Path,
    whole: bool,
    kept: dict[str, _Kept],
    workers: int,
    alive: Callable[[], None],
    on_progress: Callable[[int], None],
    timeout: float,
) -> None:
    """Scan all shards; write the index aside and rename it."""
    found: dict[int, Scanned] = {}
    for number, scanned in _scanned(shards, whole, workers, alive):
        _check_kept(scanned, kept.get(scanned.facts.name), shards.storage.name)
        found[number] = scanned
        alive()
        on_progress(1)
    scans = [found[number] for number in range(len(found))]
    versions = {name: facts.version for name, facts in zip(shards.names, shards.facts, strict=True)}
    if shards.skip_bad:
        scans = without_odd(scans)
    columns, keys = joined(scans, whole)
    double = shared_keys([one.facts.name for one in scans], columns["shard"], keys)
    if double:
        _log.warning(
            "%d samples in %s have keys that another shard has too, the first %s: if they are the same, they count "
            "several times",
            double[0],
            shards.storage.name,
            double[1],
        )
    alive()
    annotated = any(name.startswith(("mask", "boxes")) for name in columns)
    columns["label"], classes = labelled(
        scans, class_names(shards.storage, shards.names[0], timeout), annotated, shards.storage.name, shards.labels
    )
    unreadable = [f"{one.facts.name}: {key}" for one in scans for key in one.unreadable]
    if unreadable:
        _log.warning(
            "%d images in %s have no readable header, the first %s", len(unreadable), shards.storage.name, unreadable[0]
        )
    options = {
        "pattern": shards.pattern,
        "headers": [one.headers for one in scans],
        "versions": [versions[one.facts.name] for one in scans],
        "unreadable": unreadable[:_LISTED],
        "passed": _together(scans).line(),
        "left_out": [[name, why] for one in scans for name, why in one.left_out][:_LEFT_OUT],
    }
    work = target.with_name(f".{target.name}.partial")
    work.mkdir()
    facts = tuple(one.facts for one in scans)
    write_index(work, classes, facts, columns, keys, options, identity_of(scans, columns, classes))
    if target.exists():  # it is damaged
        shutil.rmtree(target)
    work.rename(target)


def _together(scans: list[Scanned]) -> Passed:
    """Return what is skipped in all shards together."""
    passed = Passed()
    for one in scans:
        for name in ("ignored", "unread", "odd", "others"):
            getattr(passed, name).update(getattr(one.passed, name))
    return passed


def _scanned(shards: Shards, whole: bool, workers: int, alive: Callable[[], None]) -> Iterator[tuple[int, Scanned]]:
    """Yield (number, what is in it) of each shard, as they are done."""
    jobs = list(zip(shards.names, shards.facts, strict=True))
    if not workers:
        for number, (name, facts) in enumerate(jobs):
            yield number, scan_shard(shards.storage, name, facts, whole, lambda members: alive(), shards.skip_bad)
        return
    others = set(multiprocessing.active_children())
    with lean_start():
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=helper_context(), initializer=begin_helper, initargs=(os.getpid(),)
        )
        futures = {
            pool.submit(scan_shard, shards.storage, name, facts, whole, skip_bad=shards.skip_bad): number
            for number, (name, facts) in enumerate(jobs)
        }
    helpers = set(multiprocessing.active_children()) - others
    try:
        left = set(futures)
        while left:
            done, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            alive()  # a shard may take long; a process that stands still is ended by the storage's time-outs
            for future in done:
                yield futures[future], future.result()
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
