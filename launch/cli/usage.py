"""One-line messages for arguments that no command takes, with suggestions for users of other programs."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
import typer

from setformer_dist.core.config import HOME_NOT_EXPANDED, all_keys, first_key, meaning
from setformer_dist.core.errors import ConfigError

# The class of the command-line library that typer brings along.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_COMMANDS = {
    "fit": "train",
    "resume": "train, which resumes an existing run",
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
    "tune": "sweep",
    "search": "sweep",
    "hpo": "sweep",
    "report": "runs report",
    "benchmark": "data bench",
}


_REPAIRS = {
    "make room there": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "name another place, or change who may write there": (errno.EROFS, errno.EACCES, errno.EPERM),
    "check the storage": (errno.EIO, errno.ESTALE),
    "shorten the name": (errno.ENAMETOOLONG,),
    "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "raise the limits of memory and processes (ulimit -v, -u)": (errno.ENOMEM, errno.EAGAIN),
}
_NOT_OF_A_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def system_fault(error: OSError) -> str | None:
    """Return the line for what the machine refuses (a full disk, a limit), None where the error is a defect of ours.

    Args:
        error: that no command has explained; without a file's name it comes of what was printed.
    """
    if error.errno == errno.ENOENT and error.filename is None and _no_folder():
        return "the present folder was removed: cd to another one"
    repair = next((repair for repair, numbers in _REPAIRS.items() if error.errno in numbers), None)
    if repair is None or error.errno is None:
        return None
    if error.errno in _NOT_OF_A_FILE:
        return f"the system refuses: {os.strerror(error.errno)}; {repair}"
    what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else "standard output"
    return f"{what} cannot be used: {os.strerror(error.errno)}; {repair}"


def _no_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def check_homes(words: Iterable[str]) -> None:
    """Refuse --option=~/path, which shells do not expand: it would create a folder named ~.

    Raises:
        ConfigError: naming the option.
    """
    for word in words:
        if re.fullmatch(r"--[\w-]+=~(/.*)?", word, re.DOTALL):
            raise ConfigError(f"{word}: {HOME_NOT_EXPANDED}")


def usage_fault(error: Any, config: type[pydantic.BaseModel]) -> str:
    """Return the text for a command-line error: the help if no argument was given, else one line.

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
    unknown = re.match(r"No such command '([^']*)'", said)
    if (
        unknown is not None and unknown[1] in _COMMANDS and context.parent is None
    ):  # the suggestion for "runs list" is ls already
        said = f"{unknown[0]}: did you mean {_COMMANDS[unknown[1]]}?"
    return f"error: {said} (see {path} --help)"


def _as_key(option: str, config: type[pydantic.BaseModel]) -> str:
    name = option.lstrip("-").replace("-", "_")
    meant = name if name in all_keys(config) else first_key(config, name) or meaning(config, name)
    if meant is None:
        return "; keys of the run config are given as key=value, such as optim.lr=1e-3"
    return f": {meant}" if " " in meant else f": keys of the run config are given as key=value, so {meant}=..."
