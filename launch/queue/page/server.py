"""Listens for the page of a queue, and serves it: in this process, or in a child of `setformer queue serve`.

The child shares the listening socket and nothing else with the scheduler: it reads the database. If it ends, it is
started again, later each time; if the scheduler is killed, the kernel ends it as well (`setformer queue page` stays).

    python -P -m launch.queue.page.server FOLDER DESCRIPTOR      the child; its token is in its environment
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from launch.queue import token as tokens
from launch.queue.config import database_of
from launch.queue.page.access import Access, own_names
from launch.queue.page.app import application
from launch.queue.page.live import Watch
from launch.queue.settings import Settings
from launch.queue.source import Local
from launch.queue.store import Store
from launch.ranks.processes import die_with_parent
from launch.ranks.signals import stop_signals
from setformer_dist.core.errors import LaunchError, SetformerError
from setformer_dist.core.logging_config import endpoint_of

log = logging.getLogger(__name__)

_HOME = Path(__file__).resolve().parents[3]
_MODULE = "launch.queue.page.server"
SILENT_S = 30.0  # after which the kernel ends a connection whose other side takes nothing
HEAD_S = 20.0  # in which a new connection sends its first request
_MOST_CONNECTIONS = 256
_BUFFER = 1 << 16  # bytes that wait in the kernel for one browser
_AGAIN_S, _AGAIN_MAX_S = 1.0, 60.0


def listen(where: str, token: str | None, silent_s: float = SILENT_S) -> socket.socket:
    """Return a socket that listens.

    Args:
        where: a port on 127.0.0.1, or ADDRESS:PORT.
        token: of the page; needed where others can reach it.
        silent_s: seconds after which a browser that takes nothing is disconnected.

    Raises:
        LaunchError: the address is none, is taken, or can be reached by others without a token.
    """
    try:
        host, port = endpoint_of(where)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (ValueError, OSError) as error:
        why = "no such host" if isinstance(error, OSError) else "give a port from 1 to 65535, or ADDRESS:PORT"
        raise LaunchError(f"--page {where}: {why}") from None
    family, address = found[0], str(found[4][0])
    if token is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise LaunchError(
            f"the page does not listen on {host}, where others can reach it, without a token: set {tokens.VARIABLE} or "
            f"{tokens.FILE_VARIABLE}, or listen on 127.0.0.1"
        )
    try:
        made = socket.create_server((address, port), family=family, backlog=128)
    except OSError as error:
        raise LaunchError(
            f"the page cannot listen on {where} ({error.strerror or error}): give it another port"
        ) from None
    # What is accepted inherits these.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * silent_s))
    return made


def address_of(listening: socket.socket) -> str:
    """Return the URL of a page that listens."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def run(folder: Path, found: Settings, listening: socket.socket, token: str | None) -> int:
    """Serve the page until a stop signal comes; return 128 + the signal.

    Raises:
        LaunchError: the database cannot be used.
    """
    store = Store(database_of(folder, found.config))
    server = server_of(Local(store, found.config, found), folder, token, listening)
    with stop_signals() as received:
        server.over = lambda: bool(received.stop)
        server.run(sockets=[listening])
    store.close()
    return 128 + received.stop[0] if received.stop else 1


class Server(uvicorn.Server):
    """A server that leaves signals to others.

    Attributes:
        over: asked ten times a second whether it should end.
    """

    over: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, config: uvicorn.Config, watch: Watch) -> None:
        super().__init__(config)
        self._watch = watch

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; those who listen to changes are let go first."""
        self._watch.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end."""
        return await super().on_tick(counter) or self.over()


class Impatient(H11Protocol):
    """A connection that is closed where no whole request comes within `HEAD_S`: idle ones must not take all places."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self.loop.call_later(HEAD_S, self._look)

    def _look(self) -> None:
        if getattr(self, "cycle", None) is None and not self.transport.is_closing():
            self.transport.close()


def server_of(queue: Local, folder: Path, token: str | None, listening: socket.socket) -> Server:
    """Return the server of a page."""
    names = frozenset({*own_names(), *(name.lower() for name in queue.config.page.names)})
    access = Access(token, names, f"setformer_queue_{listening.getsockname()[1]}")
    watch = Watch(queue.store)
    return Server(
        uvicorn.Config(
            application(queue, folder, access, watch), loop="asyncio", http=Impatient, ws="none", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, limit_concurrency=_MOST_CONNECTIONS,
            timeout_keep_alive=15, timeout_graceful_shutdown=1, h11_max_incomplete_event_size=1 << 16,
        ),
        watch,
    )  # fmt: skip


@dataclass
class Child:
    """The page as a child of the scheduler, which looks at it now and then and never waits for it.

    Attributes:
        folder: of the queue.
        listening: its socket.
        token: of the page.
    """

    folder: Path
    listening: socket.socket
    token: str | None
    _process: subprocess.Popen[bytes] | None = None
    _pause_s: float = field(default=_AGAIN_S)
    _next: float = float("-inf")

    def look(self) -> None:
        """Start the page where it does not run."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            log.warning("the page has ended (%d); it starts again in %.0f s", code, self._pause_s)
            self._process, self._next = None, now + self._pause_s
            self._pause_s = min(_AGAIN_MAX_S, 2 * self._pause_s)
        if now < self._next:
            return
        path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path}
        environment |= {tokens.VARIABLE: self.token} if self.token is not None else {}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(self.folder), str(self.listening.fileno())],
                env=environment, stdin=subprocess.DEVNULL, pass_fds=[self.listening.fileno()],
                start_new_session=True, preexec_fn=die_with_parent(),
            )  # fmt: skip
        except OSError as error:
            log.warning("the page cannot be started now: %s", error)
            self._next = now + self._pause_s

    @property
    def pid(self) -> int | None:
        """Process id; None where it does not run."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the page."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.listening.close()


def main(words: list[str]) -> int:
    """Serve the page of a folder on a socket that this process was given."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    folder = Path(words[0])
    token = tokens.find() if os.environ.get(tokens.VARIABLE) else None
    tokens.forget()
    try:
        return run(folder, Settings(folder), socket.socket(fileno=int(words[1])), token)
    except SetformerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
