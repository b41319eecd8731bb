"""The page of the queue and its JSON API, in this process: who may read and act, what is escaped, what is refused."""

from __future__ import annotations

import html.parser
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from launch.queue import pace
from launch.queue import schema as db
from launch.queue import token as tokens
from launch.queue.page import overview
from launch.queue.page.access import LARGEST_BODY, Access
from launch.queue.page.app import application
from launch.queue.page.curves import Curves, chart
from launch.queue.source import Local
from launch.queue.store import event
from setformer_dist.core.errors import LaunchError
from tests.unit import queue_page_world as world

HERE = "http://127.0.0.1:8765"
PAGES = ("/", "/jobs/1", "/jobs/3", "/jobs/5", "/events", "/api")
SUBMISSION = {"config": "demo", "overrides": ["data.root=runs/demo-data"], "ranks": "1:2", "name": "<b>"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    made = world.make(tmp_path_factory.mktemp("whole"), dashboard="http://head:8265")
    yield made
    made.store.close()


@pytest.fixture
def queue(whole: Local, tmp_path: Path) -> Iterator[Local]:
    made = world.copied(whole, tmp_path)
    yield made
    made.store.close()


def client(queue: Local, folder: Path, token: str | None = None) -> TestClient:
    app = application(queue, folder, Access(token, frozenset({"node9"})))
    return TestClient(app, base_url=HERE, follow_redirects=False)


@pytest.fixture
def reader(queue: Local, tmp_path: Path) -> TestClient:
    return client(queue, tmp_path)


@pytest.fixture
def actor(queue: Local, tmp_path: Path) -> TestClient:
    return client(queue, tmp_path, world.TOKEN)


BEARER = {"Authorization": f"Bearer {world.TOKEN}"}
OWN = {"Origin": HERE}


def log_in(page: TestClient) -> str:
    """Log in; return the CSRF token of the session."""
    answer = page.post("/login", data={"token": world.TOKEN}, headers=OWN)
    assert answer.status_code == 303, answer.text
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert world.TOKEN not in cookie
    found = re.search(r'name="csrf" value="([\w-]+)"', page.get("/").text)
    assert found
    return found[1]


class Parser(html.parser.HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("acts", [False, True])
def test_pages_hold_no_markup_of_others_and_nothing_that_the_policy_forbids(
    queue: Local, tmp_path: Path, path: str, acts: bool
) -> None:
    page = client(queue, tmp_path, world.TOKEN if acts else None)
    if acts:
        log_in(page)
    answer = page.get(path)
    assert answer.status_code == 200, answer.text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", answer.text)
    assert world.TOKEN not in answer.text
    assert "secret" not in answer.text.replace("without secrets", "")
    parsed = Parser(answer.text)
    assert not [tag for tag, attributes in parsed.tags if tag == "img" and attributes.get("src") == "x"]
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)
        if tag in ("script", "link", "img"):
            assert str(attributes.get("src") or attributes.get("href")).startswith("/files/")
        assert tag not in ("style", "iframe", "base")
    assert len(set(parsed.ids)) == len(parsed.ids)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


def test_a_page_says_why_jobs_wait_and_what_runs(reader: TestClient) -> None:
    text = reader.get("/").text
    for expected in ("in 1.5 h", "waits until it is released", "node1:6", "http://head:8265", "<polyline", "drained"):
        assert expected in text
    text = reader.get("/jobs/1").text
    assert "step 10 loss 2.31" in text
    log = text.partition('aria-label="log"')[2].partition("</pre>")[0]
    assert "&amp;\\u202ered\n" in log  # colours are left out, what turns the direction of writing is written out
    assert "https://host/x" in text
    assert text.count("<svg") == 3


def test_who_reads_without_a_token_cannot_act(reader: TestClient, queue: Local) -> None:
    for path in ("/api/jobs/1/cancel", "/jobs/1/cancel", "/api/jobs", "/login", "/nodes/node1/drain"):
        answer = reader.post(path, json={}, headers={**BEARER, **OWN})
        assert answer.status_code == 403
        assert "read-only" in answer.text
    assert not queue.store.job(1)["cancelled"]
    assert "<form" not in reader.get("/").text
    assert reader.get("/login").status_code == 303


def test_everything_but_the_login_needs_the_token(actor: TestClient) -> None:
    for path in (*PAGES, "/live", "/api/jobs", "/api/openapi.json", "/metrics", "/nosuch"):
        answer = actor.get(path)
        assert answer.status_code in (303, 401), path
        assert "node1" not in answer.text
    assert actor.get("/login").status_code == 200
    assert actor.get("/files/page.css").status_code == 200
    for wrong in ("", "x" * 40, world.TOKEN[:-1], f"{world.TOKEN}x", "ä" * 30):
        headers = {"Authorization": f"Bearer {wrong}".encode()}
        assert actor.get("/api/jobs", headers=headers).status_code == 401
    assert actor.get(f"/api/jobs?token={world.TOKEN}").status_code == 401
    assert actor.get("/api/jobs", headers=BEARER).status_code == 200
    assert actor.get("/metrics", headers=BEARER).status_code == 200


def test_a_wrong_token_does_not_log_in(actor: TestClient) -> None:
    began = time.monotonic()
    answer = actor.post("/login", data={"token": "wrong"}, headers=OWN)
    assert answer.status_code == 403
    assert time.monotonic() - began > 0.4
    assert "set-cookie" not in answer.headers
    assert actor.post("/login", data={"token": world.TOKEN}).status_code == 403  # no Origin
    assert actor.post("/login", content=b"\xff=%", headers=OWN).status_code == 403


def test_forms_act_for_their_own_session_alone(actor: TestClient, queue: Local) -> None:
    csrf = log_in(actor)
    for data, headers in (
        ({"csrf": csrf}, {}),
        ({"csrf": csrf}, {"Origin": "http://evil.example"}),
        ({"csrf": csrf}, {"Origin": "null"}),
        ({"csrf": "wrong"}, OWN),
        ({}, OWN),
    ):
        assert actor.post("/jobs/1/hold", data=data, headers=headers).status_code == 403
    assert actor.post("/jobs/1/hold", json={"csrf": csrf}, headers=OWN).status_code == 403
    assert actor.post("/api/jobs/1/hold", json={}, headers=OWN).status_code == 403  # the API wants the bearer
    assert actor.get("/jobs/1/hold").status_code == 405
    assert not queue.store.job(1)["held"]
    answer = actor.post("/jobs/1/hold", data={"csrf": csrf}, headers=OWN)
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs/1")
    assert queue.store.job(1)["held"]
    assert "job 1 stops once it has saved, and waits" in actor.get("/jobs/1").text
    assert "stops once it has saved" not in actor.get("/jobs/1").text  # said once
    for path, data in (("/jobs/1/move", {"priority": "7"}), ("/jobs/1/release", {}), ("/jobs/2/cancel", {}),
                       ("/nodes/node1/drain", {"why": world.HOSTILE}), ("/nodes/node3/undrain", {})):  # fmt: skip
        assert actor.post(path, data={"csrf": csrf, **data}, headers=OWN).status_code == 303
    assert queue.store.job(1)["priority"] == 7
    assert queue.store.job(2)["cancelled"]
    drained = {row["name"]: row["drained"] for row in queue.store.rows(sa.select(db.nodes))}
    assert drained["node1"] == world.HOSTILE
    assert drained["node3"] is None


def test_what_a_form_cannot_do_is_a_sentence(actor: TestClient) -> None:
    csrf = log_in(actor)
    for path, data, said in (
        ("/jobs/5/hold", {}, "has ended"),
        ("/jobs/99/hold", {}, "no job 99"),
        ("/jobs/1/move", {"priority": "many"}, "a priority is a whole number"),
        ("/jobs/1/move", {"priority": "101"}, "100 at most"),
        ("/nodes/nosuch/drain", {}, "no node nosuch"),
    ):
        assert actor.post(path, data={"csrf": csrf, **data}, headers=OWN).status_code == 303
        assert said in actor.get("/").text
    assert actor.post("/jobs/1/explode", data={"csrf": csrf}, headers=OWN).status_code == 404


def test_a_session_ends_with_the_logout(actor: TestClient) -> None:
    csrf = log_in(actor)
    cookie = dict(actor.cookies)
    assert actor.post("/logout", data={"csrf": "wrong"}, headers=OWN).status_code == 403
    assert actor.post("/logout", data={"csrf": csrf}, headers=OWN).status_code == 303
    actor.cookies.update(cookie)
    assert actor.get("/").status_code == 303


def test_sessions_are_bounded_and_over_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access(world.TOKEN)
    first = access.begin()
    assert access.session(first)
    others = [access.begin() for _ in range(256)]
    assert access.session(first) is None
    later = time.monotonic() + 13 * 3600
    monkeypatch.setattr("launch.queue.page.access.time.monotonic", lambda: later)
    assert access.session(others[-1]) is None


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8765", 200), ("localhost", 200), ("[::1]:8765", 200), ("node9:80", 200), ("10.0.0.7", 200),
     ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example:8765", 421), ("", 421),
     ("evil@127.0.0.1", 421), ("[::1", 421), ("localhost/x", 421)],
)  # fmt: skip
def test_other_names_are_refused(reader: TestClient, host: str, status: int) -> None:
    assert reader.get("/", headers={"Host": host}).status_code == status
    assert reader.get("/api/jobs", headers={"Host": host}).status_code == status


