"""A run within this process: begun or resumed, trained step by step, saved, evaluated.

One process is one rank. In a script or a notebook that is all; under torchrun or deepspeed every rank runs the same
program, and every method here is called by all of them. Restarts after a crash are the supervisor's, `setformer train`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from launch.machine.doctor import check_package_origins
from launch.run.compose import Splits
from launch.run.config import RunConfig, continued
from launch.run.own_model import OwnModel, named_own
from launch.run.session import Session, log_to_file, session
from setformer.configs import check_config
from setformer_dist.core.callback import Callback
from setformer_dist.core.errors import ConfigError, LaunchError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.deepspeed_engine import quiet_deepspeed
from setformer_dist.engine.run_state import Outcome

log = logging.getLogger(__name__)


class Training:
    """A run as a context manager: built, and resumed from its newest checkpoint, on entry.

        with setformer.Training(config) as run:
            run.train(steps=100)
            print(run.step, run.evaluate())
            run.train()                      # to the end

    Leaving it saves a checkpoint unless the newest one is up to date (not after an error), writes the summary and the
    report, and releases the folder. Running the program again resumes the run, as the same command does.

    Args:
        config: of the run, from `load_config`.
        model: instead of `model.name`: a module, of which a copy is trained, or a function that takes the number of
            outputs and returns a module. A module keeps its weights; the run's seed determines those of a function.
        callbacks: called after those that the config names, in this order; see `setformer.Callback`.
        data: from `setformer.own_data`; in place of what the config's [data] names, whose `root` is then only a name.

    Raises (on entry):
        SetformerError: the run cannot begin here, or cannot resume from what its folder holds.
    """

    def __init__(
        self,
        config: RunConfig,
        model: OwnModel | None = None,
        callbacks: Sequence[Callback] = (),
        data: Splits | None = None,
    ) -> None:
        check_config(config)
        self._callbacks = _checked(callbacks)
        self._data = data
        self._config = continued(config if model is None else named_own(config, model), warn=log.warning)
        self._own = model
        self._stack = contextlib.ExitStack()
        self._session: Session | None = None
        self._saved = -1

    def __enter__(self) -> Training:
        if threading.current_thread() is not threading.main_thread():
            raise LaunchError("training begins in the main thread, as it turns Ctrl-C and SIGTERM into a last save")
        ranks = RankInfo.from_env()
        quiet_deepspeed()
        check_package_origins()
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            if "LOCAL_RANK" not in os.environ:  # no launcher set it, and DeepSpeed asks for it
                os.environ["LOCAL_RANK"] = str(ranks.local_rank)
                stack.callback(os.environ.pop, "LOCAL_RANK", None)
            at_the_end = stack.enter_context(contextlib.ExitStack())
            begun = stack.enter_context(
                session(self._config, ranks, False, self._own, stays=True, callbacks=self._callbacks, data=self._data)
            )
            stack.enter_context(contextlib.closing(begun.trainer))
            level = logging.getLogger().level
            at_the_end.callback(_stop_logging, log_to_file(begun.run, ranks), level)  # after summary and report
            self._stack = stack.pop_all()
        self._session = begun
        self._saved = begun.trainer.step
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begun, self._session = self._begun, None
        if error is not None:
            begun.outcome = None
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if begun.trainer.step != self._saved and begun.outcome is not None and begun.outcome.signum == 0:
                begun.trainer.save()

    @property
    def _begun(self) -> Session:
        if self._session is None:
            raise LaunchError("this training is not open: use it within `with setformer.Training(config) as run:`")
        return self._session

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._begun.trainer.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._begun.trainer.total_steps

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._config.folder

    @property
    def model(self) -> nn.Module:
        """The module that is trained, as DeepSpeed has changed it: in the compute dtype, under stage 3 in parts."""
        return self._begun.model

    def train(self, steps: int | None = None) -> Outcome:
        """Train a number of optimizer steps, or to the run's end, with the evaluations and checkpoints that are due.

        Args:
            steps: how many; None, or more than are left, trains to the end.

        Returns:
            `state.step`, `state.evaluation` (the last one's metrics by name), `images_per_s`, and `signum`: None at the
            run's end, also an early one that a callback asked for, 0 after `steps`, or the signal (Ctrl-C, SIGTERM)
            after which the run saved and stopped.

        Raises:
            ConfigError: `steps` is negative.
            TrainingError: the loss is not finite or spikes, and `guard` does not tolerate it.
            DataError: the data cannot be read.
            CheckpointError: a checkpoint cannot be written.
        """
        if steps is not None and steps < 0:
            raise ConfigError(f"steps = {steps}: it must be 0 or more, or None to train to the end")
        trainer = self._begun.trainer
        last = trainer.total_steps if steps is None else trainer.step + steps
        self._begun.outcome = trainer.advance(last)
        return self._begun.outcome

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one; durable when this returns.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._begun.trainer.save()
        self._saved = self.step

    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics on the validation split, those of averaged weights as `ema_...`.

        Nothing of it is recorded, and no checkpoint becomes the best by it: a run is a function of its config and its
        step, not of who looks at it.

        Raises:
            DataError: the data cannot be read.
        """
        return self._begun.trainer.score()


def _checked(callbacks: object) -> tuple[Callback, ...]:
    """Return the callbacks that a program passes.

    Raises:
        ConfigError: they are no list, or one of them is no instance of `Callback`.
    """
    if not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks must be a list, and is {type(callbacks).__name__}: write callbacks=[...]")
    for callback in callbacks:
        if isinstance(callback, type):
            raise ConfigError(f"callbacks has the class {callback.__name__}, not an instance of it: call it first")
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks has a {type(callback).__name__}: derive it from setformer.Callback")
    return tuple(callbacks)


def _stop_logging(handler: logging.Handler, level: int) -> None:
    root = logging.getLogger()
    root.removeHandler(handler)
    root.setLevel(level)
    handler.close()


def train(
    config: RunConfig,
    model: OwnModel | None = None,
    callbacks: Sequence[Callback] = (),
    data: Splits | None = None,
) -> Outcome:
    """Train a run to its end, resuming it if it has begun; what `setformer train` does on each rank.

    Args:
        config: of the run, from `load_config`.
        model: as `Training`.
        callbacks: as `Training`.
        data: as `Training`.

    Returns:
        As `Training.train`.

    Raises:
        SetformerError: as `Training` and `Training.train`.
    """
    with Training(config, model, callbacks, data) as run:
        return run.train()
