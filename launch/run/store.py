"""The engine's checkpoint store: which checkpoints a run may resume from, and what it adds to those that it writes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.reader import Checkpoint
from dataloaders.order.order import Cursor, counts_samples
from launch.run.config import ResolvedRun
from launch.run.distill import KEY as TEACHER
from launch.run.distill import check_same_teacher
from launch.run.imported import is_imported, loadable, trainer_state
from launch.run.own_model import BUFFERS, check_same_buffers
from setformer_dist.core.continuing import agreements
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import CopyEvent, SavedState, Snapshot
from setformer_dist.core.words import counted
from setformer_dist.engine.run_state import check_trainer

log = logging.getLogger(__name__)


class RunStore:
    """The engine's CheckpointStore: a CheckpointManager that knows whose checkpoints it keeps.

    trainer.json also holds the config, the class names and the model's input spec, so that a
    checkpoint serves evaluation alone.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        run: ResolvedRun,
        identity: Identity,
        classes: tuple[str, ...],
        input_spec: dict[str, object],
        cursor_at: Callable[[int], dict[str, object]],
        total_steps: int,
        is_main: bool,
        check_place: Callable[[dict[str, object]], object],
        holds: Callable[[Checkpoint], object],
        teacher: str | None = None,
        fixed: Collection[str] = (),
        buffers: str | None = None,
    ) -> None:
        self._teacher = teacher
        self._check_place = check_place
        self._holds = holds
        self._fixed = fixed
        self._manager = manager
        self._cursor_at = cursor_at
        self._total_steps = total_steps
        self._is_main = is_main
        self._run = run
        self._identity = identity
        self._about = {"config": run.as_json(), "classes": list(classes), "inputs": input_spec}
        if teacher is not None:
            self._about[TEACHER] = teacher
        self._buffers = buffers
        if buffers is not None:
            self._about[BUFFERS] = buffers

    def due(self, step: int) -> bool:
        """Return whether the config wants a checkpoint after this many steps."""
        return self._run.config.checkpoint.due(step)

    def save(self, snapshot: Snapshot, replace: bool = False) -> Path:
        """Begin a checkpoint; when this returns the fragments may change."""
        return self._manager.begin(self._described(snapshot), self._identity, replace)

    def save_renumbered(self, snapshot: Snapshot) -> Path:
        """Write the checkpoint from which on steps are counted in another way; durable when this returns."""
        return self._manager.save_renumbered(self._described(snapshot), self._identity)

    def _described(self, snapshot: Snapshot) -> Snapshot:
        return dataclasses.replace(snapshot, trainer={**snapshot.trainer, **self._about})

    def committed(self) -> Sequence[tuple[int, Path]]:
        """Return the steps and folders that became durable since the last call, on rank 0."""
        return self._manager.committed()

    def copies(self) -> Sequence[CopyEvent]:
        """Return what became of copies in the object store since the last call, on rank 0."""
        return self._manager.copies()

    def finish_copies(self, seconds: float) -> bool:
        """Wait at most so long for the copy of the newest checkpoint; return whether nothing is left to wait for."""
        return self._manager.finish_copies(seconds)

    def failed(self) -> bool:
        """Return whether a save has failed on this rank since the last `finish`."""
        return self._manager.failed()

    def agree(self) -> None:
        """Give every host what else the run's folder holds."""
        self._manager.agree()

    def complete(self) -> None:
        """Bring the whole newest checkpoint to rank 0's disk."""
        self._manager.complete()

    def finish(self, last: bool = False) -> None:
        """Wait until what was begun is durable; raise on all ranks if it failed on any."""
        self._manager.finish(last)

    def close(self) -> None:
        """Wait for this rank's own writing after an error."""
        self._manager.close()

    def newest(self) -> SavedState | None:
        """Return the newest checkpoint that verifies.

        Raises:
            CheckpointError: it is of another model, or was not written by a run.
        """
        return self._checked(self._manager.newest(self._accept))

    def newest_before(self, step: int, reason: str) -> SavedState | None:
        """Return the newest checkpoint below a step that verifies; put the others aside for good if there is one.

        Raises:
            CheckpointError: as `newest`.
        """
        return self._checked(self._manager.newest_before(step, reason, self._accept))

    def _accept(self, found: Checkpoint) -> None:
        """Check all that a continuation takes from a checkpoint, before one is chosen for all ranks.

        Raises:
            SetformerError: this run cannot resume from it.
        """
        imported = is_imported(found)
        self._checked(found, says=False)
        self._check_place(found.trainer["stream"])
        if not imported:
            self._holds(found)

    def _checked(self, found: Checkpoint | None, says: bool = True) -> Checkpoint | None:
        if found is None:
            return None
        if is_imported(found):
            says = says and self._is_main
            optimizer = self._run.config.optim.name
            state = trainer_state(found, self._identity, self._cursor_at, self._total_steps, says, optimizer)
            found.trainer.update(state)
            check_trainer(found.trainer, found.path)
            return found
        check_trainer(found.trainer, found.path)
        found.identity.check_same_model(self._identity)
        check_same_teacher(found.trainer, self._teacher, found.path)
        check_same_buffers(found.trainer, self._buffers, found.path)
        allowed = self._run.config.checkpoint.allow_changes
        found.trainer["stream"] = continued_cursor(found.trainer["stream"], self._cursor_at(0), allowed)
        return found

    def load(self, saved: SavedState, fragments: Iterable[Fragment]) -> None:
        """Fill the fragments; parameters that do not train stay as they are where an older checkpoint lacks them."""
        assert isinstance(saved, Checkpoint)  # what `newest` returned
        if lacking := set(self._fixed) - saved.parameters().keys():
            missing = counted(len(lacking), "parameter")
            log.warning("checkpoint %s lacks %s that do not train: they are as the model has them", saved.path, missing)
            fragments = [fragment for fragment in fragments if fragment.name not in lacking]
        found = loadable(saved, fragments, self._run.config.optim.name) if is_imported(saved) else fragments
        self._manager.load(saved, found)