def test_long_and_malformed_requests_are_refused(actor: TestClient) -> None:
    big = b"x" * (LARGEST_BODY + 1)
    assert actor.post("/api/jobs", content=big, headers=BEARER).status_code == 413
    pieces = iter([big])  # without a length
    assert actor.post("/api/jobs", content=pieces, headers=BEARER).status_code == 400
    for body in (b"", b"[", b"[" * 100_000, b'{"config": 1' + b"0" * 5000 + b"}", b"\xff", b"{}", b'{"surplus": 1}'):
        answer = actor.post("/api/jobs", content=body, headers={**BEARER, "Content-Type": "application/json"})
        assert answer.status_code in (400, 422), body[:20]
        assert answer.json()["error"]
    answer = actor.post("/api/jobs", content=b"{bad", headers={**BEARER, "Content-Type": "application/json"})
    assert answer.json()["error"] == "the body is not valid JSON (at character 1)"
    huge = {"config": "demo", "directory": "/", "after": [10**30]}
    answer = actor.post("/api/jobs", json=huge, headers=BEARER)
    assert (answer.status_code, answer.json()["exit_code"]) == (400, 5), "no 500"
    for path in ("/jobs/0", "/jobs/99999999999999999999", "/jobs/x", "/jobs/1?attempt=0", "/events?before=x"):
        assert actor.get(path, headers=BEARER).status_code == 422
    for path in ("/jobs/77", "/jobs/1?attempt=9", "/nosuch", "/files/../api.py", "/files/front.html.j2"):
        assert actor.get(path, headers=BEARER).status_code == 404, path


