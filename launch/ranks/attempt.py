"""One attempt of a run: all ranks, of one host or of many, from their start to their end, and who is to blame for it.

The first rank that fails is named with its log. A rank that gives no sign of life is found, and its stack written to
its log. A host that nothing is heard of is lost. A stop signal reaches all ranks at the same moment and leaves them
time for a checkpoint. Whether to start again is decided in supervise.py.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from launch.ranks.signals import STOP_SIGNALS, TICK_S, Pause, Received
from launch.ranks.usage import Use
from setformer_dist.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    RankFailedError,
    TrainingError,
    TransientError,
)
from setformer_dist.core.heartbeat import START, Beat

_log = logging.getLogger(__name__)
_STACKS_S = 2.0  # how long ranks that hang have to write their stacks
_ECHO_S = 1.0  # how long to wait for others to fail after the first, to distinguish a cause from its echoes
_CAUSE_S = 10.0  # how long to wait for the cause where so far ranks only say that they lost another one
# What gloo and DeepSpeed say where ranks do not send each other the same tensors.
_APART = ("collective mismatch", "Detected a disagreement on list contents")
_APART_HINT = (
    " (the ranks sent each other different things: with zero.stage = 3 all must use the same layers in the same order, "
    "see docs/library.md, or set zero.stage = 2)"
)
_TRANSIENT, _LOST_A_PEER = 2, 3  # kinds of failure that may be echoes of another's, see `_blame`
_FAILURE_GRACE_S = 10.0
_NAMED = 5  # lost hosts of a message; the others are counted
# Exit codes by which a rank says that it has explained itself in one sentence, and that a user must do something.
_USER_CODES = {e.exit_code for e in (ConfigError, DataError, CheckpointError, LaunchError, TrainingError)}


class Member(Protocol):
    """One rank, wherever it runs.

    Attributes:
        rank: over all hosts.
        host: its host's name; "" for this machine.
        log: its log file, on its host; this start begins at byte `log_start`.
        ended_at: of this process's monotonic clock; None while it runs.
    """

    rank: int
    host: str
    log: Path
    log_start: int
    ended_at: float | None

    @property
    def code(self) -> int | None:
        """Exit code or minus the number of a signal, once it has ended."""

    def beat(self) -> Beat:
        """Return its last sign of life."""

    def said(self) -> str:
        """Return the last line of its log that looks like an error, or its last line, or ""."""

    def last_lines(self) -> list[str]:
        """Return the last lines of its log since this start."""

    def is_suspended(self) -> bool:
        """Return whether it is suspended (SIGSTOP)."""

    def memory_mib(self) -> float | None:
        """Return its resident memory, None where it is unknown."""

    def use(self) -> Use:
        """Return what it uses of its device."""


class Host(Protocol):
    """The ranks of one host."""

    @property
    def lost(self) -> str | None:
        """One sentence where nothing can be known of them any more, None otherwise."""

    @property
    def members(self) -> Sequence[Member]:
        """Its ranks."""

    def poll(self) -> None:
        """Take note of what has happened."""

    def readable(self) -> list[int]:
        """Return descriptors that have something to read when there is news."""

    def terminate(self) -> None:
        """Ask all ranks to save and stop."""

    def write_stacks(self) -> None:
        """Have all ranks write their stacks to their logs."""

    def kill(self) -> None:
        """Kill whatever is left, with all children."""

    def killed(self) -> bool:
        """Return whether nothing is left, or nothing can be known of it any more."""


def kill_all(hosts: Sequence[Host]) -> None:
    """Kill whatever is left on some hosts, on all at once, and wait for it."""
    for host in hosts:
        host.kill()
    pause = Pause()
    while not all(host.killed() for host in hosts):
        pause.sleep()
        for host in hosts:
            host.poll()


class AttemptError(RankFailedError):
    """An attempt that failed.

    Attributes:
        how: "killed" (by a signal that we did not send), "hang", "host" (a host was lost), "transient" (something
            outside the run, which the rank names), "unsaved" (stopped as asked, but not with a checkpoint) or
            "error" (any other end).
        step: optimizer step the ranks were at; -1 before the first.
        mistake: whether the rank has named something that a user must repair.
        member: the rank to blame; None where it is no rank.
    """

    def __init__(
        self, message: str, how: str, step: int, member: Member | None = None, code: int | None = None
    ) -> None:
        super().__init__(message, code)
        self.how = how
        self.step = step
        self.mistake = code is not None
        if how == "transient" and code is None:
            self.exit_code = TransientError.exit_code
        self.member = member


class Regroup(Exception):  # noqa: N818 - nothing went wrong
    """An attempt that ended well, with a checkpoint, to be started again with other hosts."""


class FolderLostError(TransientError):
    """The run's folder was moved or removed while the run was at work in it."""


