"""What rank 0 finds out about a folder that may hold a checkpoint, as JSON for the other ranks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.errors import DamagedError, StorageError
from checkpoints.reader import Checkpoint
from setformer_dist.core.errors import CheckpointError, SetformerError

_log = logging.getLogger(__name__)

Accept = Callable[[Checkpoint], object]


class UnusableError(Exception):
    """A folder is skipped.

    Attributes:
        kind: "damaged", "unread" (the storage failed), "foreign" (a later format, a link), or "refused" (sound, and a
            run cannot resume from it).
    """

    def __init__(self, fault: str, kind: str) -> None:
        super().__init__(fault)
        self.kind = kind


def judged(work: Callable[[], Any]) -> dict[str, Any]:
    """Return what rank 0 found out about a folder, as JSON; `usable` takes it on all ranks."""
    try:
        return {"value": work()}
    except CheckpointError as error:
        known = {DamagedError: "damaged", StorageError: "unread"}
        kind = next((kind for error_type, kind in known.items() if isinstance(error, error_type)), "foreign")
        return {"fault": str(error), "kind": kind}
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        _log.warning("a checkpoint's contents led to an error that its checks should have caught", exc_info=True)
        return {"fault": f"its contents are not as this program writes them: {error!r}", "kind": "damaged"}


def accepted(accept: Accept, found: Checkpoint) -> dict[str, Any]:
    """Return what `accept` says of a sound checkpoint, as JSON like `judged`; any other error refuses it too."""
    try:
        accept(found)
    except (DamagedError, StorageError) as error:
        return {"fault": str(error), "kind": "damaged" if isinstance(error, DamagedError) else "unread"}
    except SetformerError as error:
        return {"fault": str(error), "kind": "refused"}
    except Exception as error:  # noqa: BLE001 — what a crafted file leads to must not stop a resume
        _log.warning("checkpoint %s could not be checked", found.path, exc_info=True)
        return {"fault": f"{found.path} is not as a run of this program saves it: {error!r}", "kind": "refused"}
    return {"value": None}


@dataclasses.dataclass
class Search:
    """What a search has met so far.

    Attributes:
        unread: the first fault of what could not be read, or "".
        refused: folders that verify and are not accepted, with the reasons.
    """

    unread: str = ""
    refused: list[tuple[Path, str]] = dataclasses.field(default_factory=list)


def usable(told: dict[str, Any]) -> Any:
    """Return what `judged` has found, on any rank.

    Raises:
        UnusableError: it has found a fault.
    """
    if "fault" in told:
        raise UnusableError(told["fault"], told["kind"])
    return told["value"]
