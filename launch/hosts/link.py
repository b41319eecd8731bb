"""The supervisor's end of one host: the command that reaches its agent, and the ranks behind it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.hosts.wire import Message, Wire
from launch.ranks.processes import ENTRY_MODULE, die_with_parent
from launch.ranks.usage import Use
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.heartbeat import START, Beat
from setformer_dist.core.secrets import redacted

_KILL_S = 30.0
_GONE_S = 5.0  # how long a command may take to end once its pipe is closed
_ERROR_BYTES = 4096


class Link:
    """A running agent, as long as it answers.

    Attributes:
        name: the host's, as the user has named it.
        facts: what the host said of itself; empty before it has said anything.
        lost: one sentence where the host does not answer any more.
    """

    def __init__(self, name: str, command: Sequence[str], silence_s: float) -> None:
        """Start the command of an agent.

        Raises:
            LaunchError: there is no such command.
        """
        self.name = name
        self.facts: dict[str, Any] = {}
        self.lost: str | None = None
        self.silence_s = silence_s
        self._unread: list[Message] = []
        self._errors = b""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            raise LaunchError(
                f"{command[0]} is needed to reach host {name} and cannot be run: {error.strerror}"
            ) from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stderr = self._process.stderr.fileno()
        os.set_blocking(self._stderr, False)
        self._wire = Wire(self._process.stdout.fileno(), self._process.stdin.fileno())

    def readable(self) -> list[int]:
        """Return descriptors that have something to read when there is news."""
        assert self._process.stdout is not None
        return [] if self.lost is not None else [self._process.stdout.fileno()]

    def send(self, message: Message) -> None:
        """Send a message."""
        self._wire.send(message)

    def show_life(self) -> None:
        """Show the agent that somebody listens."""
        self._wire.show_life()

    def poll(self) -> list[Message]:
        """Return what has come, and find out whether the host is lost."""
        messages, self._unread = self._unread, []
        if self.lost is not None:
            return messages
        messages += [m for m in self._wire.receive() if "is" in m]
        with contextlib.suppress(OSError):
            self._errors = (self._errors + os.read(self._stderr, 1 << 16))[-_ERROR_BYTES:]
        for message in messages:
            if message["is"] == "facts":
                self.facts = message
        if self._wire.ended:
            self.lost = f"host {self.name} is lost: {self._end()}"
        elif self._wire.silence() > self.silence_s:
            self.lost = f"host {self.name} is lost: nothing heard of it for {self._wire.silence():.0f} s"
        self._wire.show_life()
        return messages

    def put_back(self, messages: list[Message]) -> None:
        """Have `poll` return these again."""
        self._unread += messages

    def _end(self) -> str:
        """Say how the command that reached the host has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        with contextlib.suppress(OSError):
            self._errors = (self._errors + os.read(self._stderr, 1 << 16))[-_ERROR_BYTES:]
        code = self._process.returncode
        how = "its command closed the pipe" if code is None else f"its command ended with exit code {code}"
        said = [line.strip() for line in self._errors.decode(errors="replace").splitlines() if line.strip()]
        said = said[-1:] or list(self._wire.strange)[-1:]
        return how + (f" ({redacted(said[0])})" if said else "")

    def close(self) -> None:
        """Close the pipe, which ends the agent and all it has started; wait for the command."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(0.0 if self.lost is not None else _GONE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.lost = self.lost or f"host {self.name} is given back"


def ask(
    links: Sequence[Link], messages: Sequence[Message], limit_s: float, meanwhile: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Ask every host something at once; return the answers, {"error": sentence} where none came.

    Args:
        links: of the hosts.
        messages: one for each.
        limit_s: how long to wait.
        meanwhile: called while waiting, so that hosts that are not asked hear something too.
    """
    answers: list[dict[str, Any]] = [{} for _ in links]
    for link, message in zip(links, messages, strict=True):
        link.send(message)
    others: list[list[Message]] = [[] for _ in links]
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit and not all(answers):
        for at, (link, message) in enumerate(zip(links, messages, strict=True)):
            for came in link.poll():
                if came["is"] == "answer" and came.get("to") == message["do"]:
                    answers[at] = came
                else:
                    others[at].append(came)  # of a rank that ends while other hosts still start theirs
            if link.lost is not None and not answers[at]:
                answers[at] = {"error": link.lost}
        meanwhile()
        time.sleep(0.005)
    for link, answer, more in zip(links, answers, others, strict=True):
        link.put_back(more)
        if not answer:
            answer["error"] = f"host {link.name} did not answer within {limit_s:.0f} s"
    return answers


