"""The page's server with real sockets: where it listens, what is told, who never reads, and the commands by its URL."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import sqlalchemy as sa

from launch.cli import main as cli
from launch.queue import schema as db
from launch.queue import token as tokens
from launch.queue.page import server
from launch.queue.page.live import MOST
from launch.queue.source import Local
from launch.queue.store import event
from launch.ranks.environment import choose_port
from setformer_dist.core.errors import LaunchError
from tests.unit import queue_page_world as world


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    made = world.make(tmp_path_factory.mktemp("whole"))
    yield made
    made.store.close()


@pytest.fixture
def queue(whole: Local, tmp_path: Path) -> Iterator[Local]:
    made = world.copied(whole, tmp_path)
    yield made
    made.store.close()


class Served(NamedTuple):
    port: int
    server: server.Server


@contextlib.contextmanager
def serving(queue: Local, folder: Path, token: str | None = None, silent_s: float = 30.0) -> Iterator[Served]:
    """Serve the page in a thread."""
    listening = server.listen(str(choose_port(None)), token, silent_s)
    running = server.server_of(queue, folder, token, listening)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: running.started)
        yield Served(int(listening.getsockname()[1]), running)
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def connected(port: int, path: str, receive: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    made.settimeout(20)
    made.connect(("127.0.0.1", port))
    made.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return made


def test_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("0.0.0.0:8765", "[::]:8765", f"{socket.gethostname()}:8765"):
        if where[0] in "0[" or not socket.gethostbyname(where[:-5]).startswith("127."):
            with pytest.raises(LaunchError, match="where others can reach it, without a token"):
                server.listen(where, None)
    for where in ("x", "127.0.0.1:0", "99999", "nosuch.invalid:80"):
        with pytest.raises(LaunchError, match=f"--page {where}: "):
            server.listen(where, world.TOKEN)
    port = choose_port(None)
    for address in ("127.0.0.1", "0.0.0.0"):
        with server.listen(f"{address}:{port}", world.TOKEN):
            if address == "127.0.0.1":
                with pytest.raises(LaunchError, match=f"cannot listen on {port}.*in use.*another port"):
                    server.listen(str(port), None)


def test_changes_are_told_and_a_listener_that_leaves_is_forgotten(queue: Local, tmp_path: Path) -> None:
    with serving(queue, tmp_path) as (port, _):
        listener = connected(port, "/live")
        came = b""
        while b"retry" not in came:
            came += listener.recv(4096)
        assert b"text/event-stream" in came
        with queue.store.write() as connection:
            event(connection, "news")
        while b"event: change" not in came:
            came += listener.recv(4096)
        listener.close()
        others = [connected(port, "/live") for _ in range(MOST)]
        for other in others:
            assert b"200 OK" in other.recv(4096)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/live", timeout=20)
        for other in others:
            other.close()
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).status == 200


def test_a_browser_that_never_reads_is_disconnected(queue: Local, tmp_path: Path) -> None:
    # Long answers instead of many changes: both wait in the same buffers.
    log = tmp_path / "output.log"
    log.write_bytes(b"x" * 60_000)
    with queue.store.write() as connection:
        connection.execute(sa.update(db.attempts).values(folder=str(tmp_path)))
    with serving(queue, tmp_path, silent_s=2.0) as (port, running):
        lazy = [connected(port, "/api/jobs/1/logs?attempt=1", receive=2048) for _ in range(4)]
        for one in lazy:
            for _ in range(20):  # answers come one after the other, and none is read
                one.sendall(b"GET /api/jobs/1/logs?attempt=1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")

        until(lambda: len(running.server_state.connections) == len(lazy))
        until(lambda: not running.server_state.connections)
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).status == 200
        for one in lazy:
            one.close()


def test_a_connection_without_a_request_is_closed(
    queue: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.5)
    with serving(queue, tmp_path) as (port, _), socket.create_connection(("127.0.0.1", port)) as idle:
        idle.settimeout(20)
        idle.sendall(b"GET / HTTP/1.1\r\n")
        assert idle.recv(100) == b""


@pytest.fixture
def by_url(queue: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands use the API of a server with a token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tokens.VARIABLE, world.TOKEN)
    with serving(queue, tmp_path, world.TOKEN) as (port, _):
        monkeypatch.setenv("SETFORMER_QUEUE", f"http://127.0.0.1:{port}/")
        yield


def run(words: str) -> None:
    cli.app(shlex.split(words), standalone_mode=False)


def test_every_command_by_the_url(
    queue: Local, by_url: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("queue submit demo data.root=runs/demo-data --ranks 1:2 --name <b> --time-limit 4h --priority 3")
    assert capsys.readouterr().out == "job 6\n"
    row = queue.store.job(6)
    assert (row["name"], row["sizes"], row["limit_s"], row["folder"]) == ("<b>", [1, 2], 14400, f"{tmp_path}/runs/demo")
    assert json.loads(row["config"])["data"]["root"] == "runs/demo-data"
    run("queue ls --all --json")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(queue.jobs(True)))
    run("queue show 1 --json")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(queue.job(1)))
    run("queue logs 1")
    printed = capsys.readouterr().out
    assert printed.startswith("=== attempt-0001\nstep 10 loss")
    assert printed.count("step 10") == 40
    run("queue events --since 2")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == json.loads(json.dumps(queue.events(2)))
    for words in ("queue hold 1", "queue release 1", "queue move 1 --priority 5", "queue ls", "queue show 1",
                  "queue top --once", 'queue drain node1 --why "new memory"', "queue undrain node1",
                  "queue cancel 1"):  # fmt: skip
        run(words)
        assert capsys.readouterr().out.strip(), words
    assert queue.store.job(1)["cancelled"]


def test_what_the_server_refuses_is_the_commands_sentence(
    by_url: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        ("queue show 77", "the queue has no job 77"),
        ("queue move 1 --priority 1000", "100 at most"),
        ("queue drain nosuch", "no node nosuch"),
        ("queue submit demo data.root=runs/x --ranks 64", "do not fit"),
        ("queue submit demo surplus.key=1", "unknown"),
        ("queue backup copy.db", "needs the queue's folder"),
        ("queue serve", "needs the queue's folder"),
    ):
        with pytest.raises(Exception, match=said):
            run(words)
    monkeypatch.setenv(tokens.VARIABLE, "x" * 20)
    with pytest.raises(LaunchError, match="wants its token: set SETFORMER_QUEUE_TOKEN"):
        run("queue ls")
    with pytest.raises(LaunchError, match="does not answer"):
        run(f"queue ls --queue http://127.0.0.1:{choose_port(None)}")


def test_what_is_no_server_of_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tokens.VARIABLE, world.TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer() -> None:
            with other.accept()[0] as one:
                one.recv(4096)
                one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LaunchError, match="is no server of a queue"):
            run(f"queue ls --queue http://127.0.0.1:{port}")
        thread.join()


@pytest.mark.drill
def test_the_page_and_the_scheduler_do_not_end_each_other(tmp_path: Path) -> None:
    queue = world.make(tmp_path)
    with queue.store.write() as connection:  # nothing of the world runs
        connection.execute(sa.update(db.attempts).values(state="ended"))
        connection.execute(sa.update(db.jobs).values(state="done"))
        connection.execute(sa.update(db.lease).values(holder=""))
    port = choose_port(None)
    folder = tmp_path / "token"
    folder.write_text(world.TOKEN)
    folder.chmod(0o600)
    words = [sys.executable, "-m", "launch.cli", "queue", "serve", "--queue", str(tmp_path), "--page", str(port),
             "--token-file", str(folder)]  # fmt: skip
    pid = os.posix_spawn(sys.executable, words, os.environ)
    ended = False
    try:
        until(lambda: status(port) == 401, 60)
        (first,) = children(pid)
        assert world.TOKEN.encode() not in Path(f"/proc/{first}/cmdline").read_bytes()
        os.kill(first, signal.SIGKILL)
        until(lambda: children(pid) not in ([], [first]), 60)
        until(lambda: status(port) == 401, 60)
        before = beat(queue)
        until(lambda: beat(queue) != before)
        (second,) = children(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ended = True
        until(lambda: not Path(f"/proc/{second}").exists())
    finally:
        if not ended:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
        queue.store.close()


@pytest.mark.drill
def test_a_page_alone_ends_as_asked(tmp_path: Path) -> None:
    world.make(tmp_path).store.close()
    port = choose_port(None)
    words = [sys.executable, "-m", "launch.cli", "queue", "page", str(port), "--queue", str(tmp_path)]
    for number in (signal.SIGTERM, signal.SIGINT):
        pid = os.posix_spawn(sys.executable, words, os.environ)
        until(lambda: status(port) == 200, 60)
        listener = connected(port, "/live")
        os.kill(pid, number)
        began = time.monotonic()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        listener.close()
        assert code == 128 + number
        assert time.monotonic() - began < 10


def status(port: int) -> int:
    try:
        return int(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/cluster", timeout=5).status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def beat(queue: Local) -> int:
    return int(queue.store.rows(sa.select(db.lease))[0]["beat"])