def continued_cursor(saved: dict[str, object], here: dict[str, object], allowed: Collection[str]) -> dict[str, object]:
    """Return a saved cursor of the stream with what may differ as it is in this run.

    Args:
        saved: the checkpoint's cursor.
        here: any cursor of this run's stream.
        allowed: `checkpoint.allow_changes`.

    Raises:
        CheckpointError: something differs that may not, or that would have samples lost or repeated.
    """
    for name, rule in agreements(Cursor).items():
        ours, theirs = here.get(name), saved.get(name)
        if ours == theirs or rule.by is None:  # the stream itself refuses the latter
            continue
        if rule.by not in allowed:
            raise CheckpointError(
                f"the checkpoint was written with {name} = {theirs!r}, this run has {ours!r}: restore the old value, "
                f"or see what checkpoint.allow_changes = [{rule.by!r}] does to the order of samples"
            )
        if name == "global_batch":
            _check_new_batch(saved, here)
        saved = {**saved, name: ours}
    return saved


def _check_new_batch(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse another global batch where samples would be lost or repeated by it.

    Raises:
        CheckpointError: with the reason.
    """
    global_batch, theirs, consumed = here["global_batch"], saved.get("global_batch"), saved.get("samples_consumed")
    if not counts_samples(str(saved.get("order"))):
        raise CheckpointError(
            f"the checkpoint was written with global_batch = {theirs!r}, this run has {global_batch}, and with "
            "data.mixture, data.aspect_buckets, data.augment.repeats or epoch_end = 'wrap' samples would be lost or "
            "repeated: restore the old value"
        )
    whole_steps = range(0, here["num_samples"] // global_batch * global_batch, global_batch)
    if consumed not in whole_steps:
        raise CheckpointError(
            f"the checkpoint was written after {consumed} samples of its epoch, where no step of global_batch = "
            f"{global_batch} begins: set it to {theirs!r} again"
        )
