"""How all ranks come to stop at the same step, though a signal reaches one of them first."""

from __future__ import annotations

from collections.abc import Callable

from setformer_dist.core.store import CheckpointStore
from setformer_dist.engine.comm import TorchCollectives
from setformer_dist.engine.signals import StopRequest

# What a rank without a signal says of itself when a save has failed; less than any signal.
_SAVE_FAILED = 0.5


def _nobody() -> float:
    """No rank got a signal: none was asked yet."""
    return 0.0


class StopVote:
    """Asks all ranks whether one of them is to stop. Every method is collective."""

    def __init__(self, stop: StopRequest, comm: TorchCollectives, store: CheckpointStore) -> None:
        self._stop = stop
        self._comm = comm
        self._store = store
        self._answer: Callable[[], float] = _nobody

    def now(self) -> int | None:
        """Return the signal if any rank got one; all ranks stop at the same place."""
        return int(self._comm.max(self._stop.signum or 0)) or None

    def of_last_step(self) -> int | None:
        """Return the signal that any rank had a step ago, and ask again without waiting for the answer.

        The same question carries whether a save has failed meanwhile; then all ranks look into it at this step.

        Raises:
            CheckpointError: a save has failed on some rank, and the config does not bear it.
        """
        wish = self._stop.signum or (_SAVE_FAILED if self._store.failed() else 0)
        answer, self._answer = self._answer, self._comm.max_later(wish)
        agreed = answer()
        if agreed == _SAVE_FAILED:
            self._store.finish()
        return int(agreed) or None

    def settle(self) -> None:
        """Hear the answer that is still to come, where the loop is left: all ranks have asked."""
        self._answer()
        self._answer = _nobody
