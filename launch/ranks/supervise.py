"""`setformer train`'s own process: it starts the ranks, stands by them, and starts them again when they fail.

    attempt 1 --killed, hung--> verdict (launch.ranks.restarts) --again, after a while--> attempt 2 ... --> done
                                                          --give up--> the error of the last attempt

Each attempt resumes from the newest checkpoint that verifies, so starting again is all that recovery takes. A user's
mistake (bad config, damaged data, a loss that is not finite) is never tried again: it would only fail again.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from checkpoints.layout import MANIFEST, step_folders, step_of
from launch.ranks.attempt import AttemptError, FolderLostError, HangTimeouts, Regroup, Watch
from launch.ranks.board import Board
from launch.ranks.lock import gone, supervising
from launch.ranks.restarts import Failure, GiveUp, RestartConfig, verdict
from launch.ranks.signals import Received, stop_signals
from setformer_dist.core import ledger
from setformer_dist.core.errors import LaunchError, RankFailedError
from setformer_dist.core.live import Live
from setformer_dist.core.terminal import bear_lost_streams


class Crew(Protocol):
    """Starts the ranks of a run, attempt by attempt: on this machine, or on many hosts."""

    @property
    def ranks(self) -> int:
        """Ranks of the attempt that comes or runs."""

    @property
    def hosts(self) -> list[str]:
        """Names of its hosts; none where it is this machine alone."""

    def machines(self) -> Mapping[str, tuple[int, Mapping[str, object]]]:
        """Return ranks, and what the host says of its machine, by host; none where it is this machine alone."""

    def show_life(self) -> None:
        """Do what must be done twice a second."""

    def prepare(self, received: Received) -> None:
        """Get ready for an attempt; wait for hosts, unless a stop signal comes.

        Raises:
            LaunchError: there can be no attempt.
        """

    def attempt(self, log_dir: Path, watch: Watch) -> int:
        """Run all ranks until they have ended; return 0, or 128 + the stop signal that ended them.

        Args:
            log_dir: of the ranks' logs; it is there.
            watch: what to look for.

        Raises:
            LaunchError: they cannot be started.
            AttemptError: one failed, or a host was lost; all others have ended.
            FolderLostError: the run's folder is gone.
            Regroup: the ranks have saved, to start again on other hosts.
        """

    def close(self) -> None:
        """End what is left."""


class Recorder(Protocol):
    """Writes down who runs an attempt; see `launch.record.attempts.Recorder`."""

    def begin(self) -> None:
        """Write what must be in the run's folder before anything starts; it is this process's by now."""

    def write(self, ranks: int, hosts: Mapping[str, tuple[int, Mapping[str, object]]]) -> None:
        """Write the record of an attempt that begins; never raises for want of storage."""


def run_supervised(
    crew: Crew,
    run_folder: Path,
    config: RestartConfig,
    *,
    say: Callable[[str], None] = lambda line: None,
    recorder: Recorder | None = None,
    tell: Callable[[Live], None] = lambda seen: None,
) -> int:
    """Run all ranks until the run is done, stopped, or given up.

    Args:
        crew: starts them.
        run_folder: of the run; logs and the ledger are below it.
        config: when to start again.
        say: prints a line for the user: about a restart, or after a stop that rank 0 did not report, where to resume.
        recorder: writes down who runs each attempt.
        tell: hears once a second what the ranks do.

    Returns:
        0, or 128 + signal.

    Raises:
        LaunchError: as `Crew`, or another process trains in the folder.
        TransientError: the folder cannot be written, or is gone.
        RankFailedError: the last attempt's error, and why there is no further one.
    """
    bear_lost_streams()
    with supervising(run_folder) as folder:

        def show_life() -> None:
            folder.show_life()
            crew.show_life()

        with stop_signals(show_life) as received, contextlib.closing(crew):
            ledger.close_killed(run_folder, folder.seen)
            folder.show_life()
            if recorder is not None:
                recorder.begin()
            try:
                return _attempts(
                    crew, run_folder, config, received, folder.fault, say, recorder, Board(run_folder, tell)
                )
            except FileNotFoundError:  # between two looks
                if (run_folder / "logs").is_dir():
                    raise
                raise FolderLostError(gone(run_folder)) from None


def _attempts(
    crew: Crew,
    run_folder: Path,
    config: RestartConfig,
    received: Received,
    lost: Callable[[], str | None],
    say: Callable[[str], None],
    recorder: Recorder | None,
    board: Board,
) -> int:
    """Start the ranks again and again, as `run_supervised` says."""
    failures: list[Failure] = []
    timeouts = HangTimeouts(config.hang_after_s, config.start_after_s, config.save_after_s)
    log_dir = run_folder / "logs"
    watch = Watch(received, timeouts, lost, board.look)
    while True:
        try:
            log_dir.mkdir(exist_ok=True)
            crew.prepare(received)
            if received.stop:
                say(f"stopped before starting; {how_to_resume(run_folder)}")
                return _stopped(run_folder, received.stop[0])
            hosts = {"hosts": crew.hosts} if crew.hosts else {}
            ledger.record(run_folder, "attempt", number=len(failures) + 1, ranks=crew.ranks, **hosts)
            if recorder is not None:
                recorder.write(crew.ranks, crew.machines())
            code = crew.attempt(log_dir, watch)
        except FolderLostError:
            _take_back_terminal()
            raise  # nothing is written where it was: that would make another folder of its name
        except LaunchError:
            ledger.record(run_folder, "ended", why="not started", final=True)
            raise
        except Regroup as reason:
            _take_back_terminal()
            ledger.record(run_folder, "ended", why="regrouped", message=str(reason), final=False)
            say(f"{reason}; all ranks have saved and restart")
            continue
        except AttemptError as error:
            _take_back_terminal()
            if received.stop:
                ledger.record(run_folder, "ended", why=error.how, step=error.step, message=str(error), final=True)
                raise
            wait = _judge(error, failures, config, run_folder, say)
            if _stopped_within(received, wait):
                say(f"stopped before a restart; {how_to_resume(run_folder)}")
                return _stopped(run_folder, received.stop[0])
            continue
        if code:
            if not _began(run_folder):
                say(f"stopped before the first step, with nothing new to save; {how_to_resume(run_folder)}")
            elif received.forced:  # else rank 0 has said at which step
                say(f"ended at once, without waiting for a checkpoint; {how_to_resume(run_folder)}")
            return _stopped(run_folder, code - 128)
        ledger.record(run_folder, "ended", why="done", final=True)
        return 0


def _take_back_terminal() -> None:
    """Clear the bar of a rank 0 that was killed, and show the cursor that it had hidden."""
    if sys.stderr.isatty():
        print("\r\x1b[2K\x1b[?25h", end="", file=sys.stderr, flush=True)


def _began(run_folder: Path) -> bool:
    """Return whether the last attempt came as far as its first step."""
    kinds = [str(event["event"]) for event in ledger.read_events(run_folder)]
    return "began" in kinds[max((at for at, kind in enumerate(kinds) if kind == "attempt"), default=0) :]


def how_to_resume(run_folder: Path) -> str:
    """Return where the same command resumes, judged by names alone: nothing is verified in a process that will end."""
    with contextlib.suppress(OSError):
        found = [folder for folder in step_folders(run_folder / "checkpoints") if (folder / MANIFEST).is_file()]
        if not found:
            return "the same command begins at step 0"
        return f"the same command resumes from the newest checkpoint, step {step_of(found[0])}"
    return "the same command resumes from the newest checkpoint"


def _stopped(run_folder: Path, signum: int) -> int:
    ledger.record(run_folder, "ended", why="stopped", signal=signum, final=True)
    return 128 + signum


def _judge(
    error: AttemptError,
    failures: list[Failure],
    config: RestartConfig,
    run_folder: Path,
    say: Callable[[str], None],
) -> float:
    """Return the seconds to wait before starting again.

    Raises:
        RankFailedError: there is no further attempt.
    """
    failures.append(Failure(time.monotonic(), error.step, error.how))
    judged = GiveUp("") if error.mistake else verdict(failures, config)
    final = isinstance(judged, GiveUp)
    ledger.record(run_folder, "ended", why=error.how, step=error.step, message=str(error), final=final)
    if error.member is not None and error.member.rank and not error.mistake:  # rank 0 speaks to the terminal itself
        say(f"the last lines of {error.member.log}:")
        for line in error.member.last_lines():
            say(f"  {line}")
    if isinstance(judged, GiveUp):
        if not judged.reason:
            raise error
        raise RankFailedError(f"{error}; not restarted: {judged.reason}", error.exit_code) from None
    say(f"{error}; restarting from the newest checkpoint in {judged.after_s:g} s (restart {len(failures)})")
    return judged.after_s


def _stopped_within(received: Received, seconds: float) -> bool:
    """Wait, and return whether a stop signal came."""
    received.wait_for_stop(seconds)
    return bool(received.stop)
