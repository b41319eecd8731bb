"""The task that a config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.task import Task
from setformer_dist.tasks.classification import Classification

TASKS: Mapping[str, Callable[[], Task]] = {"classification": Classification}


def build_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ConfigError: there is none, with the nearest.
    """
    if name not in TASKS:
        raise ConfigError(f"task.name = {name!r} is no task: {nearest(name, TASKS)}")
    return TASKS[name]()
