"""The queue's database: SQLite in the queue's folder by default, or PostgreSQL by URL.

Reads see one consistent state. Every write is one transaction. Those of a scheduler are conditional on its lease
(`Lease.write`): one that has lost it changes nothing, however late it wakes. Times are Unix times, for people to read;
no decision between two schedulers compares clocks.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from launch.queue import schema as db
from setformer_dist.core.errors import LaunchError, SetformerError, TransientError
from setformer_dist.core.secrets import redacted

Row = dict[str, Any]
_BUSY_S = 60.0  # how long a write waits for others: ten thousand may submit at once
FILE = "queue.db"
_MIGRATION = 0x5E7F04  # PostgreSQL's advisory lock of migrations


class LeaseLostError(SetformerError):
    """Another scheduler has taken over: this one must not act any more."""


class MissingError(LaunchError):
    """The queue has no such job, attempt or node."""


class Store:
    """A queue's database."""

    def __init__(self, url: str, check: bool = True) -> None:
        """Open it; make or migrate its tables.

        Args:
            url: of SQLAlchemy, such as sqlite:////folder/queue.db or postgresql+psycopg://host/name.
            check: migrate; otherwise it is taken as it is.

        Raises:
            LaunchError: it cannot be used; the message says why.
            TransientError: it does not answer now.
        """
        self.shown = redacted(url)
        try:
            self._engine = sa.create_engine(url, pool_pre_ping=True)
        except (exc.ArgumentError, exc.NoSuchModuleError, ModuleNotFoundError) as error:
            raise LaunchError(
                f"the queue's database {self.shown} is no URL of SQLite or PostgreSQL "
                f"({_line(error)}): write postgresql+psycopg://USER@HOST/NAME"
            ) from None
        self.is_file = self._engine.dialect.name == "sqlite"
        self._inode = 0  # of the file, once a scheduler has looked
        if self.is_file:
            _prepare_sqlite(self._engine)
        if check:
            with self.read() as connection:
                version = db.version_of(connection)
            if version != len(db.STEPS):
                with self.write() as connection:
                    if not self.is_file:  # two may come at once, and CREATE TABLE does not wait
                        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION)))
                    db.migrate(connection)

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Give a connection that sees one state.

        Raises:
            LaunchError, TransientError: as the constructor.
        """
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Give a connection whose changes are one transaction; raises as `read`."""
        with self._explained(), self._engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (exc.DBAPIError, sqlite3.Error) as error:
            said = _line(error.orig if isinstance(error, exc.DBAPIError) else error)
            text = f"the queue's database {self.shown} cannot be used: {said}"
            for word, repair in _REPAIRS:
                if word in said.lower():
                    raise LaunchError(f"{text}; {repair}") from None
            repairs = [repair for word, repair in _PASSES if word in said.lower()]
            raise TransientError("; ".join([text, *repairs])) from None
        except OverflowError:
            raise LaunchError("a number is larger than the queue's database can hold: write a smaller one") from None
        except UnicodeEncodeError:
            raise LaunchError("a text is not valid UTF-8, so the queue's database cannot hold it: change it") from None
        except (ValueError, exc.NoResultFound) as error:  # bytes that are no text, no JSON; no lease
            raise LaunchError(f"the queue's database {self.shown} is damaged ({_line(error)}); {_RESTORE}") from None

    def rows(self, query: sa.Select[Any]) -> list[Row]:
        """Return the rows of a query as dicts."""
        with self.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def job(self, number: int) -> Row:
        """Return a job.

        Raises:
            MissingError: there is none.
        """
        found = self.rows(sa.select(db.jobs).where(db.jobs.c.id == number))
        if not found:
            raise MissingError(f"the queue has no job {number}: see `setformer queue ls --all`")
        return found[0]

    def check_file(self) -> None:
        """Refuse a SQLite file that is another one than at the last call, or gone: what is written would be lost.

        Raises:
            LaunchError: as said.
        """
        if not self.is_file:
            return
        path = str(self._engine.url.database)
        try:
            found = Path(path).stat().st_ino
        except FileNotFoundError:
            found = 0
        self._inode = self._inode or found
        if found != self._inode:
            raise LaunchError(
                f"the queue's database {path} was removed or replaced while a scheduler used it: restore a backup, or "
                "start `setformer queue serve` again"
            )

    def lease(self) -> Row:
        """Return the row of the lease; raises LaunchError where there is none."""
        with self.read() as connection:
            return dict(connection.execute(sa.select(db.lease)).mappings().one())

    def parsed(self, text: str) -> Any:
        """Return what a column holds as JSON; raises LaunchError where it is none."""
        with self._explained():
            return json.loads(text)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def check(self) -> list[str]:
        """Return what is wrong with the database; nothing where it is whole."""
        with self.read() as connection:
            faults = []
            if self.is_file:
                said = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
                faults += [line for line in said if line != "ok"]
            faults += _contradictions(connection)
            return faults

    def backup(self, path: Path) -> None:
        """Write a copy of a SQLite database, whole or not at all, while it is in use.

        Raises:
            LaunchError: the database is PostgreSQL's, or the path is taken.
        """
        if not self.is_file:
            raise LaunchError(f"{self.shown} is backed up by PostgreSQL's own pg_dump")
        if path.exists():
            raise LaunchError(f"{path} exists: name another file for the backup")
        aside = path.with_name(f".{path.name}.tmp")
        aside.unlink(missing_ok=True)
        try:
            with self.read() as connection, contextlib.closing(sqlite3.connect(aside)) as target:
                source = connection.connection.driver_connection
                assert isinstance(source, sqlite3.Connection)
                source.backup(target)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


