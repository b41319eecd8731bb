"""Start all ranks of one host and stand by them: they begin together and end together.

What `run_local` promises: no rank outlives it, even if it is killed with SIGKILL; the first rank that fails is
named with its log; a rank that gives no sign of life is found, its stack written to its log; a stop signal reaches
all ranks at the same moment and leaves them time for a checkpoint. Whether to start again is decided in supervise.py.

    terminal <-- rank 0 (its stdout and stderr untouched, so that progress bars work)
    log_dir/rank-00000.log   header per start, by us; lines, by rank 0's own logging
    log_dir/rank-00001.log   header per start, stdout and stderr of rank 1

Each rank is a session of its own, so Ctrl-C in a terminal reaches the supervisor alone. torch is not imported
here: the supervisor starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from launch.ranks.orphans import Guardian
from setformer_dist.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    PassingError,
    RankFailedError,
    TrainingError,
)
from setformer_dist.core.heartbeat import FD_VARIABLE, START, Beat, Pulse
from setformer_dist.core.ranks import PORT_GIVEN_VARIABLE
from setformer_dist.core.secrets import redacted

ENTRY_MODULE = "launch.entry"
LOG_DIR_VARIABLE = "SETFORMER_LOG_DIR"
HOST = "127.0.0.1"

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
# What asks a run to save and stop; job schedulers warn with SIGUSR1 (Slurm: --signal=USR1@120).
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_STACKS_SIGNAL = signal.SIGUSR2  # launch/entry.py answers it with the stacks of all threads
_KILL_S = 30.0  # how long a killed process may take to go
_STACKS_S = 2.0  # how long ranks that hang have to write their stacks
# A scheduler signals every process of a job, and we hand on what we get: repeats this soon after are no second wish.
_REPEAT_S = 2.0
_TICK_S = 0.5  # longest time between two looks at the ranks; signals wake the loop at once
_ECHO_S = 1.0  # how long to wait for others to fail after the first, to tell a cause from its echoes
_CAUSE_S = 10.0  # how long to wait for the cause where so far ranks only say that they lost another one
_MAY_PASS, _LOST_A_PEER = 2, 3  # kinds of failure that may be echoes of another's, see `_blame`
_FAILURE_GRACE_S = 10.0
_ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b|\b(ERROR|CRITICAL|FATAL)\b|Segmentation fault")
_TAIL_BYTES = 64 * 1024
# Exit codes by which a rank says that it has explained itself in one sentence, and that a user must do something.
_USER_CODES = {e.exit_code for e in (ConfigError, DataError, CheckpointError, LaunchError, TrainingError)}


class AttemptError(RankFailedError):
    """An attempt that ended by itself and not well.

    Attributes:
        how: "killed" (a signal that nobody asked for), "hang", "passing" (something outside the run, which the rank
            names), "unsaved" (stopped as asked, but not with a checkpoint) or "error" (any other end).
        step: optimizer step the ranks were at; -1 before the first.
        mistake: whether the rank has named something that a user must repair.
        log: of the rank to blame.
        log_start: byte where this attempt begins in it.
    """

    def __init__(self, message: str, how: str, step: int, log: Path, log_start: int, code: int | None = None) -> None:
        super().__init__(message, code)
        self.how = how
        self.step = step
        self.mistake = code is not None
        if how == "passing" and code is None:
            self.exit_code = PassingError.exit_code
        self.log = log
        self.log_start = log_start


class FolderLostError(PassingError):
    """The run's folder was moved or removed while the run was at work in it."""


@dataclass(frozen=True)
class Patience:
    """Seconds without a sign of life after which a rank counts as hanging; 0 waits for ever.

    Attributes:
        step: while it trains.
        start: before its first step.
        save: while it saves.
    """

    step: float = 0.0
    start: float = 0.0
    save: float = 0.0

    def exceeded_by(self, beat: Beat) -> bool:
        """Return whether a rank's last sign of life is too long ago."""
        limit = {START: self.start, "checkpoint": self.save}.get(beat.phase, self.step)
        return limit > 0 and beat.age > limit


