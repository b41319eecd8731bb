"""What no decision of the queue's policy may break, counted slot by slot and without the policy's own means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from launch.queue.order import starves
from launch.queue.state import Job, Node, Placement, Plan, Rules, Running

_OVERDUE_S = 60.0


def check_plan(
    plan: Plan, nodes: Sequence[Node], waiting: Sequence[Job], running: Sequence[Running], rules: Rules, now: float
) -> None:
    """Check one decision.

    Raises:
        AssertionError: no job is lost or doubled, no slot or quota is used twice, nobody stops without a reason, no
            reservation is touched, or a job was passed over that could have started.
    """
    jobs = {job.id: job for job in waiting}
    assert len(jobs) == len(waiting)
    started = [start.job for start in plan.starts]
    assert len(set(started)) == len(started), "a job starts twice"
    assert {*started, *plan.waits} == set(jobs), "a job neither starts nor is told why it waits"
    assert not {*started} & {*plan.waits}
    _check_starts(plan, nodes, jobs, rules, now)
    _check_stops(plan, jobs, running, rules, now)
    _check_order(plan, jobs, rules, now)
    _check_quotas(plan, jobs, running, rules)
    _check_slots(plan, nodes, jobs, running, rules, now)
    _check_nobody_passed_over(plan, nodes, jobs, running, rules, now)


def _check_starts(plan: Plan, nodes: Sequence[Node], jobs: dict[int, Job], rules: Rules, now: float) -> None:
    usable = {node.name for node in nodes if node.usable}
    for start in plan.starts:
        job = jobs[start.job]
        assert not job.held
        assert not job.after
        assert job.eligible_at <= now
        assert start.boosted == starves(job, rules, now)
    placements = [(jobs[start.job], start.placement) for start in plan.starts]
    placements += [(jobs[number], placement) for number, (_, placement) in plan.reserved.items()]
    for job, placement in placements:
        assert sum(count for _, count in placement) in job.sizes
        assert all(name in usable for name, _ in placement), "a node that is down or drained"
        assert len({name for name, _ in placement}) == len(placement)
        assert job.per_node is None or {count for _, count in placement} == {job.per_node}


def _check_stops(plan: Plan, jobs: dict[int, Job], running: Sequence[Running], rules: Rules, now: float) -> None:
    live = {run.job.id: run for run in running}
    assert len({stop.job for stop in plan.stops}) == len(plan.stops), "a job is stopped twice"
    told = {stop.job for stop in plan.stops}
    for run in running:
        if not run.stopping and now >= run.started + run.job.limit_s and (run.job.hard or plan.reserved):
            assert run.job.id in told, "it runs beyond its limit, or beyond its turn while others wait"
    for stop in plan.stops:
        run = live[stop.job]
        over = now >= run.started + run.job.limit_s
        assert not run.stopping
        if stop.why == "preempted":
            assert jobs[stop.by].priority > run.job.priority
            assert not run.boosted or now - run.started >= rules.protect_s, "one that had starved"
        elif stop.why == "limit":
            assert over
            assert run.job.hard
        elif stop.why == "turn":
            assert over
            assert not run.job.hard
            waits = jobs[stop.by]
            own = waits.user == run.job.user and starves(waits, rules, now)
            assert stop.by in plan.reserved or own, "its turn ends for nobody"
        else:
            assert stop.why == "resize"
            size = sum(count for _, count in stop.then)
            assert size in run.job.sizes
            assert (size < run.ranks) == bool(stop.by)
            if stop.by:
                assert all(count <= dict(run.placement).get(name, 0) for name, count in stop.then)
                assert jobs[stop.by].priority >= run.job.priority
            else:
                assert not plan.reserved, "it grows while others wait"


def _check_order(plan: Plan, jobs: dict[int, Job], rules: Rules, now: float) -> None:
    keys = []
    for number in plan.order:
        job = jobs[number]
        starved = starves(job, rules, now)
        keys.append((0, job.waiting_since, job.id) if starved else (1, -job.priority, 0))
    assert keys == sorted(keys), "the order is not by starvation and priority"


def _check_quotas(plan: Plan, jobs: dict[int, Job], running: Sequence[Running], rules: Rules) -> None:
    then = {stop.job: stop.then for stop in plan.stops}
    held = Counter[str]()
    for run in running:
        held[run.job.user] += max(run.ranks, _ranks(run.then), _ranks(then.get(run.job.id, ())))
    for start in plan.starts:
        held[jobs[start.job].user] += _ranks(start.placement)
    for user, quota in rules.quotas.items():
        assert held[user] <= quota, f"{user} runs {held[user]} of {quota}"


def _spans(
    plan: Plan, jobs: dict[int, Job], running: Sequence[Running], rules: Rules, now: float
) -> list[tuple[float, float, Placement]]:
    """Return who has which slots from when to when at the latest, reservations included."""
    stops = {stop.job: stop for stop in plan.stops}
    spans: list[tuple[float, float, Placement]] = []
    for run in running:
        end = run.started + run.job.limit_s
        end = end if end > now else now + _OVERDUE_S
        soon = now + rules.save_s
        if run.stopping:
            spans += [(now, soon, run.placement), (soon, soon + run.job.limit_s, run.then)]
            spans += [(now, soon, _beyond(run.then, run.placement))]
        elif run.job.id in stops:
            then = stops[run.job.id].then
            spans += [(now, min(end, soon), run.placement), (soon, max(end, soon), then)]
            spans += [(now, soon, _beyond(then, run.placement))]
        else:
            spans.append((now, end, run.placement))
    spans += [(now, now + jobs[start.job].limit_s, start.placement) for start in plan.starts]
    spans += [(at, at + jobs[number].limit_s, placement) for number, (at, placement) in plan.reserved.items()]
    return spans


def _check_slots(
    plan: Plan, nodes: Sequence[Node], jobs: dict[int, Job], running: Sequence[Running], rules: Rules, now: float
) -> None:
    """Check that every node has the slots for all that run, start now and are to start at their reserved times."""
    spans = _spans(plan, jobs, running, rules, now)
    slots = {node.name: node.slots for node in nodes}
    for at in {begin for begin, _, _ in spans}:
        used: Counter[str] = Counter()
        for begin, end, placement in spans:
            if begin <= at < end:
                for name, count in placement:
                    used[name] += count
        for name, count in used.items():
            assert count <= slots[name], f"{name} at {at}: {count} of {slots[name]}"


def _check_nobody_passed_over(
    plan: Plan, nodes: Sequence[Node], jobs: dict[int, Job], running: Sequence[Running], rules: Rules, now: float
) -> None:
    """Check that each job that waits did not fit beside those ahead of it.

    From the last of the order to the first, each start and reservation is taken back; what is left then is what the job
    found: running jobs, and starts and reservations of those ahead.
    """
    free = {node.name: node.slots if node.usable else 0 for node in nodes}
    held: Counter[str] = Counter()
    soon, later = now + rules.save_s, []
    for run in running:
        held[run.job.user] += max(run.ranks, _ranks(run.then))
        _take(free, run.placement)
        if run.stopping:
            _take(free, _beyond(run.then, run.placement))
            later.append((soon, soon + run.job.limit_s, run.then))
    placed = {start.job: start.placement for start in plan.starts}
    for number, placement in placed.items():
        held[jobs[number].user] += _ranks(placement)
        _take(free, placement)
    reserved = {number: (at, at + jobs[number].limit_s, place) for number, (at, place) in plan.reserved.items()}
    barred = {jobs[n].user for n in plan.order if n in plan.waits and starves(jobs[n], rules, now)
              and jobs[n].sizes[0] > rules.quotas.get(jobs[n].user, 1 << 30) - held[jobs[n].user]}  # fmt: skip
    if plan.more:
        return
    refused: set[tuple[int, int | None, float]] = set()
    for number in reversed(plan.order):
        job = jobs[number]
        if number in placed:
            held[job.user] -= _ranks(placed[number])
            _take(free, placed[number], -1)
            refused.clear()
            continue
        if reserved.pop(number, None):
            refused.clear()
        kind = (job.sizes[0], job.per_node, job.limit_s)
        if kind in refused or job.user in barred:
            continue
        if job.sizes[0] > rules.quotas.get(job.user, 1 << 30) - held[job.user]:
            continue
        room = dict(free)
        for begin, end, placement in [*later, *reserved.values()]:
            if begin < now + job.limit_s and end > now:
                _take(room, placement)
        assert not _fits(job, room.values()), f"job {number} was passed over: {plan.waits[number]}"
        refused.add(kind)


def _fits(job: Job, room: Collection[int]) -> bool:
    if job.per_node is None:
        return sum(max(0, slots) for slots in room) >= job.sizes[0]
    return sum(slots >= job.per_node for slots in room) * job.per_node >= job.sizes[0]


def _take(free: dict[str, int], placement: Placement, sign: int = 1) -> None:
    for name, count in placement:
        free[name] -= sign * count


def _ranks(placement: Placement) -> int:
    return sum(count for _, count in placement)


def _beyond(placement: Placement, other: Placement) -> Placement:
    theirs = dict(other)
    return tuple((name, count - theirs.get(name, 0)) for name, count in placement if count > theirs.get(name, 0))


@dataclass
class Bound:
    """Checks that a job that has starved starts in time, once it is the first of them.

    It waits at most until all jobs that run have reached their limits or the ends of their turns, and have saved. If a
    quota keeps it back, it waits so long for its user's jobs, and so long again for its slots. Whatever takes slots
    away, or gives a running job another limit (a node, the scheduler, a resize), begins the time anew.

    Attributes:
        longest: seconds that such a job waited.
    """

    rules: Rules
    kill_after_s: float = 30.0
    longest: float = 0.0
    _head: int = 0
    _since: float = 0.0
    _limit: float = 0.0

    def disturb(self) -> None:
        """Begin anew: what was expected holds no more."""
        self._head = 0

    def note(self, plan: Plan, waiting: Sequence[Job], running: Sequence[Running], now: float) -> None:
        """Look at a decision."""
        jobs = {job.id: job for job in waiting}
        head = next((number for number in plan.order if number in plan.waits), 0)
        if not head or not starves(jobs[head], self.rules, now):
            self._head = 0
            return
        if head != self._head:
            left = [max(0.0, run.started + run.job.limit_s - now) for run in running]
            left += [jobs[start.job].limit_s for start in plan.starts]
            most = max(left, default=0.0) + self.kill_after_s + self.rules.save_s + _OVERDUE_S
            if jobs[head].user in self.rules.quotas:
                most += most + max(run.job.limit_s for run in running) if running else most
            self._head, self._since, self._limit = head, now, now + most
        self.longest = max(self.longest, now - self._since)
        assert now <= self._limit, f"job {head} has starved: {now - self._since:.0f} s first of all"
