"""What the pages show, as plain values for the templates, from rows of the database and the records of runs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from launch.queue import schema as db
from launch.queue.page.curves import SCORES, Curves, chart, spark
from launch.queue.source import CHUNK, Local, as_line, expected_in, ranks_of, said, span
from launch.queue.store import Row
from setformer_dist.core.metric import LOSS
from setformer_dist.core.secrets import redacted

Facts = dict[str, Any]
_T = TypeVar("_T")

_NODES, _RUNNING, _WAITING, _ENDED, _EVENTS = 200, 48, 200, 15, 12
EVENTS = 100  # of a page of events
_DAY_S = 86400.0
_BLOCKS = 16  # slots that are drawn one by one
_LABELS = {"loss": "training", "eval_loss": "evaluation"}


@dataclass(frozen=True)
class When:
    """A moment.

    Attributes:
        text: how long ago, or in how long.
        iso: for the browser, which shows it in its own time zone.
    """

    text: str
    iso: str


class Fresh:
    """Values that are computed at most once a second, however many browsers ask."""

    def __init__(self, for_s: float = 1.0) -> None:
        self._for_s = for_s
        self._lock = threading.Lock()
        self._kept: dict[object, tuple[float, Any]] = {}

    def get(self, key: object, make: Callable[[], _T]) -> _T:
        """Return the value of a key; one caller makes it, the others wait."""
        with self._lock:
            now = time.monotonic()
            self._kept = {name: kept for name, kept in self._kept.items() if now - kept[0] < self._for_s}
            if key not in self._kept:
                self._kept[key] = (now, make())
            found: _T = self._kept[key][1]
            return found


def front(queue: Local, curves: Curves) -> Facts:
    """Return what the first page shows."""
    now = time.time()
    running = queue.running(_RUNNING)
    nodes, counts = queue.nodes(), queue.counts(now - _DAY_S)
    on_node: dict[str, list[int]] = {}
    for row in running:
        for node, _ in row["placement"]:
            on_node.setdefault(node, []).append(row["id"])
    runs = counts.get("running", 0) + counts.get("stopping", 0)
    return {
        "tiles": _tiles(nodes, counts),
        "nodes": [_node(node, on_node.get(node["name"], [])) for node in nodes[:_NODES]],
        "more_nodes": max(0, len(nodes) - _NODES),
        "running": [_run(row, curves, now) for row in running],
        "more_running": max(0, runs - len(running)),
        "waiting": [_waiting(row, now) for row in queue.waiting(_WAITING)],
        "more_waiting": max(0, counts.get("waiting", 0) - _WAITING),
        "ended": [_ended(row, now) for row in queue.ended(_ENDED)],
        "events": [event(row, now) for row in queue.latest_events(_EVENTS)],
    }


def _tiles(nodes: list[Row], counts: Mapping[str, int]) -> list[tuple[str, str]]:
    used, total = sum(node["used"] for node in nodes), sum(node["slots"] for node in nodes)
    usable = sum(node["state"] == "up" for node in nodes)
    failed = counts.get("failed", 0)
    return [
        (f"{used:,} / {total:,}", "slots in use"),
        (f"{counts.get('running', 0) + counts.get('stopping', 0):,}", "jobs run"),
        (f"{counts.get('waiting', 0):,}", "jobs wait"),
        (f"{usable:,} / {len(nodes):,}", "nodes take jobs"),
        (f"{counts.get('done', 0):,}", "done in 24 hours" + (f", {failed:,} failed" if failed else "")),
    ]


def _node(node: Row, jobs: list[int]) -> Facts:
    state, _, why = node["state"].partition(": ")
    slots, used = node["slots"], node["used"]
    blocks = [place < used for place in range(slots)] if slots <= _BLOCKS else []
    share = min(100.0, 100 * used / slots) if slots else 0.0
    return {**node, "state": state, "why": why, "blocks": blocks, "share": f"{share:.1f}", "jobs": jobs[:6],
            "more_jobs": max(0, len(jobs) - 6)}  # fmt: skip


def _run(row: Row, curves: Curves, now: float) -> Facts:
    found = curves.of(Path(row["folder"]))
    loss, speed = found.get("loss", []), found.get("images_per_s", [])
    ran = row["used_s"] + max(0.0, now - (row["started"] or now))
    limit = row["limit_s"]
    return {
        **_job(row, now),
        "spark": spark(loss),
        "step": f"{loss[-1][0]:,}" if loss else "",
        "loss": f"{loss[-1][1]:.4g}" if loss else "",
        "speed": f"{speed[-1][1]:,.0f}" if speed else "",
        "since": when(row["started"], now),
        "limit": f"{span(ran)} of {span(limit)}" if limit else "",
        "share": f"{min(100.0, 100 * ran / limit):.1f}" if limit else "",
    }


def _job(row: Row, now: float) -> Facts:
    return {
        "id": row["id"],
        "name": row["name"],
        "user": row["user"],
        "priority": row["priority"],
        "state": row["state"],
        "ranks": ranks_of(row),
        "where": " ".join(f"{node}:{count}" for node, count in row["placement"]),
        "reason": row["reason"],
        "held": row["held"],
        "expected": expected_in(row, now),
    }


def _waiting(row: Row, now: float) -> Facts:
    ready = when(row["expected"], now)
    return {**_job(row, now), "place": row["place"] or "", "since": when(row["waiting_since"], now),
            "start": When(expected_in(row, now), ready.iso) if ready else None}  # fmt: skip


def _ended(row: Row, now: float) -> Facts:
    return {**_job(row, now), "at": when(row["finished"], now), "ran": span(row["used_s"])}


def event(row: Row, now: float) -> Facts:
    """Return one event as a page shows it."""
    rest = {key: value for key, value in row.items() if key not in ("id", "time", "event", "job")}
    return {"id": row["id"], "kind": row["event"], "job": row["job"], "at": when(row["time"], now), "said": said(rest)}


def when(at: float | None, now: float) -> When | None:
    """Return a moment as the page shows it; None for none, or for one that no calendar has."""
    if at is None:
        return None
    try:
        iso = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return None
    return When(f"in {span(at - now)}" if at > now else f"{span(now - at)} ago", iso)


def job(queue: Local, curves: Curves, number: int, attempt: int | None) -> Facts:
    """Return what the page of a job shows.

    Args:
        queue: the queue.
        curves: of its run.
        number: of the job.
        attempt: whose log is shown; None for the last one.

    Raises:
        MissingError: there is no such job, or attempt.
    """
    now = time.time()
    row = queue.job(number)
    chosen = len(row["tries"]) if attempt is None else attempt
    over = row["state"] in db.ENDED
    return {
        **_job(row, now),
        "facts": _facts(row, now),
        "charts": _charts(curves.of(Path(row["folder"]))),
        "attempts": [_attempt(one, now) for one in row["tries"]],
        "events": [event(as_line(one), now) for one in reversed(row["events"][-50:])],
        "config": json.dumps(row["config"], indent=2, ensure_ascii=False),
        "log": _log(queue.output(number, chosen, -CHUNK)),
        "attempt": chosen,
        "may_cancel": not over and not row["cancelled"],
        "may_hold": not over and not row["held"],
        "may_release": row["held"] or row["state"] in ("failed", "over limit", "cancelled"),
        "may_move": not over,
    }


def _facts(row: Row, now: float) -> list[tuple[str, object]]:
    used = row["used_s"] + (max(0.0, now - row["started"]) if row["started"] else 0.0)
    limit = f"{span(row['limit_s'])}, of which {span(used)} used" if row["limit_s"] else ""
    found: list[tuple[str, object]] = [
        ("user", row["user"]),
        ("priority", str(row["priority"])),
        ("ranks", ranks_of(row) + (f", {row['per_node']} on each node" if row["per_node"] else "")),
        ("runs on", " ".join(f"{node}:{count}" for node, count in row["placement"])),
        ("submitted", when(row["submitted"], now)),
        ("expected start", when(row["expected"], now) if row["state"] == "waiting" else None),
        ("place in the queue", str(row["place"] or "") if row["state"] == "waiting" else ""),
        ("waits for", " ".join(f"job {number}" for number in row["after"])),
        ("ended", when(row["finished"], now)),
        ("time limit", limit or "none: it runs in turns"),
        ("own failures", f"{row['own_failures']} of {row['max_retries']} retries" if row["own_failures"] else ""),
        ("run folder", redacted(row["folder"])),
    ]
    return [(name, value) for name, value in found if value]


def _charts(found: Mapping[str, list[tuple[int, float]]]) -> list[Facts]:
    losses = [(label, found[name]) for name, label in _LABELS.items() if found.get(name)]
    score = next((metric for name, metric in SCORES.items() if name in found), LOSS)
    times, unit = (100, ", %") if score.share else (1, "")
    scores = [(score.title, [(step, times * value) for step, value in found.get(score.name, [])])]
    speeds = [("samples per second", found.get("images_per_s", []))]
    heading = f"{score.label[:1].upper()}{score.label[1:]}{unit}"
    wanted = (("Loss", losses), *([(heading, scores)] if score is not LOSS else []), ("Samples per second", speeds))
    drawn = [{"title": title, "labels": [label for label, points in lines if points],
              "svg": chart(title, lines, from_zero=lines is speeds)} for title, lines in wanted]  # fmt: skip
    return [one for one in drawn if one["svg"]]


def _attempt(row: Row, now: float) -> Facts:
    ended = row["ended"]
    code = "" if row["code"] is None else str(row["code"])
    return {
        "number": row["number"],
        "ranks": row["ranks"],
        "where": " ".join(f"{node}:{count}" for node, count in row["placement"]),
        "started": when(row["started"], now),
        "lasted": span((ended or now) - row["started"]),
        "stop": row["stop_why"] or "",
        "how": row["how"] or row["state"],
        "code": code,
    }


def _log(piece: Row) -> Facts:
    """Return the end of a log, from the first whole line on."""
    text = piece["text"]
    if piece["start"]:
        text = text.partition("\n")[2]
    return {"text": text, "cut": piece["start"] > 0}
