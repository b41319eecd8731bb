"""What people see and change of a queue: one set of calls for the database (here) and for a server (remote.py).

Rows are dicts of JSON values; the JSON API gives the same ones. Texts of users are as they were given, but for secrets
of URLs; who shows them escapes them.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from launch.queue import schema as db
from launch.queue import wishes
from launch.queue.config import QueueConfig
from launch.queue.keeper import OUTPUT
from launch.queue.settings import Settings
from launch.queue.store import MissingError, Row, Store
from launch.queue.submit import Request
from launch.queue.submit import submit as put
from setformer_dist.core.files import open_plain
from setformer_dist.core.secrets import redacted, redacted_json
from setformer_dist.core.words import plain_page

CHUNK = 1 << 16  # bytes of a log in one answer
MOST_EVENTS = 1000  # in one answer
_COLOURS = re.compile(r"\x1b\[[0-9;]{0,32}m")
_BY_AGE = ("running", "stopping", "waiting")
_LIVE = ("running", "stopping")
_WORDS = {"placement": "on", "seconds": "ran", "room_for": "makes room for job", "then": "then on", "sizes": "ranks",
          "how": "", "why": "because:", "code": "exit code"}  # fmt: skip


class Source(Protocol):
    """A queue as people see it. Every call raises LaunchError or ConfigError with a sentence for its user."""

    def leader(self) -> Row | None:
        """Return host, pid and term of the scheduler; None where none runs."""

    def fault(self) -> str:
        """Return why queue.toml is not in force, in one sentence; "" where it is."""

    def nodes(self) -> list[Row]:
        """Return name, slots, used and state of each node."""

    def jobs(self, everything: bool) -> list[Row]:
        """Return jobs: those that run, those that wait in their order, then, if asked, those that have ended."""

    def job(self, number: int) -> Row:
        """Return one job with its config, its attempts (`tries`) and its first thousand events."""

    def events(self, since: int) -> list[Row]:
        """Return the events after one, a thousand at most."""

    def output(self, number: int, attempt: int, start: int) -> Row:
        """Return a piece of what an attempt printed: attempts, state of the job, start, end, text."""

    def cancel(self, number: int) -> str:
        """Have a job end; return what happens."""

    def hold(self, number: int) -> str:
        """Have a job wait until it is released; return what happens."""

    def release(self, number: int) -> str:
        """Let a job go on; return what happens."""

    def move(self, number: int, priority: int) -> str:
        """Give a job another priority; return what happens."""

    def drain(self, node: str, why: str | None, vacate: bool = False) -> None:
        """Have no job start on a node, or none stay there either (`vacate`); None lets jobs start there."""

    def submit(self, request: Request) -> int:
        """Put a job into the queue; return its number."""


@dataclass(frozen=True)
class Local:
    """The queue of a database.

    Attributes:
        store: the database.
        config: queue.toml, as it was read first.
        settings: queue.toml as it is now; None where it does not change.
    """

    store: Store
    config: QueueConfig
    settings: Settings | None = None

    def fault(self) -> str:
        """As `Source`."""
        if self.settings is None:
            return ""
        self.settings.look()
        return self.settings.fault

    def _in_force(self) -> QueueConfig:
        if self.settings is None:
            return self.config
        self.settings.look()
        return self.settings.config

    def leader(self) -> Row | None:
        """As `Source`."""
        row = self.store.lease()
        if not row["holder"]:
            return None
        holder = self.store.parsed(row["holder"])
        return {"host": holder["host"], "pid": holder["pid"], "term": row["term"]}

    def nodes(self) -> list[Row]:
        """As `Source`."""
        used: dict[str, int] = {}
        live = sa.select(db.attempts.c.placement).where(db.attempts.c.state != "ended")
        for row in self.store.rows(live):
            for node, count in row["placement"]:
                used[node] = used.get(node, 0) + count
        return [
            {
                "name": row["name"],
                "slots": row["slots"],
                "used": used.get(row["name"], 0),
                "state": "down" if not row["up"] else "up" if row["drained"] is None else f"drained: {row['drained']}",
            }
            for row in self.store.rows(sa.select(db.nodes).order_by(db.nodes.c.name))
        ]

    def jobs(self, everything: bool) -> list[Row]:
        """As `Source`."""
        live = self._in(*_LIVE, "waiting")
        rows = self.rows(sa.true() if everything else live)

        def key(row: Row) -> tuple[object, ...]:
            rank = _BY_AGE.index(row["state"]) if row["state"] in _BY_AGE else len(_BY_AGE)
            place = row["place"] or (1 << 30)
            waits = row["state"] == "waiting"
            return (rank, place if waits else 0, -row["priority"] if waits else 0, row["id"])

        return sorted(rows, key=key)

    def running(self, most: int) -> list[Row]:
        """Return the jobs that run, by number."""
        return self.rows(self._in(*_LIVE), db.jobs.c.id, limit=most)

    def waiting(self, most: int) -> list[Row]:
        """Return the first jobs that wait, in their order."""
        table = db.jobs.c
        order = (sa.func.coalesce(table.place, 1 << 30), table.priority.desc(), table.id)
        return self.rows(self._in("waiting"), *order, limit=most)

    def ended(self, most: int) -> list[Row]:
        """Return the jobs that ended last."""
        return self.rows(self._in(*db.ENDED), db.jobs.c.finished.desc(), limit=most)

    def counts(self, since: float) -> dict[str, int]:
        """Return jobs by state; of those that have ended, the ones that ended after a time."""
        table = db.jobs.c
        query = sa.select(table.state, sa.func.count().label("n"))
        query = query.where(sa.or_(table.state.not_in(db.ENDED), table.finished >= since)).group_by(table.state)
        return {row["state"]: row["n"] for row in self.store.rows(query)}

    def _in(self, *states: str) -> sa.ColumnElement[bool]:
        return db.jobs.c.state.in_(states)

    def rows(self, where: sa.ColumnElement[bool], *order: Any, limit: int | None = None) -> list[Row]:
        """Return jobs without their configs, with placement, start and ranks of those that run."""
        wanted = [column for column in db.jobs.c if column.name != "config"]
        running = sa.select(db.attempts.c.job, db.attempts.c.placement, db.attempts.c.started, db.attempts.c.ranks)
        live = {row["job"]: row for row in self.store.rows(running.where(db.attempts.c.state != "ended"))}
        found = self.store.rows(sa.select(*wanted).where(where).order_by(*order).limit(limit))
        return [{**row, **_now(live.get(row["id"]))} for row in found]

    def job(self, number: int) -> Row:
        """As `Source`."""
        job = self.store.job(number)
        query = sa.select(db.attempts).where(db.attempts.c.job == number).order_by(db.attempts.c.number)
        happened = sa.select(db.events).where(db.events.c.job == number).order_by(db.events.c.id).limit(MOST_EVENTS)
        job["config"] = redacted_json(self.store.parsed(job["config"]))
        tries = self.store.rows(query)
        live = next((row for row in tries if row["state"] != "ended"), None)
        return {**job, **_now(live), "tries": tries, "events": self.store.rows(happened)}

    def events(self, since: int) -> list[Row]:
        """As `Source`."""
        query = sa.select(db.events).where(db.events.c.id > since).order_by(db.events.c.id).limit(MOST_EVENTS)
        return [as_line(row) for row in self.store.rows(query)]

    def latest_events(self, most: int, before: int | None = None) -> list[Row]:
        """Return the latest events, the latest first."""
        query = sa.select(db.events).order_by(db.events.c.id.desc()).limit(most)
        if before is not None:
            query = query.where(db.events.c.id < before)
        return [as_line(row) for row in self.store.rows(query)]

    def output(self, number: int, attempt: int, start: int) -> Row:
        """As `Source`; a start below 0 counts from the end."""
        state = self.store.job(number)["state"]
        folders = wishes.attempt_folders(self.store, number)
        if not (folders and attempt):
            return {"attempts": len(folders), "state": state, "start": 0, "end": 0, "text": ""}
        if attempt > len(folders):
            raise MissingError(f"job {number} has no attempt {attempt}: it has {len(folders)}")
        first, end, text = _piece(folders[attempt - 1] / OUTPUT, start)
        return {"attempts": len(folders), "state": state, "start": first, "end": end, "text": text}

    def cancel(self, number: int) -> str:
        """As `Source`."""
        return wishes.cancel(self.store, number)

    def hold(self, number: int) -> str:
        """As `Source`."""
        return wishes.hold(self.store, number)

    def release(self, number: int) -> str:
        """As `Source`."""
        return wishes.release(self.store, number)

    def move(self, number: int, priority: int) -> str:
        """As `Source`."""
        return wishes.move(self.store, self._in_force(), number, priority)

    def drain(self, node: str, why: str | None, vacate: bool = False) -> None:
        """As `Source`."""
        wishes.drain(self.store, node, why, vacate)

    def submit(self, request: Request) -> int:
        """As `Source`."""
        return put(self.store, self._in_force(), request)


def _now(run: Row | None) -> Row:
    """Return placement, start and ranks of the attempt that runs, if one does."""
    return {
        "placement": run["placement"] if run else [],
        "started": run["started"] if run else None,
        "ranks": run["ranks"] if run else None,
    }


def as_line(row: Row) -> Row:
    """Return an event as one flat object; what an event's data says never hides its number, time, kind or job."""
    return {**row["data"], "id": row["id"], "time": row["time"], "event": row["kind"], "job": row["job"]}


