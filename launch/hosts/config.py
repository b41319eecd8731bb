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
        silence_s: seconds without a word from a host after which it counts as lost, and after which its own ranks end
            because they hear nothing of the supervisor.
        connect_s: seconds that a host has to answer at the start.
        min_hosts: the run waits for hosts rather than going on with fewer than these.
        max_hosts: hosts that train at a time; further ones of the list stand by. 0 takes all.
        retry_s: seconds for which a host that was lost is left out; doubled each time it is lost again, up to an hour,
            until it has trained for ten times as long.
        take_back: when a host that answers again takes part again: once the next checkpoint is written, at once (the
            ranks save and start again), or never before the next start.
        warm: fork the ranks of a host from one interpreter that has imported everything, which makes restarts faster;
            hosts that stand by have theirs ready too. Not done on GPUs.
        env: environment variables that travel to all ranks besides those that always do: names, or NAME=value.
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
