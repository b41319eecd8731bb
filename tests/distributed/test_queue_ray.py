"""The queue on a Ray cluster of two hosts: preempted, shrunk and grown, and whatever can be killed is."""

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

from launch.drill.namespaces import Cluster, why_impossible
from launch.queue import schema as db
from launch.queue.config import load
from launch.queue.store import Store, url_of
from launch.queue.submit import Request, submit
from launch.sweep.journal import read_events
from launch.testing.commands import losses, setformer, train_words
from launch.testing.ray_nodes import RayNodes
from setformer_dist.core import ledger
from tests.integration.test_queue import SWEEP

REASON = why_impossible()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.drill,
    pytest.mark.hosts,
]
PAGE = """
[cluster]
kind = "ray"
ray = "{address}"
[policy]
save_seconds = 5.0
grow_after_minutes = 0.01
kill_after_seconds = 60.0
"""
STEPS = ("~schedule.epochs", "schedule.warmup_epochs=0", "run.log_every=1", "checkpoint.every_steps=5", "run.threads=1")


class Queue:
    """A queue on a Ray cluster, whose server runs on host a."""

    def __init__(self, nodes: RayNodes, folder: Path, digits: Path) -> None:
        self.nodes, self.folder, self.digits = nodes, folder / "q", digits
        self.runs = folder / "runs"
        self.folder.mkdir()
        (self.folder / "queue.toml").write_text(PAGE.format(address=nodes.address))
        self.config = load(self.folder)
        self.store = Store(url_of(self.folder))
        self.servers: list[subprocess.Popen[str]] = []

    def serve(self) -> None:
        words = [sys.executable, "-m", "launch.cli.main", "queue", "serve", "--queue", str(self.folder)]
        log = self.folder / f"server-{len(self.servers)}.log"
        self.servers.append(self.nodes.on("a", words, log))

    def leader(self) -> int | None:
        holder = self.store.rows(sa.select(db.lease))[0]["holder"]
        return int(json.loads(holder)["pid"]) if holder else None

    def submit(self, name: str, ranks: str, steps: int, *more: str, priority: int = 0) -> int:
        words = [f"data.root={self.digits}", f"run.name={name}", f"run.out={self.runs}", *STEPS, *more]
        request = Request(Path("demo"), [*words, f"schedule.steps={steps}"], ranks, priority=priority)
        return submit(self.store, self.config, request)

    def state(self, number: int) -> str:
        return str(self.store.job(number)["state"])

    def step(self, name: str) -> int:
        folder = self.runs / name
        return max((step for _, step in losses(folder)), default=0) if (folder / "metrics.jsonl").exists() else 0

    def tries(self, number: int) -> list[tuple[int, str]]:
        query = sa.select(db.attempts).where(db.attempts.c.job == number).order_by(db.attempts.c.number)
        return [(row["ranks"], row["how"]) for row in self.store.rows(query)]

    def up(self) -> set[str]:
        return {row["name"] for row in self.store.rows(sa.select(db.nodes)) if row["up"]}

    def until(self, what: str, condition: Callable[[], object], seconds: float = 240.0) -> None:
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                events = [str(dict(row)) for row in self.store.rows(sa.select(db.events))]
                said = [path.read_text()[-2000:] for path in sorted(self.folder.glob("server-*.log"))]
                raise AssertionError("\n".join([f"not within {seconds:.0f} s: {what}", *events, *said]))
            time.sleep(0.2)
        print(f"{time.monotonic() - began:6.1f} s until {what}")


@pytest.fixture
def queue(digits: Path, tmp_path: Path) -> Iterator[Queue]:
    with Cluster(2) as cluster:
        nodes = RayNodes(cluster, cpus=2)
        try:
            nodes.boot("a")
            nodes.boot("b")
            made = Queue(nodes, tmp_path, digits)
            made.serve()
            made.until("both nodes are seen", lambda: len(made.up()) == 2, 120)
            yield made
            made.store.close()
        finally:
            nodes.close()


