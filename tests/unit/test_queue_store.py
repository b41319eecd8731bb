"""The queue's database, on SQLite and on a real PostgreSQL: migrations, lease, wishes, damage; and whole rounds."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from launch.queue import attempts, keeper, wishes
from launch.queue import schema as db
from launch.queue.attempts import Ended, Watcher
from launch.queue.book import Book
from launch.queue.config import QueueConfig, load
from launch.queue.outcome import backoff, judge
from launch.queue.page.figures import Figures
from launch.queue.page.live import Watch
from launch.queue.scheduler import Scheduler
from launch.queue.source import Local
from launch.queue.state import Start
from launch.queue.store import Lease, LeaseLostError, MissingError, Store, event, url_of
from launch.queue.submit import Request, seconds_of, submit
from setformer_dist.core.errors import ConfigError, LaunchError, SetformerError, TransientError
from tests.unit.queue_postgres import Postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL."""
    server = Postgres()
    yield server.url
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return url_of(tmp_path)
    found = str(request.getfixturevalue("postgres"))
    engine = sa.create_engine(found)
    db.METADATA.drop_all(engine)
    engine.dispose()
    return found


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    made = Store(url)
    yield made
    made.close()


def _config(slots: int = 2) -> QueueConfig:
    return QueueConfig.model_validate({"cluster": {"slots": slots}})


def _submit(store: Store, name: str, ranks: str = "1", config: QueueConfig | None = None, **other: object) -> int:
    words = {"user": "ada", "name": other.pop("label", None), **other}
    request = Request(Path("demo"), [f"run.name={name}"], ranks, **words)  # type: ignore[arg-type]
    return submit(store, config or _config(), request)


def test_a_database_of_the_first_schema_keeps_its_jobs(url: str) -> None:
    store = Store(url)
    _submit(store, "old")
    with store.write() as connection:
        connection.execute(sa.text("ALTER TABLE queue_jobs DROP COLUMN kind"))
        connection.execute(sa.text("ALTER TABLE queue_nodes DROP COLUMN vacate"))
        connection.execute(sa.update(db.schema).values(version=1))
    store.close()
    store = Store(url)
    assert [(row["kind"], row["name"]) for row in store.rows(sa.select(db.jobs))] == [("run", "old")]
    assert store.rows(sa.select(db.schema.c.version)) == [{"version": len(db.STEPS)}]
    store.close()


