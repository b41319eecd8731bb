"""How to make room for a job: which elastic jobs shrink, which jobs of lower priority stop. Pure.

What is lost is the work since the last checkpoint, in slot-seconds: a job saves when it is stopped, but may fail to.
Whoever loses least goes first, and nobody stops in vain: a job whose stop is not needed in the end keeps running.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from launch.queue.state import Job, Placement, Rules, Running, Stop
from launch.queue.timeline import Slots, Timeline

_FEW = 64


def make_room(job: Job, size: int, timeline: Timeline, at: float, options: Sequence[tuple[Stop, Slots]]) -> list[Stop]:
    """Return the stops that make room for a job; none where there is no such set.

    Args:
        job: that waits.
        size: ranks.
        timeline: with what is free, or soon will be.
        at: when those that stop now have ended.
        options: of its priority.
    """
    if not options:
        return []
    free = timeline.free_soon(at, job.limit_s)
    # More room never fits worse, so halving finds how many of the options are needed; most often they are few.
    few = options[:_FEW]
    totals = np.cumsum(np.stack([gives for _, gives in few]), axis=0)
    if len(options) > _FEW and timeline.place(free + totals[-1], size, job.per_node) is None:
        few = options
        totals = np.cumsum(np.stack([gives for _, gives in few]), axis=0)

    def fits(count: int) -> bool:
        return timeline.place(free + totals[count - 1], size, job.per_node) is not None

    if not fits(len(few)):
        return []
    count = bisect.bisect_left(range(1, len(few)), True, key=fits) + 1
    free = free + totals[count - 1]
    taken: dict[int, tuple[Stop, Slots]] = {}
    for stop, gives in few[:count]:
        before = taken[stop.job][1] if stop.job in taken else 0
        taken[stop.job] = (replace(stop, by=job.id), gives + before)  # a stop supersedes a shrink of the same job
    for victim in list(taken):  # whoever is not needed goes on
        without = free - taken[victim][1]
        if timeline.place(without, size, job.per_node) is not None:
            free = without
            del taken[victim]
    return [stop for stop, _ in taken.values()]


def options(
    priority: int, timeline: Timeline, running: Sequence[Running], rules: Rules, now: float
) -> list[tuple[Stop, Slots]]:
    """Return what may be stopped for a job of a priority, shrinks first, then by loss, and what more each gives."""
    usable = np.array([node.usable for node in timeline.nodes], dtype=bool)
    found: list[tuple[tuple[int, float, int, int], Stop, Slots]] = []
    for run in running:
        lower = run.job.priority < priority
        if run.stopping or run.job.priority > priority:
            continue
        if now < run.started + run.job.limit_s <= now + rules.save_s:
            continue  # it ends by itself before it has saved
        if run.boosted and now - run.started < rules.protect_s:
            continue
        loss = run.ranks * max(0.0, now - run.saved)
        for smaller in reversed([size for size in run.job.sizes if size < run.ranks]):
            kept = shrunk(run.placement, smaller)
            gives = timeline.slots_of(run.placement) - timeline.slots_of(kept)
            key = (0, loss, -smaller, run.job.id)
            found.append((key, Stop(run.job.id, "resize", kept), np.where(usable, gives, 0)))
        if lower:
            gives = np.where(usable, timeline.slots_of(run.placement), 0)
            found.append(((1, loss, run.job.priority, run.job.id), Stop(run.job.id, "preempted"), gives))
    found.sort(key=lambda entry: entry[0])
    given: dict[int, Slots] = {}
    steps = []
    for _, stop, gives in found:  # each beyond what the options of the same job before it give
        steps.append((stop, gives - given.get(stop.job, 0)))
        given[stop.job] = gives
    return steps


def shrunk(placement: Placement, ranks: int) -> Placement:
    """Return the part of a placement that a job keeps: its largest nodes, so that it stays on few."""
    kept: list[tuple[str, int]] = []
    for node, count in sorted(placement, key=lambda entry: -entry[1]):
        if ranks:
            kept.append((node, min(count, ranks)))
            ranks -= min(count, ranks)
    return tuple(kept)
