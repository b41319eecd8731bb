"""What the JSON API takes and gives. Times are Unix times in seconds; a slot holds one rank."""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import Field


class Given(pydantic.BaseModel):
    """Base of what the API takes: unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Fault(pydantic.BaseModel):
    """What went wrong, in one sentence."""

    error: str
    exit_code: int = Field(default=1, description="what the command line would end with")


class Leader(pydantic.BaseModel):
    """The scheduler that leads."""

    host: str
    pid: int
    term: int = Field(description="grows each time a scheduler takes over")


class Node(pydantic.BaseModel):
    """A node."""

    name: str
    slots: int
    used: int
    state: str = Field(description='"up", "down" or "drained: REASON"')


class Cluster(pydantic.BaseModel):
    """The cluster."""

    leader: Leader | None = Field(description="null where no scheduler runs")
    nodes: list[Node]
    fault: str = Field(description="why queue.toml is not in force; empty where it is")


class Job(pydantic.BaseModel):
    """A job of the list."""

    model_config = pydantic.ConfigDict(extra="allow")

    id: int
    name: str
    user: str
    priority: int
    state: str = Field(description="waiting, running, stopping, done, failed, cancelled, over limit")
    submitted: float
    sizes: list[int] = Field(description="numbers of ranks that it may have, ascending")
    per_node: int | None = Field(description="ranks on each of its nodes; null for any")
    limit_s: float | None = Field(description="longest total run time")
    held: bool
    cancelled: bool
    after: list[int] = Field(description="jobs that must be done before")
    folder: str = Field(description="of the run")
    waiting_since: float
    used_s: float = Field(description="run time of the attempts that have ended")
    attempts: int
    reason: str = Field(description="why it waits, or how it ended")
    place: int | None = Field(description="in the order of the last decision, from 1")
    expected: float | None = Field(description="when it is expected to start")
    finished: float | None
    placement: list[tuple[str, int]] = Field(default=[], description="ranks by node, of a job that runs")
    started: float | None = None
    ranks: int | None = Field(default=None, description="of a job that runs")


class Jobs(pydantic.BaseModel):
    """Jobs: those that run, those that wait in their order, those that have ended."""

    jobs: list[Job]
    total: int = Field(description="jobs that were asked for, also beyond the limit")


class Attempt(pydantic.BaseModel):
    """One attempt of a job."""

    model_config = pydantic.ConfigDict(extra="allow")

    number: int
    state: str = Field(description="running, stopping, ended")
    placement: list[tuple[str, int]]
    ranks: int
    started: float
    ended: float | None
    stop_why: str | None = Field(description="why the queue stopped it")
    how: str | None = Field(description="how it ended: done, stopped, mistake, error, killed, hang, host, …")
    code: int | None = Field(description="exit code, or minus a signal")


class JobDetail(Job):
    """A job with all that is known of it."""

    config: dict[str, Any] = Field(description="its run config, without secrets of URLs")
    tries: list[Attempt]
    events: list[dict[str, Any]]


class Event(pydantic.BaseModel):
    """What happened; further keys say more of it."""

    model_config = pydantic.ConfigDict(extra="allow")

    id: int
    time: float
    event: str
    job: int | None


class Events(pydantic.BaseModel):
    """Events in their order, a thousand at most: ask again with the last one's id."""

    events: list[Event]


class Output(pydantic.BaseModel):
    """A piece of a log; control characters are written out."""

    attempts: int = Field(description="that there are")
    state: str = Field(description="of the job")
    start: int = Field(description="first byte of this piece")
    end: int = Field(description="first byte of the next one; as start where nothing has come")
    text: str


class Curves(pydantic.BaseModel):
    """The curves of a run, thinned to some hundred points: [step, value] each."""

    series: dict[str, list[tuple[int, float]]]


class Said(pydantic.BaseModel):
    """What happens now."""

    said: str


class Number(pydantic.BaseModel):
    """The job's number."""

    job: int


class Move(Given):
    """A job's new priority."""

    priority: int = Field(ge=-(2**31), lt=2**31)


class Drain(Given):
    """Why no job starts on a node."""

    why: str = Field(default="by hand", max_length=500)
    vacate: bool = Field(default=False, description="jobs that run there save, stop, and go on elsewhere")


class Submission(Given):
    """A job. What is left out is as `setformer queue submit` has it."""

    config: str | dict[str, Any] = Field(description="name of a shipped run config, or a whole run config")
    overrides: list[str] = Field(default=[], description="such as optim.lr=1e-3")
    directory: str = Field(description="absolute path on the server: in which the job runs, for its relative paths")
    ranks: str | None = Field(default=None, description='"N" or "MIN:MAX"')
    nodes: int | None = Field(default=None, ge=1)
    ranks_per_node: int | None = Field(default=None, ge=1)
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    user: str | None = Field(default=None, max_length=100, description="by default the server's user")
    name: str | None = Field(default=None, max_length=255, description="by default run.name")
    max_retries: int = Field(default=0, ge=0, lt=2**31)
    time_limit: str | None = Field(default=None, description="90, 30m, 4h or 2d")
    after: list[int] = []
    hold: bool = False
