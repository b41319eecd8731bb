"""A run whose own folder lacks a checkpoint takes a copy from the object store.

All ranks fetch it, as a save is made: each rank its share of the files, verified while they are written, into a folder
that gets the name of a checkpoint last. So at every instant there is no checkpoint, or a whole one; what comes after is
as with any other.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints import layout
from checkpoints.copies import Copy, fetch_files, list_copies
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError
from checkpoints.manifest import Manifest
from checkpoints.objects import Objects
from checkpoints.rankfile import write_bytes
from checkpoints.together import Together
from setformer_dist.core.errors import CheckpointError

log = logging.getLogger(__name__)


def fetched(
    objects: Objects, root: Path, together: Together, disk: Disk, wanted: Callable[[Copy], bool]
) -> Iterator[Path]:
    """Fetch copies, newest first, and yield the folder of each, on every rank the same. Collective.

    A copy that does not verify is warned of and passed over.

    Args:
        objects: the run's folder in the store.
        root: the `checkpoints` folder.
        together: the ranks.
        disk: the disk.
        wanted: which copies; one whose manifest cannot be read is not asked about.

    Raises:
        StorageError: on every rank, if the store does not answer one of them.
        CheckpointError: likewise, if it refuses, or the disk does not take a file.
    """

    def listed() -> list[tuple[str, dict[str, object]]]:
        copies = [copy for copy in list_copies(objects) if not copy.begun]
        for copy in copies:
            if copy.manifest is None:
                log.warning("copy %s cannot be used: %s", objects.below(copy.name), copy.fault)
        return [(copy.name, copy.manifest.to_json()) for copy in copies if copy.manifest and wanted(copy)]

    for name, value in together.on_main("look for a copy of", listed):
        folder = _fetched(objects, root, together, disk, name, Manifest.from_json(value, objects.below(name)))
        if folder is not None:
            yield folder


def _fetched(
    objects: Objects, root: Path, together: Together, disk: Disk, name: str, manifest: Manifest
) -> Path | None:
    """Fetch one copy; return its folder, None where it does not verify."""
    ranks = together.comm.ranks
    final = layout.step_folder(root, manifest.step)
    attempt = together.on_main("prepare", lambda: _prepared(root, disk, manifest.step))
    folder = layout.temporary_folder(root, manifest.step, attempt)

    def share() -> str | None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not seen, which rank 0 has made: put the run folder on shared storage")
        try:
            fetch_files(objects, name, manifest.files[ranks.rank :: ranks.world_size], folder, disk)
        except DamagedError as error:
            return str(error)
        return None

    def complete() -> None:
        write_bytes(disk, folder / layout.MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())
        disk.sync_folder(folder)
        disk.rename(folder, final)
        disk.sync_folder(root)
        log.warning("checkpoint %s is fetched from %s", final, objects.below(name))

    try:
        faults = [fault for fault in together.everywhere("fetch a copy of", share) if fault]
        if not faults:
            together.on_main("fetch a copy of", complete)
            return final
    except CheckpointError:
        _drop(folder, disk, ranks.is_main)
        raise
    _drop(folder, disk, ranks.is_main)
    if ranks.is_main:
        log.warning("copy %s does not verify and is passed over: %s", objects.below(name), "; ".join(faults))
    return None


def _prepared(root: Path, disk: Disk, step: int) -> str:
    attempt = secrets.token_hex(4)
    disk.make_folder(layout.temporary_folder(root, step, attempt))
    return attempt


def _drop(folder: Path, disk: Disk, is_main: bool) -> None:
    with contextlib.suppress(OSError):
        if is_main:
            disk.remove_tree(folder)
