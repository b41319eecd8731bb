"""The order in which jobs are considered: who has starved, then priority, then fair share, then arrival.

Fair share: within a priority, the user goes first whose use divided by share is least. Use is in slot-seconds and
decays by half in a fixed time (`decayed`). A job that is picked counts at once, so that users take turns.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter

from launch.queue.state import Job, Rules

_CHARGE_S = 3600.0  # a picked job counts as if it ran so long, or to its limit


def decayed(amount: float, age_s: float, half_life_s: float) -> float:
    """Return what is left of an amount after a time; a clock that was set back leaves it whole."""
    return float(amount * 0.5 ** (max(0.0, age_s) / half_life_s))


def starves(job: Job, rules: Rules, now: float) -> bool:
    """Return whether a job has waited so long that it goes before all others."""
    return now - job.waiting_since >= rules.starve_after_s


def in_order(jobs: Iterable[Job], use: Mapping[str, float], rules: Rules, now: float) -> Iterator[Job]:
    """Yield jobs, first first.

    Args:
        jobs: that may start.
        use: decayed slot-seconds of each user, the work of running jobs included.
        rules: with the users' shares.
        now: the present.
    """
    starved: list[Job] = []
    classes: dict[int, dict[str, list[Job]]] = defaultdict(lambda: defaultdict(list))
    for job in jobs:
        if starves(job, rules, now):
            starved.append(job)
        else:
            classes[job.priority][job.user].append(job)
    yield from sorted(starved, key=lambda job: (job.waiting_since, job.id))
    spent = dict(use)
    for priority in sorted(classes, reverse=True):
        yield from _take_turns(classes[priority], spent, rules)


def _take_turns(users: Mapping[str, list[Job]], spent: dict[str, float], rules: Rules) -> Iterator[Job]:
    queues = {user: deque(sorted(jobs, key=attrgetter("id"))) for user, jobs in users.items()}
    heap = [(spent.get(user, 0.0) / rules.shares.get(user, 1.0), queue[0].id, user) for user, queue in queues.items()]
    heapq.heapify(heap)
    while heap:
        level, _, user = heap[0]
        job = queues[user].popleft()
        yield job
        charge = job.sizes[0] * min(job.limit_s, _CHARGE_S)
        spent[user] = spent.get(user, 0.0) + charge
        if queues[user]:
            share = rules.shares.get(user, 1.0)
            heapq.heapreplace(heap, (level + charge / share, queues[user][0].id, user))
        else:
            heapq.heappop(heap)
