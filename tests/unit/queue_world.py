"""A cluster for tests of the queue's policy: it obeys plans, and jobs end, fail and are lost at random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from launch.queue.policy import decide
from launch.queue.state import Job, Node, Placement, Plan, Rules, Running, Stop


@dataclass
class _Run:
    run: Running
    ends: float  # when it is done by itself
    stop: Stop | None = None
    saved_at: float = 0.0


@dataclass
class World:
    """Runs jobs by the policy's plans, and checks at each decision that no slot is used twice."""

    nodes: Sequence[Node]
    rules: Rules
    seed: int
    faults: bool = True
    now: float = 0.0
    ended: Counter[int] = field(default_factory=Counter)
    began: dict[int, float] = field(default_factory=dict)
    _live: dict[int, _Run] = field(default_factory=dict)
    _work: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._draws = random.Random(self.seed)

    def ever_fits(self, job: Job) -> bool:
        """Whether a job fits the whole cluster."""
        if job.per_node is not None:
            wide = sum(node.slots >= job.per_node for node in self.nodes)
            return wide * job.per_node >= job.sizes[0]
        return sum(node.slots for node in self.nodes) >= job.sizes[0]

    def run(self, jobs: Sequence[Job]) -> None:
        """Submit jobs at `waiting_since`, and go on until all that fit have ended."""
        coming = sorted((j for j in jobs if self.ever_fits(j)), key=lambda j: j.waiting_since)
        waiting: dict[int, Job] = {}
        # The work of a job in rank-seconds: at its smallest size it takes some of its limit.
        self._work = {j.id: j.sizes[0] * j.limit_s * self._draws.uniform(0.3, 0.999) for j in coming}
        rounds = 0
        while coming or waiting or self._live:
            rounds += 1
            assert rounds < 50 * len(jobs) + 1000, "it does not come to an end"
            while coming and coming[0].waiting_since <= self.now:
                arrived = coming.pop(0)
                waiting[arrived.id] = arrived
            self._end(waiting)
            plan = self._obey(waiting)
            if not plan.more and not self._due():
                self._advance([j.waiting_since for j in coming[:1]], plan)

    def _due(self) -> bool:
        return any(min(r.ends, r.saved_at if r.stop else r.ends) <= self.now for r in self._live.values())

    def _advance(self, arrivals: list[float], plan: Plan) -> None:
        times = list(arrivals)
        for r in self._live.values():
            times.append(min(r.ends, r.saved_at if r.stop else r.ends))
            times.append(r.run.started + r.run.job.limit_s)
            times.append(r.run.started + self.rules.grow_after_s)
        later = [t for t in times if t > self.now]
        self.now = min([*later, self.now + 10.0]) if later or self._live else self.now + 10.0

    def _end(self, waiting: dict[int, Job]) -> None:
        for number, r in list(self._live.items()):
            ran = self.now - r.run.started
            if r.ends <= self.now:
                del self._live[number]
                self.ended[number] += 1
            elif r.stop is not None and r.saved_at <= self.now:
                del self._live[number]
                self._work[number] -= r.run.ranks * ran
                if r.stop.why == "limit":
                    self.ended[number] += 1
                elif r.stop.why == "resize" and r.stop.then:
                    self._begin(r.run.job, r.stop.then, False)
                else:
                    waiting[number] = replace(r.run.job, waiting_since=self.now)
            elif self.faults and self._draws.random() < 0.01:  # a node fails: work is lost
                del self._live[number]
                waiting[number] = replace(r.run.job, waiting_since=self.now, eligible_at=self.now + 3.0)

    def _begin(self, job: Job, placement: Placement, boosted: bool) -> None:
        assert job.id not in self._live
        ranks = sum(count for _, count in placement)
        assert ranks in job.sizes
        self.began.setdefault(job.id, self.now)
        run = Running(job, placement, self.now, self.now, boosted=boosted)
        self._live[job.id] = _Run(run, self.now + max(0.01, self._work[job.id] / ranks))

    def _obey(self, waiting: dict[int, Job]) -> Plan:
        running = [r.run for r in self._live.values()]
        plan = decide(self.nodes, list(waiting.values()), running, {}, self.rules, self.now)
        explained = {s.job for s in plan.starts} | set(plan.waits)
        assert explained == set(waiting), "a job neither starts nor is told why it waits"
        for stop in plan.stops:
            r = self._live[stop.job]
            assert r.stop is None, "stopped twice"
            r.stop, r.saved_at = stop, self.now + self.rules.save_s
            r.run = replace(r.run, stopping=True, then=stop.then)
        for start in plan.starts:
            self._begin(waiting.pop(start.job), start.placement, start.boosted)
        self._check()
        return plan

    def _check(self) -> None:
        used: Counter[str] = Counter()
        for r in self._live.values():
            then = dict(r.stop.then) if r.stop else {}
            for node, count in r.run.placement:
                used[node] += max(count, then.pop(node, 0))
            used.update(then)  # kept for its restart
        for node in self.nodes:
            assert used[node.name] <= node.slots, f"{node.name} is oversubscribed"


def check_backfill(nodes: Sequence[Node], waiting: list[Job], running: list[Running], rules: Rules, now: float) -> None:
    """Check by counting slots over time that no reservation of a job ahead is touched by what starts now."""
    plan = decide(nodes, waiting, running, {}, rules, now)
    by_id = {job.id: job for job in waiting}
    stops = {stop.job: stop for stop in plan.stops}
    spans: list[tuple[float, float, Placement]] = []
    for r in running:
        end = r.started + r.job.limit_s
        end = end if end > now else now + 60.0
        if r.job.id in stops:
            end = now + rules.save_s  # what it keeps, it keeps to its limit
            if stops[r.job.id].then:
                spans.append((end, end + r.job.limit_s, stops[r.job.id].then))
        spans.append((now, end, r.placement))
    spans += [(now, now + by_id[s.job].limit_s, s.placement) for s in plan.starts]
    spans += [(at, at + by_id[number].limit_s, placement) for number, (at, placement) in plan.reserved.items()]
    slots = {node.name: node.slots for node in nodes}
    for at in {begin for begin, _, _ in spans}:
        used: Counter[str] = Counter()
        for begin, end, placement in spans:
            if begin <= at < end:
                used.update(dict(placement))
        for name, count in used.items():
            assert count <= slots[name], f"{name} at {at}: {count} of {slots[name]}"
