"""Tables of the queue for the terminal, and the same as JSON."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.queue import schema as db
from launch.queue.source import Source, expected_in, ranks_of, said, span
from launch.queue.store import Row
from launch.shown import cell
from setformer_dist.core.terminal import open_table
from setformer_dist.core.words import plain, plain_lines

_FOLLOW_S = 0.5
_WIDE = 130  # columns, from which a job fits one line
_FACTS = ("name", "user", "priority", "state", "reason", "folder", "directory")


def jobs_list(rows: list[Row], now: float, width: int) -> RenderableType:
    """Return jobs as a table; in a narrow terminal, where each is or why it waits stands below it."""
    heads = ("job", "name", "user", "priority", "ranks", "state", "since", "expected", "where, or why it waits")
    lines = []
    for row in rows:
        where = " ".join(f"{node}:{count}" for node, count in row["placement"]) or row["reason"]
        since = row["started"] or row["finished"] or row["waiting_since"]
        cells = (row["id"], _short(row["name"]), _short(row["user"]), row["priority"], ranks_of(row), row["state"],
                 span(now - since), expected_in(row, now), _short(where, 400))  # fmt: skip
        lines.append([plain(cell) for cell in cells])
    if width < _WIDE:
        return Group(*_narrow([(*heads[:3], "prio", *heads[4:]), *lines], width))
    table = open_table(*heads)
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def _narrow(lines: Sequence[Sequence[str]], width: int) -> Iterator[Text]:
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)][:-1]
    spare = width - sum(widths) - 2 * (len(widths) - 1)
    for at, least in ((1, 12), (2, 6)):  # names and users give way, and `show` gives them as a whole
        less = max(0, min(-spare, widths[at] - least))
        widths[at] -= less
        spare += less
    for number, line in enumerate(lines):
        cells = [
            set_cell_size(text if cell_len(text) <= size else f"{set_cell_size(text, size - 1)}…", size)
            for text, size in zip(line[:-1], widths, strict=True)
        ]
        yield Text("  ".join(cells).rstrip(), style="bold" if number == 0 else "", no_wrap=True, overflow="crop")
        for part in textwrap.wrap(line[-1], max(20, width - 5)) if number else ():
            yield Text(f"     {part}", style="dim")


def _short(text: str, most: int = 40) -> str:
    """Return a text that does not push the other columns of a list away; `show` gives it as a whole."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def nodes_table(nodes: list[Row]) -> Table:
    """Return a table of nodes."""
    table = open_table("node", "slots", "used", "state")
    for node in nodes:
        table.add_row(*map(cell, (node["name"], node["slots"], node["used"], node["state"])))
    return table


def leader(source: Source) -> str:
    """Return a line about the scheduler, and one about queue.toml where it is broken."""
    found, fault = source.leader(), source.fault()
    line = "no scheduler runs: start one with `setformer queue serve`"
    if found is not None:
        line = f"scheduler: host {plain(found['host'])}, process {found['pid']}, term {found['term']}"
    return f"{line}\n{plain_lines(fault)}" if fault else line


def ls(source: Source, console: Console, everything: bool, as_json: bool) -> None:
    """Print the jobs."""
    rows = source.jobs(everything)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console.print(leader(source), markup=False, highlight=False)
    console.print(jobs_list(rows, time.time(), console.width) if rows else "no job waits or runs")


def top(source: Source, console: Console, once: bool) -> None:
    """Print nodes and jobs again and again."""

    def page() -> Group:
        rows = source.jobs(False)
        jobs = jobs_list(rows, time.time(), console.width) if rows else Text("no job waits or runs")
        return Group(Text(leader(source)), nodes_table(source.nodes()), jobs)

    if once or not console.is_terminal:
        console.print(page())
        return
    with Live(page(), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(1.0)
            live.update(page(), refresh=True)


def show(source: Source, number: int, console: Console, as_json: bool) -> None:
    """Print one job with its attempts and events."""
    job = source.job(number)
    if as_json:
        print(json.dumps(job, indent=2))
        return
    facts = open_table("", "", show_header=False, box=None)
    told = {"job": job["id"], **{name: job[name] for name in _FACTS}, "ranks": ranks_of(job)}
    told["ranks per node"] = job["per_node"]
    told["time limit"] = span(job["limit_s"]) if job["limit_s"] else "none: it runs in turns"
    told["time used"] = span(job["used_s"])
    for name, value in told.items():
        if value not in (None, ""):
            facts.add_row(name, cell(value))
    console.print(facts)
    table = open_table("attempt", "ranks", "nodes", "ran", "stopped because", "ended", "exit code")
    for row in job["tries"]:
        nodes = " ".join(f"{node}:{count}" for node, count in row["placement"])
        ran = span((row["ended"] or time.time()) - row["started"])
        cells = (row["number"], row["ranks"], nodes, ran, row["stop_why"] or "", row["how"] or "",
                 "" if row["code"] is None else row["code"])  # fmt: skip
        table.add_row(*map(cell, cells))
    if job["tries"]:
        console.print(table)
    for row in job["events"]:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
        line = f"{at}  {row['kind']}  {plain(said(row['data']))}".rstrip()
        console.print(line, markup=False, highlight=False)


def logs(source: Source, number: int, follow: bool, write: Callable[[str], object]) -> None:
    """Print what a job's supervisor has printed, attempt by attempt.

    Args:
        source: the queue.
        number: of the job.
        follow: go on until the job has ended.
        write: prints.
    """
    attempt, start = 0, 0
    while True:
        piece = source.output(number, attempt, start)
        if piece["end"] > start:
            write(piece["text"])
            start = piece["end"]
        elif attempt < piece["attempts"]:
            attempt, start = attempt + 1, 0
            write(f"=== attempt-{attempt:04d}\n")
        elif piece["state"] in db.ENDED or not follow:
            return
        else:
            time.sleep(_FOLLOW_S)


def events(source: Source, since: int, write: Callable[[str], object]) -> int:
    """Print events after one as JSON lines; return the last one's number."""
    while rows := source.events(since):
        for row in rows:
            write(json.dumps(row) + "\n")
        since = rows[-1]["id"]
    return since