def _safe_path() -> list[str]:
    """Return Python's switch against the working directory's own `configs` or `launch`, where that is not ours."""
    home = Path(__file__).resolve().parent.parent.parent
    return [] if Path.cwd().resolve() == home else ["-P"]


def log_file(log_dir: Path, rank: int) -> Path:
    """Return a rank's log file."""
    return log_dir / f"rank-{rank:05d}.log"


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
    patience: Patience | None = None,
    received: Received | None = None,
    lost: Callable[[], str | None] = lambda: None,
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
        patience: when a rank counts as hanging; by default never.
        received: stop signals that the caller collects; by default they are collected here.
        lost: asked now and then; says what happened to the run's folder where it is gone.

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
    command = [sys.executable, *_safe_path(), "-m", module, *command_args]
    with Guardian() as guardian, contextlib.nullcontext(received) if received else stop_signals() as signals:
        base |= guardian.environment
        group = _Group([], grace_s, signals, patience or Patience(), lost)
        try:
            for rank in range(ranks):
                group.members.append(_start(command, rank, base, log_dir))
                guardian.watch(group.members[-1].process.pid)
                if signals.stop:
                    break
            return group.supervise()
        finally:
            group.kill()
            for member in group.members:
                member.pulse.close()


def rank_environment(ranks: int, port: int, threads_per_rank: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that all ranks share; what the user has set stays."""
    made = dict(environ)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # all ranks are here: nobody else is to reach them
        made.setdefault(name, "lo")
    made |= {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }
    # DeepSpeed's launcher sets LOCAL_SIZE; where it equals WORLD_SIZE each rank leaves 69 MB in /dev/shm for ever.
    made.pop("LOCAL_SIZE", None)
    if threads_per_rank is not None:
        made["OMP_NUM_THREADS"] = str(threads_per_rank)
    else:
        made.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    if not has_gpu(environ):
        made.setdefault("DS_ACCELERATOR", "cpu")
    return made


def usable_cores() -> int:
    """Return the cores this process may use: its affinity, and the container's share where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # "max" is no number: no limit
    return max(1, cores)


def has_gpu(environ: Mapping[str, str]) -> bool:
    """Whether this host seems to have a GPU that the user did not hide; found without importing torch."""
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    device_files = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return device_files or shutil.which("nvidia-smi") is not None


def choose_port(port: int | None) -> int:
    """Return a free TCP port, or the given one if nobody listens there.

    Raises:
        LaunchError: the port is taken or not a port.
    """
    if port is not None and not 0 < port < 2**16:
        raise LaunchError(f"{port} is not a TCP port: give 1 to 65535, or none to have a free one chosen")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free to listen on
        try:
            probe.bind((HOST, port or 0))
        except OSError as error:
            raise LaunchError(
                f"port {port} cannot be used ({error.strerror}): another job runs there; give another port, "
                "or none to have a free one chosen"
            ) from None
        found = probe.getsockname()[1]
    assert isinstance(found, int)
    return found


@dataclass
class Received:
    """Stop signals in order of arrival, and the pipe on which any signal wakes the loop."""

    wake: socket.socket | None
    show_life: Callable[[], None] = lambda: None
    stop: list[int] = field(default_factory=list)
    first_at: float = 0.0
    forced: bool = False  # a second wish came, which does not wait for a checkpoint

    def note(self, number: int) -> None:
        """Take a stop signal."""
        now = time.monotonic()
        if not self.stop:
            self.first_at = now
        elif number == signal.SIGINT or now - self.first_at > _REPEAT_S:
            self.forced = True
        self.stop.append(number)

    def wait(self, seconds: float) -> None:
        """Sleep, but wake up at any signal, and show life before."""
        self.show_life()
        if self.wake is None:
            time.sleep(min(seconds, 0.05))
            return
        ready, _, _ = select.select([self.wake], [], [], seconds)
        if ready:
            self.wake.recv(4096)

    def wait_for_stop(self, seconds: float) -> None:
        """Sleep until a stop signal comes."""
        limit = time.monotonic() + seconds
        while not self.stop and (left := limit - time.monotonic()) > 0:
            self.wait(min(left, _TICK_S))


@contextlib.contextmanager
def stop_signals(show_life: Callable[[], None] = lambda: None) -> Iterator[Received]:
    """Collect stop signals instead of dying of them. Only the main thread can; elsewhere the loop polls.

    Args:
        show_life: called at least once in `_TICK_S` seconds while somebody waits for signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Received(None, show_life)
        return
    wake, wake_write = socket.socketpair()
    wake.setblocking(False)
    wake_write.setblocking(False)
    received = Received(wake, show_life)

    def note(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            received.note(number)

    # What is ignored stays ignored: nohup ignores SIGHUP, a shell in the background SIGINT.
    mine = [s for s in (*_STOP_SIGNALS, signal.SIGCHLD) if s == signal.SIGCHLD or _heeded(s)]
    before: dict[int, Any] = {number: signal.signal(number, note) for number in mine}
    fd_before = signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        wake.close()
        wake_write.close()


def _heeded(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


@dataclass
class _Member:
    """One rank's process. `log_start` is where this start begins in its log."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    pulse: Pulse
    ended_at: float | None = None

    @property
    def failed(self) -> bool:
        return self.process.returncode not in (None, 0)

    def kill(self) -> None:
        # Its whole session: loader workers go with their rank.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _start(command: Sequence[str], rank: int, base: Mapping[str, str], log_dir: Path) -> _Member:
    path = log_file(log_dir, rank)
    pulse = Pulse()
    env = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank), FD_VARIABLE: str(pulse.fileno())}
    with path.open("ab") as log:
        log.write(_header(command, rank, base).encode())
        log.flush()
        start = log.tell()
        output = None if rank == 0 else log
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(pulse.fileno(),),
            preexec_fn=die_with_parent(),
        )
    return _Member(rank, process, path, start, pulse)