def _piece(path: Path, start: int) -> tuple[int, int, str]:
    """Return where a piece of a file begins and ends, and its text; a character that is not whole yet is left out.

    Colours and the ends of lines of other systems are left out; other control characters are written out.
    """
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            first = min(size, start if start >= 0 else max(0, size + start))
            file.seek(first)
            data = file.read(CHUNK)
    except OSError:
        return 0, 0, ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = _COLOURS.sub("", decoder.decode(data).replace("\r\n", "\n"))
    return first, first + len(data) - len(decoder.getstate()[0]), plain_page(redacted(text))


def span(seconds: float) -> str:
    """Return a length of time in words."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def said(data: Mapping[str, object]) -> str:
    """Return what an event's data says, in words."""
    return ", ".join(
        f"{_WORDS.get(key, key)} {_value(key, value)}".strip()
        for key, value in data.items()
        if value not in (None, "", 0, [])
    )


def _value(key: str, value: object) -> str:
    if key in ("seconds", "waited") and isinstance(value, float):
        return span(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return " ".join(f"{node}:{count}" for node, count in value)
    if key == "sizes" and isinstance(value, list) and value:
        return f"{value[0]}" if len(value) == 1 else f"{value[0]}:{value[-1]}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def ranks_of(row: Row) -> str:
    """Return how many ranks a job wants, or has of those it may have."""
    sizes = row["sizes"]
    if len(sizes) == 1:
        return str(sizes[0])
    return f"{row['ranks']} of {sizes[0]}:{sizes[-1]}" if row["ranks"] else f"{sizes[0]}:{sizes[-1]}"


def expected_in(row: Row, now: float | None = None) -> str:
    """Return in how much time a job is expected to start, "" where that is not known."""
    if row["expected"] is None:
        return ""
    left = row["expected"] - (time.time() if now is None else now)
    return f"in {span(left)}" if left >= 1 else "now"
