"""The queue's policy against FIFO and EASY back-fill, on generated workloads; and how long a decision takes.

    python -m benchmarks.queue [--jobs 2000] [--seeds 12] [--nodes 32] [--slots 8] [--load 0.9] [--json FILE]
    python -m benchmarks.queue --swf TRACE.swf.gz [--jobs 2000] [--nodes 32] [--slots 8]    # a trace instead

Sizes and run times are drawn as Lublin and Feitelson do (2003, J. Parallel Distrib. Comput. 63(11)), with the
parameters of their program m_lublin99.c for jobs without types: a quarter of the jobs has one rank, log2 of the
others is two-stage uniform, mostly rounded, and the log of the run time is hyper-gamma with a mixture that depends on
the size. Arrivals are simpler than theirs: exponential with a daily cycle, scaled to a load. Estimates, which the
model does not have, are run times times a uniform factor of 1 to 5.

All policies get the same jobs, rigid and without faults, each of one user: what differs is the order. `queue` stops
nobody here: all jobs have one priority. The offline bound of utilisation is the work divided by the slots' time from
the first arrival to the last end that no schedule can beat: the largest of (work / slots) and (arrival + run time).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.swf import Work, read
from launch.queue.policy import decide
from launch.queue.state import Job, Node, Placement, Rules, Running
from launch.queue.timeline import Timeline

# SERIAL_PROB, POW2_PROB, ULOW, UHI - UMED, UPROB; (A1, B1), (A2, B2), PA, PB.
_SERIAL, _POWERS, _ULOW, _BELOW, _UPROB = 0.244, 0.576, 0.8, 2.5, 0.86
_LONG, _SHORT = (312.0, 0.03), (4.2, 0.94)
_PA, _PB = -0.0054, 0.78
_BOUND_S = 10.0  # of the bounded slowdown


def workload(count: int, slots: int, load: float, seed: int) -> list[Work]:
    """Return jobs in order of arrival."""
    draws = random.Random(seed)
    high = math.log2(slots)
    medium = high - _BELOW
    jobs = []
    for number in range(1, count + 1):
        kind, low_half = draws.random(), draws.random() < _UPROB
        log2 = draws.uniform(_ULOW, medium) if low_half else draws.uniform(medium, high)
        log2 = math.floor(log2 + 0.5) if kind <= _SERIAL + _POWERS else log2
        ranks = 1 if kind <= _SERIAL else math.floor(2**log2 + 0.5)
        share = min(1.0, max(0.0, _PA * ranks + _PB))
        alpha, beta = _SHORT if draws.random() < share else _LONG
        seconds = min(129600.0, max(1.0, math.exp(draws.gammavariate(alpha, beta))))
        jobs.append((number, min(slots, ranks), seconds, seconds * draws.uniform(1.0, 5.0)))
    work = sum(ranks * seconds for _, ranks, seconds, _ in jobs)
    mean_gap = work / (load * slots) / count
    at, made = 0.0, []
    for number, ranks, seconds, estimate in jobs:
        day = 1.0 + 0.8 * math.cos(2 * math.pi * at / 86400.0)
        at += draws.gammavariate(1.0, mean_gap) * day
        made.append(Work(number, at, ranks, seconds, estimate))
    return made


Decider = Callable[[Sequence[Node], Sequence[Work], dict[int, tuple[Work, Placement, float]], float],
                   list[tuple[int, Placement]]]  # fmt: skip


def fifo(
    nodes: Sequence[Node], waiting: Sequence[Work], live: dict[int, tuple[Work, Placement, float]], now: float
) -> list[tuple[int, Placement]]:
    """Start jobs in order of arrival, as long as the first one fits."""
    return _in_arrival(nodes, waiting, live, now, back_fill=False)


def easy(
    nodes: Sequence[Node], waiting: Sequence[Work], live: dict[int, tuple[Work, Placement, float]], now: float
) -> list[tuple[int, Placement]]:
    """EASY: the first that does not fit has a reservation, and any other may start that does not touch it."""
    return _in_arrival(nodes, waiting, live, now, back_fill=True)


def _in_arrival(
    nodes: Sequence[Node], waiting: Sequence[Work], live: dict[int, tuple[Work, Placement, float]], now: float,
    back_fill: bool,
) -> list[tuple[int, Placement]]:  # fmt: skip
    timeline = Timeline(nodes, now)
    for work, placement, began in live.values():
        timeline.take(placement, max(began + work.estimate, now + 1.0))
    starts: list[tuple[int, Placement]] = []
    blocked = False
    for work in waiting:
        if timeline.total_free < 1:
            break
        placement = timeline.place(timeline.free(now, work.estimate), work.ranks, None)
        if placement is not None:
            timeline.take(placement, now + work.estimate)
            starts.append((work.id, placement))
        elif not back_fill:
            break
        elif not blocked:
            blocked = True
            found = timeline.earliest(work.ranks, None, work.estimate)
            assert found is not None
            timeline.reserve(found[0], work.estimate, found[1])
    return starts


def queue(
    nodes: Sequence[Node], waiting: Sequence[Work], live: dict[int, tuple[Work, Placement, float]], now: float
) -> list[tuple[int, Placement]]:
    """The queue's own policy."""
    plan = decide(
        nodes, [_job(work) for work in waiting],
        [Running(_job(work), placement, began, began) for work, placement, began in live.values()], {},
        Rules(starve_after_s=1e12), now,
    )  # fmt: skip
    return [(start.job, start.placement) for start in plan.starts]


