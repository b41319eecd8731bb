"""Calls a run's callbacks on its events, in order, and handles an exception in one of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from setformer_dist.core.callback import Callback, Event, RunEnd, RunStart
from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError, TrainingError, TransientError

log = logging.getLogger(__name__)


class Callbacks:
    """The callbacks that this rank calls.

    Args:
        callbacks: of the run, on every rank the same, in the order of their calls.
        folder: of the run.
        config: of the run, as config.json has it.
        is_main: whether this is rank 0.

    Raises:
        ConfigError: two callbacks have the same name, or one has a method for an event that there is not.
    """

    def __init__(
        self, callbacks: Sequence[Callback], folder: Path, config: Mapping[str, object], is_main: bool
    ) -> None:
        names = [callback.name or type(callback).__name__ for callback in callbacks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two callbacks are named {twice[0]!r}: give one of them another name")
        for callback in callbacks:
            _check_events(callback)
        self._folder = folder
        self._config = config
        self._active = {
            name: callback for name, callback in zip(names, callbacks, strict=True) if is_main or callback.every_rank
        }
        self._say: Callable[[str], None] = log.warning

    def start(self, step: int, total_steps: int, resumed_from: Path | None, say: Callable[[str], None]) -> None:
        """Report that the run begins or resumes.

        Args:
            step: optimizer steps done.
            total_steps: at the end of the run.
            resumed_from: the checkpoint's folder.
            say: prints a line for the user, about a callback that is left out.
        """
        self._say = say
        self._call("on_run_start", step, RunStart(self._folder, self._config, step, total_steps, resumed_from))

    def step_end(self, step: int) -> None:
        """Report that a step is done."""
        self._call("on_step_end", step, step)

    def figures(self, event: Event, step: int, values: Mapping[str, object]) -> None:
        """Report figures of a step: of training, of an evaluation, of a bad step."""
        self._call(event, step, step, values)

    def saved(self, step: int, folder: Path) -> None:
        """Report that a checkpoint is durable."""
        self._call("on_checkpoint_saved", step, step, folder)

    def end(self, end: RunEnd) -> None:
        """Report that the run ended or was stopped."""
        self._call("on_run_end", end.step, end)

    def _call(self, event: Event, step: int, *values: object) -> None:
        """Call one event on every callback.

        Args:
            event: its method.
            step: for the message.
            values: its arguments.

        Raises:
            TrainingError: an essential callback raised an exception.
            TransientError: likewise, and it was one of these.
        """
        self._each(f"{event} at step {step}", lambda _, callback: getattr(callback, event)(*values))

    @property
    def asks_to_stop(self) -> str:
        """The name of a callback that asks to end the run; "" for none."""
        return next((name for name, callback in self._active.items() if callback.should_stop), "")

    def exception(self, error: BaseException) -> None:
        """Report the error that ends the run, all but the callback that raised it; raises nothing."""
        for name, callback in self._active.items():
            try:
                callback.on_exception(error)
            except Exception:
                log.exception("callback %r failed in on_exception", name)

    def state(self) -> dict[str, Any]:
        """Return the states of those that have one, by name, for the checkpoint.

        Raises:
            TrainingError: as `step_end`.
        """
        found: dict[str, object] = {}

        def take(name: str, callback: Callback) -> None:
            if type(callback).state is not Callback.state:
                found[name] = dict(callback.state())
                json.dumps(found[name])  # a value that is not JSON fails here, where the callback's name is known

        self._each("state", take)
        return found

    def load_state(self, states: Mapping[str, Any]) -> None:
        """Give the states of a checkpoint back; a callback that is not in it keeps what it has.

        Raises:
            TrainingError: as `step_end`.
        """

        def give(name: str, callback: Callback) -> None:
            if name in states:
                callback.load_state(states[name])

        self._each("load_state", give)

    def _each(self, where: str, call: Callable[[str, Callback], object]) -> None:
        for name, callback in list(self._active.items()):
            try:
                call(name, callback)
            except Exception as error:  # noqa: BLE001 — of code that is not ours
                self._failed(name, callback, where, error)

    def _failed(self, name: str, callback: Callback, where: str, error: Exception) -> None:
        del self._active[name]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        failure = f"callback {name!r} failed in {where} ({what})"
        if not callback.essential:
            log.warning("%s", failure, exc_info=True)
            self._say(f"warning: {failure}; the run continues without it")
            return
        log.error("%s", failure, exc_info=True)
        kind = TransientError if isinstance(error, TransientError) else TrainingError
        raise kind(
            f"{failure}: fix it, or remove it from the run, and the same command continues from the newest checkpoint; "
            "the rank's log has the traceback"
        ) from error


def _check_events(callback: Callback) -> None:
    """Check that every event which a callback handles exists; a mistyped one would never be called."""
    events = [name for name in dir(Callback) if name.startswith("on_")]
    for name in dir(callback):
        if name.startswith("on_") and name not in events and callable(getattr(callback, name)):
            raise ConfigError(
                f"callback {callback.name or type(callback).__name__!r} handles {name}, and there is no such event: "
                f"{nearest(name, events)} Give a method of your own a name that does not begin with on_"
            )
