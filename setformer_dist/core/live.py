"""What the ranks of a run are doing right now, for `setformer runs top`: one small file that the supervisor rewrites.

    runs/<run>/live.json

It is written at most once a second, never synced, and replaced by the next start. The record is the ledger.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pydantic

from setformer_dist.core.files import open_plain

LIVE = "live.json"
_LARGEST = 64 << 20  # bytes; 4,096 ranks take less than one


@dataclass(frozen=True)
class LiveRank:
    """One rank at one moment.

    Attributes:
        rank: over all hosts.
        host: its host; "" for the supervisor's own.
        step: optimizer step it is at; -1 before the first.
        phase: as its heartbeat has it; "ended" when it has ended.
        silent_s: seconds since its last sign of life.
        memory_mib: resident memory of its process; None where it is unknown.
        waiting: share of the last looks at which it waited for samples.
        cores: busy on average since the last look, of its process and its readers; None where it cannot be told.
        gpu: share of time in which its GPU computed, 0 to 1; None where there is none, or it cannot be told.
    """

    rank: int
    host: str
    step: int
    phase: str
    silent_s: float
    memory_mib: float | None
    waiting: float
    cores: float | None = None
    gpu: float | None = None


@dataclass(frozen=True)
class Live:
    """All ranks at one moment.

    Attributes:
        time: Unix time.
        steps_per_s: optimizer steps per second since some looks ago; None before there are two.
        ranks: in order.
    """

    time: float
    steps_per_s: float | None
    ranks: tuple[LiveRank, ...]


_TYPE: pydantic.TypeAdapter[Live] = pydantic.TypeAdapter(Live)


def write(folder: Path, seen: Live) -> None:
    """Replace a run's file; where that is not possible, it stays as it was."""
    text = json.dumps({**vars(seen), "ranks": [vars(rank) for rank in seen.ranks]})
    part = folder / f".{LIVE}.part"
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with os.fdopen(os.open(part, flags, 0o644), "w") as file:
            file.write(text)
        part.replace(folder / LIVE)


def read(folder: Path) -> Live | None:
    """Return what the ranks did at the supervisor's last look, None where nothing can be read."""
    try:
        descriptor = open_plain(folder / LIVE, os.O_RDONLY)
        with os.fdopen(descriptor, "rb") as file:
            seen = _TYPE.validate_json(file.read(_LARGEST))
    except (OSError, ValueError):
        return None
    return seen if seen.ranks else None
