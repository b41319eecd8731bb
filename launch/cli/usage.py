"""What is said of words that no command takes: in one line, with what people who come from other programs meant."""

from __future__ import annotations

from typing import Any

import pydantic
import typer

from setformer_dist.core.config import all_keys, meaning

# The class of the command-line library that typer brings along.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_COMMANDS = {
    "fit": "train",
    "resume": "train, which goes on by itself",
    "finetune": "train with model.weights",
    "validate": "eval",
    "evaluate": "eval",
    "test": "eval",
    "infer": "predict",
    "inference": "predict",
    "export": "ckpt export",
    "convert": "ckpt convert, or data convert",
    "pack": "data pack",
    "inspect": "data inspect",
    "ls": "runs ls, or ckpt ls",
    "report": "runs report",
    "benchmark": "data bench",
}


def usage_fault(error: Any, config: type[pydantic.BaseModel]) -> str:
    """Return what to print for an error of the command line: the help where nothing was typed, else one line.

    Args:
        error: a `UsageError`.
        config: of a run; `--lr 1e-3` means a key of it.
    """
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(context.get_help())
    path = context.command_path if context is not None else "setformer"
    said = error.format_message().rstrip(".")
    option = getattr(error, "option_name", None)
    if option is not None and path.endswith(" train"):
        said = f"no such option {option}{_as_key(option, config)}"
    words = getattr(context, "protected_args", None) or getattr(context, "args", None) or []
    command = said.rsplit("'", 2)[1] if said.startswith("No such command '") else (words[0] if words else "")
    if said.startswith("No such command") and command in _COMMANDS:
        said += f": did you mean {_COMMANDS[command]}?"
    return f"error: {said} ({path} --help says what it takes)"


def _as_key(option: str, config: type[pydantic.BaseModel]) -> str:
    name = option.lstrip("-").replace("-", "_")
    keys = all_keys(config)
    found = [key for key in keys if key == name or key.rsplit(".", 1)[-1] == name]
    meant = found[0] if name in found or len(found) == 1 else meaning(config, name)
    if meant is None:
        return "; keys of the page are given as key=value, such as optim.lr=1e-3"
    return f": keys of the page are given as key=value, so {meant}=..." if meant in keys else f": {meant}"
