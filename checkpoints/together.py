"""Work of several ranks that ends with every rank knowing whether every other one succeeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from checkpoints.commit import describe, is_transient
from checkpoints.errors import StorageError
from setformer_dist.core.comm import Collectives
from setformer_dist.core.errors import CheckpointError


class Together:
    """What ranks do to the checkpoints of a run; every method is collective.

    Args:
        comm: of the ranks.
        root: the `checkpoints` folder, for messages.
    """

    def __init__(self, comm: Collectives, root: Path) -> None:
        self.comm = comm
        self._root = root

    def everywhere(self, what: str, work: Callable[[], Any]) -> Sequence[Any]:
        """Do something on every rank, return all results on all, or raise on all if it failed on any.

        Raises:
            StorageError: it failed for a transient reason.
            CheckpointError: it failed otherwise.
        """
        answer, cause = _tried(work)
        answers = self.comm.gather_json(answer)
        failed = [f"rank {r}: {a['error']}" for r, a in enumerate(answers) if "error" in a]
        if failed:
            transient = all(a["transient"] for a in answers if "error" in a)
            message = f"could not {what} the checkpoint in {self._root}: {'; '.join(failed)}"
            raise (StorageError if transient else CheckpointError)(message) from cause
        return [a["value"] for a in answers]

    def on_main(self, what: str, work: Callable[[], Any]) -> Any:
        """Do something on rank 0 alone and tell all its result, or raise on all if it failed; raises likewise."""
        answer: dict[str, object] = {}
        cause: Exception | None = None
        if self.comm.ranks.is_main:
            answer, cause = _tried(work)
        answer = self.comm.broadcast_json(answer)
        if "error" in answer:
            message = f"could not {what} the checkpoint in {self._root}: {answer['error']}"
            raise (StorageError if answer["transient"] else CheckpointError)(message) from cause
        return answer["value"]


def _tried(work: Callable[[], object]) -> tuple[dict[str, object], Exception | None]:
    """Return what work returned, or how it failed, as JSON for the other ranks, and the error itself."""
    try:
        return {"value": work()}, None
    except Exception as error:  # noqa: BLE001 — whatever it is, the other ranks must hear of it
        return {"error": describe(error), "transient": is_transient(error)}, error
