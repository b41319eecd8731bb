"""queue.toml is read again while a server runs; a broken one changes nothing, and a node that left it is drained."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from rich.console import Console
from starlette.testclient import TestClient

from launch.queue import schema as db
from launch.queue import show
from launch.queue.attempts import Ended
from launch.queue.config import FILE, load
from launch.queue.page.access import Access
from launch.queue.page.app import application
from launch.queue.scheduler import Scheduler
from launch.queue.settings import USED, Settings
from launch.queue.source import Local
from launch.queue.store import Store, event, url_of
from launch.queue.submit import Request, submit
from setformer_dist.core.errors import ConfigError, LaunchError

HOSTS = '[cluster]\nkind = "hosts"\nnodes = {%s}\n'


class Served:
    """A scheduler of a folder with a queue.toml, step by step; keepers never come."""

    def __init__(self, folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setattr("launch.queue.settings._STEADY_S", 0.0)
        monkeypatch.setattr("launch.queue.scheduler.processes.start", lambda *_: None)
        self.folder = folder
        self.write(text)
        self.store = Store(url_of(folder))
        self.scheduler = Scheduler(self.store, folder, load(folder))
        self.scheduler.step()

    def write(self, text: str) -> None:
        (self.folder / FILE).write_text(text)

    def step(self, text: str) -> None:
        self.write(text)
        self.scheduler.step()

    def submit(self, **asked: object) -> int:
        request = Request(Path("demo"), [f"run.name=r{time.time_ns()}"], user="ada", **asked)  # type: ignore[arg-type]
        return submit(self.store, self.scheduler.config, request)

    def nodes(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in Local(self.store, self.scheduler.config).nodes()}

    def told(self, kind: str) -> list[dict[str, object]]:
        return [row["data"] for row in self.store.rows(sa.select(db.events).where(db.events.c.kind == kind))]


def test_users_and_policy_change_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(tmp_path, "[cluster]\nslots = 4\n", monkeypatch)
    first = served.submit(ranks="2", limit="1h")
    second = served.submit(ranks="2", limit="1h")
    served.step("[cluster]\nslots = 4\n[users.ada]\nquota = 2\n[policy]\nturn_hours = 2.0\n")
    assert [served.store.job(n)["state"] for n in (first, second)] == ["running", "waiting"]
    assert served.store.job(second)["reason"] == "ada may run 2 ranks at a time"
    assert served.scheduler.config.policy.turn_hours == served.scheduler.book.config.policy.turn_hours == 2.0
    served.step("[cluster]\nslots = 4\n[users.ada]\nquota = 4\n")
    assert served.store.job(second)["state"] == "running"
    assert served.told("settings") == [{}, {}]
    served.scheduler.step()
    assert served.told("settings") == [{}, {}]  # once


def test_a_broken_file_keeps_the_old_settings_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(tmp_path, "[cluster]\nslots = 4\n[users.ada]\nquota = 3\n", monkeypatch)
    for _ in range(3):
        served.step("[cluster]\nslots = 2\n[users.ada]\nqouta = 1\n")
    assert served.scheduler.config.user("ada").quota == 3
    assert served.scheduler.config.cluster.slots == 4
    (fault,) = [str(data["fault"]) for data in served.told("settings refused")]
    assert "qouta" in fault
    assert fault.endswith("the settings before it stay in force")
    assert sum(fault in line for line in caplog.messages) == 1
    # Commands go by what the scheduler uses, and say so.
    found = Settings(tmp_path)
    assert found.config.user("ada").quota == 3
    queue = Local(served.store, found.config, found)
    output = io.StringIO()
    show.ls(queue, Console(file=output, width=80), everything=False, as_json=False)
    assert "qouta" in output.getvalue()
    with pytest.raises(LaunchError, match="quota of 3"):
        queue.submit(Request(Path("demo"), ["run.name=wide"], "4", user="ada"))
    for _ in range(2):
        (tmp_path / FILE).unlink(missing_ok=True)
        served.scheduler.step()
    assert "is gone" in served.scheduler.settings.fault
    served.step('database = "postgresql+psycopg://q@x/y"\n')
    assert "names another database" in served.scheduler.settings.fault
    assert len(served.told("settings refused")) == 3
    served.step("[cluster]\nslots = 2\n")
    assert served.scheduler.config.cluster.slots == 2
    assert queue.fault() == ""
    (tmp_path / USED).unlink()
    served.write("x")
    with pytest.raises(ConfigError):
        Settings(tmp_path)  # nothing that anybody used


def test_the_page_and_the_api_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("[users.ada]\n")
    found, store = Settings(tmp_path), Store(url_of(tmp_path))
    found.keep()
    assert (tmp_path / USED).read_text() == "[users.ada]\n"
    (tmp_path / FILE).write_text("[users.ada]\n'<b>' = 1\n")
    found = Settings(tmp_path)
    app = application(Local(store, found.config, found), tmp_path, Access(None, frozenset()))
    page = TestClient(app, base_url="http://127.0.0.1:8765")
    assert "stay in force" in page.get("/api/cluster").json()["fault"]
    text = page.get("/").text
    assert "the settings before it stay in force" in text
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    store.close()


def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("[cluster]\nslots = 4\n")
    found = Settings(tmp_path)
    (tmp_path / FILE).write_text("[cluster]\n")
    assert not found.look()
    (tmp_path / FILE).write_text("[cluster]\nslots = 5\n")
    assert not found.look()
    time.sleep(0.6)
    assert found.look()
    assert found.config.cluster.slots == 5


def test_a_node_that_left_the_file_is_drained_while_jobs_run_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(tmp_path, HOSTS % "a = 2, b = 2, c = 2", monkeypatch)
    number = served.submit(ranks="2", limit="1h")
    served.scheduler.step()
    ((on, _),) = Local(served.store, served.scheduler.config).jobs(False)[0]["placement"]
    others = sorted({"a", "b", "c"} - {on})
    served.step(HOSTS % f"{others[0]} = 3, d = 2")
    assert served.nodes() == {
        on: "drained: it is no longer in queue.toml", others[0]: "up", others[1]: "down", "d": "up",
    }  # fmt: skip
    served.scheduler.step()
    assert served.store.job(number)["state"] == "running"
    assert [data["node"] for data in served.told("drained")] == [on]
    served.step(HOSTS % f"{on} = 2, d = 2")  # it comes back
    assert served.nodes()[on] == "up"
    served.step(HOSTS % "d = 2")
    (row,) = served.scheduler._live()
    with served.store.write() as connection:
        served.scheduler.book.close(connection, row, Ended(0, time.time()))
        event(connection, "x")
    served.scheduler.step()
    assert served.nodes()[on] == "down"
    served.step(HOSTS % f"{on} = 2")
    assert served.nodes()[on] == "up"
