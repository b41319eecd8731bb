"""The pages, and the forms that act. Every text goes through autoescape and `plain`: no markup, no control characters.

A form answers with a redirection; what it did stands on the next page.
"""

from __future__ import annotations

import asyncio
import time
import urllib.parse
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Query
from fastapi import Path as InPath
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from launch.queue.page import live, overview
from launch.queue.page.access import Access, Session, is_csrf
from launch.queue.page.curves import Curves
from launch.queue.source import Local
from setformer_dist.core.errors import LaunchError, SetformerError
from setformer_dist.core.words import plain, plain_page

_WRONG_S = 0.5  # a wrong token is answered no sooner
_MOST_LOGINS = 8  # at a time
_FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
Number = Annotated[int, InPath(ge=1, lt=2**63)]
Attempt = Annotated[int | None, Query(ge=1, lt=2**31)]
Before = Annotated[int | None, Query(ge=1, lt=2**63)]
_ACTIONS = ("cancel", "hold", "release", "move")


def _finalize(value: object) -> object:
    if value is None:
        return ""
    return value if isinstance(value, Markup | int) else plain_page(str(value))


def templates() -> jinja2.Environment:
    """Return the environment of the templates."""
    loader = jinja2.FunctionLoader(lambda name: _file(name).decode())
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_finalize,
    )  # fmt: skip


def _file(name: str) -> bytes:
    return resources.files(__package__).joinpath("files", name).read_bytes()


@dataclass
class Pages:
    """Renders the pages of one queue.

    Attributes:
        queue: the queue.
        access: who may read and act.
        watch: what has changed.
        curves: of runs.
        folder: of the queue.
        api: the document of the JSON API, in the form of OpenAPI.
    """

    queue: Local
    access: Access
    watch: live.Watch
    curves: Curves
    folder: Path
    api: dict[str, Any] = field(default_factory=dict)
    _fresh: overview.Fresh = field(default_factory=overview.Fresh)
    _environment: jinja2.Environment = field(default_factory=templates)

    def render(self, request: Request, template: str, status: int = 200, **values: object) -> Response:
        """Return a page."""
        session: Session | None = getattr(request.state, "session", None)
        said, csrf = "", ""
        if session is not None:
            said, session.said, csrf = session.said, "", session.csrf
        text = self._environment.get_template(template).render(
            queue=self.folder.name, path=request.url.path, csrf=csrf, said=said, may_act=session is not None,
            wants_token=self.access.token is not None, dashboard=self.queue.config.page.dashboard, **values,
        )  # fmt: skip
        return HTMLResponse(text, status)

    def fault(self, request: Request, status: int, said: str) -> Response:
        """Return a page with one sentence about what went wrong."""
        return self.render(request, "fault.html.j2", status, sentence=said)

    def front(self, request: Request) -> Response:
        """Return the first page."""
        facts = self._fresh.get("front", lambda: overview.front(self.queue, self.curves))
        fault = self._fresh.get("fault", self.queue.fault)
        return self.render(request, "front.html.j2", leader=self._leader(), fault=fault, **facts)

    def _leader(self) -> dict[str, object]:
        found = self._fresh.get("leader", self.queue.leader)
        if found is None or self.watch.leads is False:
            return {"leads": False, "said": "no scheduler runs: nothing starts"}
        return {"leads": True, "said": f"scheduler on {plain(found['host'])}, term {found['term']}"}

    def job(self, request: Request, number: int, attempt: int | None) -> Response:
        """Return the page of a job."""
        facts = self._fresh.get((number, attempt), lambda: overview.job(self.queue, self.curves, number, attempt))
        return self.render(request, "job.html.j2", leader=self._leader(), **facts)

    def events(self, request: Request, before: int | None) -> Response:
        """Return a page of events, the latest first."""
        rows = self.queue.latest_events(overview.EVENTS, before)
        now = time.time()
        return self.render(
            request, "events.html.j2", leader=self._leader(), events=[overview.event(row, now) for row in rows],
            older=rows[-1]["id"] if len(rows) == overview.EVENTS else None, before=before,
        )  # fmt: skip


def router(pages: Pages) -> APIRouter:
    """Return the routes of the pages and forms."""
    routes = APIRouter(include_in_schema=False)
    _shown(routes, pages)
    _login(routes, pages)
    _forms(routes, pages)
    return routes


