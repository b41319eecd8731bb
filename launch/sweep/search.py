"""Which point comes next, and which trial is stopped: Optuna's samplers and pruners, made a function of the journal.

Optuna's own storages and Ray Tune's restored experiments hold pickles, so neither is used: a study lives in memory and
is built anew by asking, reporting and telling in the journal's order. For each trial the sampler is made afresh, with a
seed of the sweep's seed and the trial's number, so what it suggests depends on nothing but the journal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from launch.sweep.page import SchedulerTable, SearchTable, Sweep
from launch.sweep.space import Parameter, Point, grid, is_active, label
from setformer_dist.core.seeding import Purpose, derive_key

optuna.logging.set_verbosity(optuna.logging.ERROR)

_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class Searcher:
    """The searcher and the scheduler of a sweep.

    Args:
        sweep: what is searched.
    """

    def __init__(self, sweep: Sweep) -> None:
        config = sweep.config
        self._space = config.space
        self._search = config.search
        self._seed = config.sweep.seed
        self._grid = grid(config.space) if config.search.name == "grid" else None
        self._trials: list[optuna.Trial] = []
        self._study = optuna.create_study(
            direction="maximize" if sweep.mode == "max" else "minimize",
            study_name="sweep",  # Hyperband draws a trial's bracket by it
            sampler=RandomSampler(0),
            pruner=_pruner(config.scheduler),
        )

    @property
    def points(self) -> int | None:
        """How many points there are; None for no end."""
        return None if self._grid is None else len(self._grid)

    def ask(self, given: Point | None = None) -> Point:
        """Return the point of the next trial.

        Args:
            given: the point, where the searcher is not to choose it.
        """
        number = len(self._trials)
        if self._grid is not None:
            given = self._grid[number]
        self._study.sampler = _sampler(self._search, derive_key(Purpose.SWEEP, self._seed, number) % 2**32)
        if given is not None:
            self._study.enqueue_trial({key: _stored(self._space[key], value) for key, value in given.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask()
            point: Point = {}
            for key, parameter in self._space.items():
                if is_active(parameter, point):
                    point[key] = _suggested(trial, key, parameter)
        self._trials.append(trial)
        return point

    def report(self, number: int, ordinal: int, value: float | None) -> bool:
        """Take the value of a trial's evaluation; return whether the trial is to be stopped.

        Args:
            number: of the trial.
            ordinal: of the evaluation, from 1.
            value: None where it is no number.
        """
        trial = self._trials[number]
        trial.report(math.nan if value is None else value, ordinal)
        return trial.should_prune()

    def tell(self, number: int, state: str, value: float | None) -> None:
        """Take the end of a trial.

        Args:
            number: of the trial.
            state: "complete", "pruned" or "failed".
            value: of a complete one.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study.tell(self._trials[number], value if state == "complete" else None, _STATES[state])


def _sampler(config: SearchTable, seed: int) -> BaseSampler:
    if config.name == "tpe":
        # constant_liar: trials that run at the same time are not sent to the same place.
        return TPESampler(seed=seed, n_startup_trials=config.startup, constant_liar=True)
    if config.name == "cmaes":
        return CmaEsSampler(seed=seed, n_startup_trials=config.startup, warn_independent_sampling=False)
    return RandomSampler(seed)


def _pruner(config: SchedulerTable) -> BasePruner:
    if config.name == "asha":
        return SuccessiveHalvingPruner(min_resource=config.first, reduction_factor=config.reduction)
    if config.name == "hyperband":
        assert config.last is not None
        return HyperbandPruner(config.first, config.last, config.reduction)
    if config.name == "median":
        return MedianPruner(n_startup_trials=config.startup, n_warmup_steps=config.first - 1)
    return NopPruner()


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's distribution of a parameter: choices by their labels, grids by place."""
    if parameter.choice is not None:
        return CategoricalDistribution([label(value) for value in parameter.choice])
    if parameter.grid is not None:
        return IntDistribution(0, len(parameter.grid) - 1)
    if parameter.int is not None:
        return IntDistribution(parameter.int[0], parameter.values[-1] if parameter.values else 0, step=parameter.step)
    low, high = parameter.bounds
    return FloatDistribution(low, high, log=parameter.loguniform is not None)


def _suggested(trial: optuna.Trial, key: str, parameter: Parameter) -> Any:
    found = trial._suggest(key, distribution(parameter))
    if parameter.choice is not None:
        return next(value for value in parameter.choice if label(value) == found)
    return parameter.grid[int(found)] if parameter.grid is not None else found


def _stored(parameter: Parameter, value: Any) -> Any:
    """Return what Optuna stores for a value."""
    if parameter.choice is not None:
        return label(value)
    return parameter.grid.index(value) if parameter.grid is not None else value


def stored_point(space: Mapping[str, Parameter], point: Point) -> dict[str, Any]:
    """Return what Optuna stores for a point."""
    return {key: _stored(space[key], value) for key, value in point.items()}