def test_six_jobs_and_everything_that_can_be_killed(queue: Queue, digits: Path, tmp_path: Path) -> None:
    plain = setformer(*train_words(digits, tmp_path / "plain", *STEPS, "schedule.steps=60", "~checkpoint.every_steps"))
    assert plain.code == 0, plain.err

    # An elastic job takes all, gives way to a job of two ranks, and grows again.
    wide = queue.submit("wide", "1:4", 900)
    queue.until("the elastic job trains", lambda: queue.step("wide") > 5)
    assert queue.tries(wide)[-1][0] == 4
    fixed = queue.submit("fixed", "2", 60)
    queue.until("it has shrunk for another", lambda: queue.tries(wide)[-1][0] == 2 and queue.state(fixed) == "running")

    # A job of higher priority that needs all stops both.
    queue.until("the other trains", lambda: queue.step("fixed") > 12)
    urgent = queue.submit("urgent", "4", 10, priority=5)
    queue.until("the urgent job is done", lambda: queue.state(urgent) == "done")
    queue.until("the preempted job is done", lambda: queue.state(fixed) == "done")
    assert queue.tries(fixed) == [(2, "stopped"), (2, "done")]
    assert not ledger.account(ledger.read_events(queue.runs / "fixed")).steps_lost
    assert losses(queue.runs / "fixed") == losses(tmp_path / "plain" / "demo")  # bit by bit

    # The scheduler is killed while jobs run: the next one adopts them.
    third = queue.submit("third", "2", 60)
    queue.until("the third job trains", lambda: queue.step("third") > 5)
    first = queue.leader()
    assert first is not None
    queue.serve()
    os.kill(first, signal.SIGKILL)
    queue.until("another scheduler leads", lambda: queue.leader() not in (None, first), 20)
    queue.until("the adopted job is done", lambda: queue.state(third) == "done")
    assert queue.tries(third) == [(2, "done")]

    # A sweep has its trials on the nodes that the queue chose, and nowhere else.
    (page := tmp_path / "page.toml").write_text(SWEEP.format(out=tmp_path, data=digits))
    trials = submit(queue.store, queue.config, Request(page, (), "2", priority=1, sweep=True))
    queue.until("the sweep is done", lambda: queue.state(trials) == "done", 300)
    assert sorted(event["trial"] for event in read_events(tmp_path / "s") if event["event"] == "ended") == [0, 1, 2]

    # A node is killed: its jobs go on elsewhere.
    queue.until("the elastic job has grown", lambda: queue.tries(wide)[-1][0] == 4 and queue.step("wide") > 20)
    queue.nodes.cluster.kill("b")
    queue.until("the node is missed", lambda: len(queue.up()) == 1, 120)
    fifth = queue.submit("fifth", "2", 30, priority=1)
    queue.until("a job is done on the node that is left", lambda: queue.state(fifth) == "done")
    queue.nodes.cluster.boot("b")
    queue.nodes.boot("b")
    queue.until("the node is back", lambda: len(queue.up()) == 2, 120)

    # The host of the head and of the scheduler loses its power.
    sixth = queue.submit("sixth", "4", 60, priority=1)
    queue.until("the sixth job trains", lambda: queue.step("sixth") > 5)
    for host in ("a", "b"):
        queue.nodes.cluster.kill(host)
        queue.nodes.cluster.boot(host)
    for host in ("a", "b"):
        queue.nodes.boot(host)
    queue.serve()
    queue.until("the sixth job is done", lambda: queue.state(sixth) == "done", 300)
    assert queue.tries(sixth)[-1] == (4, "done")
    queue.until("the elastic job is done", lambda: queue.state(wide) == "done", 400)
    assert {step for kind, step in losses(queue.runs / "wide") if kind == "train"} == set(range(1, 901))
    assert not queue.store.check()
    print(setformer("queue", "ls", "--all", "--queue", str(queue.folder)).out)
