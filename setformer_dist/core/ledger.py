"""Where the wall time of a run went, over all its attempts: the goodput ledger.

    runs/<run>/ledger.jsonl     one JSON object a line, appended by the supervisor and by rank 0

    {"event": "attempt", "time": t, "number": 1, "ranks": 2}     supervisor: ranks are started
    {"event": "began", "time": t, "step": 40}                    rank 0: the first step of this attempt comes now
    {"event": "spent", "time": t, "step": 50, "seconds": {...}}  rank 0: since the last such line or `began`
    {"event": "rewound", "time": t, "step": 40, "reached": 47}   rank 0: the guard went back to a checkpoint; with
                                                                 "bad", the bad step as guard.json has it
    {"event": "ended", "time": t, "why": "killed", "step": 53}   supervisor: "done", "stopped", or how it failed, and
                                                                 "final": true where it will not start again

A line is one write, so a process that dies leaves at most one torn line, which is passed over. Times are Unix times
in seconds. `account` turns events into seconds by kind; it is a pure function.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setformer_dist.core.secrets import redacted_json

LEDGER = "ledger.jsonl"

# What counts as progress, by the sections of the engine's clock; everything else has its own name.
_TRAINING = frozenset({"forward", "backward", "optimizer", "communication", "other"})
KINDS = ("training", "data", "checkpoint", "evaluation", "refresh", "start", "restart", "lost", "finish")
WELL = ("done", "stopped")


def record(folder: Path, event: str, **values: Any) -> None:
    """Append one event to a run's ledger; a full disk costs the line and not the run."""
    line = json.dumps(redacted_json({"event": event, "time": time.time(), **values})).encode() + b"\n"
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / LEDGER, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # whoever wrote last has died within a line
            os.write(descriptor, b"\n" + line if torn else line)
        finally:
            os.close(descriptor)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run, in order; what is not a whole event is passed over."""
    path = folder / LEDGER
    events = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("time"), int | float) and "event" in value:
            events.append(value)
    return events


@dataclass(frozen=True)
class Account:
    """A run's wall time.

    Attributes:
        seconds: by kind (`KINDS`): "start" is from the first start of the ranks to the first step, "restart" from a
            failure to the next step, "lost" what was computed and had to be computed again, "finish" the end.
        attempts: times that ranks were started.
        failures: (time, how, step) of each attempt that failed.
        steps_lost: optimizer steps computed again.
    """

    seconds: dict[str, float]
    attempts: int
    failures: list[tuple[float, str, int]]
    steps_lost: int

    @property
    def total(self) -> float:
        """Seconds of all kinds."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the time that became training progress."""
        return self.seconds["training"] / self.total if self.total else 0.0


@dataclass
class _Span:
    """Steps (first, last] and the seconds they took, by kind."""

    first: int
    last: int
    seconds: dict[str, float]


@dataclass
class _Book:
    """The account while events are read."""

    spans: list[_Span] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    attempts: int = 0
    failures: list[tuple[float, str, int]] = field(default_factory=list)
    steps_lost: int = 0
    running: bool = False  # ranks are up
    since: float | None = None  # when ranks were started and no step has come yet, or when the last attempt failed
    mark: float = 0.0  # the last event within an attempt
    step: int = 0
    reached: int = 0  # steps done, in whole or in part, when the last attempt failed
    failed_at: float | None = None
    training: bool = False

    def attempt(self, event: dict[str, Any]) -> None:
        if self.running:  # the supervisor was killed, so nobody wrote the end: the last sign of life is it
            self.failures.append((self.mark, "supervisor killed", self.step))
            self.close(self.mark, failed=True)
            self.failed_at, self.reached = None, self.step
        self.attempts += 1
        self.running, self.training = True, False
        self.since = self.failed_at if self.failed_at is not None else event["time"]
        self.mark = event["time"]

    def began(self, event: dict[str, Any]) -> None:
        if self.running and self.training:  # another launcher, which writes no ends
            self.close(self.mark, failed=True)
            self.failed_at, self.reached = None, self.step
        if not self.running:
            self.attempts += 1
            self.running, self.since = True, event["time"]
        kind = "restart" if self.failed_at is not None else "start"
        self.seconds[kind] += event["time"] - (event["time"] if self.since is None else self.since)
        self.failed_at = None
        self.step, self.mark, self.training = int(event.get("step", 0)), event["time"], True
        self._lose(self.step)
        self.steps_lost += max(0, self.reached - self.step)
        self.reached = 0

    def spent(self, event: dict[str, Any]) -> None:
        wall = event["time"] - self.mark
        seconds = dict.fromkeys(KINDS, 0.0)
        for name, value in event.get("seconds", {}).items():
            kind = "training" if name in _TRAINING else name if name in KINDS else "training"
            seconds[kind] += float(value)
        seconds["training"] += wall - sum(seconds.values())  # what the clock did not see
        self.spans.append(_Span(self.step, int(event["step"]), seconds))
        self.step, self.mark = int(event["step"]), event["time"]

    def rewound(self, event: dict[str, Any]) -> None:
        """The run went back to an earlier step within an attempt (the guard's rollback)."""
        self.step = int(event["step"])
        self._lose(self.step)
        self.steps_lost += max(0, int(event.get("reached", self.step)) - self.step)

    def ended(self, event: dict[str, Any]) -> None:
        failed = event.get("why") not in WELL
        if failed:
            self.reached = max(self.reached, self.step, int(event.get("step", 0)))
            self.failures.append((event["time"], str(event.get("why")), self.reached))
        self.close(event["time"], failed)
        if event.get("final"):  # whoever starts the run again may do so a day later: that is no restart
            self.failed_at = None

    def close(self, now: float, failed: bool) -> None:
        if not self.running:
            return
        self.running = False
        if (
            self.training and failed and self.reached > self.step
        ):  # steps since the last line: the next start says which
            self.spans.append(_Span(self.step, self.reached, {"training": now - self.mark}))
        elif self.training:
            self.seconds["lost" if failed else "finish"] += now - self.mark
        else:
            self.seconds["restart" if self.failed_at is not None else "start"] += now - (
                now if self.since is None else self.since
            )
        self.failed_at = now if failed else None

    def _lose(self, step: int) -> None:
        """What was computed beyond a step that the run goes on from had been in vain."""
        for span in self.spans:
            steps = span.last - span.first
            gone = min(steps, span.last - step)
            if gone <= 0 or steps <= 0:
                continue
            share = gone / steps
            for kind, value in span.seconds.items():
                self.seconds["lost"] += value * share
                span.seconds[kind] = value * (1 - share)
            span.last -= gone


def account(events: Iterable[dict[str, Any]], now: float | None = None) -> Account:
    """Add up a run's events.

    Args:
        events: as `read_events` returns them.
        now: the present, for a run that goes on; None takes the last event for the end.
    """
    book = _Book()
    known = {"attempt", "began", "spent", "rewound", "ended"}
    for event in events:
        if event["event"] in known:
            getattr(book, event["event"])(event)
    if book.running and now is not None and book.training:
        book.seconds["finish"] += now - book.mark
    for span in book.spans:
        for kind, value in span.seconds.items():
            book.seconds[kind] += value
    return Account(book.seconds, book.attempts, book.failures, book.steps_lost)


def kinds_by_size(account: Account) -> Sequence[tuple[str, float]]:
    """Return (kind, seconds) of what took any time, largest first."""
    return sorted(((k, s) for k, s in account.seconds.items() if s > 0), key=lambda pair: -pair[1])