def test_the_api_gives_what_the_commands_print(reader: TestClient, queue: Local) -> None:
    listed = reader.get("/api/jobs?all=true").json()
    assert listed["total"] == 5
    assert json.loads(json.dumps(queue.jobs(True))) == listed["jobs"]
    assert reader.get("/api/jobs?limit=1").json()["jobs"][0]["id"] == 1
    assert reader.get("/api/jobs/1").json() == json.loads(json.dumps(queue.job(1)))
    assert reader.get("/api/jobs/1").json()["config"]["data"]["root"] == "s3://store/data"
    events = reader.get("/api/events?since=3").json()["events"]
    assert [row["id"] for row in events] == [row["id"] for row in queue.events(3)]
    assert reader.get("/api/cluster").json()["leader"] == {"host": "head", "pid": 4711, "term": 3}
    assert reader.get("/api/jobs/1/curves").json()["series"]["loss"][0][0] == 10
    piece = reader.get("/api/jobs/1/logs?attempt=1&start=5").json()
    assert piece["text"].startswith("10 loss")
    assert reader.get("/api/jobs/1/logs?attempt=0").json()["attempts"] == 1
    assert reader.get("/api/jobs/9").status_code == 404
    assert "no job 9" in reader.get("/api/jobs/9").json()["error"]


