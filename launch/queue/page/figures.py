"""What Prometheus reads at /metrics, by `prometheus_client`; computed when it asks.

Gauges come from the tables. Counters come from all events there are: each look reads those that are new, so that a page
that starts again goes on with the same numbers. The scheduler writes how long decisions take (launch.queue.pace).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from launch.queue import pace
from launch.queue import schema as db
from launch.queue.source import Local

_AT_A_TIME = 10_000
_WAITS_S = (10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 7 * 86400.0)
_LONGEST_LABEL = 200  # characters


class Figures(Collector):
    """The figures of one queue.

    Args:
        queue: the queue.
        folder: of the queue.
    """

    def __init__(self, queue: Local, folder: Path) -> None:
        self._queue = queue
        self._folder = folder
        self._lock = threading.Lock()
        self._since = 0
        self._stops: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._waits: Counter[float] = Counter()
        self._waited_s = 0.0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Return nothing: a name would need a look at the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all figures."""
        with self._lock:
            self._read_events()
            yield from self._jobs()
            yield from self._nodes()
            yield from self._counters()
        yield from self._decisions()

    def _jobs(self) -> Iterator[Metric]:
        table = db.jobs.c
        jobs = GaugeMetricFamily("setformer_queue_jobs", "Jobs by state and user.", labels=["state", "user"])
        query = sa.select(table.state, table.user, sa.func.count().label("n")).group_by(table.state, table.user)
        for row in self._queue.store.rows(query):
            jobs.add_metric([row["state"], _label(row["user"])], row["n"])
        yield jobs
        oldest = self._queue.store.rows(
            sa.select(sa.func.min(table.waiting_since).label("at")).where(table.state == "waiting")
        )[0]["at"]
        waits = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        yield GaugeMetricFamily(
            "setformer_queue_longest_wait_seconds", "For how long the job that has waited longest waits.", waits
        )
        led = self._queue.leader()
        yield GaugeMetricFamily("setformer_queue_term", "Term of the scheduler that leads; 0 for none.",
                                led["term"] if led else 0)  # fmt: skip

    def _nodes(self) -> Iterator[Metric]:
        total = GaugeMetricFamily("setformer_queue_node_slots", "Slots of a node.", labels=["node"])
        used = GaugeMetricFamily("setformer_queue_node_slots_used", "Slots that jobs have.", labels=["node"])
        usable = GaugeMetricFamily("setformer_queue_node_usable", "1 for a node that is up and not drained.",
                                   labels=["node"])  # fmt: skip
        for node in self._queue.nodes():
            name = [_label(node["name"])]
            total.add_metric(name, node["slots"])
            used.add_metric(name, node["used"])
            usable.add_metric(name, node["state"] == "up")
        yield from (total, used, usable)

    def _read_events(self) -> None:
        table = db.events.c
        query = sa.select(table.id, table.kind, table.data).order_by(table.id).limit(_AT_A_TIME)
        while rows := self._queue.store.rows(query.where(table.id > self._since)):
            for row in rows:
                self._count(row["kind"], row["data"])
            self._since = rows[-1]["id"]

    def _count(self, kind: str, data: dict[str, object]) -> None:
        if kind == "stopping":
            self._stops[str(data.get("why"))] += 1
        elif kind == "ended":
            self._ends[str(data.get("how"))] += 1
        elif kind == "started" and isinstance(waited := data.get("waited"), int | float):
            self._waited_s += waited
            self._waits[next((bound for bound in _WAITS_S if waited <= bound), float("inf"))] += 1

    def _counters(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "setformer_queue_preemptions", "Jobs that stopped for one of higher priority.", self._stops["preempted"]
        )
        stops = CounterMetricFamily("setformer_queue_stops", "Jobs that the queue stopped, by reason.", labels=["why"])
        for why, count in sorted(self._stops.items()):
            stops.add_metric([_label(why)], count)
        yield stops
        ends = CounterMetricFamily("setformer_queue_attempts_ended", "Attempts by how they ended.", labels=["how"])
        for how, count in sorted(self._ends.items()):
            ends.add_metric([_label(how)], count)
        yield ends
        failed = sum(count for how, count in self._ends.items() if how not in ("done", "stopped"))
        yield CounterMetricFamily("setformer_queue_failures", "Attempts that failed.", failed)
        buckets, total = [], 0
        for bound in (*_WAITS_S, float("inf")):
            total += self._waits[bound]
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        waits = HistogramMetricFamily("setformer_queue_wait_seconds", "Waiting time of the jobs that started.")
        waits.add_metric([], buckets, self._waited_s)
        yield waits

    def _decisions(self) -> Iterator[Metric]:
        seen = pace.read(self._folder)
        if seen is None:
            return
        yield CounterMetricFamily("setformer_queue_decisions", "Decisions of this scheduler.", seen.count)
        yield CounterMetricFamily("setformer_queue_decision_seconds", "Seconds that they took.", seen.seconds)
        yield GaugeMetricFamily("setformer_queue_decision_seconds_longest", "The longest one.", seen.longest)


def _label(text: str) -> str:
    return text[:_LONGEST_LABEL]
