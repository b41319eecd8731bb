"""The run of a trial: its config's file, its process in a Ray actor, and the hand-over of a checkpoint to a clone.

    driver --Ray--> actor (resources: ranks × cores, ranks × devices) --> `setformer train` --> ranks

The actor starts the same command that a user types, so supervision, restarts, ports and the run folder are the same
code. The command dies with the actor, and its ranks die with the command, however the actor ends.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from checkpoints.layout import MANIFEST, step_folders, step_of
from launch.ranks.forkserver import die_with
from launch.run.config import RunConfig
from setformer_dist.core.errors import ConfigError, TransientError
from setformer_dist.core.files import lines_of, write_state
from setformer_dist.core.secrets import redacted_json

TRIAL = "trial.json"
LOG = "trial.log"
_LEAST_FREE = 1 << 20  # bytes of a disk that is not full
_HOME = Path(__file__).resolve().parents[2]
# What tells a process that another launcher has started it.
_OTHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_PORT",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
)


@dataclass(frozen=True)
class Command:
    """What an actor starts.

    Attributes:
        words: of `setformer`.
        threads: compute threads of a rank.
        gpus: whether the run has devices.
        log: file to which it speaks.
        directory: in which relative paths of the config are meant.
    """

    words: tuple[str, ...]
    threads: int
    gpus: bool
    log: str
    directory: str


def write_config(config: RunConfig) -> Path:
    """Write the config of a run into its folder, from which every start reads it; return the file.

    Raises:
        ConfigError: it holds credentials.
        TransientError: the folder cannot be written.
    """
    table = config.model_dump(mode="json")
    if redacted_json(table) != table:
        raise ConfigError(
            "the base run config holds credentials of a URL, and a sweep writes the config of each trial to its "
            "folder: give them to the store's client instead"
        )
    path = config.folder / TRIAL
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_state(path, table)
    except OSError as error:
        raise TransientError(
            f"{path} cannot be written ({error.strerror}): make room, and start the sweep again"
        ) from None
    return path


class TrialProcess:
    """A run as a process of this one; an actor of Ray has one.

    Args:
        command: to start.
    """

    def __init__(self, command: Command) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _OTHERS}
        path = os.pathsep.join(filter(None, (str(_HOME), environment.get("PYTHONPATH"))))
        environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": str(command.threads)}
        if not command.gpus:  # Ray leaves the devices of others visible
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._fault = ""
        try:
            with Path(command.log).open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "launch.cli", *command.words],
                    cwd=command.directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=functools.partial(die_with, os.getpid()),
                )
        except OSError as error:
            self._fault = (
                f"node {socket.gethostname()} cannot use {error.filename} ({error.strerror}): the sweep's folder must "
                "be on storage that all nodes share, under the same path"
            )

    def poll(self) -> int | str | None:
        """Return the exit code if it has ended, why it could not be started, or None while it runs."""
        return self._process.poll() if self._process is not None else self._fault

    def stop(self) -> None:
        """Ask the run to save and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def words_of(config: Path, ranks: int, stop_s: float) -> tuple[str, ...]:
    """Return the words of `setformer` that run a trial."""
    return ("train", str(config), "--ranks", str(ranks), "--grace", f"{stop_s:g}")


def why_ended(log: Path, code: int) -> str:
    """Return why a run has ended with an exit code: the last error that it has printed, or its last line."""
    if not log.is_file():
        return f"exit code {code}; {log} is gone, as its folder was removed or replaced while it ran"
    return _said(log) or f"exit code {code}"


def no_room(folder: Path, why: str) -> bool:
    """Return whether a run has failed since the disk of its folder is full, which is nothing that is wrong with it.

    Args:
        folder: on the same disk.
        why: the run's words.
    """
    if any(os.strerror(number) in why for number in (errno.ENOSPC, errno.EDQUOT)):
        return True
    try:
        free = os.statvfs(folder)
    except OSError:
        return False
    return free.f_bavail * free.f_frsize < _LEAST_FREE or (free.f_files > 0 and not free.f_favail)


def _said(log: Path) -> str:
    lines = [line.decode(errors="replace").strip() for line in lines_of(log)]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else next((line for line in reversed(lines) if line), "")


def hand_over(source: Path, clone: Path) -> int | None:
    """Copy the newest checkpoint of a run to the folder of a new one, which then begins there.

    Optimizer, step, position in the data and averaged weights go with it. The run verifies it before it takes it over.

    Args:
        source: folder of the run that is cloned.
        clone: folder of the new run; what is there of an earlier try is removed.

    Returns:
        The checkpoint's step, None where there is none.

    Raises:
        TransientError: there is no room.
    """
    shutil.rmtree(clone, ignore_errors=True)
    for folder in step_folders(source / "checkpoints"):
        if not (folder / MANIFEST).is_file():
            continue
        target = clone / "checkpoints" / folder.name
        try:
            target.mkdir(parents=True)
            names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
            for name in (*names, MANIFEST):
                shutil.copyfile(folder / name, target / name)
        except FileNotFoundError:  # it was removed meanwhile, as newer ones are kept
            shutil.rmtree(clone, ignore_errors=True)
            continue
        except OSError as error:
            shutil.rmtree(clone, ignore_errors=True)
            raise TransientError(f"{target} cannot be written ({error.strerror}): make room") from None
        return step_of(folder)
    return None
