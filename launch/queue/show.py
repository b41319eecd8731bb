"""Tables of the queue for the terminal, and the same as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from launch.queue import schema as db
from launch.queue.store import Row, Store
from launch.queue.wishes import attempt_folders
from launch.shown import cell
from setformer_dist.core.terminal import open_table
from setformer_dist.core.words import plain

_FOLLOW_S = 0.5
_CHUNK = 1 << 16
_BY_AGE = ("running", "stopping", "waiting")


def listed(store: Store, everything: bool) -> list[Row]:
    """Return jobs: those that run first, then those that wait in their order, then, if asked, those that have ended."""
    wanted = [column for column in db.jobs.c if column.name != "config"]
    running = sa.select(db.attempts.c.job, db.attempts.c.placement, db.attempts.c.started, db.attempts.c.ranks)
    live = {row["job"]: row for row in store.rows(running.where(db.attempts.c.state != "ended"))}
    query = sa.select(*wanted)
    if not everything:
        query = query.where(db.jobs.c.state.not_in(db.ENDED))
    rows = store.rows(query)
    for row in rows:
        run = live.get(row["id"])
        row["placement"] = run["placement"] if run else []
        row["started"] = run["started"] if run else None
        row["ranks"] = run["ranks"] if run else None

    def key(row: Row) -> tuple[object, ...]:
        rank = _BY_AGE.index(row["state"]) if row["state"] in _BY_AGE else len(_BY_AGE)
        place = row["place"] or (1 << 30)
        return (rank, place if row["state"] == "waiting" else 0, -row["priority"] if rank == 2 else 0, row["id"])

    return sorted(rows, key=key)


def jobs_table(rows: list[Row], now: float) -> Table:
    """Return a table of jobs."""
    table = open_table(
        "job", "name", "user", "priority", "ranks", "state", "since", "where, or why it waits", "expected"
    )
    for row in rows:
        wished = f"{row['sizes'][0]}:{row['sizes'][-1]}" if len(row["sizes"]) > 1 else str(row["sizes"][0])
        ranks = f"{row['ranks']} of {wished}" if row["ranks"] and len(row["sizes"]) > 1 else str(row["ranks"] or wished)
        where = " ".join(f"{node}:{count}" for node, count in row["placement"]) or row["reason"]
        since = row["started"] or row["finished"] or row["waiting_since"]
        expected = "" if row["expected"] is None else f"in {span(max(0.0, row['expected'] - now))}"
        cells = (row["id"], row["name"], row["user"], row["priority"], ranks, row["state"], span(now - since), where,
                 expected)  # fmt: skip
        table.add_row(*map(cell, cells))
    return table


def nodes_table(store: Store, rows: list[Row]) -> Table:
    """Return a table of nodes."""
    used: dict[str, int] = {}
    for row in rows:
        for node, count in row["placement"]:
            used[node] = used.get(node, 0) + count
    table = open_table("node", "slots", "used", "state")
    for node in store.rows(sa.select(db.nodes).order_by(db.nodes.c.name)):
        state = "down" if not node["up"] else "up" if node["drained"] is None else f"drained: {node['drained']}"
        table.add_row(*map(cell, (node["name"], node["slots"], used.get(node["name"], 0), state)))
    return table


def leader(store: Store) -> str:
    """Return a line about the scheduler."""
    row = store.rows(sa.select(db.lease))[0]
    if not row["holder"]:
        return "no scheduler runs: start one with `setformer queue serve`"
    holder = json.loads(row["holder"])
    return f"scheduler: host {plain(holder['host'])}, process {holder['pid']}, term {row['term']}"


def ls(store: Store, console: Console, everything: bool, as_json: bool) -> None:
    """Print the jobs."""
    rows = listed(store, everything)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console.print(leader(store), markup=False, highlight=False)
    console.print(jobs_table(rows, time.time()) if rows else "no job waits or runs")


def top(store: Store, console: Console, once: bool) -> None:
    """Print nodes and jobs again and again."""

    def page() -> Group:
        rows = listed(store, False)
        return Group(plain(leader(store)), nodes_table(store, rows), jobs_table(rows, time.time()))

    if once or not console.is_terminal:
        console.print(page())
        return
    with Live(page(), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(1.0)
            live.update(page(), refresh=True)


def show(store: Store, number: int, console: Console, as_json: bool) -> None:
    """Print one job with its attempts and events."""
    job = store.job(number)
    query = sa.select(db.attempts).where(db.attempts.c.job == number).order_by(db.attempts.c.number)
    tries = store.rows(query)
    happened = store.rows(sa.select(db.events).where(db.events.c.job == number).order_by(db.events.c.id))
    if as_json:
        job["config"] = json.loads(job["config"])
        print(json.dumps({**job, "tries": tries, "events": happened}, indent=2))
        return
    facts = open_table("", "", show_header=False, box=None)
    for name in ("id", "name", "user", "priority", "state", "reason", "folder", "directory", "sizes", "per_node"):
        facts.add_row(name, cell(job[name]))
    facts.add_row("time limit", span(job["limit_s"]) if job["limit_s"] else "none: it runs in turns")
    facts.add_row("time used", span(job["used_s"]))
    console.print(facts)
    table = open_table("attempt", "ranks", "nodes", "seconds", "stopped because", "ended", "exit code")
    for row in tries:
        nodes = " ".join(f"{node}:{count}" for node, count in row["placement"])
        seconds = (row["ended"] or time.time()) - row["started"]
        cells = (row["number"], row["ranks"], nodes, f"{seconds:.0f}", row["stop_why"] or "", row["how"] or "",
                 "" if row["code"] is None else row["code"])  # fmt: skip
        table.add_row(*map(cell, cells))
    console.print(table)
    for row in happened:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
        data = json.dumps(row["data"]) if row["data"] else ""
        console.print(f"{at}  {row['kind']}  {plain(data)}", markup=False, highlight=False)


def logs(store: Store, number: int, follow: bool, write: Callable[[str], object]) -> None:
    """Print what a job's supervisor has printed, attempt by attempt.

    Args:
        store: the database.
        number: of the job.
        follow: go on until the job has ended.
        write: prints.
    """
    shown: dict[Path, int] = {}
    while True:
        over = store.job(number)["state"] in db.ENDED
        for folder in attempt_folders(store, number):
            path = folder / "output.log"
            if folder not in shown:
                write(f"=== {folder.name}\n")
            shown[folder] = _print_from(path, shown.get(folder, 0), write)
        if over or not follow:
            return
        time.sleep(_FOLLOW_S)


def _print_from(path: Path, start: int, write: Callable[[str], object]) -> int:
    try:
        with path.open("rb") as file:
            file.seek(start)
            while data := file.read(_CHUNK):
                start += len(data)
                write("\n".join(map(plain, data.decode(errors="replace").split("\n"))))
    except OSError:
        pass
    return start


def span(seconds: float) -> str:
    """Return a length of time in words."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def events(store: Store, since: int, write: Callable[[str], object]) -> int:
    """Print events after one as JSON lines; return the last one's number."""
    for row in store.rows(sa.select(db.events).where(db.events.c.id > since).order_by(db.events.c.id)):
        line: dict[str, Any] = {"id": row["id"], "time": row["time"], "event": row["kind"], "job": row["job"]}
        write(json.dumps({**line, **row["data"]}) + "\n")
        since = row["id"]
    return since
