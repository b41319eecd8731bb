"""The ranks of one machine: processes that begin together, give signs of life, and never outlive their parent.

    log_dir/rank-00000.log   header per start, by us; lines, by rank 0's own logging
    log_dir/rank-00001.log   header per start, stdout and stderr of rank 1

Each rank is a session of its own, so Ctrl-C in a terminal reaches the supervisor alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launch.ranks.forkserver import Forked, ForkServer, die_with
from launch.ranks.logs import last_error_line, last_lines, log_file
from launch.ranks.orphans import Guardian
from launch.ranks.usage import Usage, Use
from setformer_dist.core.heartbeat import FD_VARIABLE, Beat, Pulse
from setformer_dist.core.secrets import redacted

ENTRY_MODULE = "launch.entry"
_log = logging.getLogger(__name__)
_STACKS_SIGNAL = signal.SIGUSR2  # launch/entry.py answers it with the stacks of all threads
_KILL_S = 30.0  # how long a killed process may take to go


@dataclass
class LocalRank:
    """One rank's process.

    Attributes:
        rank: over all hosts.
        log: its log file; this start begins at byte `log_start` of it.
        code: exit code, or minus the number of a signal; None while it runs.
        usage: of the ranks of this host.
        local: the rank's number on this host.
        ended_at: of the monotonic clock.
    """

    rank: int
    process: subprocess.Popen[bytes] | Forked
    log: Path
    log_start: int
    pulse: Pulse
    usage: Usage
    local: int
    ended_at: float | None = None
    host: str = ""

    @property
    def code(self) -> int | None:
        """Exit code, once it has ended."""
        return self.process.returncode

    def beat(self) -> Beat:
        """Return its last sign of life."""
        return self.pulse.read()

    def said(self) -> str:
        """Return the last line of its log that looks like an error, or its last line, or ""."""
        return last_error_line(self.log, self.log_start)

    def last_lines(self) -> list[str]:
        """Return the last lines of its log since this start."""
        return last_lines(self.log, self.log_start)

    def is_suspended(self) -> bool:
        """Return whether it is suspended (SIGSTOP)."""
        return _process_state(self.process.pid) == "T"

    def memory_mib(self) -> float | None:
        """Return its resident memory."""
        return resident_mib(self.process.pid) if self.ended_at is None else None

    def use(self) -> Use:
        """Return what it uses of its device."""
        return self.usage.of(self.process.pid, self.local) if self.ended_at is None else Use()


class LocalHost:
    """All ranks of this machine, from the first start to the last end.

    Attributes:
        members: in order of rank.
        lost: why nothing can be known of them; never, on this machine.
    """

    lost: str | None = None

    def __init__(
        self,
        command: Sequence[str],
        ranks: range,
        base: Mapping[str, str],
        log_dir: Path,
        until: Callable[[], object] = lambda: False,
        output: tuple[int, int] | None = None,
        server: ForkServer | None = None,
    ) -> None:
        """Start the ranks.

        Args:
            command: of every rank.
            ranks: their numbers over all hosts.
            base: environment that all of them share.
            log_dir: folder of the logs; it is there.
            until: asked after each start; true where no further one is wanted.
            output: descriptors for rank 0's output and errors; by default it has those of this process.
            server: forks the ranks; by default, and where it is gone, each starts cold.
        """
        self.members: list[LocalRank] = []
        self._guardian = Guardian()
        base = {**base, **self._guardian.environment}
        usage = Usage(base)
        try:
            for local, rank in enumerate(ranks):
                member = _start(command, rank, local, base, log_dir, output, server, until, usage)
                if member is None:
                    break
                self.members.append(member)
                self._guardian.watch(member.process.pid)
                if until():
                    break
        except BaseException:
            self.close()
            raise

    def poll(self) -> None:
        """Look which ranks have ended."""
        for member in self.members:
            if member.ended_at is None and member.process.poll() is not None:
                member.ended_at = time.monotonic()

    def readable(self) -> list[int]:
        """Return descriptors that have something to read when a rank has ended; a child's end is a signal instead."""
        return [m.process.readable() for m in self.members if isinstance(m.process, Forked) and m.ended_at is None]

    def terminate(self) -> None:
        """Ask all ranks to save and stop."""
        for member in self.members:
            if member.ended_at is None:
                member.process.terminate()

    def write_stacks(self) -> None:
        """Have all ranks write their stacks to their logs."""
        for member in self.members:
            if member.ended_at is None:
                with contextlib.suppress(ProcessLookupError):
                    member.process.send_signal(_STACKS_SIGNAL)

    def kill(self) -> None:
        """Kill what is left, with all children, and wait for it."""
        for member in self.members:
            # Its whole session: loader workers go with their rank.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(member.process.pid, signal.SIGKILL)
        limit = time.monotonic() + _KILL_S
        for member in self.members:
            try:
                member.process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:  # in the kernel's hands: storage that is gone, a device that hangs
                _log.warning("rank %d (process %d) does not end after SIGKILL", member.rank, member.process.pid)
        self.poll()

    def killed(self) -> bool:
        """Return that nothing is left: `kill` has waited."""
        return True

    def close(self) -> None:
        """End all ranks and clear up after them."""
        self.kill()
        self._guardian.__exit__(None, None, None)
        for member in self.members:
            member.pulse.close()


def rank_command(args: Sequence[str], module: str = ENTRY_MODULE) -> list[str]:
    """Return the command of a rank; the working directory's own `configs` or `launch` do not get in its way."""
    home = Path(__file__).resolve().parent.parent.parent
    safe = [] if Path.cwd().resolve() == home else ["-P"]
    return [sys.executable, *safe, "-m", module, *args]


def _start(
    command: Sequence[str],
    rank: int,
    local: int,
    base: Mapping[str, str],
    log_dir: Path,
    first_output: tuple[int, int] | None,
    server: ForkServer | None,
    until: Callable[[], object],
    usage: Usage,
) -> LocalRank | None:
    """Start a rank; None where it is not wanted any more before it is there."""
    path = log_file(log_dir, rank)
    pulse = Pulse()
    env = {**base, "RANK": str(rank), "LOCAL_RANK": str(local), FD_VARIABLE: str(pulse.fileno())}
    with path.open("ab") as log:
        log.write(_header(command, rank, base).encode())
        log.flush()
        start = log.tell()
        out, err = (first_output or (None, None)) if rank == 0 else (log.fileno(), log.fileno())
        process: subprocess.Popen[bytes] | Forked | None = None
        if server is not None:
            ends = (1 if out is None else out, 2 if err is None else err)
            process = server.start(command, env, *ends, pulse.fileno(), until)
            if process is None and until():
                pulse.close()
                return None
        process = process or subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            pass_fds=(pulse.fileno(),),
            preexec_fn=die_with_parent(),
        )
    return LocalRank(rank, process, path, start, pulse, usage, local)


def _header(command: Sequence[str], rank: int, base: Mapping[str, str]) -> str:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"\n=== rank {rank} of {base['WORLD_SIZE']}, {now}: {redacted(shlex.join(command))}\n"


def die_with_parent() -> Callable[[], None] | None:
    """Return what a child does before exec, so that the kernel kills it when this process dies."""
    return functools.partial(die_with, os.getpid()) if sys.platform == "linux" else None


def resident_mib(pid: int) -> float | None:
    """Return a process's resident memory, None where it is unknown."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError, ValueError):
        return None


def _process_state(pid: int) -> str:
    """Return a process's state as the kernel names it ("R", "S", "T" for stopped), or "" where it is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""