def _header(command: Sequence[str], rank: int, base: Mapping[str, str]) -> str:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"\n=== rank {rank} of {base['WORLD_SIZE']}, {now}: {redacted(shlex.join(command))}\n"


def die_with_parent() -> Callable[[], None] | None:
    """Return what a child does before exec, so that the kernel kills it when this process dies."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def arm() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the supervisor died between fork and prctl: nobody will tell us
            os._exit(1)

    return arm


class _Group:
    """All ranks of this host, from the first start to the last end."""

    def __init__(
        self,
        members: list[_Member],
        grace_s: float,
        received: Received,
        patience: Patience,
        lost: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._lost = lost
        self.members = members
        self._grace_s = grace_s
        self._received = received
        self._patience = patience

    def supervise(self) -> int:
        """Return when all ranks have ended well or were stopped.

        Raises:
            AttemptError: one failed by itself; by then all others have ended too.
        """
        while not self._received.stop:
            self._reap()
            if any(m.failed for m in self.members):
                return self._fail()
            if not self._running():
                return 0
            asked = next((beat.stop for m in self._running() if (beat := m.pulse.read()).stop), 0)
            if asked and not self._received.stop:  # somebody signalled a rank and not us: its grace begins now
                self._received.note(asked)
                break
            if (fault := self._lost()) is not None:
                self.kill()
                raise FolderLostError(fault)
            hanging = [m for m in self._running() if self._patience.exceeded_by(m.pulse.read())]
            if hanging:
                self._give_up_on(hanging)
            self._received.wait(_TICK_S)
        return self._stop()

    def step(self) -> int:
        """Return the optimizer step that the ranks are at, or were; -1 before the first."""
        return max((m.pulse.read().step for m in self.members), default=-1)

    def kill(self) -> None:
        """Kill whatever is left, with all children, and wait for it."""
        for member in self.members:
            member.kill()
        limit = time.monotonic() + _KILL_S
        for member in self.members:
            try:
                member.process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:  # in the kernel's hands: storage that is gone, a device that hangs
                _log.warning("rank %d (process %d) does not end after SIGKILL", member.rank, member.process.pid)
        self._reap()

    def _reap(self) -> None:
        for member in self.members:
            if member.ended_at is None and member.process.poll() is not None:
                member.ended_at = time.monotonic()

    def _running(self) -> list[_Member]:
        return [m for m in self.members if m.ended_at is None]

    def _terminate(self) -> None:
        for member in self._running():
            member.process.terminate()

    def _wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        limit = time.monotonic() + seconds
        while self._running() and not until():
            left = limit - time.monotonic()
            if left <= 0:
                return
            self._received.wait(min(left, _TICK_S))
            self._reap()

    def _stop(self) -> int:
        """Hand a stop signal on to all ranks as SIGTERM, once; a second Ctrl-C ends the waiting."""
        first = self._received.stop[0]
        self._reap()
        self._terminate()
        _log.warning(
            "%s: ranks have %.0f s for a checkpoint; Ctrl-C (or any signal once more) ends at once",
            signal.Signals(first).name,
            self._grace_s,
        )
        self._wait(self._grace_s, until=lambda: self._received.forced)
        for member in self._running():
            _log.warning("rank %d did not end within %.0f s and is killed", member.rank, self._grace_s)
        self.kill()
        unsaved = [m for m in self.members if m.process.returncode != 0 and not _stopped_by(m)]
        if not unsaved or self._received.forced or self._stopped_before_training(unsaved):
            return 128 + first
        culprit = min(unsaved, key=_blame)
        code = culprit.process.returncode
        raise AttemptError(
            f"asked to stop by {signal.Signals(first).name}, but {self._describe(culprit)}; the checkpoint before it "
            "stays",
            "unsaved",
            self.step(),
            culprit.log,
            culprit.log_start,
            code if code in _USER_CODES else None,
        )

    def _stopped_before_training(self, unsaved: list[_Member]) -> bool:
        """Whether a signal ended ranks that did not heed it yet, and others merely lost them: nothing is unsaved."""
        unheeding = any(m.process.returncode in [-number for number in _STOP_SIGNALS] for m in self.members)
        return unheeding and all(m.process.returncode == RankFailedError.exit_code for m in unsaved)

    def _give_up_on(self, hanging: list[_Member]) -> NoReturn:
        """Have the stacks of all ranks written to their logs, and end them."""
        beats = {m.rank: m.pulse.read() for m in self.members}
        stopped = [m.rank for m in self._running() if _process_state(m.process.pid) == "T"]
        # In lock-step all wait for the one that is behind: it is the one to blame.
        behind = min(hanging, key=lambda m: (m.rank not in stopped, beats[m.rank].step, beats[m.rank].count))
        for member in self._running():
            with contextlib.suppress(ProcessLookupError):
                member.process.send_signal(_STACKS_SIGNAL)
        self._wait(_STACKS_S)
        beat = beats[behind.rank]
        where = "before its first step" if beat.phase == START else f"in {beat.phase!r} of step {beat.step}"
        why = f" (rank {', '.join(map(str, stopped))} is suspended by SIGSTOP)" if stopped else ""
        step = self.step()
        self.kill()
        raise AttemptError(
            f"rank {behind.rank} gave no sign of life for {beat.age:.0f} s {where}{why}: the stacks of all ranks are "
            f"in {behind.log.parent}",
            "hang",
            step,
            behind.log,
            behind.log_start,
        )

    def _fail(self) -> int:
        """End all other ranks and raise an error that names the one to blame.

        Returns:
            128 + signal if no rank failed but some were told to stop, by somebody who signalled them and not us.
        """
        self._wait(_ECHO_S)
        if all(_blame(m)[0] >= _MAY_PASS for m in self.members if m.failed):
            # Somebody went away and has not ended yet: its end says more than that others noticed.
            self._wait(_CAUSE_S, until=lambda: any(_blame(m)[0] < _MAY_PASS for m in self.members if m.failed))
        failed = sorted((m for m in self.members if m.failed), key=_blame)
        asked = next((signum for m in failed if (signum := _stopped_by(m))), None)
        if asked is not None and all(_stopped_by(m) or _blame(m)[0] == _LOST_A_PEER for m in failed):
            self._terminate()
            self._wait(self._grace_s, until=lambda: self._received.forced)
            self.kill()
            return 128 + asked
        self._terminate()
        self._wait(min(self._grace_s, _FAILURE_GRACE_S), until=lambda: bool(self._received.stop))
        self.kill()
        culprit, others = failed[0], [str(m.rank) for m in failed[1:]]
        code = culprit.process.returncode
        how = "killed" if code < 0 else "passing" if code == PassingError.exit_code else "error"
        facts = (how, self.step(), culprit.log, culprit.log_start)
        said = last_error_line(culprit.log, culprit.log_start).removeprefix("error: ")
        if code in _USER_CODES and culprit.rank == 0:
            raise AttemptError("", *facts, code)  # it has told the user itself, on the terminal
        if code in _USER_CODES and said:
            raise AttemptError(f"{said} (rank {culprit.rank}, log {culprit.log})", *facts, code)
        echo = f" (then rank {', '.join(others)} failed too)" if others else ""
        raise AttemptError(f"{self._describe(culprit, *failed[1:])}{echo}", *facts)

    def _describe(self, member: _Member, *echoes: _Member) -> str:
        """Say how a rank ended and its last words; rank 0 may have spoken to the terminal only, so ask others too."""
        lines = [last_error_line(m.log, m.log_start) for m in (member, *echoes)]
        said = next((f": {line}" for line in lines if line), ", which is empty")
        return f"rank {member.rank} {_ending(member.process.returncode)}, log {member.log}{said}"


def _blame(member: _Member) -> tuple[int, float]:
    """Order failed ranks: a stated mistake (rank 0's first), a death, what may pass, the loss of a peer; by time."""
    code = member.process.returncode
    kinds = {
        PassingError.exit_code: _MAY_PASS,
        RankFailedError.exit_code: _LOST_A_PEER,
        **dict.fromkeys(_USER_CODES, 0),
    }
    kind = kinds.get(code, 1)
    return kind, member.rank if kind == 0 else member.ended_at or 0.0


def _stopped_by(member: _Member) -> int | None:
    """Return the stop signal that a rank ended for, with or without a checkpoint; None if it ended otherwise."""
    code = member.process.returncode
    return next((number for number in _STOP_SIGNALS if code in (-number, 128 + number)), None)


def _process_state(pid: int) -> str:
    """Return a process's state as the kernel names it ("R", "S", "T" for stopped), or "" where it cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (by the kernel if memory ran out: see dmesg)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def last_lines(path: Path, start: int = 0, count: int = 12) -> list[str]:
    """Return the last lines of a log that are not empty, from byte `start` on; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-count:]


def last_error_line(path: Path, start: int = 0) -> str:
    """Return the last line of a log that looks like an error, or else its last line, or "".

    Args:
        path: log file.
        start: byte at which to begin, so that earlier starts do not speak.
    """
    lines = [line.strip() for line in last_lines(path, start, count=1000)]
    told = [line for line in lines if line.startswith("error: ")]  # how our own ranks explain themselves
    errors = told or [line for line in lines if _ERROR_LINE.search(line)]
    return (errors or lines or [""])[-1]