@dataclass(frozen=True)
class HangTimeouts:
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


@dataclass(frozen=True)
class Watch:
    """What a supervisor looks for while ranks run.

    Attributes:
        received: stop signals.
        timeouts: when a rank counts as hanging; by default never.
        folder_lost: asked now and then; says what happened to the run's folder where it is gone.
        look: called now and then with all ranks.
    """

    received: Received
    timeouts: HangTimeouts = HangTimeouts()
    folder_lost: Callable[[], str | None] = lambda: None
    look: Callable[[Sequence[Member]], None] = lambda members: None


class Attempt:
    """All ranks of one attempt; when it is over, all have ended.

    Args:
        hosts: with their ranks, started.
        grace_s: seconds that ranks have for a checkpoint after a stop signal.
        watch: what to look for.
        regroup: asked now and then; says why all ranks should save and start again, None where they should not.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        grace_s: float,
        watch: Watch,
        regroup: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._hosts = hosts
        self.members: list[Member] = [member for host in hosts for member in host.members]
        self._grace_s = grace_s
        self._woke_at = time.monotonic()
        self._watch = watch
        self._received = watch.received
        self._regroup = regroup

    def supervise(self) -> int:
        """Return when all ranks have ended well or were stopped.

        Raises:
            AttemptError: one failed; by then all others have ended too.
            FolderLostError: the run's folder is gone; the ranks are killed, as they have nowhere to save.
            Regroup: they have saved and ended, as `regroup` has asked.
        """
        while not self._received.stop:
            self._poll()
            if any(_failed(m) for m in self.members):
                return self._fail()
            if self._lost_hosts():
                self._give_up_hosts()
            running = self._running()
            if not running:
                return 0
            beats = [m.beat() for m in running]
            asked = next((beat.stop for beat in beats if beat.stop), 0)
            if asked and not self._received.stop:  # a rank was signalled, and not us: its grace begins now
                self._received.note(asked)
                break
            if (fault := self._watch.folder_lost()) is not None:
                self.kill()
                raise FolderLostError(fault)
            hanging = [m for m, beat in zip(running, beats, strict=True) if self._watch.timeouts.exceeded_by(beat)]
            if hanging:
                self._give_up_on(hanging)
            if (reason := self._regroup()) is not None and self.step() >= 0:
                self._end_for(reason)
            self._sleep(TICK_S)
        return self._stop()

    def _end_for(self, reason: str) -> None:
        """Have all ranks save and end, and raise `Regroup` where they did; where they did not, it is a failure."""
        self._terminate()
        self._wait(self._grace_s, until=lambda: bool(self._received.stop or self._lost_hosts()))
        if self._received.stop or self._lost_hosts():
            return
        if all(m.ended_at is not None and (m.code == 0 or _stopped_by(m)) for m in self.members):
            if all(m.code == 0 for m in self.members):
                return  # the run was done
            raise Regroup(reason)

    def step(self) -> int:
        """Return the optimizer step that the ranks are at, or were; -1 before the first."""
        return max((m.beat().step for m in self.members), default=-1)

    def kill(self) -> None:
        """Kill whatever is left, with all children, and wait for it."""
        kill_all(self._hosts)
        self._poll()

    def _poll(self) -> None:
        for host in self._hosts:
            host.poll()

    def _sleep(self, seconds: float) -> None:
        self._watch.look(self.members)
        # Thousands of hosts have news all the time: wait until some has gathered, as long as the last look took.
        time.sleep(min(seconds, time.monotonic() - self._woke_at))
        self._received.wait(seconds, [number for host in self._hosts for number in host.readable()])
        self._woke_at = time.monotonic()

    def _running(self) -> list[Member]:
        return [m for host in self._hosts if host.lost is None for m in host.members if m.ended_at is None]

    def _lost_hosts(self) -> list[Host]:
        """Return the hosts that nothing is heard of, though their ranks have not ended."""
        return [host for host in self._hosts if host.lost is not None and any(m.ended_at is None for m in host.members)]

    def _terminate(self) -> None:
        for host in self._hosts:
            host.terminate()

    def _wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        limit = time.monotonic() + seconds
        while self._running() and not until():
            left = limit - time.monotonic()
            if left <= 0:
                return
            self._sleep(min(left, TICK_S))
            self._poll()

    def _stop(self) -> int:
        """Hand a stop signal on to all ranks as SIGTERM, once; a second Ctrl-C ends the waiting."""
        first = self._received.stop[0]
        self._poll()
        self._terminate()
        _log.warning(
            "%s: ranks have %.0f s to save a checkpoint; Ctrl-C (or a second signal) ends them at once",
            signal.Signals(first).name,
            self._grace_s,
        )
        self._wait(self._grace_s, until=lambda: self._received.forced)
        for member in self._running():
            _log.warning("rank %d did not end within %.0f s and is killed", member.rank, self._grace_s)
        self.kill()
        unsaved = [m for m in self.members if m.code != 0 and not _stopped_by(m)]
        if not unsaved or self._received.forced or self._stopped_before_training(unsaved):
            return 128 + first
        culprit = min(unsaved, key=_blame)
        raise AttemptError(
            f"asked to stop by {signal.Signals(first).name}, but {_describe(culprit)}; the previous checkpoint is kept",
            "unsaved",
            self.step(),
            culprit,
            culprit.code if culprit.code in _USER_CODES else None,
        )

    def _stopped_before_training(self, unsaved: list[Member]) -> bool:
        """Whether a signal ended ranks that did not obey it yet, and others merely lost them: nothing is unsaved."""
        unheeding = any(m.code in [-number for number in STOP_SIGNALS] for m in self.members)
        return unheeding and all(m.code == RankFailedError.exit_code for m in unsaved)

    def _give_up_hosts(self) -> NoReturn:
        """End the ranks of the hosts that answer."""
        lost, step = self._lost_hosts(), self.step()
        self._terminate()  # they wait for the lost ranks, and can save nothing; who writes a checkpoint may finish
        self._wait(min(self._grace_s, _ECHO_S), until=lambda: bool(self._received.stop))
        self.kill()
        more = f"; and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        raise AttemptError("; ".join(str(host.lost) for host in lost[:_NAMED]) + more, "host", step)

    def _give_up_on(self, hanging: list[Member]) -> None:
        """Have the stacks of all ranks written to their logs, and end them, unless they go on meanwhile."""
        beats = {m.rank: m.beat() for m in self.members}
        stopped = [m.rank for m in self._running() if m.is_suspended()]
        # In lock-step all wait for the one that is behind: it is the one to blame.
        behind = min(hanging, key=lambda m: (m.rank not in stopped, beats[m.rank].step, beats[m.rank].count))
        for host in self._hosts:
            host.write_stacks()
        self._wait(_STACKS_S)
        beat = beats[behind.rank]
        if all(m.beat().count > beats[m.rank].count for m in hanging):
            _log.warning("%s sent its next heartbeat after more than %.0f s; the run continues, and the stacks of "
                         "all ranks are in %s", _name(behind), beat.age, behind.log.parent)  # fmt: skip
            return
        where = "before its first step" if beat.phase == START else f"in {beat.phase!r} of step {beat.step}"
        why = f" (rank {', '.join(map(str, stopped))} is suspended by SIGSTOP)" if stopped else ""
        step = self.step()
        self.kill()
        raise AttemptError(
            f"{_name(behind)} sent no heartbeat for {beat.age:.0f} s {where}{why}: the stacks of all ranks are "
            f"in {behind.log.parent}",
            "hang",
            step,
            behind,
        )

    def _fail(self) -> int:
        """End all other ranks and raise an error that names the one to blame.

        Returns:
            128 + signal if no rank failed but some were signalled to stop, and we were not.
        """
        self._wait(_ECHO_S)
        if all(_blame(m)[0] >= _TRANSIENT for m in self.members if _failed(m)):
            # A rank closed its connections and has not ended yet: its end says more than its peers' errors.
            self._wait(_CAUSE_S, until=self._cause_is_known)
        failed = sorted((m for m in self.members if _failed(m)), key=_blame)
        if self._lost_hosts() and all(_blame(m)[0] == _LOST_A_PEER for m in failed):
            self._give_up_hosts()
        asked = next((signum for m in failed if (signum := _stopped_by(m))), None)
        if asked is not None and all(_stopped_by(m) or _blame(m)[0] == _LOST_A_PEER for m in failed):
            self._terminate()
            self._wait(self._grace_s, until=lambda: self._received.forced)
            self.kill()
            return 128 + asked
        self._terminate()
        self._wait(min(self._grace_s, _FAILURE_GRACE_S), until=lambda: bool(self._received.stop))
        self.kill()
        raise self._error(failed)

    def _cause_is_known(self) -> bool:
        return bool(self._lost_hosts()) or any(_blame(m)[0] < _TRANSIENT for m in self.members if _failed(m))

    def _error(self, failed: list[Member]) -> AttemptError:
        """Return what the first of some failed ranks is to blame for."""
        culprit, others = failed[0], [str(m.rank) for m in failed[1:]]
        code = culprit.code
        assert code is not None
        how = "killed" if code < 0 else "transient" if code == TransientError.exit_code else "error"
        said = culprit.said().removeprefix("error: ")
        if code in _USER_CODES and culprit.rank == 0:
            return AttemptError("", how, self.step(), culprit, code)  # it has printed the error itself
        if code in _USER_CODES and said:
            where = f" on {culprit.host}" if culprit.host else ""
            message = f"{said} (rank {culprit.rank}{where}, log {culprit.log})"
            return AttemptError(message, how, self.step(), culprit, code)
        echo = f" (then rank {', '.join(others)} failed too)" if others else ""
        return AttemptError(f"{_describe(culprit, *failed[1:])}{echo}", how, self.step(), culprit)


def _failed(member: Member) -> bool:
    return member.code not in (None, 0)


def _name(member: Member) -> str:
    return f"rank {member.rank} on {member.host}" if member.host else f"rank {member.rank}"


def _describe(member: Member, *echoes: Member) -> str:
    """Say how a rank ended and its last words; rank 0 may have spoken to the terminal only, so ask others too."""
    lines = [m.said() for m in (member, *echoes)]
    said = next((f": {line}" for line in lines if line), ", which is empty")
    hint = _APART_HINT if any(words in said for words in _APART) else ""
    return f"{_name(member)} {_ending(member.code)}, log {member.log}{said}{hint}"


def _blame(member: Member) -> tuple[int, float]:
    """Order failed ranks: a stated mistake (rank 0's first), a death, what may pass, the loss of a peer; by time."""
    kinds = {
        TransientError.exit_code: _TRANSIENT,
        RankFailedError.exit_code: _LOST_A_PEER,
        **dict.fromkeys(_USER_CODES, 0),
    }
    kind = 1 if member.code is None else kinds.get(member.code, 1)
    return kind, member.rank if kind == 0 else member.ended_at or 0.0


def _stopped_by(member: Member) -> int | None:
    """Return the stop signal that a rank ended for, with or without a checkpoint; None if it ended otherwise."""
    return next((number for number in STOP_SIGNALS if member.code in (-number, 128 + number)), None)


def _ending(code: int | None) -> str:
    if code is None:
        return "did not end"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (by the kernel if memory ran out: see dmesg)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
