"""The scheduler's book-keeping: rows of the database to the policy's values, and its decisions to rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sa

from launch.queue import schema as db
from launch.queue.attempts import Ended
from launch.queue.config import QueueConfig
from launch.queue.keeper import OUTPUT
from launch.queue.order import decayed
from launch.queue.outcome import BACKOFF_MAX_S, Outcome, backoff, judge, why
from launch.queue.policy import SHOWN
from launch.queue.state import Job, Node, Placement, Plan, Running, Start, Stop
from launch.queue.store import Row, Store, event
from launch.ranks.logs import last_error_line

_NODE_HALF_LIFE_S = 6 * 3600.0
_MOST_IN_ROW = 20  # failures of machines, after which the job is given up
_SAME_S = 30.0


@dataclass
class Book:
    """Reads and writes for one scheduler.

    Attributes:
        config: queue.toml.
        clock: Unix time.
    """

    config: QueueConfig
    clock: Callable[[], float]

    def nodes(self, store: Store) -> list[Node]:
        """Return all nodes."""
        now = self.clock()
        return [
            Node(
                row["name"],
                row["slots"],
                bool(row["up"]) and row["drained"] is None,
                decayed(row["failures"], now - row["failed_at"], _NODE_HALF_LIFE_S),
            )
            for row in store.rows(sa.select(db.nodes).order_by(db.nodes.c.name))
        ]

    def waiting(self, store: Store) -> list[Job]:
        """Return all jobs that wait."""
        wanted = [column for column in db.jobs.c if column.name not in ("config", "directory")]
        rows = store.rows(sa.select(*wanted).where(db.jobs.c.state == "waiting").order_by(db.jobs.c.id))
        needed = {number for row in rows for number in row["after"]}
        done: dict[int, float] = {}
        if needed:
            query = sa.select(db.jobs.c.id, db.jobs.c.finished)
            query = query.where(db.jobs.c.state == "done", db.jobs.c.id.in_(sorted(needed)))
            done = {row["id"]: row["finished"] or 0.0 for row in store.rows(query)}
        return [
            replace(
                self._job(row, after=tuple(number for number in row["after"] if number not in done)),
                # It waits for slots only since those that it waited for are done.
                waiting_since=max([row["waiting_since"], *(done[n] for n in row["after"] if n in done)]),
            )
            for row in rows
        ]

    def _job(self, row: Row, after: tuple[int, ...] = (), prefix: str = "") -> Job:
        limit, eligible_at = row[f"{prefix}limit_s"], row[f"{prefix}eligible_at"]
        hours = self.config.user(row[f"{prefix}user"]).max_hours
        turn = 3600 * min(self.config.policy.turn_hours, hours or self.config.policy.turn_hours)
        return Job(
            id=row[f"{prefix}id"],
            user=row[f"{prefix}user"],
            priority=row[f"{prefix}priority"],
            waiting_since=row[f"{prefix}waiting_since"],
            sizes=tuple(row[f"{prefix}sizes"]),
            per_node=row[f"{prefix}per_node"],
            limit_s=turn if limit is None else max(1.0, limit - row[f"{prefix}used_s"]),
            hard=limit is not None,
            # No failure makes a job wait so long: the clock was set back since.
            eligible_at=eligible_at if eligible_at - self.clock() <= BACKOFF_MAX_S else 0.0,
            held=bool(row[f"{prefix}held"]),
            after=after,
        )

    def running(self, row: Row, saved: float) -> Running:
        """Return an attempt that has not ended."""
        return Running(
            self._job(row, prefix="job_"),
            as_placement(row["placement"]),
            row["started"],
            saved,
            row["state"] == "stopping",
            as_placement(row["then_on"]),
            bool(row["boosted"]),
        )

    def use(self, store: Store, running: Sequence[Running], now: float) -> dict[str, float]:
        """Return each user's decayed use, that of running jobs included."""
        half_life = 86400 * self.config.policy.half_life_days
        found = {
            row["user"]: decayed(row["slot_s"], now - row["at"], half_life) for row in store.rows(sa.select(db.use))
        }
        for run in running:
            found[run.job.user] = found.get(run.job.user, 0.0) + run.ranks * max(0.0, now - run.started)
        return found

    def open(
        self, connection: sa.Connection, start: Start, number: int, folder: Path, devices: list[str] | None
    ) -> None:
        """Write down that an attempt begins."""
        now = self.clock()
        ranks = sum(count for _, count in start.placement)
        connection.execute(
            sa.insert(db.attempts).values(
                job=start.job, number=number, state="running", placement=start.placement, devices=devices, ranks=ranks,
                started=now, boosted=start.boosted, folder=str(folder), then_on=(),
            )
        )  # fmt: skip
        since = connection.execute(sa.select(db.jobs.c.waiting_since).where(db.jobs.c.id == start.job)).scalar_one()
        ended = sa.select(sa.func.max(db.attempts.c.ended)).where(db.attempts.c.job == start.job)
        since = max(since, connection.execute(ended).scalar() or 0.0)
        changed = {"state": "running", "attempts": number, "reason": "", "place": None, "expected": None}
        connection.execute(_job_row(start.job).values(**changed))
        waited = max(0.0, now - since)
        event(connection, "started", start.job, attempt=number, placement=start.placement, waited=waited)

    def ask_to_stop(self, connection: sa.Connection, stop: Stop, row: Row) -> None:
        """Write down that an attempt is to stop."""
        connection.execute(
            _attempt_row(row).values(state="stopping", stop_why=stop.why, stop_at=self.clock(), then_on=stop.then)
        )
        connection.execute(_job_row(stop.job).values(state="stopping"))
        event(connection, "stopping", stop.job, attempt=row["number"], why=stop.why, room_for=stop.by, then=stop.then)

    def close(self, connection: sa.Connection, row: Row, ended: Ended) -> Placement | None:
        """Write down how an attempt ended and what becomes of its job.

        Returns:
            Where the job starts again at once, after a resize; None otherwise.
        """
        outcome = judge(ended, row["stop_why"] is not None, why(Path(row["job_folder"])), row["job_failures_in_row"])
        ran = max(0.0, ended.time - row["started"]) if ended.began else 0.0
        connection.execute(_attempt_row(row).values(state="ended", ended=ended.time, code=ended.code, how=outcome.how))
        self._charge(connection, row["job_user"], row["ranks"] * ran)
        if outcome.blames_machine:
            self._blame(connection, as_placement(row["placement"]))
        used = row["job_used_s"] + ran
        connection.execute(_job_row(row["job"]).values(used_s=used))
        event(connection, "ended", row["job"], attempt=row["number"], how=outcome.how, code=ended.code, seconds=ran)
        if outcome.how == "done":
            self.end(connection, row["job"], "done", "")
        elif row["job_cancelled"]:
            self.end(connection, row["job"], "cancelled", "cancelled by its user")
        elif outcome.how == "stopped" and row["stop_why"] == "limit":
            self.end(connection, row["job"], "over limit", "reached its time limit; `setformer queue release` goes on")
        elif outcome.how == "stopped":
            self._wait(connection, row, self._since(row, ran), failures_in_row=0)
            if row["stop_why"] == "resize" and row["then_on"]:
                return as_placement(row["then_on"])
        else:
            self._failed(connection, row, outcome, self._since(row, ran))
        return None

    def _since(self, row: Row, ran: float) -> float:
        """Return since when a job waits; a start that gave it little time, and no whole turn, is as if none."""
        short = ran < 60 * self.config.policy.protect_minutes and row["stop_why"] != "turn"
        return float(min(row["job_waiting_since"], self.clock())) if short else self.clock()

    def _failed(self, connection: sa.Connection, row: Row, outcome: Outcome, since: float) -> None:
        own = outcome.how in ("mistake", "error")
        failures, in_row = row["job_own_failures"] + own, row["job_failures_in_row"] + 1
        if outcome.how == "mistake":
            self.end(connection, row["job"], "failed", last_error(row) or "a mistake that only its user can repair")
        elif own and failures > row["job_max_retries"]:
            self.end(connection, row["job"], "failed", last_error(row) or "failed by itself; see its log")
        elif in_row >= _MOST_IN_ROW:
            self.end(connection, row["job"], "failed", f"failed {in_row} times in a row ({outcome.how})")
        else:
            until = self.clock() + backoff(in_row)
            self._wait(connection, row, since, own_failures=failures, failures_in_row=in_row, eligible_at=until)

    def _wait(self, connection: sa.Connection, row: Row, since: float, **changed: object) -> None:
        values = {"state": "waiting", "waiting_since": since, **changed}
        connection.execute(_job_row(row["job"]).values(**values))

    def end(self, connection: sa.Connection, job: int, state: str, reason: str) -> None:
        """Write down the end of a job."""
        values = {"state": state, "reason": reason, "finished": self.clock(), "place": None, "expected": None}
        connection.execute(_job_row(job).values(**values))
        event(connection, state, job)

    def _charge(self, connection: sa.Connection, user: str, slot_s: float) -> None:
        now = self.clock()
        half_life = 86400 * self.config.policy.half_life_days
        row = connection.execute(sa.select(db.use).where(db.use.c.user == user)).mappings().first()
        if row is None:
            connection.execute(sa.insert(db.use).values(user=user, slot_s=slot_s, at=now))
            return
        total = decayed(row["slot_s"], now - row["at"], half_life) + slot_s
        connection.execute(sa.update(db.use).where(db.use.c.user == user).values(slot_s=total, at=now))

    def _blame(self, connection: sa.Connection, placement: Placement) -> None:
        """Count a failure against its nodes, shared among them; drain a node that fails again and again."""
        now = self.clock()
        for name, _ in placement:
            found = connection.execute(sa.select(db.nodes).where(db.nodes.c.name == name)).mappings().first()
            if found is None:
                continue
            before = decayed(found["failures"], now - found["failed_at"], _NODE_HALF_LIFE_S)
            failures = before + 1 / len(placement)
            values: dict[str, object] = {"failures": failures, "failed_at": now}
            if failures >= self.config.policy.suspect_failures and found["drained"] is None:
                values["drained"] = f"{failures:.1f} failures lately"
                event(connection, "drained", None, node=name, failures=failures)
            connection.execute(sa.update(db.nodes).where(db.nodes.c.name == name).values(**values))

    def explain(self, connection: sa.Connection, plan: Plan) -> None:
        """Write down why jobs wait and when they are expected to start, where that has changed."""
        places = {job: place for place, job in enumerate(plan.order, 1) if job in plan.waits}
        table = db.jobs
        query = sa.select(table.c.id, table.c.reason, table.c.place, table.c.expected)
        changed = []
        for number, reason, place, expected in connection.execute(query.where(table.c.state == "waiting")):
            wait = plan.waits.get(number)
            if wait is None:
                continue
            now_at = places.get(number, 0)
            shown = now_at if 0 < now_at <= SHOWN else None
            same = (expected is None) == (wait.expected is None) and abs(
                (expected or 0) - (wait.expected or 0)
            ) < _SAME_S
            if reason != wait.reason or place != shown or not same:
                changed.append({"n": number, "r": wait.reason, "p": shown, "e": wait.expected})
        if changed:
            statement = sa.update(table).where(table.c.id == sa.bindparam("n"), table.c.state == "waiting")
            statement = statement.values(reason=sa.bindparam("r"), place=sa.bindparam("p"), expected=sa.bindparam("e"))
            connection.execute(statement, changed)


def last_error(row: Row) -> str:
    """Return the last line of an attempt's output that looks like an error, or its last line."""
    return last_error_line(Path(row["folder"]) / OUTPUT, 0)[:300]


def as_placement(value: Sequence[Sequence[object]]) -> Placement:
    """Return a placement that was stored as JSON."""
    return tuple((str(name), int(str(count))) for name, count in value)


def _job_row(number: int) -> sa.Update:
    return sa.update(db.jobs).where(db.jobs.c.id == number)


def _attempt_row(row: Row) -> sa.Update:
    return sa.update(db.attempts).where(db.attempts.c.job == row["job"], db.attempts.c.number == row["number"])
