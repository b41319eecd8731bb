"""The copies that `mirror` puts into an object store: listed, read, verified, fetched."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from checkpoints import layout
from checkpoints.digest import Digest, algorithm_of
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError, MissingError, StorageError
from checkpoints.manifest import MAX_BYTES, FileRecord, Manifest
from checkpoints.objects import Objects
from checkpoints.strictjson import parse
from setformer_dist.core.errors import CheckpointError

log = logging.getLogger(__name__)

T = TypeVar("T")

_NAME = re.compile(r"(step-\d{8,15})-[0-9a-f]{8}")
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # between tries; the last repeats


def copy_name(step: int, attempt: str) -> str:
    """Return the name of the copy that an attempt makes."""
    return f"{layout.step_folder(Path(), step).name}-{attempt}"


def step_of_copy(name: str) -> int | None:
    """Return the step of a copy's name, None where it is none."""
    match = _NAME.fullmatch(name)
    return layout.step_of(Path(match[1])) if match else None


@dataclass(frozen=True)
class Copy:
    """What is in the store under the name of a copy.

    Attributes:
        name: of its folder.
        manifest: where it could be read.
        fault: why it is no copy that can be used, None where its manifest is whole; its files were not looked at.
        begun: it has no manifest: it is being made, or its maker died.
    """

    name: str
    manifest: Manifest | None
    fault: str | None = None
    begun: bool = False


def list_copies(objects: Objects) -> list[Copy]:
    """Return what is in the store, newest first; of two copies of a step that which was written later.

    Raises:
        StorageError: the store does not answer.
        CheckpointError: it refuses.
    """
    found = [copy_named(objects, name) for name in objects.names() if step_of_copy(name) is not None]
    return sorted(found, key=_age, reverse=True)


def _age(copy: Copy) -> tuple[int, str]:
    return step_of_copy(copy.name) or 0, copy.manifest.created if copy.manifest else ""


def copy_named(objects: Objects, name: str) -> Copy:
    """Return what is under the name of a copy; raises as `list_copies`."""
    try:
        return Copy(name, manifest_of(objects, name))
    except MissingError:
        return Copy(name, None, "has no manifest: it was never finished, or is being deleted", begun=True)
    except StorageError:
        raise
    except CheckpointError as error:
        return Copy(name, None, str(error))


def manifest_of(objects: Objects, name: str) -> Manifest:
    """Return the manifest of a copy.

    Raises:
        MissingError: there is none.
        DamagedError: it cannot be trusted.
        CheckpointError: it is of a later version.
        StorageError: the store does not answer.
    """
    path = f"{name}/{layout.MANIFEST}"
    manifest = Manifest.from_json(parse(objects.read(path, MAX_BYTES), objects.below(path)), objects.below(path))
    if manifest.step != step_of_copy(name):
        raise DamagedError(f"{objects.below(path)} is of step {manifest.step}")
    return manifest


def verify_copy(objects: Objects, copy: Copy, advance: Callable[[int], None] | None = None) -> list[str]:
    """Read every byte of a copy and return what is wrong, one line each.

    Raises:
        StorageError: the store does not answer.
    """
    if copy.manifest is None:
        return [copy.fault or ""]
    faults = []
    for record in copy.manifest.files:
        try:
            for data in checked(objects, copy.name, record):
                if advance is not None:
                    advance(len(data))
        except DamagedError as error:
            faults.append(str(error))
    return faults


def checked(objects: Objects, name: str, record: FileRecord) -> Iterator[bytes]:
    """Yield the bytes of a file of a copy; what ends without an error was as the manifest says.

    Raises:
        DamagedError: it is missing, or its bytes are not those that were put there.
        StorageError: the store does not answer.
    """
    digest, size = Digest(algorithm_of(record.digest) or ""), 0
    try:
        for data in objects.blocks(f"{name}/{record.name}", record.size):
            size += len(data)
            if size > record.size:
                break
            digest.update(data)
            yield data
    except MissingError:
        raise DamagedError(f"{record.name} is missing") from None
    if size != record.size:
        what = "more" if size > record.size else str(size)
        raise DamagedError(f"{record.name} has {what} bytes, not {record.size}")
    if digest.text() != record.digest:
        raise DamagedError(f"{record.name} is damaged (its {algorithm_of(record.digest)} differs)")


def fetch_files(objects: Objects, name: str, records: Iterable[FileRecord], folder: Path, disk: Disk) -> None:
    """Write files of a copy into a local folder, durable and verified.

    Raises:
        DamagedError: one is not as its manifest says.
        StorageError: the store does not answer.
        OSError: the disk does not take it.
    """
    for record in records:
        path = folder / record.name

        def work(record: FileRecord = record, path: Path = path) -> None:
            disk.remove(path)
            with disk.create(path) as file:
                for data in checked(objects, name, record):
                    disk.write(file, data)
                disk.sync(file)

        tried(work, time.monotonic() + sum(_WAITS_S))


def tried(work: Callable[[], T], until: float, still: Callable[[], bool] = lambda: True) -> T:
    """Return what some work returns, tried again where it fails for what may pass.

    Raises:
        StorageError: it did not pass in time, or is no longer wanted.
        CheckpointError: it will not pass.
    """
    waits = iter(_WAITS_S)
    wait = 0.0
    while True:
        try:
            return work()
        except StorageError as error:
            wait = next(waits, wait)
            if time.monotonic() + wait > until or not still():
                raise
            log.warning("%s: tried again in %g s", error, wait)
        time.sleep(wait)


def delete_copy(objects: Objects, name: str) -> None:
    """Delete a copy, its manifest first.

    Raises:
        StorageError: the store does not answer.
        CheckpointError: it refuses.
    """
    objects.remove(f"{name}/{layout.MANIFEST}")
    objects.remove_folder(name)
