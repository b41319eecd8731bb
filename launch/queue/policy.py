"""The queue's decisions: a pure function of nodes, jobs, use and clock. Nothing is started or stored here.

    order (launch.queue.order)   starved, then priority, then fair share, then arrival
    first that fits              starts, all ranks or none (launch.queue.timeline chooses the nodes)
    one that does not            elastic jobs shrink, jobs of lower priority stop, where that makes room for it;
                                 otherwise it gets a reservation, which jobs behind it must not touch (back-fill)
    behind the last reservation  starts if it touches none; the next ones are told when they should start
    nobody is blocked            elastic jobs grow

Waiting is bounded: a job that has waited `starve_after_s` goes before all others. Then it waits at most until the
running jobs have reached their limits, and for jobs that had starved before it. Where its user's quota keeps it back,
no other job of that user starts, so it waits for that user's running jobs first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from launch.queue.order import in_order, starves
from launch.queue.room import make_room, options
from launch.queue.state import Job, Node, Placement, Plan, Rules, Running, Start, Stop, Wait
from launch.queue.timeline import Slots, Timeline
from setformer_dist.core.words import counted

_OVERDUE_S = 60.0  # a job beyond its limit is expected to end within this time
FITS_NOT = "does not fit the nodes that are up and not drained"
BEHIND = "behind other jobs"
_MOST_BLOCKED = 8  # jobs of which it is known when they should start, if `depth` is not larger
SHOWN = 200  # jobs whose place in the order is known at least


def decide(
    nodes: Sequence[Node],
    waiting: Sequence[Job],
    running: Sequence[Running],
    use: Mapping[str, float],
    rules: Rules,
    now: float,
) -> Plan:
    """Decide what to start and to stop, and say why every other job waits.

    Args:
        nodes: all of the cluster.
        waiting: jobs that do not run.
        running: jobs that do, or are being stopped.
        use: decayed slot-seconds by user.
        rules: see there.
        now: the present.
    """
    decision = _Decision(Timeline(nodes, now), running, rules, now)
    candidates = decision.candidates(waiting)
    coming, ordered = in_order(candidates, use, rules, now), []
    for job in coming:
        ordered.append(job)
        if decision.is_full:
            # Which of thousands is the last matters to nobody while there is no free slot.
            ordered += coming if decision.timeline.total_free else islice(coming, SHOWN)
            decision.back_fill(ordered, candidates)
            decision.foresee(ordered)
            break
        decision.consider(job)
    decision.end_overdue()
    if not decision.blocked and not decision.starts:
        decision.grow()
    return Plan(
        tuple(decision.starts),
        tuple(decision.stops.values()),
        decision.waits,
        tuple(job.id for job in ordered),
        decision.reserved,
        len(decision.starts) >= rules.most_starts,
    )


@dataclass
class _Decision:
    """A decision that is being made."""

    timeline: Timeline
    running: Sequence[Running]
    rules: Rules
    now: float
    starts: list[Start] = field(default_factory=list)
    stops: dict[int, Stop] = field(default_factory=dict)
    waits: dict[int, Wait] = field(default_factory=dict)
    blocked: list[Job] = field(default_factory=list)
    reserved: dict[int, tuple[float, Placement]] = field(default_factory=dict)
    preempting: list[int] = field(default_factory=list)
    options: dict[int, list[tuple[Stop, Slots]]] = field(default_factory=dict)
    held_by: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    barred: dict[str, int] = field(default_factory=dict)  # users whose quota is kept for a job that has starved

    def __post_init__(self) -> None:
        for run in self.running:
            # One that is being grown has its larger size already.
            self.held_by[run.job.user] += max(run.ranks, sum(count for _, count in run.then))
            if run.stopping:
                self.timeline.take(_larger(run.placement, run.then), self.now + self.rules.save_s)
                self.timeline.give_soon(self.timeline.slots_of(_less(run.placement, run.then)))
                if run.then:
                    self.timeline.reserve(self.now + self.rules.save_s, run.job.limit_s, run.then)
            else:
                self.timeline.take(run.placement, self._end_of(run))

    @property
    def is_full(self) -> bool:
        """Whether no further job gets a reservation. Those for which others save now do not count: they start soon."""
        long = sum(start > self._soon for start, _ in self.reserved.values())
        most = max(_MOST_BLOCKED, self.rules.depth)
        return long >= self.rules.depth or len(self.blocked) >= most or len(self.starts) >= self.rules.most_starts

    @property
    def _soon(self) -> float:
        return self.now + self.rules.save_s

    def _end_of(self, run: Running) -> float:
        end = run.started + run.job.limit_s
        return end if end > self.now else self.now + _OVERDUE_S

    def candidates(self, waiting: Sequence[Job]) -> list[Job]:
        """Return the jobs that may start; say why the others may not."""
        room = sum(node.slots for node in self.timeline.nodes if node.usable)
        widths = [node.slots for node in self.timeline.nodes if node.usable]
        possible: dict[tuple[int, int | None], bool] = {}
        found = []
        for job in waiting:
            key = (job.sizes[0], job.per_node)
            if key not in possible:
                per = job.per_node
                possible[key] = key[0] <= room and (per is None or sum(w >= per for w in widths) * per >= key[0])
            if job.held:
                self.waits[job.id] = Wait("held by its user")
            elif job.after:
                self.waits[job.id] = Wait(f"waits for {_jobs(job.after)} to be done")
            elif job.eligible_at > self.now:
                self.waits[job.id] = Wait("waits a while after a failure", job.eligible_at)
            elif not possible[key]:
                self.waits[job.id] = Wait(FITS_NOT)
            else:
                found.append(job)
        return found

    def consider(self, job: Job) -> None:
        """Start a job, or make room for it, or reserve its place."""
        sizes = self._within_quota(job)
        if not sizes:
            self._over_quota(job)
            return
        if self._start(job, sizes) or self._room_comes(job, sizes[0]):
            return
        if len(self.preempting) >= self.rules.most_preempting:
            self._reserve(job, sizes[0], "waits for free slots")
            return
        if job.priority not in self.options:
            self.options[job.priority] = options(job.priority, self.timeline, self.running, self.rules, self.now)
        able = [option for option in self.options[job.priority] if option[0].job not in self.stops]
        stops = make_room(job, sizes[0], self.timeline, self._soon, able)
        if stops:
            self._ask(job, stops, sizes[0])
            return
        self._reserve(job, sizes[0], "waits for free slots")

    def _over_quota(self, job: Job) -> None:
        quota = self.rules.quotas[job.user]
        if job.user in self.barred:
            self.waits[job.id] = Wait(f"behind {_jobs((self.barred[job.user],))} of the same user, which has starved")
            return
        self.waits[job.id] = Wait(f"{job.user} may run {counted(quota, 'rank')} at a time")
        if starves(job, self.rules, self.now) and job.sizes[0] <= quota:
            self.barred[job.user] = job.id  # its user's small jobs would take the quota for ever

    def _within_quota(self, job: Job) -> tuple[int, ...]:
        if job.user in self.barred:
            return ()
        quota = self.rules.quotas.get(job.user)
        if quota is None:
            return job.sizes
        return tuple(size for size in job.sizes if self.held_by[job.user] + size <= quota)

    def _start(self, job: Job, sizes: Sequence[int]) -> bool:
        if self.timeline.total_free < sizes[0]:
            return False
        free = self.timeline.free(self.now, job.limit_s)
        for size in reversed(sizes):
            placement = self.timeline.place(free, size, job.per_node)
            if placement is not None:
                self.timeline.take(placement, self.now + job.limit_s)
                self.starts.append(Start(job.id, placement, starves(job, self.rules, self.now)))
                self.held_by[job.user] += size
                return True
        return False

    def _room_comes(self, job: Job, size: int) -> bool:
        """Reserve the place that jobs which are stopping make."""
        if not self.timeline.any_soon:
            return False
        placement = self.timeline.place(self.timeline.free_soon(self._soon, job.limit_s), size, job.per_node)
        if placement is None:
            return False
        self._block(job, self._soon, placement, "waits for other jobs to save")
        return True

    def _ask(self, job: Job, stops: Sequence[Stop], size: int) -> None:
        self.preempting.append(job.id)
        for stop in stops:
            self.stops[stop.job] = stop
            run = next(run for run in self.running if run.job.id == stop.job)
            self.timeline.give_soon(self.timeline.slots_of(_less(run.placement, stop.then)))
        placement = self.timeline.place(self.timeline.free_soon(self._soon, job.limit_s), size, job.per_node)
        assert placement is not None
        whom = _jobs(tuple(stop.job for stop in stops))
        self._block(job, self._soon, placement, f"waits for {whom} to save and make room")

    def _reserve(self, job: Job, size: int, reason: str) -> None:
        found = self.timeline.earliest(size, job.per_node, job.limit_s)
        if found is None:
            self.waits[job.id] = Wait(FITS_NOT)
            return
        self._block(job, *found, reason)

    def _block(self, job: Job, start: float, placement: Placement, reason: str) -> None:
        self.blocked.append(job)
        self.timeline.reserve(start, job.limit_s, placement)
        self.reserved[job.id] = (start, placement)
        self.waits[job.id] = Wait(reason, start)

    def back_fill(self, ordered: Sequence[Job], jobs: Sequence[Job]) -> None:
        """Start those that fit beside all reservations; none of them gets one.

        Args:
            ordered: jobs in their order; those that were considered before are passed over.
            jobs: all, those too that are not in the order.
        """
        refused: list[tuple[int, float]] = []  # ranks and times that did not fit: more of both does not fit either
        seen = {*self.waits, *(start.job for start in self.starts)}
        free = self.timeline.total_free
        for job in ordered if free else ():
            size = job.sizes[0]
            if (
                job.id not in seen
                and len(self.starts) < self.rules.most_starts
                and size <= free
                and not any(size >= ranks and job.limit_s >= limit for ranks, limit in refused)
                and (sizes := self._within_quota(job))
            ):
                if self._start(job, sizes):
                    seen.add(job.id)
                    free = self.timeline.total_free
                elif job.per_node is None:
                    refused.append((size, job.limit_s))
        self.leave([job for job in jobs if job.id not in seen])

    def foresee(self, ordered: Sequence[Job]) -> None:
        """Say of the next ones behind when they should start, by reservations that nobody has to respect."""
        behind = (job for job in ordered if self.blocked and self.waits.get(job.id) == Wait(BEHIND))
        for job in islice(behind, max(0, _MOST_BLOCKED - len(self.blocked))):
            if (found := self.timeline.earliest(job.sizes[0], job.per_node, job.limit_s)) is not None:
                self.timeline.reserve(found[0], job.limit_s, found[1])
                self.waits[job.id] = Wait(BEHIND, found[0])

    def leave(self, jobs: Sequence[Job]) -> None:
        """Say of the jobs behind the last one that was considered that they wait for those ahead."""
        if not self.blocked:  # many start now: these are next
            wait = Wait("starts next", self.now)
            self.waits.update((job.id, wait) for job in jobs)
            return
        self.waits.update(dict.fromkeys((job.id for job in jobs), Wait(BEHIND)))

    def end_overdue(self) -> None:
        """Stop jobs that have reached their limit; where that is a turn, only if somebody waits."""
        for run in self.running:
            if run.stopping or run.job.id in self.stops or self.now < run.started + run.job.limit_s:
                continue
            if run.job.hard:
                self.stops[run.job.id] = Stop(run.job.id, "limit")
            elif for_whom := self.barred.get(run.job.user) or next((job.id for job in self.blocked), 0):
                self.stops[run.job.id] = Stop(run.job.id, "turn", by=for_whom)

    def grow(self) -> None:
        """Grow the elastic job that gains most, if slots are free and nobody waits for them."""
        best: tuple[int, int, Placement] | None = None
        if any(run.stopping for run in self.running):
            return
        for run in self.running:
            larger = [size for size in self._growable(run) if size > run.ranks]
            if not larger:
                continue
            free = self.timeline.free(self.now, run.job.limit_s) + self.timeline.slots_of(run.placement)
            for size in reversed(larger):
                placement = self.timeline.place(free, size, run.job.per_node)
                if placement is not None:
                    best = max(best or (0, 0, ()), (size - run.ranks, -run.job.id, placement))
                    break
        if best is not None:
            self.stops[-best[1]] = Stop(-best[1], "resize", best[2])

    def _growable(self, run: Running) -> Sequence[int]:
        if run.job.id in self.stops or self.now - run.started < self.rules.grow_after_s:
            return ()
        if run.job.user in self.barred:
            return ()
        quota = self.rules.quotas.get(run.job.user)
        spare = None if quota is None else quota - self.held_by[run.job.user]
        return [size for size in run.job.sizes if spare is None or size - run.ranks <= spare]


def _jobs(ids: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ids[:3]))
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return f"job{'s' if len(ids) > 1 else ''} {shown}{more}"


def _less(placement: Placement, other: Placement) -> Placement:
    """Return what a placement has and another does not have."""
    theirs = dict(other)
    return tuple((node, count - theirs.get(node, 0)) for node, count in placement if count > theirs.get(node, 0))


def _larger(placement: Placement, other: Placement) -> Placement:
    """Return the larger number of ranks of two placements, by node."""
    counts = dict(placement)
    for node, count in other:
        counts[node] = max(count, counts.get(node, 0))
    return tuple(counts.items())
