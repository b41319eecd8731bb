"""queue.toml in the queue's folder: database, nodes, users and limits. Without the file, the defaults hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from launch.hosts.names import HostSpec
from launch.queue.state import Rules
from launch.queue.store import url_of
from setformer_dist.core import config as base
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError, LaunchError

FILE = "queue.toml"
VARIABLE = "SETFORMER_QUEUE"

_Hours = Annotated[float, pydantic.Field(gt=0)]


class UserTable(FrozenConfig):
    """A table `[users.NAME]`; `[users.default]` is for those who have none.

    Attributes:
        share: weight in the fair share.
        quota: most ranks at a time; none by default.
        max_priority: highest priority that the user may give.
        max_hours: longest time limit, and the turn of a job without one.
    """

    share: float = pydantic.Field(default=1.0, gt=0)
    quota: int | None = pydantic.Field(default=None, ge=1)
    max_priority: int = 100
    max_hours: _Hours | None = None


class ClusterTable(FrozenConfig):
    """The `[cluster]` table.

    Attributes:
        kind: "local" for this machine alone, "hosts" for those of `nodes` (as `setformer train --hosts`), "ray".
        slots: ranks on this machine; by default its GPUs, or its cores.
        nodes: ranks by host.
        ray: address of the Ray cluster.
    """

    kind: Literal["local", "hosts", "ray"] = "local"
    slots: int | None = pydantic.Field(default=None, ge=1)
    nodes: dict[str, Annotated[int, pydantic.Field(ge=1)]] = pydantic.Field(default_factory=dict)
    ray: str = "auto"

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> ClusterTable:
        if (self.kind == "hosts") != bool(self.nodes):
            raise ValueError('cluster.nodes belongs to cluster.kind = "hosts": set both, or none of them')
        for name, slots in self.nodes.items():
            HostSpec(name, slots)
        return self


class PolicyTable(FrozenConfig):
    """The `[policy]` table.

    Attributes:
        half_life_days: after which a user's use counts half.
        starve_after_hours: a job that has waited so long goes before all others.
        turn_hours: after which a job without a time limit gives way to jobs that wait.
        protect_minutes: for which a job that had starved is not preempted. A job that ran for less goes on waiting
            as if it had not.
        grow_after_minutes: an elastic job is not grown sooner after a start.
        save_seconds: expected time of a stop with a checkpoint.
        kill_after_seconds: a job that has not saved and ended by then is killed.
        suspect_failures: failures (by half in six hours) after which a node is drained.
        depth: waiting jobs that get a reservation; more of them promise more starts, and leave more slots idle.
    """

    half_life_days: _Hours = 7.0
    starve_after_hours: _Hours = 24.0
    turn_hours: _Hours = 24.0
    protect_minutes: float = pydantic.Field(default=60.0, ge=0)
    grow_after_minutes: float = pydantic.Field(default=10.0, ge=0)
    save_seconds: _Hours = 30.0
    kill_after_seconds: _Hours = 150.0
    suspect_failures: _Hours = 3.0
    depth: int = pydantic.Field(default=3, ge=1)


class PageTable(FrozenConfig):
    """The `[page]` table.

    Attributes:
        names: host names under which browsers may ask for the page, besides IP addresses, localhost and this machine's
            own name: that of a proxy with TLS in front of it.
        dashboard: URL of the Ray cluster's dashboard, to which the page links.
    """

    names: tuple[str, ...] = pydantic.Field(default=(), strict=False)
    dashboard: str | None = None

    @pydantic.field_validator("dashboard")
    @classmethod
    def _web(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value


class QueueConfig(FrozenConfig):
    """queue.toml.

    Attributes:
        database: URL of PostgreSQL; by default a SQLite database in the queue's folder.
        users: by name.
    """

    database: str | None = None
    cluster: ClusterTable = ClusterTable()
    policy: PolicyTable = PolicyTable()
    page: PageTable = PageTable()
    users: dict[str, UserTable] = pydantic.Field(default_factory=dict)

    def user(self, name: str) -> UserTable:
        """Return a user's table."""
        return self.users.get(name) or self.users.get("default") or UserTable()

    def rules(self, users: set[str]) -> Rules:
        """Return the policy's rules, for the users that have jobs."""
        policy, tables = self.policy, {name: self.user(name) for name in users}
        return Rules(
            shares={name: table.share for name, table in tables.items()},
            quotas={name: table.quota for name, table in tables.items() if table.quota is not None},
            starve_after_s=3600 * policy.starve_after_hours,
            protect_s=60 * policy.protect_minutes,
            save_s=policy.save_seconds,
            grow_after_s=60 * policy.grow_after_minutes,
            depth=policy.depth,
        )


def url_of_server(given: str | None) -> str | None:
    """Return the URL of a queue's server where --queue or SETFORMER_QUEUE names one; None where it is a folder."""
    named = given or os.environ.get(VARIABLE) or ""
    return named.rstrip("/") if named.startswith(("http://", "https://")) else None


def folder_of(given: str | None) -> Path:
    """Return the queue's folder: as given, or that of SETFORMER_QUEUE, or the user's own.

    Raises:
        LaunchError: it is the URL of a server, and the command needs the folder.
    """
    if url_of_server(given) is not None:
        raise LaunchError("this command needs the queue's folder, not the URL of its server: name it with --queue")
    if named := given or os.environ.get(VARIABLE):
        return Path(named).absolute()
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "setformer" / "queue"


def load(folder: Path) -> QueueConfig:
    """Read queue.toml of a queue's folder.

    Raises:
        ConfigError: naming the file, the key and the repair.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"the queue's folder {folder} is no folder: name another with --queue")
    path = folder / FILE
    return base.load(QueueConfig, path if os.path.lexists(path) else None)


def database_of(folder: Path, config: QueueConfig) -> str:
    """Return the URL of the queue's database."""
    return config.database or url_of(folder)
