"""Population based training (Jaderberg et al. 2017): which member gives up for a clone, of whom, with which point.

Members are judged when they report: one among the worst is replaced by a clone of one among the best, which goes on
from that one's newest checkpoint with the optimizer's state, at its step and on its samples, under a changed point. A
clone is a trial of its own, so that no run changes its config. Pure functions of reports and of the sweep's seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.sweep.page import SchedulerTable
from launch.sweep.space import Parameter, Point
from setformer_dist.core.seeding import Purpose, generator

_FACTORS = (0.8, 1.2)


def source_of(
    config: SchedulerTable, scores: Mapping[int, float], number: int, ordinal: int, seed: int, larger: bool
) -> int | None:
    """Return the member whose clone replaces one that has reported, None where it goes on.

    Args:
        config: of the population.
        scores: the newest report of each living member, by trial.
        number: the trial that has reported.
        ordinal: of its report, from 1.
        seed: of the sweep.
        larger: whether larger scores are better.
    """
    if ordinal < config.first or ordinal % config.interval or len(scores) < config.population or number not in scores:
        return None
    ranked = sorted(scores, key=lambda member: (-scores[member] if larger else scores[member], member))
    count = max(1, math.floor(len(ranked) * config.quantile))
    best, worst = ranked[:count], ranked[-count:]
    if number not in worst or number in best:
        return None
    source = best[int(generator(Purpose.POPULATION, seed, number, ordinal).integers(len(best)))]
    return source if scores[source] != scores[number] else None


def explored(config: SchedulerTable, space: Mapping[str, Parameter], point: Point, number: int, seed: int) -> Point:
    """Return the point of a clone.

    Args:
        config: of the population.
        space: of the sweep.
        point: of the member that is cloned.
        number: of the new trial.
        seed: of the sweep.
    """
    draw = generator(Purpose.POPULATION, seed, -1, number)
    return {key: _changed(space[key], value, config.resample, draw) for key, value in point.items()}


def _changed(parameter: Parameter, value: Any, resample: float, draw: np.random.Generator) -> Any:
    anew, up = draw.random() < resample, int(draw.integers(2))
    values = parameter.values
    if values is None:
        low, high = parameter.bounds
        if not anew:
            return float(min(high, max(low, value * _FACTORS[up])))
        if parameter.loguniform is not None:
            return float(min(high, max(low, math.exp(draw.uniform(math.log(low), math.log(high))))))
        return float(draw.uniform(low, high))
    at = parameter.place(value)
    assert at is not None  # a point of this space
    if anew or parameter.choice is not None:
        return values[int(draw.integers(len(values)))]
    return values[min(len(values) - 1, max(0, at + (1 if up else -1)))]
