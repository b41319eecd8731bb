"""The queue with real runs: adopted by the next scheduler, preempted and resumed bit by bit, shrunk and grown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from launch.queue import attempts, wishes
from launch.queue import schema as db
from launch.queue.config import QueueConfig
from launch.queue.scheduler import Scheduler
from launch.queue.store import Store, url_of
from launch.queue.submit import Request, submit
from launch.sweep.journal import read_events
from setformer_dist.core import ledger
from tests.unit.queue_postgres import Postgres

SMALL = (
    "~schedule.epochs",
    "schedule.steps=12",
    "schedule.warmup_epochs=0",
    "run.log_every=1",
    "batch.global_size=16",
    "model.name=setformer_nano",
)


class Place:
    """A queue in a folder, with its scheduler in this process."""

    def __init__(self, folder: Path, digits: Path, slots: int, url: str | None = None, **policy: float) -> None:
        self.config = QueueConfig.model_validate({"cluster": {"slots": slots}, "policy": policy})
        self.folder, self.digits = folder, digits
        (folder / "q").mkdir()
        self.store = Store(url or url_of(folder / "q"))
        self.scheduler = Scheduler(self.store, folder / "q", self.config, stale_s=0.5)

    def submit(self, name: str, ranks: str = "1", *more: str, **other: object) -> int:
        words = [f"data.root={self.digits}", f"run.name={name}", f"run.out={self.folder / 'runs'}", *SMALL, *more]
        return submit(self.store, self.config, Request(Path("demo"), words, ranks, **other))  # type: ignore[arg-type]

    def until(self, condition: Callable[[], object], seconds: float = 240.0) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            self.scheduler.step()
            assert time.monotonic() < limit, [dict(row) for row in self.store.rows(sa.select(db.events))]
            time.sleep(0.2)

    def state(self, number: int) -> str:
        return str(self.store.job(number)["state"])

    def step(self, name: str) -> int:
        lines = self.metrics(name)
        return max(lines, default=0)

    def metrics(self, name: str) -> dict[int, float]:
        path = self.folder / "runs" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def tries(self, number: int) -> list[tuple[int, str]]:
        query = sa.select(db.attempts).where(db.attempts.c.job == number).order_by(db.attempts.c.number)
        return [(row["ranks"], row["how"]) for row in self.store.rows(query)]

    def close(self) -> None:
        """End what still runs: keepers outlive their schedulers."""
        for row in self.store.rows(sa.select(db.attempts.c.folder).where(db.attempts.c.state != "ended")):
            attempts.kill(Path(row["folder"]))
        self.store.close()


Make = Callable[..., Place]


@pytest.fixture
def make(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make places; what runs there ends with the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made: list[Place] = []

    def make(slots: int, url: str | None = None, **policy: float) -> Place:
        made.append(Place(tmp_path, digits, slots, url, **policy))
        return made[-1]

    yield make
    for place in made:
        place.close()


def test_a_running_job_is_adopted_by_the_next_scheduler(make: Make, tmp_path: Path) -> None:
    place = make(1)
    number = place.submit("one")
    place.until(lambda: place.step("one") > 2)
    before = place.scheduler.lease.term
    place.scheduler = Scheduler(place.store, tmp_path / "q", place.config, stale_s=0.5)  # the first is seen no more
    place.until(lambda: place.state(number) == "done")
    assert place.scheduler.lease.term == (before or 0) + 1
    assert place.tries(number) == [(1, "done")]
    assert not place.store.check()


@pytest.mark.drill
def test_preempted_and_resumed_bit_by_bit(make: Make, tmp_path: Path) -> None:
    place = make(1, save_seconds=5.0)
    alone = place.submit("alone", "1", "schedule.steps=24")
    place.until(lambda: place.state(alone) == "done")
    low = place.submit("low", "1", "schedule.steps=24")
    place.until(lambda: place.step("low") > 6)
    high = place.submit("high", priority=5)
    place.until(lambda: place.state(high) == "running")
    assert place.state(low) == "waiting"
    place.until(lambda: place.state(low) == "done")
    assert place.tries(low) == [(1, "stopped"), (1, "done")]
    assert place.metrics("low") == place.metrics("alone")
    assert not ledger.account(ledger.read_events(tmp_path / "runs" / "low")).steps_lost


@pytest.mark.drill
def test_an_elastic_job_shrinks_and_grows(make: Make, tmp_path: Path) -> None:
    place = make(2, save_seconds=5.0, grow_after_minutes=0.01)
    wide = place.submit("wide", "1:2", "schedule.steps=400")
    place.until(lambda: place.step("wide") > 5)
    small = place.submit("small")
    place.until(lambda: place.state(small) == "done")
    place.until(lambda: len(place.tries(wide)) == 3)
    wishes.cancel(place.store, wide)
    place.until(lambda: place.state(wide) == "cancelled")
    assert [ranks for ranks, _ in place.tries(wide)] == [2, 1, 2]


@pytest.mark.drill
def test_a_stand_by_takes_over_within_ten_seconds(make: Make, tmp_path: Path) -> None:
    place = make(1)
    (tmp_path / "q" / "queue.toml").write_text("[cluster]\nslots = 1\n")
    number = place.submit("one", "1", "schedule.steps=20")
    words = [sys.executable, "-m", "launch.cli", "queue", "serve", "--queue", str(tmp_path / "q")]
    servers = []

    def leads() -> int | None:
        holder = place.store.rows(sa.select(db.lease))[0]["holder"]
        return int(json.loads(holder)["pid"]) if holder else None

    def wait(condition: Callable[[], object], seconds: float) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds
            time.sleep(0.05)
        return time.monotonic() - began

    try:
        servers = [subprocess.Popen(words, start_new_session=True) for _ in range(2)]
        wait(lambda: place.step("one") > 5, 90)
        first = leads()
        assert first in [server.pid for server in servers]
        os.kill(first, signal.SIGKILL)
        assert wait(lambda: leads() != first, 10) < 10
        (second,) = [server.pid for server in servers if server.pid != first]
        assert leads() == second
        wait(lambda: place.state(number) == "done", 240)
        assert place.tries(number) == [(1, "done")]
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    assert not place.store.rows(sa.select(db.lease))[0]["holder"]  # given back


@pytest.fixture
def server() -> Iterator[Postgres]:
    made = Postgres()
    yield made
    made.close()


@pytest.mark.drill
def test_a_database_that_is_lost_and_comes_back_loses_and_doubles_no_job(
    server: Postgres, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    place = make(2, url=server.url)
    first, second = place.submit("one", "1", "schedule.steps=300"), place.submit("two")
    place.until(lambda: place.step("one") > 2)
    for at, immediately in enumerate((True, False, True)):
        server.stop(immediately)
        before = place.step("one")
        for _ in range(3):
            assert place.scheduler.step()  # it bears it
            time.sleep(0.3)
        server.start()
        place.scheduler.step()
        place.until(lambda before=before: place.step("one") > before)  # the job went on
        assert place.state(first) == "running"
        assert sum("cannot be used" in line for line in caplog.messages) == at + 1  # told once each time
    server.stop(immediately=True)
    folder = place.folder / "q" / "jobs" / "000001" / "attempt-0001"
    limit = time.monotonic() + 240
    while not (folder / "end.json").exists():  # it ends while nobody can write it down
        place.scheduler.step()
        assert time.monotonic() < limit
        time.sleep(0.3)
    server.start()
    third = place.submit("three")
    place.until(lambda: all(place.state(number) == "done" for number in (first, second, third)))
    assert [place.tries(number) for number in (first, second, third)] == [[(1, "done")]] * 3
    assert not place.store.check()
    for kind in ("started", "ended", "done"):
        rows = place.store.rows(sa.select(db.events.c.job).where(db.events.c.kind == kind))
        assert sorted(row["job"] for row in rows) == [first, second, third], kind


@pytest.mark.drill
def test_a_job_leaves_a_node_that_is_vacated(make: Make, tmp_path: Path) -> None:
    place = make(1)
    number = place.submit("one", "1", "schedule.steps=200")
    place.until(lambda: place.step("one") > 2)
    (node,) = [row["name"] for row in place.store.rows(sa.select(db.nodes))]
    wishes.drain(place.store, node, "new memory", vacate=True)
    place.until(lambda: place.state(number) == "waiting")
    assert place.tries(number) == [(1, "stopped")]
    wishes.drain(place.store, node, None)
    place.until(lambda: place.state(number) == "running")
    wishes.cancel(place.store, number)
    place.until(lambda: place.state(number) == "cancelled")


SWEEP = """
[sweep]
name = "s"
out = "{out}"
base = "demo"
[set]
data = {{ root = "{data}" }}
schedule = {{ epochs = 1, warmup_epochs = 0.2 }}
eval = {{ every_steps = 11, every_epochs = 0 }}
checkpoint = {{ every_steps = 4 }}
run = {{ log_every = 1 }}
[space]
"optim.lr" = {{ loguniform = [1e-4, 1e-2] }}
[budget]
trials = 3
[search]
name = "random"
"""


@pytest.mark.drill
def test_a_sweep_is_a_job_that_gives_way_and_goes_on(make: Make, tmp_path: Path) -> None:
    place = make(2, save_seconds=5.0)
    page = tmp_path / "page.toml"
    page.write_text(SWEEP.format(out=tmp_path, data=place.digits))
    number = submit(place.store, place.config, Request(page, ["budget.hours=1"], "2", sweep=True))
    page.write_text("what was submitted counts")

    def events(kind: str) -> list[int]:
        return [int(str(event["trial"])) for event in read_events(tmp_path / "s") if event["event"] == kind]

    first = tmp_path / "s" / "trials" / "trial-0000" / "checkpoints"
    place.until(lambda: list(first.glob("step-*/manifest.json")))
    urgent = place.submit("urgent", "2", priority=3)
    place.until(lambda: place.state(urgent) == "done")
    place.until(lambda: place.state(number) == "done")
    assert place.tries(number) == [(2, "stopped"), (2, "done")]
    assert sorted(events("ended")) == [0, 1, 2]
    assert (tmp_path / "s" / "results.csv").read_text().count("\n") == 4
