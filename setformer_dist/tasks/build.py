"""The task that a config names: one of this package, or one that a user's own module has registered.

from setformer_dist.tasks.build import register_task
register_task("ranking", Ranking)      # in a module that run.imports names; Ranking(config.args, classes) is a Task
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.metric import Metric, check_best
from setformer_dist.core.registry import register
from setformer_dist.core.task import Task
from setformer_dist.core.task_config import TaskConfig
from setformer_dist.tasks.classification import Classification
from setformer_dist.tasks.detection import Detection
from setformer_dist.tasks.mae import Masked, Simmim
from setformer_dist.tasks.masked_text import MaskedText
from setformer_dist.tasks.multilabel import MultiLabel
from setformer_dist.tasks.regression import Regression
from setformer_dist.tasks.segmentation import Segmentation
from setformer_dist.tasks.sentences import Sentences

# Makes a task of task.args and the names of the data's classes.
TaskFactory = Callable[[Mapping[str, Any], tuple[str, ...]], Task]

_TASKS: dict[str, TaskFactory] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "segmentation": Segmentation,
    "detection": Detection,
    "sentences": Sentences,
    "regression": Regression,
    "mlm": MaskedText,
    "mae": Masked,
    "simmim": Simmim,
}


def register_task(name: str, factory: TaskFactory) -> None:
    """Make a task known by a name that is not known yet; the same factory may come again.

    Raises:
        ConfigError: another task has the name, or the factory is not callable.
    """
    register(_TASKS, "task", name, factory)


def build_task(config: TaskConfig, classes: tuple[str, ...]) -> Task:
    """Return the task of a config on data of these classes.

    Raises:
        ConfigError: there is none of that name, or its arguments are not its own.
    """
    if config.name not in _TASKS:
        raise ConfigError(
            f"task.name = {config.name!r} is not a task: {nearest(config.name, _TASKS)}; to use your own, name the "
            "module that registers it in run.imports"
        )
    return _TASKS[config.name](config.args, classes)


def check_metric(task: Task, best_metric: str, best_mode: str, further: Sequence[Metric] = ()) -> None:
    """Check that a task has the metric by which checkpoints are ranked, or that it is one of the run's further ones.

    Raises:
        ConfigError: it has not, or its better values lie on the other side.
    """
    try:
        check_best((*task.metrics, *further), best_metric, "min" if best_mode == "min" else "max", task.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
