"""The manifest: what a checkpoint consists of, with sizes and digests, protected by a hash of its own.

A folder is a checkpoint if and only if its manifest can be read and every file in it is as the manifest says.
Everything here reads JSON and bytes; nothing that is read can run code, lead out of the folder, or make the reader
allocate more than the files' own sizes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from checkpoints import layout
from checkpoints.digest import Seen, algorithm_of, file_digest, read_small
from checkpoints.errors import DamagedError, MisplacedError, MissingError, StorageError
from checkpoints.identity import Identity, digest_json
from checkpoints.strictjson import parse
from setformer_dist.core.config import FrozenConfig, readable
from setformer_dist.core.errors import CheckpointError

FORMAT = "setformer_dist checkpoint"
VERSION = 2  # 1: files carry "sha256" in place of "digest"
READABLE = (1, 2)
MAX_BYTES = 64 << 20  # of a manifest
# A manifest is read before any digest of it is known: besides its own fields it lists the files next to it, in
# some 150 bytes each.
MAX_BYTES_ALONE, MAX_BYTES_PER_FILE = 1 << 20, 512
_MAX_STEP = 10**15 - 1


class FileRecord(FrozenConfig):
    """One file of a checkpoint: its name within the folder, bytes, and digest (see digest.py)."""

    name: str
    size: int = pydantic.Field(ge=0, lt=2**62)
    digest: str


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Attributes:
        step: optimizer steps done.
        created: time of writing, ISO 8601 with zone.
        identity: what wrote it.
        files: all other files of the folder.
        metrics: latest evaluation at the time; NaN where a value was not finite.
        tags: words for people and for the retention policy.
    """

    step: int
    created: str
    identity: Identity
    files: tuple[FileRecord, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files)

    def record(self, name: str) -> FileRecord:
        """Return the record of a file that the manifest lists."""
        return next(record for record in self.files if record.name == name)

    def to_json(self) -> dict[str, object]:
        """Return a JSON-able value with the hash over all the rest."""
        body: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "created": self.created,
            "identity": self.identity.model_dump(),
            "files": [record.model_dump() for record in self.files],
            # NaN and infinity are not JSON: other tools must be able to read a manifest.
            "metrics": {k: v if math.isfinite(v) else None for k, v in self.metrics.items()},
            "tags": list(self.tags),
        }
        return body | {"sha256": digest_json(body)}

    @classmethod
    def parts_of(cls, value: Mapping[str, Any]) -> Manifest:
        """Return what another rank of this run made by `to_json`, whose files are still to come."""
        metrics = {k: math.nan if v is None else float(v) for k, v in value["metrics"].items()}
        identity = Identity.model_validate(value["identity"])
        return cls(value["step"], value["created"], identity, (), metrics, tuple(value["tags"]))

    @classmethod
    def from_json(cls, value: Any, source: str) -> Manifest:
        """Check and read what `to_json` made.

        Raises:
            DamagedError: it is not a manifest, or is damaged.
            CheckpointError: it is of a later version.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DamagedError(f"{source} is not a manifest of {FORMAT}")
        body = {key: part for key, part in value.items() if key != "sha256"}
        if digest_json(body) != value.get("sha256"):
            raise DamagedError(f"{source} does not match its own hash")
        version = value.get("version")
        if type(version) is not int or version not in READABLE:
            raise CheckpointError(
                f"{source} has format version {version!r}, this program reads {', '.join(map(str, READABLE))}: "
                "use the setformer_dist that wrote it"
            )
        try:
            manifest = cls(
                step=_whole(body["step"]),
                created=str(body["created"]),
                identity=Identity.model_validate(body["identity"]),
                files=tuple(_record(record, version) for record in body["files"]),
                metrics={str(k): math.nan if v is None else float(v) for k, v in body["metrics"].items()},
                tags=tuple(map(str, body["tags"])),
            )
        except pydantic.ValidationError as error:
            raise DamagedError(f"{source} has an unexpected content: {readable(error)}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DamagedError(f"{source} has an unexpected content: {error}") from None
        faults = _list_faults(manifest)
        if faults:
            raise DamagedError(f"{source} has an unexpected content: {'; '.join(faults)}")
        return manifest


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_STEP:
        raise ValueError("step is not a number of steps")
    return value


def _record(value: Mapping[str, object], version: int) -> FileRecord:
    if version == 1:
        value = {"name": value["name"], "size": value["size"], "digest": f"sha256:{value['sha256']}"}
    return FileRecord.model_validate(value)


def _list_faults(manifest: Manifest) -> list[str]:
    """Return what is impossible about the list of files, before anything is sized by it."""
    faults = []
    world_size = manifest.identity.world_size
    for record in manifest.files:
        if Path(record.name).name != record.name or "\0" in record.name:
            faults.append(f"{record.name!r} is not a plain file name")
        if algorithm_of(record.digest) is None:
            faults.append(f"{record.name} has a digest of no known kind: {record.digest[:40]!r}")
    names = sorted(record.name for record in manifest.files)
    if len(names) != world_size + 1 or names != sorted(
        [*(layout.rank_file(rank, world_size) for rank in range(world_size)), layout.TRAINER]
    ):
        faults.append(f"the manifest lists {len(names)} files, not those of {world_size} ranks")
    return faults


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint folder's manifest.

    Raises:
        DamagedError: there is none, or it cannot be trusted.
        StorageError: it cannot be read.
        MisplacedError: it is of another step than the folder's name says.
        CheckpointError: it is of a later version.
    """
    path = folder / layout.MANIFEST
    try:
        beside = len(os.listdir(folder)) if folder.is_dir() else 0  # noqa: PTH208
        limit = min(MAX_BYTES, MAX_BYTES_ALONE + MAX_BYTES_PER_FILE * beside)
        value = parse(read_small(path, limit), str(path))
    except MissingError:
        raise DamagedError(f"{folder} has no {layout.MANIFEST}: it was never finished or is being deleted") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    manifest = Manifest.from_json(value, str(path))
    if layout.step_of(folder) not in (None, manifest.step):
        raise MisplacedError(f"{path} is of step {manifest.step}: the folder was renamed by hand")
    return manifest