def _shown(routes: APIRouter, pages: Pages) -> None:
    @routes.get("/")
    def front(request: Request) -> Response:
        return pages.front(request)

    @routes.get("/jobs/{number}")
    def job(request: Request, number: Number, attempt: Attempt = None) -> Response:
        return pages.job(request, number, attempt)

    @routes.get("/events")
    def events(request: Request, before: Before = None) -> Response:
        return pages.events(request, before)

    @routes.get("/api")
    def reference(request: Request) -> Response:
        return pages.render(request, "api.html.j2", document=pages.api, leader=None)

    @routes.get("/live")
    async def listen() -> Response:
        return live.stream(pages.watch)

    @routes.get("/files/{name}")
    def file(name: str) -> Response:
        if name not in _FILES:
            return Response(status_code=404)
        return Response(_file(name), media_type=_FILES[name], headers={"Cache-Control": "no-cache"})


def _login(routes: APIRouter, pages: Pages) -> None:
    access, at_a_time = pages.access, asyncio.Semaphore(_MOST_LOGINS)

    @routes.get("/login")
    def form(request: Request) -> Response:
        if access.token is None:
            return RedirectResponse("/", 303)
        return pages.render(request, "login.html.j2", leader=None, wrong=False)

    @routes.post("/login")
    async def login(request: Request) -> Response:
        if at_a_time.locked():
            return pages.fault(request, 429, "too many logins at a time: try again in a moment")
        async with at_a_time:
            fields = await _fields(request)
            if not access.is_token(fields.get("token", "").strip()):
                await asyncio.sleep(_WRONG_S)
                return pages.render(request, "login.html.j2", 403, leader=None, wrong=True)
        answer = RedirectResponse("/", 303)
        by_tls = request.headers.get("origin", "").startswith("https://")
        answer.set_cookie(access.cookie, access.begin(), httponly=True, samesite="strict", secure=by_tls)
        return answer

    @routes.post("/logout")
    async def logout(request: Request) -> Response:
        if not _is_own(request, await _fields(request)):
            return pages.fault(request, 403, _FOREIGN)
        access.end(request.state.cookie)
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(access.cookie, httponly=True, samesite="strict")
        return answer


def _forms(routes: APIRouter, pages: Pages) -> None:
    @routes.post("/jobs/{number}/{action}")
    async def change_job(request: Request, number: Number, action: str) -> Response:
        fields = await _fields(request)

        def act() -> str:
            queue = pages.queue
            if action == "move":
                return queue.move(number, _integer(fields.get("priority", "")))
            return str(getattr(queue, action)(number))

        if action not in _ACTIONS:
            return pages.fault(request, 404, "there is no such page")
        return await _acted(pages, request, fields, f"/jobs/{number}", lambda: f"job {number} {act()}")

    @routes.post("/nodes/{name}/{action}")
    async def change_node(request: Request, name: str, action: str) -> Response:
        fields = await _fields(request)

        def act() -> str:
            drains = action == "drain"
            pages.queue.drain(name, (fields.get("why", "").strip()[:500] or "by hand") if drains else None)
            return f"no job starts on {name}" if drains else f"jobs may start on {name}"

        if action not in ("drain", "undrain"):
            return pages.fault(request, 404, "there is no such page")
        return await _acted(pages, request, fields, "/", act)


_FOREIGN = "this form is not of this session: open the page, and send it again"


async def _acted(pages: Pages, request: Request, fields: dict[str, str], after: str, act: Any) -> Response:
    if not _is_own(request, fields):
        return pages.fault(request, 403, _FOREIGN)
    try:
        said = await run_in_threadpool(act)
    except SetformerError as error:
        said = str(error)
    request.state.session.said = said
    return RedirectResponse(after, 303)


def _is_own(request: Request, fields: dict[str, str]) -> bool:
    session: Session | None = request.state.session
    return session is not None and is_csrf(session, fields.get("csrf", ""))


async def _fields(request: Request) -> dict[str, str]:
    """Return the fields of a form; none of a body that is no form."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        return {}
    body = await request.body()
    try:
        return dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=20))
    except ValueError:
        return {}


def _integer(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 2**40
    if not -(2**31) <= value < 2**31:
        raise LaunchError("a priority is a whole number, such as 5 or -3")
    return value
