"""The queue's lists are readable in a terminal of 80 columns, and one line a job where there is no width."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sqlalchemy as sa
from rich.cells import cell_len

from launch.queue import schema as db
from launch.queue import show
from launch.queue.config import QueueConfig
from launch.queue.source import Local
from launch.queue.store import Store, event, url_of
from launch.queue.submit import Request, submit
from setformer_dist.core.terminal import PlainConsole

_WHY = "waits for jobs 12, 13 and 14 more to save and make room, on the nodes that are up and are not drained"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Local:
    monkeypatch.chdir(tmp_path)
    config = QueueConfig.model_validate({"cluster": {"slots": 8}})
    store = Store(url_of(tmp_path))
    for name, user in (("a-name-that-is-longer-than-a-column", "a-user-with-a-long-name"), ("字" * 30, "ada")):
        submit(store, config, Request(Path("demo"), [f"run.name=r{len(name)}"], "2:8", user=user, name=name))
    with store.write() as connection:
        connection.execute(sa.update(db.jobs).where(db.jobs.c.id == 2).values(reason=_WHY, expected=1e12))
        connection.execute(sa.update(db.jobs).where(db.jobs.c.id == 1).values(state="running"))
        connection.execute(sa.insert(db.nodes).values(name="node1", slots=8, up=True))
        values = {"job": 1, "number": 1, "state": "running", "placement": [["node1", 4], ["node2", 4]], "ranks": 8,
                  "started": 7.0, "folder": "/nosuch", "then_on": []}  # fmt: skip
        connection.execute(sa.insert(db.attempts).values(**values))
        event(connection, "started", 1, attempt=1, placement=[["node1", 4], ["node2", 4]], waited=3.25)
    return Local(store, config)


def _printed(width: int, draw: object) -> list[str]:
    stream = io.StringIO()
    draw(PlainConsole(file=stream, width=width, soft_wrap=True))  # type: ignore[operator]
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("command", ["ls", "top"])
def test_a_list_fits_eighty_columns(queue: Local, command: str) -> None:
    def draw(console: PlainConsole) -> None:
        if command == "ls":
            show.ls(queue, console, everything=False, as_json=False)
        else:
            show.top(queue, console, once=True)

    lines = _printed(80, draw)
    assert max(map(cell_len, lines)) <= 80, lines
    (at,) = [number for number, line in enumerate(lines) if line.startswith("1    a-name-that")]
    assert "8 of 2:8" in lines[at]
    assert lines[at + 1] == "     node1:4 node2:4"
    assert " ".join(" ".join(lines[at + 3 :]).split()) == _WHY
    wide = _printed(100_000, draw)
    assert sum("字" * 30 in line and _WHY in line for line in wide) == 1


def test_a_job_is_shown_in_words(queue: Local) -> None:
    lines = _printed(80, lambda console: show.show(queue, 1, console, as_json=False))
    assert not [line for line in lines if "None" in line or "[[" in line or "{" in line]
    assert any(line.endswith("started  attempt 1, on node1:4 node2:4, waited 3 s") for line in lines)