def _job(work: Work) -> Job:
    return Job(work.id, f"user {work.id}", 0, work.arrives, (work.ranks,), limit_s=work.estimate, hard=True)


def simulate(jobs: Sequence[Work], nodes: Sequence[Node], decider: Decider) -> dict[str, float]:
    """Return mean wait in s, mean bounded slowdown, utilisation, and that divided by the offline bound."""
    by_id = {work.id: work for work in jobs}
    waiting: dict[int, Work] = {}
    live: dict[int, tuple[Work, Placement, float]] = {}
    ends: list[tuple[float, int]] = []
    began: dict[int, float] = {}
    coming, now = list(reversed(jobs)), 0.0
    while coming or waiting or live:
        now = min([coming[-1].arrives] if coming else [], default=math.inf)
        now = min(now, ends[0][0] if ends else math.inf)
        while coming and coming[-1].arrives <= now:
            work = coming.pop()
            waiting[work.id] = work
        while ends and ends[0][0] <= now:
            del live[heapq.heappop(ends)[1]]
        while starts := decider(nodes, list(waiting.values()), live, now):
            for number, placement in starts:
                work = waiting.pop(number)
                live[number] = (work, placement, now)
                began[number] = now
                heapq.heappush(ends, (now + work.seconds, number))
    slots = sum(node.slots for node in nodes)
    work_done = sum(work.ranks * work.seconds for work in jobs)
    last = max(began[work.id] + work.seconds for work in jobs)
    bound = max(work_done / slots, max(work.arrives + work.seconds for work in jobs))
    waits = [began[number] - by_id[number].arrives for number in began]
    slow = [max(1.0, (began[w.id] - w.arrives + w.seconds) / max(w.seconds, _BOUND_S)) for w in jobs]
    return {
        "wait_s": statistics.fmean(waits),
        "slowdown": statistics.fmean(slow),
        "utilisation": work_done / (slots * last),
        "of_bound": bound / last,
    }


def decision_ms(waiting: int, nodes: int, repeats: int = 7) -> dict[str, float]:
    """Return the time of a decision with many jobs that wait, on a cluster that is full: processor time in ms."""
    draws = random.Random(0)
    cluster = [Node(f"n{i}", 8) for i in range(nodes)]
    jobs = [Job(n, f"u{n % 40}", n % 3, 0.0, (draws.choice([1, 2, 8, 64]),), limit_s=draws.choice([600.0, 86400.0]))
            for n in range(nodes, nodes + waiting)]  # fmt: skip
    running = [
        Running(Job(n, f"u{n % 40}", n % 3, 0.0, (8,), limit_s=draws.uniform(1e3, 1e5)), ((f"n{n}", 8),), 0.0, 0.0)
        for n in range(nodes)
    ]
    times = []
    for _ in range(repeats):
        began = time.process_time()
        decide(cluster, jobs, running, {}, Rules(), 500.0)
        times.append(1e3 * (time.process_time() - began))
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8, help="of each node")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--swf", type=Path, help="a trace in the Standard Workload Format, instead of generated jobs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    nodes, slots = [Node(f"n{i}", args.slots) for i in range(args.nodes)], args.nodes * args.slots
    if args.swf is not None:
        try:
            jobs, left_out = read(args.swf, slots, args.jobs)
        except (OSError, EOFError, ValueError) as error:
            parser.error(str(error))
        print(f"{len(jobs)} jobs of {args.swf}; {left_out} left out, which did not run or need more than {slots} slots")
        workloads = [jobs]
    else:
        workloads = [workload(args.jobs, slots, args.load, seed) for seed in range(args.seeds)]
    found: dict[str, list[dict[str, float]]] = {}
    for jobs in workloads:
        for name, decider in (("FIFO", fifo), ("EASY", easy), ("queue", queue)):
            found.setdefault(name, []).append(simulate(jobs, nodes, decider))
    table = Table("policy", "mean wait", "bounded slowdown", "utilisation", "of the offline bound", "± of its mean")
    for name, rows in found.items():
        mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        spread = statistics.stdev(row["of_bound"] for row in rows) / len(rows) ** 0.5 if len(rows) > 1 else math.nan
        table.add_row(name, f"{mean['wait_s']:,.0f} s", f"{mean['slowdown']:.1f}", f"{mean['utilisation']:.3f}",
                      f"{mean['of_bound']:.3f}", f"{spread:.3f}")  # fmt: skip
    console = Console()
    console.print(describe())
    console.print(table)
    cost = decision_ms(10_000, 1_000)
    console.print(
        "one decision, 10,000 jobs wait on 1,000 nodes: " + ", ".join(f"{k} {v:.0f} ms" for k, v in cost.items())
    )
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(), "policies": found, "decision_ms": cost}, indent=1))


if __name__ == "__main__":
    main()
