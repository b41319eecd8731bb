"""How all ranks come to stop at the same step, though a signal or a callback's request reaches one of them first."""

from __future__ import annotations

from collections.abc import Callable

from setformer_dist.core.store import CheckpointStore
from setformer_dist.engine.comm import TorchCollectives
from setformer_dist.engine.events import Callbacks
from setformer_dist.engine.signals import StopRequest

# What a rank without a signal says when a save has failed, or when a callback asks to end the run: less than any
# signal. A failed save is found again when the run ends.
_SAVE_FAILED, _ENOUGH = 0.5, 0.75


def _nobody() -> float:
    """No rank got a signal: none was asked yet."""
    return 0.0


class StopVote:
    """Asks all ranks whether one of them is to stop. Every method is collective."""

    def __init__(self, stop: StopRequest, comm: TorchCollectives, store: CheckpointStore, callbacks: Callbacks) -> None:
        self._stop = stop
        self._callbacks = callbacks
        self._comm = comm
        self._store = store
        self._answer: Callable[[], float] = _nobody
        self._enough = False

    def now(self) -> int | None:
        """Return the signal if any rank got one; all ranks stop at the same place."""
        return int(self._comm.max(self._stop.signum or 0)) or None

    def enough(self) -> bool:
        """Return whether a callback of any rank asks to end the run, now or when `of_last_step` was asked."""
        self._enough = self._enough or self._comm.max(float(bool(self._callbacks.asks_to_stop))) > 0
        return self._enough

    @property
    def had_enough(self) -> bool:
        """Whether a callback of any rank is known to have asked; not collective."""
        return self._enough

    def of_last_step(self) -> int | None:
        """Return the signal that any rank had a step ago, and ask again without waiting for the answer.

        The same question carries whether a save has failed meanwhile; then all ranks look into it at this step.

        Raises:
            CheckpointError: a save has failed on some rank, and the config does not bear it.
        """
        wish = self._stop.signum or self._wish()
        answer, self._answer = self._answer, self._comm.max_later(wish)
        agreed = answer()
        if agreed == _SAVE_FAILED:
            self._store.finish()
        self._enough = self._enough or agreed == _ENOUGH
        return int(agreed) or None

    def _wish(self) -> float:
        if self._callbacks.asks_to_stop:
            return _ENOUGH
        return _SAVE_FAILED if self._store.failed() else 0.0

    def settle(self) -> None:
        """Hear the answer that is still to come, where the loop is left: all ranks have asked."""
        self._answer()
        self._answer = _nobody