def test_a_newer_schema_is_refused_and_an_interrupted_migration_leaves_the_old_one(url: str) -> None:
    Store(url).close()

    def broken(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE queue_jobs ADD COLUMN more INTEGER")
        raise RuntimeError("killed")

    store = Store(url)
    with pytest.raises(RuntimeError), store.write() as connection:
        db.migrate(connection, (*db.STEPS, broken))
    assert "more" not in {column["name"] for column in sa.inspect(store._engine).get_columns("queue_jobs")}
    assert not store.check()
    with store.write() as connection:
        connection.execute(sa.update(db.schema).values(version=9))
    with pytest.raises(LaunchError, match="schema 9, and this version of setformer_dist knows 2"):
        Store(url)


def test_two_schedulers_never_act_at_once(store: Store) -> None:
    first, second = Lease(store, "a", 0.3), Lease(store, "b", 0.3)
    assert first.acquire()
    assert not second.acquire()
    time.sleep(0.2)
    with first.write():
        pass  # a sign of life
    time.sleep(0.2)
    assert not second.acquire()
    time.sleep(0.35)  # the first one hangs
    assert second.acquire()
    with pytest.raises(LeaseLostError), first.write() as connection:
        event(connection, "never")
    assert not store.rows(sa.select(db.events))
    first.release()  # gives back nothing that is not its own
    with second.write():
        pass
    second.release()
    assert Lease(store, "c").acquire()  # at once


def test_what_users_wish(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    number = _submit(store, "one", "1:2")
    assert store.job(number)["sizes"] == [1, 2]
    with pytest.raises(LaunchError, match="job 1 has the run folder"):
        _submit(store, "one")
    assert _submit(store, "one", after=[number]) == number + 1
    assert wishes.hold(store, number) == "waits until it is released"
    assert wishes.release(store, number) == "may start"
    with pytest.raises(LaunchError, match="not held"):
        wishes.release(store, number)
    assert wishes.move(store, _config(), number, 7) == "has priority 7"
    assert store.job(number)["priority"] == 7
    with pytest.raises(LaunchError, match="no job 99"):
        wishes.cancel(store, 99)
    with pytest.raises(LaunchError, match="it has seen none yet"):
        wishes.drain(store, "x", "why")
    assert not store.check()


def test_impossible_requests_say_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(url_of(tmp_path))
    cases: list[tuple[dict[str, object], str]] = [
        ({"ranks": "4"}, "4 ranks do not fit: this cluster has 1 node with 2 slots.*--ranks 2 would fit"),
        ({"ranks": None, "nodes": 2, "per_node": 2}, "--nodes 1 --ranks-per-node 2 would fit"),
        ({"ranks": None, "nodes": 1, "per_node": 4}, "--ranks-per-node 2 would fit"),
        ({"ranks": None, "nodes": 1}, "belong together"),
        ({"ranks": "2", "nodes": 1, "per_node": 1}, "give only one"),
        ({"ranks": "2:1"}, "the smaller number first"),
        ({"ranks": "x"}, "no number of ranks"),
        ({"limit": "soon"}, "no time"),
        ({"priority": 101}, "more than ada may give"),
        ({"after": [5]}, "no such job"),
        ({"after": [10**30]}, "a number is larger than"),
        ({"max_retries": 10**30}, "a number is larger than"),
        ({"label": "x" * 256}, "--name has 256 characters: 255 at most"),
        ({"label": "a\0b"}, "--name .* is not valid text"),
        ({"user": "\udcff"}, "--user .* is not valid text"),
        ({"user": "x" * 101}, "--user has 101 characters"),
    ]
    for asked, said in cases:
        with pytest.raises(LaunchError, match=said):
            _submit(store, "x", **{"ranks": "1", **asked})
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        submit(store, _config(), Request(Path("demo"), ["optim.lrr=1"]))
    assert not store.rows(sa.select(db.jobs))
    assert [seconds_of(text) for text in ("90", "30m", "4h", "2d")] == [90, 1800, 14400, 172800]


def test_damaged_read_only_and_unreachable_databases_are_one_sentence(tmp_path: Path) -> None:
    Store(url_of(tmp_path)).close()
    (tmp_path / "copy").mkdir()
    store = Store(url_of(tmp_path))
    store.backup(tmp_path / "copy" / "queue.db")
    with pytest.raises(LaunchError, match="exists"):
        store.backup(tmp_path / "copy" / "queue.db")
    with pytest.raises(LaunchError, match="cannot be used"):
        store.backup(tmp_path / "nowhere" / "queue.db")
    assert not Store(url_of(tmp_path / "copy")).check()
    store.close()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "queue.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(LaunchError, match="not a database; restore a backup"):
        Store(url_of(tmp_path / "bad"))
    with sqlite3.connect(tmp_path / "copy" / "queue.db") as file:
        file.execute("DELETE FROM queue_lease")
        file.execute("INSERT INTO queue_events VALUES (1, 0.0, 'x', 1, '{bad')")
    file.close()
    store = Store(url_of(tmp_path / "copy"))
    with pytest.raises(LaunchError, match=r"is damaged \(No row.*restore a backup"):
        store.lease()
    with pytest.raises(LaunchError, match=r"is damaged \(Expecting.*restore a backup"):
        store.rows(sa.select(db.events))
    lease, events = store.check()
    assert lease == "queue_lease has no row, or more than one"
    assert "queue_events is no JSON" in events
    store.close()
    whole = (tmp_path / "copy" / "queue.db").read_bytes()  # SQLite names a table in an error that is no text
    (tmp_path / "bad" / "queue.db").write_bytes(whole.replace(b"queue_", b"\xff" * 6).replace(b"CREATE", b"CRATE "))
    with pytest.raises(LaunchError, match=r"is damaged \('utf-8'.*restore a backup"):
        Store(url_of(tmp_path / "bad")).rows(sa.select(db.jobs))
    (tmp_path / "bad" / "queue.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(LaunchError, match=r"unable to open.*check that"):
        Store(url_of(tmp_path / "nowhere"))
    with pytest.raises(LaunchError, match="no URL of SQLite or PostgreSQL"):
        Store("mysql://x")
    with pytest.raises(TransientError, match="cannot be used"):
        Store("postgresql+psycopg://q:secret@127.0.0.1:1/x?connect_timeout=2")
    (tmp_path / "queue.toml").write_text("[users.ada]\nshares = 2.0\n")
    with pytest.raises(ConfigError, match="did you mean"):
        load(tmp_path)


def test_a_locked_database_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url_of(tmp_path))
    other = sqlite3.connect(tmp_path / "queue.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    program = "import sys, time; time.sleep(0.3)"
    subprocess.run([sys.executable, "-S", "-c", program], check=True)
    assert not store.rows(sa.select(db.jobs))  # reads do not wait
    monkeypatch.setattr("launch.queue.store._BUSY_S", 0.05)
    with pytest.raises(TransientError, match="locked; another process holds it"):
        wishes.drain(Store(url_of(tmp_path)), "vm", None)
    other.execute("COMMIT")
    with store.write() as connection:
        event(connection, "x")
    other.close()


def test_what_an_end_means() -> None:
    def how(code: int | None, asked: bool = False, why: str = "", killed: bool = False) -> tuple[str, bool]:
        found = judge(Ended(code, 0.0, killed), asked, why)
        return found.how, found.blames_machine

    assert how(0, asked=True) == ("done", False)
    assert how(143, asked=True) == ("stopped", False)
    assert how(-9, asked=True, killed=True) == ("stopped", False)  # it ignored SIGTERM
    assert how(-15, asked=True) == ("stopped", False)  # before the supervisor listens to signals
    assert how(143) == ("transient", False)  # somebody else stopped it
    assert how(2)[0] == how(3)[0] == how(7)[0] == "mistake"
    assert how(6, why="error") == ("error", False)
    assert how(6, why="hang") == ("hang", True)
    assert how(6, why="transient") == ("transient", False)
    assert how(-9) == how(None) == ("killed", True)
    assert judge(Ended(None, 0.0, began=False), False, "").how == "stopped"
    assert [backoff(n) for n in (1, 2, 3, 50)] == [10.0, 20.0, 40.0, 600.0]


def _wait_for(condition: object, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_keepers(tmp_path: Path) -> None:
    watcher = Watcher()
    attempts.start(tmp_path / "a", str(tmp_path), [sys.executable, "-S", "-c", "print('x'); raise SystemExit(3)"], {})
    _wait_for(lambda: watcher.look(tmp_path / "a"))
    ended = watcher.look(tmp_path / "a")
    assert ended is not None
    assert (ended.code, (tmp_path / "a" / keeper.OUTPUT).read_text()) == (3, "x\n")
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    attempts.start(tmp_path / "b", str(tmp_path), [sys.executable, "-S", "-c", stubborn], {})
    _wait_for(lambda: (tmp_path / "b" / keeper.OUTPUT).exists() and (tmp_path / "b" / keeper.OUTPUT).read_text())
    assert watcher.look(tmp_path / "b") is None
    attempts.stop(tmp_path / "b", 0.5)
    _wait_for(lambda: watcher.look(tmp_path / "b"))
    assert Watcher().look(tmp_path / "b").killed  # type: ignore[union-attr]
    # Whoever makes the claim decides.
    (tmp_path / "c").mkdir()
    assert keeper.claim(tmp_path / "c", {"revoked": True})
    attempts.start(tmp_path / "c", str(tmp_path), [sys.executable, "-S", "-c", "print('never')"], {})
    time.sleep(0.5)
    assert not (tmp_path / "c" / keeper.OUTPUT).exists()
    assert Watcher().look(tmp_path / "c") == Ended(None, pytest.approx(time.time(), abs=9), began=False)


def test_rounds_with_jobs_that_cannot_train(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the job's is not tried again, and its last line is the reason; a cancelled job does not start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.queue.scheduler.command", lambda *_: [sys.executable, "-S", "-c",
                        "import sys; print('error: no data'); sys.exit(3)"])  # fmt: skip
    config = _config(1)
    first, second = _submit(store, "one", config=config), _submit(store, "two", config=config)
    wishes.cancel(store, second)
    scheduler = Scheduler(store, tmp_path / "q", config)
    limit = time.monotonic() + 30
    while scheduler.step():
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert [(store.job(n)["state"], store.job(n)["reason"]) for n in (first, second)] == [
        ("failed", "error: no data"), ("cancelled", "cancelled by its user"),
    ]  # fmt: skip
    kinds = [row["kind"] for row in store.rows(sa.select(db.events).where(db.events.c.job == first))]
    assert kinds == ["submitted", "started", "ended", "failed"]
    assert not store.check()
    node = store.rows(sa.select(db.nodes))[0]["name"]
    wishes.drain(store, node, "by hand")
    assert "goes on from its newest checkpoint" in wishes.release(store, first)
    scheduler.step()
    assert store.job(first)["reason"] == "does not fit the nodes that are up and not drained"
    wishes.drain(store, node, None)
    scheduler.step()
    assert store.job(first)["state"] == "running"


def test_what_the_page_reads(store: Store) -> None:
    # PostgreSQL is stricter about types and groups than SQLite.
    queue = Local(store, _config())
    for k in range(5):
        number = _submit(store, f"job-{k}", priority=k)
        with store.write() as connection:
            place = {"place": 5 - k if k < 3 else None, "expected": 1e9 + k if k < 3 else None}
            connection.execute(sa.update(db.jobs).where(db.jobs.c.id == number).values(**place))
    with store.write() as connection:
        connection.execute(sa.insert(db.nodes).values(name="node1", slots=2, up=True))
        values = {"job": 1, "number": 1, "state": "running", "placement": [["node1", 2]], "ranks": 2, "started": 7.0,
                  "folder": "/nosuch", "then_on": []}  # fmt: skip
        connection.execute(sa.insert(db.attempts).values(**values))
        connection.execute(sa.update(db.jobs).where(db.jobs.c.id == 1).values(state="running"))
        connection.execute(sa.update(db.jobs).where(db.jobs.c.id == 5).values(state="failed", finished=9.0))
        event(connection, "started", 1, waited=3.0)
    assert [row["id"] for row in queue.jobs(True)] == [1, 3, 2, 4, 5]
    assert [row["id"] for row in queue.waiting(2)] == [3, 2]
    assert [(row["id"], row["ranks"], row["placement"]) for row in queue.running(9)] == [(1, 2, [["node1", 2]])]
    assert [row["id"] for row in queue.ended(9)] == [5]
    assert queue.counts(8.0) == {"running": 1, "waiting": 3, "failed": 1}
    assert queue.counts(10.0) == {"running": 1, "waiting": 3}
    assert queue.nodes() == [{"name": "node1", "slots": 2, "used": 2, "state": "up"}]
    assert queue.job(1)["started"] == 7.0
    last = queue.latest_events(1)[0]
    assert (last["event"], last["waited"]) == ("started", 3.0)
    assert queue.latest_events(9, before=last["id"])[0]["id"] < last["id"]
    assert queue.output(1, 1, 0)["text"] == ""
    with pytest.raises(MissingError, match="job 1 has no attempt 2"):
        queue.output(1, 2, 0)
    watch = Watch(store)
    assert watch._look()[:4] == watch._look()[:4]  # without the clock
    figures = Figures(queue, Path("/nosuch")).text().decode()
    assert 'setformer_queue_jobs{state="waiting",user="ada"} 3.0' in figures
    assert "setformer_queue_wait_seconds_sum 3.0" in figures


def test_numbers_and_texts_that_no_database_holds_are_one_sentence(store: Store) -> None:
    with pytest.raises(LaunchError, match="number is larger") if store.is_file else pytest.raises(SetformerError):
        store.job(10**30)
    with pytest.raises(LaunchError, match="not valid UTF-8"):
        wishes.drain(store, "\udcff", "by hand")
    with pytest.raises(LaunchError, match=r"--why .* is not valid text"):
        wishes.drain(store, "vm", "\udcff")


def test_a_user_without_a_name_names_itself(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")  # what Python 3.11 and 3.12 raise

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("getpass.getuser", nameless)
    with pytest.raises(LaunchError, match="has no name on this machine: name yourself with --user"):
        submit(store, _config(), Request(Path("demo")))
    assert submit(store, _config(), Request(Path("demo"), user="ada")) == 1


def test_a_scheduler_outlives_a_full_disk_and_ends_where_its_database_is_gone(
    tmp_path: Path,
) -> None:
    store = Store(url_of(tmp_path))
    scheduler = Scheduler(store, tmp_path, _config())
    assert not scheduler.step()
    with store.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    with store.write() as connection:  # no page more: what SQLite says where the disk is full
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(TransientError, match="full; make room there"), store.write() as connection:
        event(connection, "large", text="x" * 100_000)
    path = tmp_path / "queue.db"
    path.rename(tmp_path / "away")
    with pytest.raises(LaunchError, match="was removed or replaced"):
        scheduler.step()
    Store(url_of(tmp_path)).close()  # a new one in its place
    with pytest.raises(LaunchError, match="was removed or replaced"):
        scheduler.step()


def test_a_scheduler_tries_again_after_an_error_of_the_system(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(store, tmp_path, _config())

    def full(_: Scheduler) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "_round", full)
        assert [scheduler.step(), scheduler.step()] == [True, True]
        assert sum("No space left on device; trying again" in line for line in caplog.messages) == 1
    assert not scheduler.step()


def test_a_clock_that_is_set_back_keeps_no_job_waiting(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    number, now = _submit(store, "x"), time.time()
    with store.write() as connection:
        connection.execute(sa.update(db.jobs).where(db.jobs.c.id == number).values(eligible_at=now + 600.0))
    assert Book(_config(), lambda: now).waiting(store)[0].eligible_at == now + 600.0
    assert Book(_config(), lambda: now - 86400.0).waiting(store)[0].eligible_at == 0.0


def test_since_when_a_job_waits(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while it is held or waits for another job; and a start that gave it no time does not begin it anew."""
    monkeypatch.chdir(tmp_path)
    first, second, held = _submit(store, "a"), _submit(store, "b", after=[1]), _submit(store, "c", held=True)
    now = time.time()
    with store.write() as connection:
        connection.execute(sa.update(db.jobs).values(waiting_since=now - 90000.0))
    book = Book(_config(), lambda: now)
    placement = (("vm", 1),)
    with store.write() as connection:
        book.open(connection, Start(first, placement), 1, tmp_path / "1", None)
    query = sa.select(db.attempts, *(c.label(f"job_{c.name}") for c in db.jobs.c)).join(db.jobs)
    short, long = (now - 3599.0, "preempted", now - 90000.0), (now - 3601.0, "preempted", now)
    for started, why, since in (short, long, (now - 60.0, "turn", now)):
        (row,) = store.rows(query.where(db.attempts.c.state != "ended"))
        with store.write() as connection:
            row |= {"started": started, "stop_why": why, "job_waiting_since": now - 90000.0}
            book.close(connection, row, Ended(143, now))
        assert store.job(first)["waiting_since"] == since
        with store.write() as connection:
            book.open(connection, Start(first, placement), store.job(first)["attempts"] + 1, tmp_path / "2", None)
    waited = [row["data"]["waited"] for row in store.rows(sa.select(db.events).where(db.events.c.kind == "started"))]
    assert waited == [90000.0, 0.0, 0.0, 0.0]  # what was told before is not told again
    with store.write() as connection:
        book.end(connection, first, "done", "")
    assert wishes.release(store, held) == "may start"
    assert all(0 <= each.waiting_since - now < 60 for each in book.waiting(store))  # the release was a moment ago
    assert [each.id for each in book.waiting(store)] == [second, held]
