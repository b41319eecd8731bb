"""A cluster for tests of the queue's policy: it obeys plans; jobs end and fail, nodes go and come, users interfere.

It keeps books as the scheduler does (launch.queue.book), and has every decision checked (tests.unit.queue_checks).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from launch.queue.outcome import backoff
from launch.queue.policy import decide
from launch.queue.state import Job, Node, Placement, Rules, Running, Start, Stop
from tests.unit.queue_checks import Bound, check_plan

_CHECKPOINT_S = 20.0
_RETRIES = 2
_SUSPECT = 3.0


@dataclass(frozen=True)
class Faults:
    """How often something happens: mean seconds between two of a kind, 0 for never.

    Attributes:
        own: share of attempts that end by the job's own failure.
        deaf: share of stops in which the job does not save and is killed.
        node_s: a node is lost, and comes back later.
        drain_s: a node is drained for a while; every other time, its jobs have to leave it.
        restart_s: the scheduler is killed, and what it has just started never begins; the next one comes later.
        user_s: somebody cancels, holds, releases or moves a job.
        away_s: mean time for which a node is away or drained.
    """

    own: float = 0.0
    deaf: float = 0.0
    node_s: float = 0.0
    drain_s: float = 0.0
    restart_s: float = 0.0
    user_s: float = 0.0
    away_s: float = 500.0


@dataclass
class _Live:
    """A job that runs."""

    run: Running
    ends: float
    how: str  # "done", "error", or "never began"
    token: int
    stop: Stop | None = None


@dataclass
class _Book:
    """What is known of a job over all its attempts."""

    left: float  # rank-seconds
    used_s: float = 0.0
    own_failures: int = 0
    in_row: int = 0


@dataclass
class World:
    """Runs jobs by the policy's plans to their ends.

    Attributes:
        nodes: as they are now.
        ended: how each job ended, as often as it did.
        began: when each first ran.
        counts: of what happened.
    """

    nodes: Sequence[Node]
    rules: Rules
    seed: int
    faults: Faults = Faults(own=0.05)
    now: float = 0.0
    ended: dict[int, list[str]] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._draws = random.Random(self.seed)
        self.ended = defaultdict(list)
        self._live: dict[int, _Live] = {}
        self._waiting: dict[int, Job] = {}
        self._books: dict[int, _Book] = {}
        self._use: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tokens = itertools.count(1)
        self._blind_until = 0.0
        self._open = 0  # jobs that have not ended, those included that have not come
        self._failures: Counter[str] = Counter()
        self._all = {node.name: node for node in self.nodes}
        self.bound = Bound(self.rules)

    def ever_fits(self, job: Job) -> bool:
        """Whether a job fits the whole cluster and its user's quota."""
        if job.sizes[0] > self.rules.quotas.get(job.user, job.sizes[0]):
            return False
        if job.per_node is not None:
            wide = sum(node.slots >= job.per_node for node in self.nodes)
            return wide * job.per_node >= job.sizes[0]
        return sum(node.slots for node in self.nodes) >= job.sizes[0]

    def run(self, jobs: Sequence[Job]) -> None:
        """Submit the jobs that fit at their `waiting_since`, and go on until all have ended."""
        for job in jobs:
            if self.ever_fits(job):
                # At its smallest size it takes some of its limit; one that runs in turns may take two of them.
                part = self._draws.uniform(0.3, 0.999 if job.hard else 2.0)
                self._books[job.id] = _Book(job.sizes[0] * job.limit_s * part)
                self._at(job.waiting_since, lambda job=job: self._arrive(job))  # type: ignore[misc]
        self._open = len(self._books)
        for mean, act in (
            (self.faults.node_s, self._lose_node), (self.faults.drain_s, self._drain_node),
            (self.faults.restart_s, self._restart), (self.faults.user_s, self._interfere),
        ):  # fmt: skip
            if mean:
                self._again(mean, act)
        while self._open:
            assert self.counts["decisions"] < 200 * len(jobs) + 1000, "it does not come to an end"
            if not self._events:
                self._at(self.now + 10.0, lambda: None)
            self.now = max(self.now, self._events[0][0])
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            while self.now >= self._blind_until and self._decide():
                pass
        self.ended = {number: hows for number, hows in self.ended.items() if hows}
        assert not self._live
        assert not self._waiting

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._tokens), act))

    def _again(self, mean: float, act: Callable[[], None]) -> None:
        def both() -> None:
            act()
            self._again(mean, act)

        self._at(self.now + self._draws.expovariate(1 / mean), both)

    def _wake(self, *times: float) -> None:
        for time in times:
            self._at(time, lambda: None)

    # What jobs do.

    def _arrive(self, job: Job) -> None:
        after = tuple(other for other in job.after if self.ended[other] != ["done"])
        if any(self.ended[other] or other not in self._books for other in after):
            self._end(job, "cancelled")
            return
        self._wait(replace(job, after=after), waiting_since=self.now)

    def _wait(self, job: Job, **changed: float) -> None:
        assert job.id not in self._waiting
        assert job.id not in self._live
        self._waiting[job.id] = job = replace(job, **changed)  # type: ignore[arg-type]
        self._wake(job.waiting_since + self.rules.starve_after_s, job.eligible_at)

    def _end(self, job: Job, how: str) -> None:
        self._waiting.pop(job.id, None)
        self.ended[job.id].append(how)
        self.counts[how] += 1
        self._open -= 1
        for other in [other for other in self._waiting.values() if job.id in other.after]:
            if how != "done":  # its user sees that it will never start
                self._end(other, "cancelled")
            else:  # only now it begins to wait for slots
                self._waiting[other.id] = replace(
                    other, after=tuple(a for a in other.after if a != job.id), waiting_since=self.now
                )
                self._wake(self.now + self.rules.starve_after_s)

    def _begin(self, job: Job, placement: Placement, boosted: bool = False) -> None:
        self.began.setdefault(job.id, self.now)
        ranks = sum(count for _, count in placement)
        assert ranks in job.sizes
        ends, how = self.now + max(0.01, self._books[job.id].left / ranks), "done"
        if self._draws.random() < self.faults.own:
            ends, how = self.now + self._draws.random() * (ends - self.now), "error"
        live = _Live(Running(job, placement, self.now, self.now, boosted=boosted), ends, how, next(self._tokens))
        self._live[job.id] = live
        self._at(ends, lambda: self._over(live, live.how))
        self._wake(self.now + job.limit_s, self.now + self.rules.grow_after_s, self.now + self.rules.protect_s)

    def _over(self, live: _Live, how: str) -> None:
        """An attempt ends: "done", "error", "host", "killed", "never began", or "stopped"."""
        job, now = live.run.job, self.now
        if self._live.get(job.id) is not live:
            return  # it ended before
        del self._live[job.id]
        book, ran = self._books[job.id], now - live.run.started
        self._use[job.user] += live.run.ranks * ran
        kept = ran if how in ("done", "stopped") else _saved(live.run, now) - live.run.started
        book.left -= live.run.ranks * (0.0 if how == "never began" else kept)
        if how != "never began":
            book.used_s += ran
        if job.hard:
            job = replace(job, limit_s=max(1.0, job.limit_s - ran))
        why = live.stop.why if live.stop else ""
        # A start that gave it little time does not begin its waiting anew.
        since = job.waiting_since if ran < self.rules.protect_s and why != "turn" else now
        if how == "done":
            self._end(job, "done")
        elif why == "cancelled":
            self._end(job, "cancelled")
        elif how == "stopped" and why == "limit":
            self._end(job, "over limit")
        elif how == "stopped" and why == "resize" and live.stop and self._usable(live.stop.then):
            self._begin(job, live.stop.then)
        elif how in ("stopped", "never began"):
            book.in_row = 0
            self._wait(job, waiting_since=since)
        else:
            book.in_row += 1
            book.own_failures += how == "error"
            if book.own_failures > _RETRIES:
                self._end(job, "failed")
            else:
                self._wait(job, waiting_since=since, eligible_at=now + backoff(book.in_row))

    def _usable(self, placement: Placement) -> bool:
        usable = {node.name for node in self.nodes if node.usable}
        return all(name in usable for name, _ in placement)

    def _ask(self, stop: Stop) -> None:
        live = self._live[stop.job]
        assert live.stop is None, "stopped twice"
        self.counts[stop.why] += 1
        live.stop = stop
        live.run = replace(live.run, stopping=True, then=stop.then)
        if stop.why == "resize":
            self.bound.disturb()
        deaf = self._draws.random() < self.faults.deaf
        patience = self.bound.kill_after_s if deaf else self.rules.save_s * self._draws.uniform(0.2, 1.0)
        self._at(self.now + patience, lambda: self._over(live, "killed" if deaf else "stopped"))

    # What happens to nodes and to the scheduler, and what users do.

    def _set(self, name: str, **values: object) -> None:
        self._all[name] = replace(self._all[name], **values)  # type: ignore[arg-type]
        self.nodes = list(self._all.values())
        self.bound.disturb()

    def _away(self, name: str) -> None:
        self._set(name, usable=False)
        self._at(self.now + self._draws.expovariate(1 / self.faults.away_s), lambda: self._back(name))

    def _back(self, name: str) -> None:
        self._failures[name] = 0
        self._set(name, usable=True, failures=0.0)

    def _any_node(self) -> str | None:
        usable = [node.name for node in self.nodes if node.usable]
        return self._draws.choice(usable) if usable else None

    def _on(self, name: str) -> list[_Live]:
        return [live for live in self._live.values() if name in dict(live.run.placement)]

    def _lose_node(self) -> None:
        if (name := self._any_node()) is None:
            return
        self.counts["node lost"] += 1
        self._away(name)
        for live in self._on(name):
            self._over(live, "host")
            for other, _ in live.run.placement:
                self._failures[other] += 1 / len(live.run.placement)  # type: ignore[assignment]
                self._set(other, failures=float(self._failures[other]))
                if self._failures[other] >= _SUSPECT and self._all[other].usable:
                    self.counts["node drained"] += 1
                    self._away(other)

    def _drain_node(self) -> None:
        if (name := self._any_node()) is None:
            return
        self.counts["node drained"] += 1
        self._away(name)
        for live in self._on(name) if self._draws.random() < 0.5 else ():
            if live.stop is None:
                self._ask(Stop(live.run.job.id, "drained"))

    def _restart(self) -> None:
        self.counts["restart"] += 1
        self.bound.disturb()
        self._blind_until = self.now + self._draws.uniform(1.0, 100.0)
        self._wake(self._blind_until)
        for live in list(self._live.values()):
            if live.run.started > self.now - 5.0 and live.stop is None:  # its keeper never came
                live.how, live.ends = "never began", self.now + 20.0
                self._at(live.ends, lambda live=live: self._over(live, live.how))  # type: ignore[misc]

    def _interfere(self) -> None:
        number = self._draws.choice([*self._waiting, *self._live] or [0])
        act = self._draws.choice(["hold", "move", "move", "cancel"])
        job = self._waiting.get(number)
        self.counts[act] += job is not None or number in self._live
        if job is not None and act == "cancel":
            self._end(job, "cancelled")
        elif job is not None and act == "move":
            self._waiting[number] = replace(job, priority=self._draws.randrange(3))
        elif job is not None and not job.held:
            self._waiting[number] = replace(job, held=True)
            self._at(self.now + self._draws.uniform(10.0, 1000.0), lambda: self._release(number))
        elif (live := self._live.get(number)) is not None and live.stop is None and act != "move":
            self._ask(Stop(number, "cancelled" if act == "cancel" else "drained"))

    def _release(self, number: int) -> None:
        if (job := self._waiting.get(number)) is not None:
            self._waiting[number] = replace(job, held=False, waiting_since=self.now)
            self._wake(self.now + self.rules.starve_after_s)

    # Decisions.

    def _decide(self) -> bool:
        """Decide once, check it and obey; return whether the next decision comes at once."""
        self.counts["decisions"] += 1
        running = [replace(live.run, saved=_saved(live.run, self.now)) for live in self._live.values()]
        waiting = list(self._waiting.values())
        use: Mapping[str, float] = self._use
        plan = decide(self.nodes, waiting, running, use, self.rules, self.now)
        check_plan(plan, self.nodes, waiting, running, self.rules, self.now)
        self.bound.note(plan, waiting, running, self.now)
        for stop in plan.stops:
            self._ask(stop)
        for start in plan.starts:
            self._start(start)
        return plan.more

    def _start(self, start: Start) -> None:
        self.counts["boosted"] += start.boosted
        self._begin(self._waiting.pop(start.job), start.placement, start.boosted)


def _saved(run: Running, now: float) -> float:
    return run.started + (now - run.started) // _CHECKPOINT_S * _CHECKPOINT_S
