"""That something has changed, told by server-sent events: `event: change`, whose data is a number that grows.

A browser that hears of a change asks for its page again; nothing else is sent, so nothing can pile up: one that is slow
misses numbers in between. One that never reads fills its connection's buffers (some 100 kB); then its sender waits, and
the kernel ends the connection after `server.SILENT_S` (TCP_USER_TIMEOUT). There are `MOST` connections at a time, and
each ends after some minutes, after which a browser comes again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from launch.queue import schema as db
from launch.queue.keeper import OUTPUT
from launch.queue.store import Store
from setformer_dist.core.errors import SetformerError
from setformer_dist.report.rows import METRICS

log = logging.getLogger(__name__)

MOST = 64
_LONGEST_S = 600.0
_PING_S = 15.0
_SILENT_S = 12.0  # of the scheduler, which gives a sign of life every second or two
_WATCHED = 100  # running jobs whose files are looked at


class Watch:
    """Looks at the queue once a second, and wakes who waits for a change.

    Attributes:
        version: grows with each change.
        leads: a scheduler holds the lease and gives signs of life; None before that can be told.
        trouble: why the database cannot be read, "" where it can.
        closed: the server ends.
    """

    def __init__(self, store: Store, every_s: float = 1.0) -> None:
        self._store = store
        self._every_s = every_s
        self._seen: object = None
        self._beat: tuple[object, float] = (None, 0.0)
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.version = 0
        self.listeners = 0
        self.leads: bool | None = None
        self.trouble = ""
        self.closed = False

    def close(self) -> None:
        """Let all listeners go: the server ends."""
        self.closed = True
        self._news.set()

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *ended: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            try:
                seen = await run_in_threadpool(self._look)
                self.trouble = ""
            except SetformerError as error:
                self.trouble, seen = str(error), (str(error),)
            if seen != self._seen:
                self._seen = seen
                self.version += 1
                self._news.set()
                self._news = asyncio.Event()
            await asyncio.sleep(self._every_s)

    def _look(self) -> tuple[object, ...]:
        """Return what changes when a page would."""
        jobs, tries = db.jobs.c, db.attempts.c
        with self._store.read() as connection:
            lease = connection.execute(sa.select(db.lease)).mappings().one()
            event = connection.execute(sa.select(sa.func.max(db.events.c.id))).scalar()
            sums = (sa.func.count(), sa.func.sum(jobs.place), sa.func.sum(jobs.expected), sa.func.sum(jobs.priority))
            waits = tuple(connection.execute(sa.select(*sums).where(jobs.state == "waiting")).one())
            live = sa.select(tries.folder, jobs.folder.label("run")).join(db.jobs, jobs.id == tries.job)
            runs = connection.execute(live.where(tries.state != "ended").limit(_WATCHED)).all()
        self._note_beat(lease["holder"], (lease["term"], lease["beat"]))
        sizes = tuple((_size(Path(folder) / OUTPUT), _size(Path(run) / METRICS)) for folder, run in runs)
        return (event, waits, sizes, lease["term"], self.leads, int(time.time() / _PING_S))

    def _note_beat(self, holder: str, beat: tuple[int, int]) -> None:
        now = time.monotonic()
        if self._beat[0] != beat:
            self.leads = bool(holder) if self._beat[0] is not None else None
            self._beat = (beat, now)
        elif now - self._beat[1] > _SILENT_S or not holder:
            self.leads = False

    async def changed(self, version: int, within_s: float) -> int:
        """Return the version when it is another one, or after some seconds."""
        if self.version == version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), within_s)
        return self.version


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def stream(watch: Watch) -> Response:
    """Return the answer to a browser that listens."""
    if watch.listeners >= MOST:
        return PlainTextResponse(f"{MOST} browsers listen already: close one\n", 503)
    return StreamingResponse(_told(watch), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _told(watch: Watch) -> AsyncIterator[bytes]:
    watch.listeners += 1
    try:
        ends, version = time.monotonic() + _LONGEST_S, watch.version
        yield b"retry: 3000\n\n"
        while time.monotonic() < ends and not watch.closed:
            before, version = version, await watch.changed(version, _PING_S)
            yield b": still here\n\n" if version == before else b"event: change\ndata: %d\n\n" % version
    finally:
        watch.listeners -= 1