class Lease:
    """The right to act as the queue's only scheduler, held as long as nobody else has taken it.

    A holder that gives no sign of life (`beat` stands still) for `stale_s` of the observer's own clock has lost it.
    """

    def __init__(self, store: Store, holder: str, stale_s: float = 8.0) -> None:
        self._store = store
        self._holder = holder
        self._stale_s = stale_s
        self.term: int | None = None
        self._seen: tuple[int, int] | None = None
        self._seen_at = 0.0

    def acquire(self) -> bool:
        """Try to take it; to be called again and again, at least once a second."""
        row = self._store.lease()
        seen = (int(row["term"]), int(row["beat"]))
        now = time.monotonic()
        if row["holder"] and (seen != self._seen or now - self._seen_at < self._stale_s):
            if seen != self._seen:
                self._seen, self._seen_at = seen, now
            return False
        with self._store.write() as connection:
            table = db.lease
            changed = connection.execute(
                sa.update(table)
                .where(table.c.term == seen[0], table.c.beat == seen[1])
                .values(term=seen[0] + 1, beat=0, holder=self._holder)
            )
            if changed.rowcount:
                self.term = seen[0] + 1
        return self.term is not None

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Give a transaction that is made only if the lease is still this one's, and renews it.

        Raises:
            LeaseLostError: it is not.
        """
        with self._store.write() as connection:
            table = db.lease
            mine = (table.c.term == self.term, table.c.holder == self._holder)
            changed = connection.execute(sa.update(table).where(*mine).values(beat=table.c.beat + 1))
            if not changed.rowcount:
                raise LeaseLostError("another scheduler has taken over the queue")
            yield connection

    def release(self) -> None:
        """Give it back, so that another takes over at once."""
        with contextlib.suppress(SetformerError), self._store.write() as connection:
            table = db.lease
            connection.execute(sa.update(table).where(table.c.term == self.term).values(holder=""))


_RESTORE = "restore a backup (`setformer queue backup` makes them)"
_REPAIRS = (
    ("malformed", _RESTORE),
    ("not a database", _RESTORE),
    ("no such table", _RESTORE),
    ("no such column", _RESTORE),
    ("readonly", "change who may write there"),
    ("unable to open", "check that the queue's folder exists and may be written"),
    ("password", "check user and password in queue.toml"),
    ("does not exist", "create it, with createdb"),
)

_PASSES = (
    ("full", "make room there"),
    ("locked", "another process holds it, such as a shell of sqlite3: end that one"),
)


def event(connection: sa.Connection, kind: str, job: int | None = None, **data: object) -> None:
    """Write an event."""
    connection.execute(sa.insert(db.events).values(time=time.time(), kind=kind, job=job, data=data))


def url_of(folder: Path) -> str:
    """Return the URL of the SQLite database of a queue's folder."""
    return f"sqlite:///{(folder / FILE).absolute()}"


def _prepare_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # SQLAlchemy begins transactions, below
        for pragma in (
            f"busy_timeout={int(_BUSY_S * 1e3)}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200]


def _contradictions(connection: sa.Connection) -> Sequence[str]:
    """Return what contradicts itself between tables."""
    live = sa.select(db.attempts.c.job, sa.func.count()).where(db.attempts.c.state != "ended").group_by("job")
    counts: dict[int, int] = {int(job): int(count) for job, count in connection.execute(live)}
    states: dict[int, str] = {int(i): s for i, s in connection.execute(sa.select(db.jobs.c.id, db.jobs.c.state))}
    faults = [f"job {job} has {count} attempts that run" for job, count in counts.items() if count > 1]
    for number, state in states.items():
        runs = state in ("running", "stopping")
        if runs != (number in counts):
            faults.append(f"job {number} is {state} and has {counts.get(number, 0)} attempts that run")
    if len(connection.execute(sa.select(db.lease)).all()) != 1:
        faults.append(f"{db.lease.name} has no row, or more than one")
    for table in (db.jobs, db.attempts, db.events):
        try:
            for row in connection.execute(sa.select(table)).mappings():
                json.loads(row.get("config", "{}"))
        except ValueError as error:
            faults.append(f"a row of {table.name} is no JSON or no text: {error}")
    return faults
