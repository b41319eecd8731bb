"""The state of a sweep as its journal tells it: trials, what they reported, and what is decided about them.

`Book.take` is all there is: a driver calls it with each event that it writes, and with those of the journal when it
goes on, so that a sweep that was killed knows what one that was not would know.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launch.sweep import population
from launch.sweep.journal import Event
from launch.sweep.page import Sweep
from launch.sweep.search import Searcher
from launch.sweep.space import Point
from setformer_dist.core.errors import DataError

# States of a run: "waiting" has not begun, or was interrupted; the others but "running" are ends.
DONE, PRUNED, REPLACED, FAILED = "done", "pruned", "replaced", "failed"
WAITING, RUNNING, STOPPING = "waiting", "running", "stopping"
# States of a trial.
COMPLETE = "complete"
# What people see of a running trial that no driver works on.
INTERRUPTED = "interrupted"


@dataclass
class RunState:
    """One run of a trial.

    Attributes:
        state: as the journal has it: "waiting" or an end.
        value: of the metric at its end.
        step: likewise.
        why: how it failed.
        starts: times that it was started.
        seconds: that it ran, in the starts that ended.
    """

    state: str = WAITING
    value: float | None = None
    step: int = 0
    why: str = ""
    starts: int = 0
    seconds: float = 0.0


@dataclass
class Trial:
    """A point and its runs.

    Attributes:
        number: from 0.
        point: values of the active parameters.
        runs: by seed.
        source: the trial of whose checkpoint it is a clone, and at which step.
        before: evaluations that the source had done until then.
        replaces: the trial that it replaces.
        reports: (step, value) of the first seed's evaluations; None for a value that is no number.
        state: "running", "complete", "pruned", "replaced" or "failed".
        stop: whether the scheduler has decided to stop it.
        clone_of: the trial of which a clone is to replace it.
        value: mean over the seeds, of a complete one; the last report of one that was stopped.
        spread: standard deviation over the seeds; None for one seed.
    """

    number: int
    point: Point
    runs: list[RunState]
    source: tuple[int, int] | None = None
    before: int = 0
    replaces: int | None = None
    reports: list[tuple[int, float | None]] = field(default_factory=list)
    state: str = RUNNING
    stop: bool = False
    clone_of: int | None = None
    value: float | None = None
    spread: float | None = None

    @property
    def over(self) -> bool:
        """Whether nothing of it is to be run any more."""
        return self.state != RUNNING

    @property
    def newest(self) -> float | None:
        """Its newest report that is a number."""
        return next((value for _, value in reversed(self.reports) if value is not None), None)


class Book:
    """The state.

    Args:
        sweep: whose journal it is.

    Attributes:
        trials: in order of their numbers.
        begun: whether the journal names the sweep.
        hours: that drivers have worked, up to the last event.
        at_work: whether a driver runs it now; the journal does not know.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._searcher = Searcher(sweep)
        self.trials: list[Trial] = []
        self.begun = False
        self.hours = 0.0
        self.at_work = False
        self._last_time: float | None = None

    def state_of(self, trial: Trial) -> str:
        """Return a trial's state as people see it: without a driver nothing runs."""
        return trial.state if trial.over or self.at_work else INTERRUPTED

    @property
    def exhausted(self) -> bool:
        """Whether the searcher has no further point."""
        return self._searcher.points is not None and len(self.trials) >= self._searcher.points

    def take(self, event: Event) -> Event:
        """Take an event; return it, an "asked" one with its point.

        Raises:
            DataError: it does not follow from those before it.
        """
        handlers: dict[str, Callable[[Event], None]] = {
            "began": self._began, "opened": self._passed, "over": self._passed, "asked": self._asked,
            "cloned": self._cloned, "kept": self._kept, "started": self._started, "reported": self._reported,
            "ended": self._ended,
        }  # fmt: skip
        if event["event"] not in handlers:
            raise DataError(
                f"the journal of {self._sweep.folder} has an event that this version does not know "
                f"({event['event']!r}): continue the sweep with the version that wrote it"
            )
        try:
            self._count(event)
            handlers[event["event"]](event)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise DataError(
                f"the journal of {self._sweep.folder} has an event that does not follow ({event['event']}: {error!r}): "
                "restore it from a copy, or give this sweep another sweep.name"
            ) from None
        return event

    def _count(self, event: Event) -> None:
        now = event.get("time")
        if isinstance(now, int | float):
            if self._last_time is not None and event["event"] != "opened":
                self.hours += max(0.0, now - self._last_time) / 3600
            self._last_time = now

    def _known(self, event: Event, name: str) -> Trial:
        if event[name] < 0:
            raise IndexError(event[name])
        return self.trials[event[name]]

    def _passed(self, event: Event) -> None:
        """Take an event that changes nothing but the time."""

    def _began(self, event: Event) -> None:
        self.begun = True

    def _asked(self, event: Event) -> None:
        point = self._searcher.ask()
        if event["trial"] != len(self.trials) or event.setdefault("point", point) != point:
            raise DataError(
                f"the journal of {self._sweep.folder} has {event['point']} as trial {event['trial']}, and the searcher "
                f"suggests {point}: continue the sweep with the versions it began with, or give it another sweep.name"
            )
        self.trials.append(self._trial(point))

    def _trial(self, point: Point) -> Trial:
        return Trial(len(self.trials), point, [RunState() for _ in range(self._sweep.config.sweep.seeds)])

    def _cloned(self, event: Event) -> None:
        source, step = self._known(event, "source"), int(event["step"])
        replaced = self._known(event, "replaces")
        point = self._searcher.ask(event["point"])
        trial = self._trial(point)
        trial.source, trial.replaces = (source.number, step), replaced.number
        trial.before = source.before + sum(at <= step for at, _ in source.reports)
        self.trials.append(trial)
        replaced.stop = True

    def explored(self, source: Trial) -> Point:
        """Return the point of the clone that would be the next trial."""
        config = self._sweep.config
        return population.explored(config.scheduler, config.space, source.point, len(self.trials), config.sweep.seed)

    def clone_for(self, trial: Trial) -> Trial | None:
        """Return the clone that replaces a trial, if it has been made."""
        return next((other for other in self.trials if other.replaces == trial.number), None)

    def _kept(self, event: Event) -> None:
        self._known(event, "trial").clone_of = None

    def _started(self, event: Event) -> None:
        self._known(event, "trial").runs[_seed(event)].starts += 1

    def _reported(self, event: Event) -> None:
        trial, value = self._known(event, "trial"), event["value"]
        trial.reports.append((int(event["step"]), value))
        ordinal = trial.before + len(trial.reports)
        stop = self._searcher.report(trial.number, ordinal, value)
        trial.stop = trial.stop or (stop and not trial.over)
        if self._sweep.config.scheduler.name == "pbt" and trial.clone_of is None and not trial.stop:
            trial.clone_of = self._source(trial, ordinal)

    def _source(self, trial: Trial, ordinal: int) -> int | None:
        living = [t for t in self.trials if t.state == RUNNING and not t.stop and t.clone_of is None]
        scores = {t.number: t.newest for t in living if t.newest is not None}
        config = self._sweep.config
        return population.source_of(
            config.scheduler,
            {n: s for n, s in scores.items() if s is not None},
            trial.number,
            ordinal,
            config.sweep.seed,
            self._sweep.mode == "max",
        )

    def _ended(self, event: Event) -> None:
        trial = self._known(event, "trial")
        run = trial.runs[_seed(event)]
        run.state, run.value, run.step = event["state"], event["value"], int(event["step"])
        run.why, run.seconds = str(event.get("why", "")), run.seconds + float(event["seconds"])
        if run.state == DONE and any(r.state == WAITING for r in trial.runs):
            return
        trial.state = COMPLETE if run.state == DONE else run.state
        if trial.state == COMPLETE:
            values = [r.value for r in trial.runs if r.value is not None]
            trial.value = statistics.fmean(values)
            trial.spread = statistics.stdev(values) if len(values) > 1 else None
        elif trial.state in (PRUNED, REPLACED):
            trial.value = trial.newest
        told = PRUNED if trial.state == REPLACED else trial.state
        self._searcher.tell(trial.number, told, trial.value)

    def ranked(self) -> list[Trial]:
        """Return the complete trials, the best first."""
        found = [t for t in self.trials if t.state == COMPLETE and t.value is not None and math.isfinite(t.value)]
        sign = -1.0 if self._sweep.mode == "max" else 1.0
        return sorted(found, key=lambda t: (sign * (t.value or 0.0), t.number))

    def in_order(self) -> list[Trial]:
        """Return all trials: the complete ones by value, then the others by number."""
        ranked = self.ranked()
        return [*ranked, *(t for t in self.trials if t not in ranked)]


def _seed(event: Event) -> int:
    seed = event["seed"]
    if type(seed) is not int or seed < 0:
        raise IndexError(seed)
    return seed


def book_of(sweep: Sweep, events: list[Event]) -> Book:
    """Return the state after some events."""
    book = Book(sweep)
    for event in events:
        book.take(dict(event))
    return book


def as_json(book: Book, trial: Trial) -> dict[str, Any]:
    """Return a trial of a sweep as JSON."""
    return {
        "trial": trial.number, "state": book.state_of(trial), "value": trial.value, "spread": trial.spread,
        "point": trial.point, "source": trial.source, "replaces": trial.replaces,
        "runs": [vars(run) for run in trial.runs],
    }  # fmt: skip
