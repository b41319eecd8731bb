"""The `[launch]` table: a run on several hosts."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import pydantic

from setformer_dist.core.config import FrozenConfig

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(=.*)?", re.S)


class LaunchConfig(FrozenConfig):
    """The `[launch]` table: a run on several hosts.

    Attributes:
        silence_s: seconds without a message from a host after which the host counts as lost. The ranks of a host end
            after the same time without a message from the supervisor.
        connect_s: seconds within which a host must answer at the start.
        min_hosts: the run waits until at least this many hosts answer.
        max_hosts: number of hosts that train at the same time; further hosts stand by. 0 uses all.
        retry_s: seconds for which a lost host is excluded. The time doubles with each further loss, up to an hour,
            until the host has trained for ten times as long.
        take_back: when a lost host that answers again rejoins: "checkpoint", after the next checkpoint; "at_once", at
            once (the ranks save and restart); or "never", at the next start.
        warm: fork the ranks of a host from one interpreter that has imported everything, which makes restarts faster.
            Hosts that stand by keep one ready too. Not used on GPUs.
        env: further environment variables to pass to all ranks: names, or NAME=value.
    """

    silence_s: float = pydantic.Field(default=60.0, ge=2)
    connect_s: float = pydantic.Field(default=30.0, gt=0)
    min_hosts: int = pydantic.Field(default=1, ge=1)
    max_hosts: int = pydantic.Field(default=0, ge=0)
    take_back: Literal["checkpoint", "at_once", "never"] = "checkpoint"
    retry_s: float = pydantic.Field(default=60.0, ge=0)
    warm: bool = True
    env: Annotated[tuple[str, ...], pydantic.Field(strict=False)] = ()

    @pydantic.field_validator("env")
    @classmethod
    def _variables(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not _VARIABLE.fullmatch(entry):
                raise ValueError(f"{entry.partition('=')[0]!r} is no name of an environment variable")
        return value
