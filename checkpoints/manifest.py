"""The manifest: what a checkpoint consists of, with sizes and hashes, protected by a hash of its own.

A folder is a checkpoint if and only if its manifest can be read and every file in it is as the manifest says.
Everything here reads JSON and bytes; nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from checkpoints import layout
from checkpoints.identity import Identity, digest_json
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import CheckpointError

FORMAT = "setformer_dist checkpoint"
VERSION = 1


class FileRecord(FrozenConfig):
    """One file of a checkpoint: its name within the folder, bytes, and sha256 in hexadecimal."""

    name: str
    size: int
    sha256: str


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

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able value with the hash over all the rest."""
        body: dict[str, Any] = {
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
    def from_json(cls, value: Any, source: str) -> Manifest:
        """Check and read what `to_json` made.

        Raises:
            CheckpointError: it is not a manifest, is damaged, or of a later version.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CheckpointError(f"{source} is not a manifest of {FORMAT}")
        if value.get("version") != VERSION:
            raise CheckpointError(
                f"{source} has format version {value.get('version')!r}, this program reads {VERSION}: "
                "use the setformer_dist that wrote it"
            )
        body = {key: part for key, part in value.items() if key != "sha256"}
        if digest_json(body) != value.get("sha256"):
            raise CheckpointError(f"{source} does not match its own hash")
        try:
            return cls(
                step=int(body["step"]),
                created=str(body["created"]),
                identity=Identity.model_validate(body["identity"]),
                files=tuple(FileRecord.model_validate(record) for record in body["files"]),
                metrics={k: math.nan if v is None else float(v) for k, v in body["metrics"].items()},
                tags=tuple(body["tags"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, pydantic.ValidationError) as error:
            raise CheckpointError(f"{source} has an unexpected content: {error}") from None


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint folder's manifest.

    Raises:
        CheckpointError: there is none, or it cannot be trusted.
    """
    path = folder / layout.MANIFEST
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {layout.MANIFEST}: it was never finished or is being deleted") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    manifest = Manifest.from_json(value, str(path))
    if layout.step_of(folder) not in (None, manifest.step):
        raise CheckpointError(f"{path} is of step {manifest.step}: the folder was renamed by hand")
    return manifest


def size_faults(folder: Path, manifest: Manifest) -> list[str]:
    """Return one line for each file that is missing, outside the folder, or of another size. Cheap."""
    faults = []
    names = [record.name for record in manifest.files]
    expected = [layout.rank_file(r, manifest.identity.world_size) for r in range(manifest.identity.world_size)]
    if sorted(names) != sorted([*expected, layout.TRAINER]):
        faults.append(f"the manifest lists {len(names)} files, not those of {len(expected)} ranks")
    for record in manifest.files:
        path = folder / record.name
        if Path(record.name).name != record.name:
            faults.append(f"{record.name!r} is not a plain file name")
        elif not path.is_file():
            faults.append(f"{record.name} is missing")
        elif (size := path.stat().st_size) != record.size:
            faults.append(f"{record.name} has {size} bytes, not {record.size}")
    return faults


def hash_faults(folder: Path, records: tuple[FileRecord, ...]) -> list[str]:
    """Return one line for each file whose bytes are not those that were written. Reads them all."""
    faults = []
    for record in records:
        try:
            with (folder / record.name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            faults.append(f"{record.name} cannot be read: {error}")
            continue
        if found != record.sha256:
            faults.append(f"{record.name} is damaged (its sha256 differs)")
    return faults
