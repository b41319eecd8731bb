"""The JSON API. The command line uses it where --queue is a URL; its reference is the page /api."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi import Path as InPath

from launch.queue.page import models
from launch.queue.page.curves import Curves
from launch.queue.source import Local
from launch.queue.store import Row
from launch.queue.submit import Request
from setformer_dist.core.errors import ConfigError

JobNumber = Annotated[int, InPath(ge=1, lt=2**63, description="number of the job")]
NodeName = Annotated[str, InPath(max_length=500, description="name of the node")]
_FAULTS: dict[int | str, dict[str, object]] = {
    400: {"model": models.Fault, "description": "the request cannot be met"},
    401: {"model": models.Fault, "description": "the token is missing or wrong"},
    403: {"model": models.Fault, "description": "the page is read-only"},
    404: {"model": models.Fault, "description": "there is no such job, attempt or node"},
    422: {"model": models.Fault, "description": "a key is missing, unknown or of the wrong type"},
    503: {"model": models.Fault, "description": "the database does not answer now"},
}


def router(queue: Local, curves: Curves) -> APIRouter:
    """Return the routes below /api."""
    routes = APIRouter(prefix="/api", responses=_FAULTS)
    _reads(routes, queue, curves)
    _acts(routes, queue)
    return routes


def _reads(routes: APIRouter, queue: Local, curves: Curves) -> None:
    @routes.get("/cluster", response_model=models.Cluster)
    def cluster() -> Row:
        """Return the scheduler that leads, the nodes, and what is wrong with queue.toml."""
        return {"leader": queue.leader(), "nodes": queue.nodes(), "fault": queue.fault()}

    @routes.get("/jobs", response_model=models.Jobs)
    def jobs(
        all: Annotated[bool, Query(description="also jobs that have ended")] = False,
        limit: Annotated[int, Query(ge=1, le=1_000_000)] = 1000,
    ) -> Row:
        """Return jobs: those that run, those that wait in their order, those that have ended."""
        found = queue.jobs(all)
        return {"jobs": found[:limit], "total": len(found)}

    @routes.get("/jobs/{number}", response_model=models.JobDetail)
    def job(number: JobNumber) -> Row:
        """Return one job with its config, attempts and events."""
        return queue.job(number)

    @routes.get("/jobs/{number}/logs", response_model=models.Output)
    def logs(
        number: JobNumber,
        attempt: Annotated[int, Query(ge=0, lt=2**31, description="from 1; 0 for how many there are")] = 1,
        start: Annotated[int, Query(ge=-(2**40), lt=2**40, description="a byte; below 0 from the end")] = 0,
    ) -> Row:
        """Return a piece of an attempt's output."""
        return queue.output(number, attempt, start)

    @routes.get("/jobs/{number}/curves", response_model=models.Curves)
    def its_curves(number: JobNumber) -> Row:
        """Return the curves of a job's run."""
        return {"series": curves.of(Path(queue.store.job(number)["folder"]))}

    @routes.get("/events", response_model=models.Events)
    def events(since: Annotated[int, Query(ge=0, lt=2**63, description="id of an event")] = 0) -> Row:
        """Return the events after one."""
        return {"events": queue.events(since)}


def _acts(routes: APIRouter, queue: Local) -> None:
    @routes.post("/jobs", response_model=models.Number)
    def submit(given: models.Submission) -> Row:
        """Check a run config and put it into the queue."""
        return {"job": queue.submit(as_request(given))}

    @routes.post("/jobs/{number}/cancel", response_model=models.Said)
    def cancel(number: JobNumber) -> Row:
        """Cancel a job; if it runs, it saves first."""
        return {"said": queue.cancel(number)}

    @routes.post("/jobs/{number}/hold", response_model=models.Said)
    def hold(number: JobNumber) -> Row:
        """Keep a job from starting; if it runs, it saves and stops."""
        return {"said": queue.hold(number)}

    @routes.post("/jobs/{number}/release", response_model=models.Said)
    def release(number: JobNumber) -> Row:
        """Let a held job start, or one that has ended go on from its newest checkpoint."""
        return {"said": queue.release(number)}

    @routes.post("/jobs/{number}/move", response_model=models.Said)
    def move(number: JobNumber, given: models.Move) -> Row:
        """Change a job's priority."""
        return {"said": queue.move(number, given.priority)}

    @routes.post("/nodes/{name}/drain", response_model=models.Said)
    def drain(name: NodeName, given: models.Drain) -> Row:
        """Start no new job on a node; running jobs continue, or go elsewhere."""
        queue.drain(name, given.why, given.vacate)
        return {"said": "no job starts there"}

    @routes.post("/nodes/{name}/undrain", response_model=models.Said)
    def undrain(name: NodeName) -> Row:
        """Let jobs start on a node again."""
        queue.drain(name, None)
        return {"said": "jobs may start there"}


def as_request(given: models.Submission) -> Request:
    """Return a submission as `launch.queue.submit` takes it.

    Raises:
        ConfigError: its config is a path: a server reads no file that a client names.
    """
    config = given.config
    if isinstance(config, str) and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", config):
        raise ConfigError("config: give the name of a shipped run config, or a whole run config as nested tables")
    return Request(
        Path(config) if isinstance(config, str) else config, given.overrides, given.ranks, given.nodes,
        given.ranks_per_node, given.priority, given.user, given.name, given.max_retries, given.time_limit,
        given.after, given.hold, directory=Path(given.directory),
    )  # fmt: skip
