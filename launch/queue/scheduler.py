"""The loop of `setformer queue serve`: hold the lease, observe, decide, act.

    another holds the lease   stand by
    observe                   attempts that have ended, nodes, what users wish
    decide                    launch.queue.policy
    act                       first the database, conditional on the lease, then the keeper or the file that stops it

Whatever is killed between the two halves of an act is seen by the next scheduler: an attempt whose keeper never came is
given up and waits again, a job that should stop and was not told is told.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from launch.queue import attempts as processes
from launch.queue import schema as db
from launch.queue import sweeps
from launch.queue.book import Book
from launch.queue.config import QueueConfig
from launch.queue.nodes import Nodes, command, devices_for, environment, program
from launch.queue.outcome import last_saved
from launch.queue.pace import Pace
from launch.queue.policy import decide
from launch.queue.settings import Settings
from launch.queue.state import Placement, Plan, Start, Stop
from launch.queue.store import Lease, LeaseLostError, Row, Store, event
from setformer_dist.core.errors import TransientError
from setformer_dist.core.files import write_state

log = logging.getLogger(__name__)

TICK_S = 1.0
_SAVED_EVERY_S = 15.0
_LEFT = "it is no longer in queue.toml"
_LOST_S = 60.0  # beyond `kill_after_seconds`, after which the keeper is killed as well


@dataclass
class Scheduler:
    """One scheduler of a queue.

    Attributes:
        store: the database.
        folder: of the queue, which all schedulers share.
        config: queue.toml; read again when it changes.
        clock: Unix time.
    """

    store: Store
    folder: Path
    config: QueueConfig
    clock: Callable[[], float] = time.time
    stale_s: float = 8.0
    _watcher: processes.Watcher = field(default_factory=processes.Watcher)
    _trouble: str = ""
    _told: bool = True  # of queue.toml as it is now
    _saved: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lease = self._new_lease()
        self.settings = Settings(self.folder, self.config)
        self.nodes = Nodes(self.config.cluster)
        self.book = Book(self.config, self.clock)
        self.pace = Pace(self.folder)

    def _new_lease(self) -> Lease:
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": self.clock()})
        return Lease(self.store, holder, self.stale_s)

    def serve(
        self, over: Callable[[], bool], idle_s: float | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Work until `over` says so, or nothing is left to do for a while.

        Args:
            over: asked every second.
            idle_s: seconds without a job after which it ends; None for never.
            sleep: until the next look.
        """
        busy_at = time.monotonic()
        try:
            while not over():
                began = time.monotonic()
                if self.step():
                    busy_at = time.monotonic()
                elif idle_s is not None and time.monotonic() - busy_at > idle_s:
                    return
                # A queue of ten thousand jobs must not keep a core busy.
                sleep(max(TICK_S, 2 * (time.monotonic() - began)))
        finally:
            self.nodes.close()
            if self.lease.term is not None:
                self.lease.release()

    def step(self) -> bool:
        """Do one round; return whether anything is left to do, or another scheduler does it."""
        try:
            self.store.check_file()
            self._reread()
            if self.lease.term is None:
                if not self.lease.acquire():
                    return True
                log.warning("this scheduler leads the queue in %s (term %d)", self.folder, self.lease.term)
                with self.lease.write() as connection:
                    event(connection, "leads", term=self.lease.term, pid=os.getpid(), host=socket.gethostname())
                self.settings.keep()
            left = self._round()
            self._trouble = ""
            return left
        except LeaseLostError as error:
            log.warning("%s: this one stands by", error)
            self.lease = self._new_lease()
            self._watcher = processes.Watcher()
        except (TransientError, OSError) as error:  # such as a full disk: jobs go on meanwhile
            if str(error) != self._trouble:
                log.warning("%s; trying again every second", error)
            self._trouble = str(error)
        return True

    def _reread(self) -> None:
        """Use queue.toml as it is now; one that is broken is told once."""
        if not self.settings.look():
            return
        if self.settings.fault:
            log.warning("%s", self.settings.fault)
        else:
            log.warning("queue.toml has changed: it is in force")
        if self.settings.config.cluster != self.config.cluster:
            self.nodes.close()
            self.nodes = Nodes(self.settings.config.cluster)
        self.config = self.book.config = self.settings.config
        self._told = False

    def _tell_settings(self) -> None:
        if not self._told:
            with self.lease.write() as connection:
                if fault := self.settings.fault:
                    event(connection, "settings refused", fault=fault)
                else:
                    event(connection, "settings")
            self.settings.keep()
            self._told = True

    def _round(self) -> bool:
        self._tell_settings()
        self._observe_nodes()
        self._observe_ends()
        self._obey()
        return self._decide()

    def _observe_nodes(self) -> None:
        up = self.nodes.look()
        listed = self.config.cluster.kind != "ray"  # there, a node that is not up has left the list
        busy = {name for row in self._live() for name, _ in row["placement"]} if listed else ()
        known = {row["name"]: row for row in self.store.rows(sa.select(db.nodes))}
        with self.lease.write() as connection:
            for name, slots in up.items():
                row = known.get(name)
                if row is None:
                    connection.execute(sa.insert(db.nodes).values(name=name, slots=slots, up=True))
                    event(connection, "node", node=name, slots=slots)
                elif not row["up"] or row["slots"] != slots:
                    connection.execute(_node(name).values(slots=slots, up=True))
                    event(connection, "node up", node=name, slots=slots)
                if row is not None and row["drained"] == _LEFT:
                    connection.execute(_node(name).values(drained=None))
                    event(connection, "undrained", node=name)
            for name in known.keys() - up.keys():
                if known[name]["up"]:
                    self._gone(connection, name, busy)

    def _gone(self, connection: sa.Connection, name: str, busy: Collection[str]) -> None:
        """Write down that a node is down; one that left queue.toml is drained as long as jobs run on it."""
        if name not in busy:
            connection.execute(_node(name).values(up=False))
            event(connection, "node down", node=name)
            return
        alone = sa.update(db.nodes).where(db.nodes.c.name == name, db.nodes.c.drained.is_(None))
        if connection.execute(alone.values(drained=_LEFT)).rowcount:
            event(connection, "drained", node=name, why=_LEFT)

    def _live(self) -> list[Row]:
        """Return the attempts that have not ended, with their jobs' columns as `job_...`."""
        wanted = [column.label(f"job_{column.name}") for column in db.jobs.c if column.name != "config"]
        query = sa.select(db.attempts, *wanted).join(db.jobs, db.jobs.c.id == db.attempts.c.job)
        return self.store.rows(query.where(db.attempts.c.state != "ended").order_by(db.attempts.c.job))

    def _observe_ends(self) -> None:
        for row in self._live():
            ended = self._watcher.look(Path(row["folder"]))
            if ended is None:
                self._insist(row)
                continue
            with self.lease.write() as connection:
                resized = self.book.close(connection, row, ended)
            self._saved.pop((row["job"], row["number"]), None)
            if resized is not None and self._usable(resized):  # otherwise it waits
                self._start(Start(row["job"], resized))

    def _usable(self, placement: Placement) -> bool:
        usable = {node.name for node in self.book.nodes(self.store) if node.usable}
        return all(name in usable for name, _ in placement)

    def _insist(self, row: Row) -> None:
        """Tell a job again that should stop; kill the keeper of one that does not end even so."""
        if row["state"] != "stopping":
            return
        folder, patience = Path(row["folder"]), self.config.policy.kill_after_seconds
        processes.stop(folder, patience)
        if self.clock() > (row["stop_at"] or 0.0) + patience + _LOST_S:
            processes.kill(folder)

    def _obey(self) -> None:
        """Do what users wish: end cancelled jobs, stop held ones and those on nodes that are to be vacated."""
        waiting = sa.select(db.jobs.c.id).where(db.jobs.c.state == "waiting", db.jobs.c.cancelled)
        for row in self.store.rows(waiting):
            with self.lease.write() as connection:
                self.book.end(connection, row["id"], "cancelled", "cancelled by its user")
        vacated = {row["name"] for row in self.store.rows(sa.select(db.nodes.c.name).where(db.nodes.c.vacate))}
        for row in self._live():
            if row["state"] != "running":
                continue
            if row["job_cancelled"] or row["job_held"]:
                self._stop(Stop(row["job"], "cancelled" if row["job_cancelled"] else "held"), row)
            elif vacated & {name for name, _ in row["placement"]}:
                self._stop(Stop(row["job"], "drained"), row)

    def _decide(self) -> bool:
        live = self._live()
        waiting = self.book.waiting(self.store)
        nodes = self.book.nodes(self.store)
        running = [self.book.running(row, self._saved_at(row)) for row in live]
        users = {job.user for job in waiting} | {run.job.user for run in running}
        now = self.clock()
        use = self.book.use(self.store, running, now)
        began = time.monotonic()
        plan = decide(nodes, waiting, running, use, self.config.rules(users), now)
        self.pace.note(time.monotonic() - began)
        self._act(plan, live)
        with self.lease.write() as connection:
            self.book.explain(connection, plan)
        return bool(waiting or running)

    def _saved_at(self, row: Row) -> float:
        """Return when a running job has last saved; its ledger is read now and then."""
        key, now = (row["job"], row["number"]), time.monotonic()
        looked, saved = self._saved.get(key, (-_SAVED_EVERY_S, row["started"]))
        if now - looked >= _SAVED_EVERY_S:
            saved = last_saved(Path(row["job_folder"]), row["started"])
            self._saved[key] = (now, saved)
        return saved

    def _act(self, plan: Plan, live: list[Row]) -> None:
        rows = {row["job"]: row for row in live}
        for stop in plan.stops:
            self._stop(stop, rows[stop.job])
        for start in plan.starts:
            self._start(start)

    def _stop(self, stop: Stop, row: Row) -> None:
        with self.lease.write() as connection:
            self.book.ask_to_stop(connection, stop, row)
        processes.stop(Path(row["folder"]), self.config.policy.kill_after_seconds)

    def _start(self, start: Start) -> None:
        job = self.store.job(start.job)
        number = job["attempts"] + 1
        folder = self.folder / "jobs" / f"{job['id']:06d}" / f"attempt-{number:04d}"
        ranks = sum(count for _, count in start.placement)
        taken = [row["devices"] for row in self._live() if row["devices"]]
        devices = devices_for(self.config.cluster, ranks, taken)
        with self.lease.write() as connection:
            self.book.open(connection, start, number, folder, devices)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            words = self._command(job, folder, start.placement)
            processes.start(folder, job["directory"], words, environment(self.config.cluster, devices))
        except OSError as error:
            log.warning("job %d cannot be started now: %s", job["id"], error)  # the watcher gives the attempt up

    def _command(self, job: Row, folder: Path, placement: Placement) -> list[str]:
        """Write the config of an attempt, and return its command."""
        if job["kind"] == "sweep":
            return sweeps.command(program(), self.config.cluster, folder.parent, job["config"], placement)
        write_state(folder / "config.json", self.store.parsed(job["config"]))
        return command(self.config.cluster, [*program(), "train", str(folder / "config.json")], placement)


def _node(name: str) -> sa.Update:
    return sa.update(db.nodes).where(db.nodes.c.name == name)
