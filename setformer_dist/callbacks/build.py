"""The callbacks of a run: the loggers of [logging], then those that the config names, in its order.

from setformer_dist.callbacks.build import register_callback
register_callback("alarm", Alarm)      # in a module that run.imports names; Alarm(args) is a Callback
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from setformer_dist.callbacks.mlflow import Mlflow
from setformer_dist.callbacks.tensorboard import TensorBoard
from setformer_dist.callbacks.wandb import Wandb
from setformer_dist.core.callback import Callback
from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.logging_config import LoggingConfig
from setformer_dist.core.registry import register

# Makes a callback of its table in run.callback_args.
CallbackFactory = Callable[[Mapping[str, Any]], Callback]

_CALLBACKS: dict[str, CallbackFactory] = {}


def register_callback(name: str, factory: CallbackFactory) -> None:
    """Make a callback known by a name that is not known yet; the same factory may come again.

    Raises:
        ConfigError: another callback has the name, or the factory is not callable.
    """
    register(_CALLBACKS, "callback", name, factory)


def build_callbacks(
    logging: LoggingConfig, names: Sequence[str], args: Mapping[str, Mapping[str, object]]
) -> list[Callback]:
    """Return the callbacks that a config asks for, in the order in which they hear each event.

    Args:
        logging: the table [logging].
        names: run.callbacks.
        args: run.callback_args.

    Raises:
        ConfigError: a name is not registered, or a logger's package is not installed.
    """
    found: list[Callback] = []
    if logging.tensorboard:
        found.append(TensorBoard())
    if logging.wandb.project is not None:
        found.append(Wandb(logging.wandb))
    if logging.mlflow.experiment is not None:
        found.append(Mlflow(logging.mlflow))
    return [*found, *(_own(name, args.get(name, {})) for name in names)]


def _own(name: str, args: Mapping[str, object]) -> Callback:
    if name not in _CALLBACKS:
        near = f" ({nearest(name, _CALLBACKS)})" if _CALLBACKS else ""
        raise ConfigError(
            f"run.callbacks names {name!r}, and no callback is registered under that name{near}: name the module that "
            "registers it in run.imports"
        )
    try:
        made = _CALLBACKS[name](args)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"callback {name!r} cannot be made with run.callback_args.{name} = {dict(args)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, Callback):
        raise ConfigError(f"callback {name!r} is a {type(made).__name__}, not a setformer_dist.core.callback.Callback")
    made.name = name
    return made
