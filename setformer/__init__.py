"""setformer_dist from Python: a script or a notebook in one process, or the ranks that torchrun or deepspeed starts.

    import setformer

    config = setformer.load_config("demo", data={"root": "data/digits"}, run={"name": "mine"})
    setformer.train(config)
    trained = setformer.load("runs/mine")
    print(setformer.evaluate(trained).figures)

Every name here is a thin layer over what the command line runs, so a run is the same, bit by bit, from either,
and every command reads its folder. Names are imported when they are first asked for: a module that registers a task or
an augmentation is imported by reader processes too, which need no DeepSpeed.

    configs.py     the config of a run, from a TOML file and keywords
    data.py        the data of a run, and its streams alone
    training.py    a run within this process
    trained.py     what a run has trained: scores and predictions
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataloaders.pixels.own import register_augmentation
    from setformer.configs import load_config
    from setformer.data import eval_stream, open_data, own_data, prepare, train_stream
    from setformer.trained import evaluate, load, predict, predict_texts
    from setformer.training import Training, train
    from setformer_dist.callbacks.build import register_callback
    from setformer_dist.core.callback import Callback
    from setformer_dist.tasks.build import register_task

_HOME = {
    "Callback": "setformer_dist.core.callback",
    "Training": "setformer.training",
    "eval_stream": "setformer.data",
    "evaluate": "setformer.trained",
    "load": "setformer.trained",
    "load_config": "setformer.configs",
    "open_data": "setformer.data",
    "own_data": "setformer.data",
    "predict": "setformer.trained",
    "predict_texts": "setformer.trained",
    "prepare": "setformer.data",
    "register_augmentation": "dataloaders.pixels.own",
    "register_callback": "setformer_dist.callbacks.build",
    "register_task": "setformer_dist.tasks.build",
    "train": "setformer.training",
    "train_stream": "setformer.data",
}

__all__ = [
    "Callback",
    "Training",
    "eval_stream",
    "evaluate",
    "load",
    "load_config",
    "open_data",
    "own_data",
    "predict",
    "predict_texts",
    "prepare",
    "register_augmentation",
    "register_callback",
    "register_task",
    "train",
    "train_stream",
]


def __getattr__(name: str) -> Any:
    """Return a name of `__all__`; its module is imported now."""
    if name not in _HOME:
        raise AttributeError(f"module 'setformer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