def test_the_api_acts_for_a_bearer(actor: TestClient, queue: Local, tmp_path: Path) -> None:
    def post(path: str, body: object = None) -> dict[str, object]:
        answer = actor.post(f"/api{path}", json=body or {}, headers=BEARER)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    number = post("/jobs", {**SUBMISSION, "directory": str(tmp_path)})["job"]
    row = queue.store.job(int(str(number)))
    assert (row["name"], row["sizes"], row["directory"]) == ("<b>", [1, 2], str(tmp_path))
    assert row["folder"] == str(tmp_path / "runs" / "demo")
    for path in (f"/jobs/{number}/hold", f"/jobs/{number}/release", f"/jobs/{number}/cancel", "/nodes/node1/drain",
                 "/nodes/node1/undrain"):  # fmt: skip
        assert post(path)["said"]
    assert post("/jobs/1/move", {"priority": 4})["said"] == "has priority 4"
    for body, status, said in (
        ({**SUBMISSION, "directory": "/nosuch"}, 400, "is no folder"),
        ({**SUBMISSION, "directory": "runs"}, 400, "is no folder"),
        ({**SUBMISSION, "directory": str(tmp_path), "config": "/etc/passwd"}, 400, "name of a shipped run config"),
        ({**SUBMISSION, "directory": str(tmp_path), "config": {"run": {}}}, 400, "missing"),
        ({**SUBMISSION, "directory": str(tmp_path), "config": "nosuch"}, 400, "no shipped config"),
        ({**SUBMISSION, "directory": str(tmp_path), "overrides": ["surplus.key=1"]}, 400, "unknown"),
        ({**SUBMISSION, "directory": str(tmp_path), "ranks": "64"}, 400, "do not fit"),
        (SUBMISSION, 422, "directory: field required"),
    ):
        answer = actor.post("/api/jobs", json=body, headers=BEARER)
        assert answer.status_code == status, answer.text
        assert said in answer.json()["error"]
    assert actor.post("/api/jobs", json={**SUBMISSION, "directory": str(tmp_path), "ranks": "64"},
                      headers=BEARER).json()["exit_code"] != 0  # fmt: skip


def test_the_reference_names_every_call(reader: TestClient) -> None:
    document = reader.get("/api/openapi.json").json()
    text = reader.get("/api").text
    calls = [(path, method) for path, methods in document["paths"].items() for method in methods]
    assert len(calls) == 13
    for path, _ in calls:
        assert path in text
    assert not [path for path, _ in calls if not path.startswith("/api/")]


def test_figures_for_prometheus(reader: TestClient, queue: Local, tmp_path: Path) -> None:
    pace.Pace(tmp_path).note(0.25)
    with queue.store.write() as connection:
        event(connection, "stopping", 1, why="preempted")
        event(connection, "ended", 1, how="killed")
        event(connection, "ended", 1, how="stopped")
    families = {family.name: family for family in text_string_to_metric_families(reader.get("/metrics").text)}
    jobs = {(s.labels["state"], s.labels["user"]): s.value for s in families["setformer_queue_jobs"].samples}
    assert jobs["running", world.HOSTILE] == 1
    assert jobs["waiting", "bob"] == 1
    used = {s.labels["node"]: s.value for s in families["setformer_queue_node_slots_used"].samples}
    assert used["node1"] == 8
    wait = {s.labels.get("le"): s.value for s in families["setformer_queue_wait_seconds"].samples}
    assert wait["600.0"] == wait["+Inf"] == 2

    def value(name: str) -> float:
        return float(families[f"setformer_queue_{name}"].samples[0].value)

    assert value("preemptions") == value("failures") == value("decisions") == 1
    assert value("decision_seconds") == 0.25
    assert value("longest_wait_seconds") > 2900
    again = {family.name: family for family in text_string_to_metric_families(reader.get("/metrics").text)}
    assert again["setformer_queue_preemptions"].samples == families["setformer_queue_preemptions"].samples


