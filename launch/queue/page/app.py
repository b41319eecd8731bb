"""The application of the page: routes, errors as one sentence, the guard in front."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pydantic
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from launch.queue.page import api, pages
from launch.queue.page.access import Access, Guard
from launch.queue.page.curves import Curves
from launch.queue.page.figures import Figures
from launch.queue.page.live import Watch
from launch.queue.page.models import Fault
from launch.queue.source import Local
from launch.queue.store import MissingError
from setformer_dist.core.errors import SetformerError, TransientError
from setformer_dist.core.words import plain_lines

log = logging.getLogger(__name__)

_ABOUT = """The queue's JSON API. Reading needs what the page needs; acting needs the token in a header,
`Authorization: Bearer TOKEN`. Every fault is one sentence under the key `error`."""


def application(queue: Local, folder: Path, access: Access, watch: Watch | None = None) -> ASGIApp:
    """Return the application of a queue's page.

    Args:
        queue: the queue.
        folder: of the queue.
        access: who may read and act.
        watch: looks for changes; by default once a second.
    """
    watch = watch or Watch(queue.store)

    @contextlib.asynccontextmanager
    async def while_open(app: FastAPI) -> AsyncIterator[None]:
        async with watch:
            yield

    app = FastAPI(
        title="setformer queue", version="1", description=_ABOUT, docs_url=None, redoc_url=None, lifespan=while_open,
        openapi_url="/api/openapi.json",
    )  # fmt: skip
    curves, figures = Curves(), Figures(queue, folder)
    shown = pages.Pages(queue, access, watch, curves, folder)
    app.include_router(api.router(queue, curves))
    app.include_router(pages.router(shown))

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return Response(figures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    shown.api.update(app.openapi())
    _explain_faults(app, shown)
    return Guard(app, access)


def _explain_faults(app: FastAPI, shown: pages.Pages) -> None:
    def told(request: Request, status: int, said: str, code: int = 1) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse(Fault(error=said, exit_code=code).model_dump(), status)
        return shown.fault(request, status, said)

    @app.exception_handler(SetformerError)
    async def ours(request: Request, error: SetformerError) -> Response:
        status = 404 if isinstance(error, MissingError) else 503 if isinstance(error, TransientError) else 400
        return told(request, status, plain_lines(str(error)), error.exit_code)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return told(request, 422, _sentence(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        said = {404: "there is no such page", 405: f"{request.method} is not for this page"}
        return told(request, error.status_code, said.get(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return told(request, 500, "this is a defect of the page; its log says more")


def _sentence(error: RequestValidationError | pydantic.ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON (at character {first['loc'][-1]})"
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    return f"{place or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}"[:500]
