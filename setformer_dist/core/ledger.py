"""Where the wall time of a run went, over all its attempts: the goodput ledger.

    runs/<run>/ledger.jsonl     one JSON object a line, appended by the supervisor and by rank 0

    {"event": "attempt", "time": t, "number": 1, "ranks": 2}     supervisor: ranks are started
    {"event": "began", "time": t, "step": 40}                    rank 0: the first step of this attempt comes now
    {"event": "spent", "time": t, "step": 50, "seconds": {...}}  rank 0: since the last such line or `began`
    {"event": "rewound", "time": t, "step": 40, "reached": 47}   rank 0: the guard went back to a checkpoint; with
                                                                 "bad", the bad step as guard.json has it
    {"event": "refreshed", "time": t, "step": 40, ...}           rank 0: reference sets were set by K-means; with
                                                                 "skipped", why not, "by", who computed them, and
                                                                 "late", why it was not in time
    {"event": "changed", "time": t, "key": "schedule.epochs", "there": 2, "here": 4}
                                                                 rank 0: of the config, by checkpoint.allow_changes
    {"event": "saved", "time": t, "step": 40}                    rank 0: a checkpoint is complete
    {"event": "ended", "time": t, "why": "killed", "step": 53}   supervisor: "done", "stopped", or how it failed, and
                                                                 "final": true where it will not start again

Each line ends with "crc", the CRC-32 of the line without it; a line that it does not fit is skipped. A line is one
write, so a process that dies leaves at most one torn line. Times are Unix times in seconds. A supervisor sets the time
of `run.lock` twice a second: where it was killed, that is when. `account` turns events into seconds by kind; it is a
pure function.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setformer_dist.core import strictjson
from setformer_dist.core.files import finite, lines_of, open_record
from setformer_dist.core.phases import TRAINING
from setformer_dist.core.secrets import redacted_json

LEDGER = "ledger.jsonl"
LOCK_FILE = "run.lock"

# Where wall time goes: progress (phases.TRAINING), and everything else by its own name.
KINDS = ("training", "data", "checkpoint", "evaluation", "refresh", "start", "restart", "lost", "finish")
WELL = ("done", "stopped", "regrouped")
_LATEST = 2.0**37  # Unix time that the calendar still has a year for
_CRC = re.compile(rb', "crc": "([0-9a-f]{8})"\}$')


def record(folder: Path, event: str, **values: object) -> None:
    """Append one event to a run's ledger; a full disk costs the line and not the run.

    Args:
        folder: of the run.
        event: see the module.
        values: the rest; "time" is the present where it is not given.
    """
    text = json.dumps(finite(redacted_json({"event": event, "time": time.time(), **values})))
    line = f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()
    with contextlib.suppress(OSError):
        descriptor = open_record(folder / LEDGER)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # the last writer died within a line
            os.write(descriptor, b"\n" + line if torn else line)
        finally:
            os.close(descriptor)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run, in order; what is not a whole event is skipped."""
    events = []
    for line in lines_of(folder / LEDGER):
        value = event_of(line)
        if value is not None:
            events.append(value)
    seen = last_seen(folder)
    seen = min(seen or 0.0, time.time())  # a file may be from the future
    if events and seen > events[-1]["time"] and not _is_over(events):
        events.append({"event": "seen", "time": seen})
    return events


def event_of(line: bytes) -> dict[str, Any] | None:
    """Return the event in a line of a ledger, None where it is not whole."""
    match = _CRC.search(line)
    if match is not None and zlib.crc32(line[: match.start()] + b"}") != int(match[1], 16):
        return None
    try:
        value = strictjson.parse(line)
        account([value])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None
    value.pop("crc", None)
    sound = isinstance(value["time"], int | float) and 0 <= value["time"] < _LATEST and isinstance(value["event"], str)
    return value if sound else None


def _is_over(events: Sequence[dict[str, object]]) -> bool:
    return next((e["event"] == "ended" for e in reversed(events) if e["event"] in ("attempt", "began", "ended")), True)


def last_seen(folder: Path) -> float | None:
    """Return when the run's supervisor last gave a sign of life, None where it never did."""
    try:
        return (folder / LOCK_FILE).stat().st_mtime
    except OSError:
        return None


def close_killed(folder: Path, seen: float | None) -> None:
    """Write the end that a supervisor which was killed could not write.

    Args:
        folder: of the run.
        seen: its last sign of life (`last_seen`, taken before the present supervisor gave its first).
    """
    events = [event for event in read_events(folder) if event["event"] != "seen"]
    if not events or _is_over(events):
        return
    at = max(events[-1]["time"], min(seen or 0.0, time.time()))
    record(folder, "ended", time=at, why="supervisor killed", final=True)


@dataclass(frozen=True)
class Account:
    """A run's wall time.

    Attributes:
        seconds: by kind (`KINDS`): "start" is from the first start of the ranks to the first step, "restart" from a
            failure to the next step, "lost" what was computed and had to be computed again, "finish" the end.
        attempts: times that ranks were started.
        failures: (time, how, step) of each attempt that failed.
        steps_lost: optimizer steps computed again.
        step: optimizer steps done, as the last event says that names one; 0 where none has.
    """

    seconds: dict[str, float]
    attempts: int
    failures: list[tuple[float, str, int]]
    steps_lost: int
    step: int

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
        if self.running:  # the supervisor was killed, so the end was not written: it is the last sign of life
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
            kind = "training" if name in TRAINING else name if name in KINDS else "training"
            seconds[kind] += float(value)
        seconds["training"] += wall - sum(seconds.values())  # what the clock did not see
        self.spans.append(_Span(self.step, int(event["step"]), seconds))
        self.step, self.mark = int(event["step"]), event["time"]

    def seen(self, event: dict[str, Any]) -> None:
        """The supervisor was alive then, and nothing else has been written since."""
        if not self.running:
            return
        if self.training:
            self.seconds["training"] += event["time"] - self.mark
        else:
            kind = "restart" if self.failed_at is not None else "start"
            self.seconds[kind] += event["time"] - (event["time"] if self.since is None else self.since)
        self.since = self.mark = event["time"]

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
        if event.get("final"):  # a start by the user, perhaps a day later, is no restart
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
        """Count what was computed beyond the step that the run resumes from as lost."""
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


def account(events: Iterable[dict[str, object]], now: float | None = None) -> Account:
    """Add up a run's events.

    Args:
        events: as `read_events` returns them.
        now: the present, for a running run; None takes the last event as the end.
    """
    book = _Book()
    known = {"attempt", "began", "spent", "rewound", "ended", "seen"}
    for event in events:
        if event["event"] in known:
            getattr(book, event["event"])(event)
    if book.running and now is not None and book.training:
        book.seconds["finish"] += now - book.mark
    for span in book.spans:
        for kind, value in span.seconds.items():
            book.seconds[kind] += value
    return Account(book.seconds, book.attempts, book.failures, book.steps_lost, book.step)


def kinds_by_size(account: Account) -> Sequence[tuple[str, float]]:
    """Return (kind, seconds) of what took any time, largest first."""
    return sorted(((k, s) for k, s in account.seconds.items() if s > 0), key=lambda pair: -pair[1])
