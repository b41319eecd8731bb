"""The time line of a report: what it takes from a ledger, and that it stays readable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from setformer_dist.core import ledger
from setformer_dist.report import timeline
from setformer_dist.report.html import write_report
from setformer_dist.report.timeline import timeline_of

Events = list[dict[str, Any]]
DAY = 86_400.0


def event(name: str, at: float, **values: Any) -> dict[str, Any]:
    return {"event": name, "time": at, **values}


TWO: Events = [
    event("attempt", 100, number=1, ranks=2, hosts=["a", "b"]),
    event("began", 110, step=0),
    event("saved", 120, step=10),
    event("spent", 121, step=11, seconds={}),
    event("ended", 125, why="host", step=13, final=False),
    event("attempt", 126, number=2, ranks=1, hosts=["a"]),
    event("began", 130, step=10),
    event("saved", 140, step=20),
    event("ended", 150, why="stopped", final=True),
    event("attempt", 150 + DAY, number=1, ranks=2, hosts=["a", "b"]),
    event("began", 155 + DAY, step=20),
    event("rewound", 157 + DAY, step=20, reached=22),
    event("ended", 160 + DAY, why="done", final=True),
]


def test_attempts_faults_and_saves_come_from_the_ledger() -> None:
    line = timeline_of(TWO)
    spans = line.attempts
    assert [(s.number, s.start, s.began, s.end) for s in spans[:2]] == [(1, 100, 110, 125), (2, 126, 130, 150)]
    assert [s.hosts for s in spans] == [("a", "b"), ("a",), ("a", "b")]
    assert [(s.first, s.last, s.how, s.failed) for s in spans] == [
        (0, 13, "host", True), (10, 20, "stopped", False), (20, 20, "done", False),
    ]  # fmt: skip
    assert line.saves == [(120, 10), (140, 20)]
    assert timeline.lead(line).startswith("3 attempts, 1 fault, 2 saves, 1 rollback. ")


def test_time_without_ranks_is_left_out() -> None:
    line = timeline_of(TWO)
    assert line.seconds == 50 + 10
    assert [line.clock(at) for at in (0, 100, 126, 150, 5000, 150 + DAY, 155 + DAY, 160 + DAY, 9e9)] == [
        0, 0, 26, 50, 50, 50, 55, 60, 60,
    ]  # fmt: skip
    assert line.pauses == [50]


def test_an_attempt_without_an_end_was_killed_or_runs() -> None:
    line = timeline_of([*TWO[:3], event("attempt", 500, ranks=2), event("began", 505, step=10), event("seen", 520)])
    assert [(s.how, s.end) for s in line.attempts] == [("killed", 120), ("", 520)]
    assert timeline.rows(line)[1][-1] == "no end yet"
    line.finish(19)
    assert timeline.rows(line)[1][-1] == "no end yet"
    line.finish(line.attempts[-1].last)
    assert timeline.rows(line)[1][-1] == "done"


def test_starts_of_other_launchers_are_attempts() -> None:
    line = timeline_of([event("began", 10, step=0), event("spent", 20, step=5), event("began", 40, step=3),
                        event("ended", 50, why="done", final=True)])  # fmt: skip
    assert [(s.start, s.end, s.how) for s in line.attempts] == [(10, 20, "killed"), (40, 50, "done")]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [event("ended", 5, why="done")],
        [event("attempt", 5)],
        [event("attempt", 5, hosts="a", ranks="x"), event("ended", 5, why=3, step="x")],
    ],
)
def test_a_ledger_that_says_little_breaks_nothing(events: Events) -> None:
    line = timeline_of(events)
    assert timeline.figure(line) == ""
    assert len(timeline.rows(line)) == len(line.attempts)


def many(faults: int, hosts: list[str]) -> Events:
    found: Events = []
    for number in range(faults + 1):
        at, last = 1e9 + 60.0 * number, number == faults
        left = [host for index, host in enumerate(hosts) if index == 0 or index != number % 50]
        found.append(event("attempt", at, number=number + 1, ranks=len(left), hosts=left))
        found.append(event("began", at + 8, step=number))
        found += [event("saved", at + 10 + second, step=number) for second in range(40)]
        found.append(event("ended", at + 55, why="done" if last else "killed", step=number, final=last))
    return found


@pytest.mark.parametrize(("faults", "hosts"), [(0, 1), (100, 1), (100, 4), (30, 400)])
def test_the_figure_stays_small_and_sound(faults: int, hosts: int, tmp_path: Path) -> None:
    for entry in many(faults, [f"n{at}<&$" for at in range(hosts)]):
        ledger.record(tmp_path, entry.pop("event"), **entry)
    write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 700_000
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    ElementTree.fromstring(svg)
    assert not re.findall(r"#0[123]00[0-9a-f]{2}|#010101|#020202", svg), "colours are the page's"
    labels = re.findall(r">(faults|saves|n\d+&lt;&amp;\$|\d+ (?:other )?hosts)</text>", svg)
    assert labels[:2] == ["faults", "saves"]
    assert 3 <= len(labels) <= 14
    assert page.count("<tr><td>") >= faults + 1