def greeted(links: Sequence[Link], limit_s: float, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Wait until every agent has told of its host; those that have not in time are lost. `meanwhile` is as in `ask`."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit and not all(link.facts or link.lost for link in links):
        for link in links:
            link.poll()
        meanwhile()
        time.sleep(0.005)
    for link in links:
        if not link.facts and link.lost is None:
            link.lost = (
                f"host {link.name} did not answer within {limit_s:.0f} s: its command may be waiting for a password, "
                "which nobody can type here; let ssh log in with a key"
            )


@dataclass
class RemoteRank:
    """One rank behind an agent; see `launch.ranks.attempt.Member`."""

    rank: int
    host: str
    log: Path = field(default_factory=Path)
    log_start: int = 0
    code: int | None = None
    ended_at: float | None = None
    beaten: Beat = field(default_factory=lambda: Beat(0, -1, START, 0.0))
    beaten_at: float = field(default_factory=time.monotonic)
    suspended: bool = False
    memory: float | None = None
    used: Use = field(default_factory=Use)
    told: str = ""
    lines: list[str] = field(default_factory=list)

    def beat(self) -> Beat:
        """Return its last sign of life; its age counts on while nothing is heard."""
        b = self.beaten
        return Beat(b.count, b.step, b.phase, b.age + time.monotonic() - self.beaten_at, b.stop)

    def said(self) -> str:
        """Return the last line of its log that looks like an error."""
        return self.told

    def last_lines(self) -> list[str]:
        """Return the last lines of its log."""
        return self.lines

    def is_suspended(self) -> bool:
        """Return whether somebody has stopped it."""
        return self.suspended

    def memory_mib(self) -> float | None:
        """Return its resident memory."""
        return self.memory

    def use(self) -> Use:
        """Return what it uses of its device."""
        return self.used


class RemoteHost:
    """The ranks of one attempt behind one link; see `launch.ranks.attempt.Host`."""

    def __init__(self, link: Link, ranks: range, asked: Callable[[int], None]) -> None:
        """Args:

        link: of the host.
        ranks: their numbers over all hosts.
        asked: told of a stop signal that reached the agent there.
        """
        self.link = link
        self.members = [RemoteRank(rank, link.name) for rank in ranks]
        self._first = ranks.start
        self._asked = asked
        self._killed = False

    @property
    def lost(self) -> str | None:
        """Why the host does not answer."""
        return self.link.lost

    def begin(
        self, args: Sequence[str], own: Mapping[str, str], env: Mapping[str, str], log_dir: Path, warm: bool
    ) -> Message:
        """Return the message that starts the ranks.

        Args:
            args: of every rank.
            own: variables that the ranks must have.
            env: variables that travel.
            log_dir: folder of the logs.
            warm: fork them from one interpreter, where the device allows it.
        """
        return {
            "do": "start",
            "ranks": [self._first, self._first + len(self.members)],
            "args": list(args),
            "module": ENTRY_MODULE,
            "own": dict(own),
            "env": dict(env),
            "log_dir": str(log_dir),
            "silence_s": self.link.silence_s,
            "warm": warm,
        }

    def poll(self) -> None:
        """Take note of what the agent tells."""
        for message in self.link.poll():
            self._take(message)

    def _take(self, message: Message) -> None:
        kind = message["is"]
        if kind == "beats":
            for rank, count, step, phase, age, stop, suspended, memory, *used in message["ranks"]:
                member = self.members[rank - self._first]
                member.beaten = Beat(count, step, phase, age, stop)
                member.beaten_at, member.suspended, member.memory = time.monotonic(), suspended, memory
                member.used = Use(*used)
        elif kind == "ended":
            member = self.members[message["rank"] - self._first]
            member.code, member.told, member.lines = message["code"], message["said"], message["lines"]
            member.ended_at = time.monotonic()
        elif kind == "output":
            stream = sys.stdout if message["stream"] == 1 else sys.stderr
            with contextlib.suppress(OSError, ValueError):
                print(message["text"], end="", file=stream, flush=True)
        elif kind == "asked":
            self._asked(message["signal"])
        elif kind == "killed":
            self._killed = True

    def started(self, answer: Mapping[str, Any]) -> None:
        """Take note of the logs of the ranks that an agent has started."""
        for member, told in zip(self.members, answer["ranks"], strict=True):
            member.log = Path(told["log"])

    def readable(self) -> list[int]:
        """Return descriptors that have something to read when there is news."""
        return self.link.readable()

    def terminate(self) -> None:
        """Ask all ranks to save and stop."""
        self.link.send({"do": "terminate"})

    def write_stacks(self) -> None:
        """Have all ranks write their stacks to their logs."""
        self.link.send({"do": "stacks"})

    def kill(self) -> None:
        """Kill whatever is left; wait for it, as long as the host answers."""
        self._killed = False
        self.link.send({"do": "kill"})
        limit = time.monotonic() + _KILL_S
        while not self._killed and self.link.lost is None and time.monotonic() < limit:
            self.poll()
            time.sleep(0.005)
