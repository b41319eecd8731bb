"""Run `python -m MODULE` in an interpreter that has imported it already: for tests, whose time is mostly imports.

A rank imports for 8 seconds of a core what it then uses for one. Here a server imports it once and forks: commands from
the server, and their ranks from the commands. What runs is an ordinary process, with an id, signals, a session and an
end of its own; it differs from a cold start by what lies in memory, and by its command line in `ps`.

    test --socket--> server --fork--> python -m launch.cli.main train … --fork--> python -m launch.entry … (each rank)

`SETFORMER_COLD_TESTS=1` starts everything cold; a machine with a GPU always does, as CUDA must not be forked.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import launch.ranks.forkserver
import launch.ranks.processes
from launch.ranks.environment import has_gpu
from launch.ranks.forkserver import (
    Forked,
    ask_for_process,
    fork,
    run_module,
    serve,
    set_environment,
    start_server,
    threads,
)

ROOT = Path(__file__).parent.parent.parent
COLD_VARIABLE = "SETFORMER_COLD_TESTS"
# What the server imports: all that ranks and most commands need.
PRELOADED = (
    "launch.entry",
    "launch.cli.main",
    "launch.run.trained",
    "launch.ckpt.transfer",
    "launch.ckpt.verify",
    "launch.ckpt.diff",
    "launch.ckpt.prune",
    "launch.run.dry_run",
    "launch.examples.lra",
    "launch.history.page",
)
_FORKED_MODULE = "launch.entry"  # what a command starts as its ranks
_NUMBER = 8  # bytes of a process id or an exit code on the way back


def possible() -> bool:
    """Return whether processes may be forked from one that has imported torch."""
    return sys.platform == "linux" and not os.environ.get(COLD_VARIABLE) and not has_gpu(os.environ)


# ------------------------------------------------------------------------------------------------- the test's side


class Warm(Forked):
    """A process that the server has forked; the part of `subprocess.Popen` that tests use."""

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], cwd: Path, out: IO[bytes], err: IO[bytes] | None = None
    ) -> None:
        """Start `python -m args`; its output goes to the files `out` and `err` (by default `out`, too)."""
        self._out, self._err = out, out if err is None else err
        request = {"args": list(args), "env": dict(env), "cwd": str(cwd)}
        super().__init__(args, ask_for_process(_server(), request, [self._out.fileno(), self._err.fileno()]))

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return what it has written to both files.

        Raises:
            subprocess.TimeoutExpired: as `wait`.
        """
        self.wait(timeout)
        out, err = (_text(file) for file in (self._out, self._err))
        return out, err

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@functools.cache
def _server() -> socket.socket:
    """Start the server once per process; it ends when this process does."""
    path = os.pathsep.join(filter(None, sys.path))
    return start_server("launch.testing.warm", {**os.environ, "PYTHONPATH": path})[0]


# ------------------------------------------------------------------------------------------------- the server's side


def _begin(request: dict[str, Any], kept: Sequence[int]) -> NoReturn:
    """Become `python -m args`, whose ranks are forked in turn."""
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])  # as `python -m` does
    set_environment(request["env"])
    launch.ranks.forkserver.possible = lambda environ: False  # this process forks them itself
    launch.ranks.processes.subprocess = SimpleNamespace(  # type: ignore[attr-defined, assignment]
        Popen=_popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    run_module(request["args"])


def _popen(command: Sequence[str], **options: Any) -> Any:
    """Stand in for `subprocess.Popen` where ranks are started."""
    first = [sys.executable, "-m", _FORKED_MODULE]
    if list(command[:3]) != first or threads() > 1:
        return subprocess.Popen(command, **options)
    return _Rank(command, **options)


class _Rank:
    """A rank forked from its supervisor, with the arguments of `subprocess.Popen` that a host gives."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: Any,
        stderr: Any,
        start_new_session: bool,
        pass_fds: Sequence[int],
        preexec_fn: Callable[[], None] | None,
    ) -> None:
        assert stdin == subprocess.DEVNULL
        assert start_new_session
        self.args = list(command)
        self.returncode: int | None = None

        def begin() -> NoReturn:
            os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            set_environment(env)
            for handler in list(logging.root.handlers):  # the command's own
                logging.root.removeHandler(handler)
            logging.root.setLevel(logging.WARNING)
            run_module(self.args[2:])

        fds = {0: os.open(os.devnull, os.O_RDONLY)}
        fds |= {number: file for number, file in ((1, stdout), (2, stderr)) if file is not None}
        self.pid = fork(begin, fds, pass_fds)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, raw = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(raw)
        return self.returncode

    def wait(self, timeout: float) -> int:
        limit = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, PRELOADED, _begin)