def test_a_page_without_a_database_says_so(queue: Local, tmp_path: Path) -> None:
    page = client(queue, tmp_path)
    queue.store.close()
    (tmp_path / "queue.db-wal").unlink(missing_ok=True)
    (tmp_path / "queue.db").write_bytes(b"no database " * 1000)
    answer = page.get("/api/jobs")
    assert answer.status_code == 400
    assert "restore a backup" in answer.json()["error"]
    assert "restore a backup" in page.get("/jobs/1").text


def test_curves_are_read_on_and_thinned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = Curves()
    assert curves.of(tmp_path) == {}
    rows = [json.dumps({"kind": "train", "step": step, "loss": 1 / (1 + step)}) for step in range(5000)]
    path.write_text("\n".join(rows) + '\n{"kind": "train", "step": 5000, "lo')
    found = curves.of(tmp_path)["loss"]
    assert 200 <= len(found) <= 801
    assert (found[0][0], found[-1][0]) == (0, 4999)
    with path.open("a") as file:
        file.write('ss": 7}\nnot json\n{"kind": "train", "step": 1e999, "loss": 3}\n[1]\n')
        file.write('{"kind": "train", "step": 4999, "loss": 5}\n{"kind": "eval", "step": 9, "loss": 2, "top1": NaN}\n')
    found = curves.of(tmp_path)["loss"]
    assert found[-2:] == [(4999, 5.0), (5000, 7.0)]  # resumed: the last line of a step counts
    assert curves.of(tmp_path)["eval_loss"] == [(9, 2.0)]
    path.write_text("\n".join(rows[:3]) + "\n")
    assert len(curves.of(tmp_path)["loss"]) == 3


@pytest.mark.parametrize(
    ("row", "titles"),
    [
        ({"top1": 0.5, "f1": 0.4}, ["Top-1 accuracy, %"]),
        ({"miou": 0.5, "pixel_accuracy": 0.9}, ["Mean intersection over union, %"]),
        ({"pearson": 0.5}, ["Pearson correlation"]),
        ({"probe_linear": 0.5}, ["Accuracy of a linear probe, %"]),
        ({}, []),
    ],
)
def test_the_first_figure_of_each_task_is_drawn(tmp_path: Path, row: dict[str, float], titles: list[str]) -> None:
    lines = [json.dumps({"kind": "eval", "step": step, "loss": 1.0, **row}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [one["title"] for one in overview._charts(Curves().of(tmp_path))] == ["Loss", *titles]


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [5.0], [1e-12, 2e-12], [-1e29, 1e29], [3.0, 3.0]])
def test_any_curve_can_be_drawn(values: list[float]) -> None:
    text = chart('a "title" <b>', [("x", list(enumerate(values)))])
    assert "nan" not in text
    assert "<b>" not in text
    numbers = [float(n) for pair in re.findall(r'points="([^"]*)"', text) for n in re.split("[ ,]", pair)]
    assert all(-1 <= number <= 401 for number in numbers)


def test_the_token_is_of_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    path.write_text(f"{world.TOKEN}\n")
    path.chmod(0o644)
    with pytest.raises(LaunchError, match=r"others may read or change the token file .*: chmod 600"):
        tokens.find(path)
    path.chmod(0o600)
    assert tokens.find(path) == world.TOKEN
    monkeypatch.setenv(tokens.FILE_VARIABLE, str(path))
    assert tokens.find() == world.TOKEN
    monkeypatch.setenv(tokens.VARIABLE, "short")
    with pytest.raises(LaunchError, match="SETFORMER_QUEUE_TOKEN holds no token") as raised:
        tokens.find()
    assert "short;" not in str(raised.value)
    monkeypatch.setenv(tokens.VARIABLE, world.TOKEN)
    assert tokens.find() == world.TOKEN
    tokens.forget()
    assert tokens.VARIABLE not in os.environ
    with pytest.raises(LaunchError, match="cannot be read"):
        tokens.find(tmp_path)


def test_moments_that_no_calendar_has_are_not_shown() -> None:
    assert overview.when(1e30, 0.0) is None
    assert overview.when(float("inf"), 0.0) is None
