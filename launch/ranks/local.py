"""Start all ranks of this machine and stand by them: they begin together and end together.

No rank outlives `run_local`, even if it is killed with SIGKILL. The terminal is rank 0's: its stdout and stderr are
untouched, so that progress bars work. torch is not imported here: the supervisor starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.ranks import forkserver
from launch.ranks.attempt import Attempt, Watch
from launch.ranks.environment import choose_port, rank_environment
from launch.ranks.forkserver import ForkServer
from launch.ranks.logs import LOG_DIR_VARIABLE
from launch.ranks.processes import ENTRY_MODULE, LocalHost, rank_command
from launch.ranks.signals import Received, stop_signals
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.ranks import PORT_GIVEN_VARIABLE


def run_local(
    command_args: Sequence[str],
    ranks: int,
    log_dir: Path,
    threads_per_rank: int | None = None,
    port: int | None = None,
    *,
    module: str = ENTRY_MODULE,
    grace_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    watch: Watch | None = None,
    server: ForkServer | None = None,
) -> int:
    """Run `python -m module *command_args` on every rank of this host until all have ended.

    Args:
        command_args: arguments for each rank.
        ranks: processes to start.
        log_dir: folder for one log file per rank; made if missing, logs are appended to.
        threads_per_rank: OMP_NUM_THREADS; by default the user's, or the cores divided by the ranks.
        port: TCP port at which rank 0 is met; by default a free one.
        module: what each rank runs.
        grace_s: seconds that ranks have for a checkpoint after a stop signal.
        env: added to the environment of each rank.
        watch: what to look for; by default stop signals alone, which are collected here.
        server: forks the ranks; by default each starts cold.

    Returns:
        0, or 128 + signal number when a stop signal ended the run (130 for Ctrl-C, 143 for SIGTERM).

    Raises:
        LaunchError: a bad number of ranks, or a port in use.
        AttemptError: a rank ended with an error or hung; the message names it, its log and its last error line.
        FolderLostError: the run's folder is gone; the ranks are killed, as they have nowhere to save.
    """
    if ranks < 1:
        raise LaunchError(f"{ranks} ranks cannot be started: give 1 or more")
    base = rank_environment(ranks, choose_port(port), threads_per_rank, os.environ)
    base |= {LOG_DIR_VARIABLE: str(log_dir), PORT_GIVEN_VARIABLE: str(int(port is not None)), **(env or {})}
    log_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext(watch.received) if watch else stop_signals() as signals:
        command = rank_command(command_args, module)
        host = LocalHost(command, range(ranks), base, log_dir, until=lambda: signals.stop, server=server)
        with contextlib.closing(host):
            return Attempt([host], grace_s, watch or Watch(signals)).supervise()


@dataclass
class LocalCrew:
    """Starts the ranks of a run on this machine; see `launch.ranks.supervise.Crew`.

    Attributes:
        args: of every rank.
        ranks: processes to start.
        port: at which rank 0 is met; by default a free one.
        grace_s: seconds that ranks have for a checkpoint after a stop signal.
        warm: fork the ranks from one interpreter, where the device allows it.
    """

    args: Sequence[str]
    ranks: int
    port: int | None = None
    grace_s: float = 60.0
    warm: bool = True
    hosts: list[str] = field(default_factory=list)
    _server: ForkServer | None = None

    def machines(self) -> Mapping[str, tuple[int, Mapping[str, object]]]:
        """Return none: it is this machine."""
        return {}

    def show_life(self) -> None:
        """Nothing is to be done: a child knows that its parent lives."""

    def prepare(self, received: Received) -> None:
        """Begin to import what the ranks need."""
        if self._server is None and self.warm and forkserver.possible(os.environ):
            self._server = ForkServer(rank_environment(self.ranks, 0, None, os.environ))

    def attempt(self, log_dir: Path, watch: Watch) -> int:
        """Run all ranks once; see `run_local`."""
        return run_local(
            self.args,
            self.ranks,
            log_dir,
            port=self.port,
            grace_s=self.grace_s,
            watch=watch,
            server=self._server,
        )

    def close(self) -> None:
        """End the server of ranks; an attempt ends with all its ranks."""
        if self._server is not None:
            self._server.close()
            self._server = None