def size_faults(folder: Path, manifest: Manifest) -> list[str]:
    """Return one line for each file that is missing, no plain file, of another size, or not listed. Cheap.

    Raises:
        StorageError: the folder cannot be read, or is being deleted.
    """
    try:
        found = {entry.name: entry for entry in os.scandir(folder)}
        faults = [fault for record in manifest.files if (fault := _size_fault(found.get(record.name), record))]
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error}") from None
    listed = {layout.MANIFEST, *(record.name for record in manifest.files)}
    # .nfs…: what an NFS client calls a file that was deleted while a process reads it.
    extra = sorted(name for name in found if name not in listed and not name.startswith(".nfs"))
    return faults + [f"{name} does not belong there" for name in extra]


def _size_fault(entry: os.DirEntry[str] | None, record: FileRecord) -> str | None:
    if entry is None:
        return f"{record.name} is missing"
    if not entry.is_file(follow_symlinks=False):
        return f"{record.name} is {'a link' if entry.is_symlink() else 'not a plain file'}"
    size = entry.stat(follow_symlinks=False).st_size
    return None if size == record.size else f"{record.name} has {size} bytes, not {record.size}"


@dataclass
class Examined:
    """What reading files in full has shown.

    Attributes:
        faults: damage, one line each.
        unread: what could not be read, one line each: nothing is known of those bytes.
        missing: names of files that are not there; they are among the faults too.
        seen: what each sound file was while it was read.
    """

    faults: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seen: dict[str, Seen] = field(default_factory=dict)


def examine_files(
    folder: Path,
    manifest: Manifest,
    records: Iterable[FileRecord],
    workers: int = 1,
    advance: Callable[[int], None] | None = None,
) -> Examined:
    """Compare files with their digests, reading all their bytes.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        records: those of the manifest's files that are to be read.
        workers: files that are read at the same time.
        advance: called with the number of bytes after each piece read, from any thread.
    """

    def examine(record: FileRecord) -> tuple[str, Seen] | DamagedError | OSError:
        algorithm = algorithm_of(record.digest)
        assert algorithm is not None  # a manifest with another does not come to be
        try:
            return file_digest(folder / record.name, algorithm, record.size, advance)
        except (DamagedError, OSError) as error:
            return error

    chosen = list(records)
    if workers > 1 and len(chosen) > 1:
        with ThreadPoolExecutor(min(workers, len(chosen))) as pool:
            answers = list(pool.map(examine, chosen))
    else:
        answers = [examine(record) for record in chosen]
    examined = Examined()
    for record, answer in zip(chosen, answers, strict=True):
        if isinstance(answer, OSError):
            examined.unread.append(f"{record.name} cannot be read: {answer}")
        elif isinstance(answer, DamagedError):
            examined.faults.append(str(answer))
            if isinstance(answer, MissingError):
                examined.missing.append(record.name)
        elif answer[0] == record.digest:
            examined.seen[record.name] = answer[1]
        else:
            examined.faults.append(_difference(manifest, record, answer[0]))
    return examined


def _difference(manifest: Manifest, record: FileRecord, found: str) -> str:
    other = next((r.name for r in manifest.files if r.digest == found and r.name != record.name), None)
    what = f": it holds what belongs into {other}" if other else f" (its {algorithm_of(record.digest)} differs)"
    return f"{record.name} is damaged{what}"
