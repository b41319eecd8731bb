"""Checkpoints as the engine sees them; `checkpoints` implements them, the engine never imports it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from setformer_dist.core.fragments import Fragment


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after so many optimizer steps, on its way into a checkpoint.

    Attributes:
        step: optimizer steps done.
        fragments: this rank's share, or everything on every rank (then each writes an equal part of it); live views
            until the save has copied or written them.
        trainer: JSON-able state besides tensors; rank 0's counts.
        metrics: latest evaluation, for the listing and for `keep_best`.
        tags: words for the manifest; `checkpoints.policy.KEEP_TAG` protects from deletion.
    """

    step: int
    fragments: Iterable[Fragment]
    trainer: Mapping[str, object]
    metrics: Mapping[str, float]
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class CopyEvent:
    """What became of the copy of a checkpoint in an object store.

    Attributes:
        step: of the checkpoint.
        place: the store, without what is secret in its URL.
        newest: step of the newest copy that is known to be whole, None where none is.
        size: bytes copied.
        seconds: that it took.
        failure: why it was given up; "" where it is whole.
        fetched: it was taken back from there.
    """

    step: int
    place: str
    newest: int | None
    size: int = 0
    seconds: float = 0.0
    failure: str = ""
    fetched: bool = False

    @property
    def ok(self) -> bool:
        """Whether the copy is whole."""
        return not self.failure

    def as_dict(self) -> dict[str, Any]:
        """Return what the ledger notes of it."""
        if self.failure:
            return {"step": self.step, "newest": self.newest, "why": self.failure}
        return {"step": self.step, "bytes": self.size, "seconds": round(self.seconds, 3), "fetched": self.fetched}

    @property
    def text(self) -> str:
        """What a user is told of it."""
        if self.fetched:
            return f"checkpoint {self.step} was fetched from {self.place} ({self.size / 2**20:,.1f} MiB)"
        if not self.failure:
            return (
                f"checkpoint {self.step} is copied to {self.place} ({self.size / 2**20:,.1f} MiB, {self.seconds:.1f} s)"
            )
        behind = "there is no copy yet" if self.newest is None else f"the newest copy is of step {self.newest}"
        return f"warning: checkpoint {self.step} is not copied to {self.place}: {self.failure}; {behind}"


class SavedState(Protocol):
    """A checkpoint that was found and verified."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    @property
    def trainer(self) -> dict[str, Any]:
        """What the trainer saved besides tensors."""
        ...

    @property
    def metrics(self) -> dict[str, float]:
        """Latest evaluation at the time."""
        ...


class CheckpointStore(Protocol):
    """Saves and finds checkpoints of one run. Every method is collective, except where it says so."""

    def due(self, step: int) -> bool:
        """Return whether the policy wants a checkpoint after this many optimizer steps."""
        ...

    def save(self, snapshot: Snapshot, replace: bool = False) -> Path:
        """Begin a checkpoint; when this returns the fragments may change. Return its folder to be.

        One of this step that verifies stays as it is, unless it is to be replaced.
        """
        ...

    def save_renumbered(self, snapshot: Snapshot) -> Path:
        """Write the checkpoint from which on steps are counted in another way; durable when this returns.

        Those whose numbers are of the old count, and not below this step, are never found again.
        """
        ...

    def failed(self) -> bool:
        """Return whether a save has failed on this rank since the last `finish`. Not collective; does not wait."""
        ...

    def committed(self) -> Sequence[tuple[int, Path]]:
        """Return the steps and folders that became durable since the last call, on rank 0; elsewhere nothing.

        Not collective; does not wait.
        """
        ...

    def copies(self) -> Sequence[CopyEvent]:
        """Return what became of copies in an object store since the last call, on rank 0; elsewhere nothing.

        Not collective; does not wait.
        """
        ...

    def finish_copies(self, seconds: float) -> bool:
        """Wait at most so long until the newest checkpoint is copied; return whether nothing is left to wait for."""
        ...

    def complete(self) -> None:
        """Bring the whole newest checkpoint to rank 0's disk, for what follows the run. Collective."""
        ...

    def finish(self, last: bool = False) -> None:
        """Wait until what was begun is durable.

        Args:
            last: no other checkpoint will follow.

        Raises:
            TransientError: on all ranks, if a save failed on any for what may pass.
            CheckpointError: likewise for what will not, and the config does not bear it.
        """
        ...

    def close(self) -> None:
        """Wait for this rank's own writing after an error. Not collective."""
        ...

    def agree(self) -> None:
        """Give every host what else the run's folder holds, where hosts have one each; before anything is read."""
        ...

    def newest(self) -> SavedState | None:
        """Return the newest checkpoint that verifies and belongs to this model, or None."""
        ...

    def newest_before(self, step: int, reason: str) -> SavedState | None:
        """Return the newest of a smaller step likewise; if there is one, no other is ever found again."""
        ...

    def load(self, saved: SavedState, fragments: Iterable[Fragment]) -> None:
        """Fill the fragments' tensors in place."""
        ...
