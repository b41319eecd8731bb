"""The supervisor's end of one host: the link to its agent, and the ranks behind it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.hosts.channel import Channel
from launch.hosts.wire import ALIVE_S, Message, Wire, alive_s
from launch.hosts.words import fault_of
from launch.ranks.processes import ENTRY_MODULE
from launch.ranks.signals import Pause
from launch.ranks.usage import Use
from setformer_dist.core.heartbeat import START, Beat
from setformer_dist.core.secrets import redacted

_KILL_S = 30.0
_SAID = 300  # characters of what was said beside the messages
_GONE_S = 5.0  # how long a command may take to end once its pipe is closed


class Link:
    """A running agent, as long as it answers.

    Attributes:
        name: the host's, as the user has named it.
        facts: what the host said of itself; empty before it has said anything.
        lost: one sentence where the host does not answer any more.
        unanswered: why its agent may say nothing, in words.
    """

    def __init__(self, name: str, channel: Channel, silence_s: float) -> None:
        """Args:

        name: of the host.
        channel: to its agent.
        silence_s: seconds without a word after which it counts as lost.
        """
        self.name = name
        self.facts: dict[str, Any] = {}
        self.lost: str | None = None
        self.silence_s = silence_s
        self.unanswered = channel.unanswered
        self._unread: list[Message] = []
        self._channel = channel
        self._wire = Wire(channel.reads, channel.writes)
        self._wire.alive_s = alive_s(silence_s)

    def readable(self) -> list[int]:
        """Return descriptors that have something to read when there is news."""
        return [] if self.lost is not None else [self._channel.reads]

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
        came = [m for m in self._wire.receive() if "is" in m]
        self._channel.listen()
        for message in came:
            if (fault := fault_of(message)) is not None:
                self.distrust(fault)
                return messages
            if message["is"] == "facts":
                self.facts = message
            messages.append(message)
        if self._wire.broken is not None:
            self.distrust(self._wire.broken)
        elif self._wire.ended:
            self.lost = f"host {self.name} is lost: {self._end()}"
        elif self.facts and self._wire.silence() > self.silence_s:  # before, `greeted` sees to it
            self.lost = f"host {self.name} is lost: nothing heard of it for {self._wire.silence():.0f} s"
        self._wire.show_life()
        return messages

    def distrust(self, fault: str) -> None:
        """Take the host for lost because of what it has sent."""
        self.lost = (
            f"host {self.name} is lost: its agent sent {fault}: install the same version of this project there, and "
            "have --via hand on nothing but the agent's output"
        )

    def put_back(self, messages: list[Message]) -> None:
        """Have `poll` return these again."""
        self._unread += messages

    def _end(self) -> str:
        """Say how the channel has ended."""
        how, said = self._channel.end()
        return how + self._beside(said)

    def _beside(self, said: str) -> str:
        """Return the last that was said beside the messages, as a parenthesis."""
        said = said or self._wire.unfinished() or next(reversed(self._wire.strange), "")
        return f" ({redacted(said[-_SAID:])})" if said else ""

    def give_up(self, limit_s: float) -> None:
        """Take a host for lost that has not told of itself in time."""
        said = self._beside(self._channel.said())
        self.lost = f"host {self.name} did not answer within {limit_s:.0f} s{said}: {self.unanswered}"

    def let_go(self) -> None:
        """Close the pipe, which ends the agent and all it has started."""
        self._channel.close()

    def close(self) -> None:
        """Close the pipe, and wait for what reached the host."""
        self.let_go()
        self._channel.wait(0.0 if self.lost is not None else _GONE_S)
        self.lost = self.lost or f"host {self.name} is given back"


def close_all(links: Sequence[Link]) -> None:
    """Close links, all at once."""
    for link in links:
        link.let_go()
    for link in links:
        link.close()


def ask(
    links: Sequence[Link], messages: Sequence[Message], limit_s: float, meanwhile: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Ask every host something at once; return the answers, {"error": sentence} where it failed or none came.

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
    limit, pause = time.monotonic() + limit_s, Pause()
    waiting = list(range(len(links)))  # whoever has answered is read again by who comes next: they are thousands
    while time.monotonic() < limit and waiting:
        for at in waiting:
            link = links[at]
            for came in link.poll():
                if came["is"] == "answer" and came.get("to") == messages[at]["do"]:
                    answers[at] = {"error": f"host {link.name}: {came['error']}"} if "error" in came else came
                else:
                    others[at].append(came)  # of a rank that ends while other hosts still start theirs
            if link.lost is not None and not answers[at]:
                answers[at] = {"error": link.lost}
        waiting = [at for at in waiting if not answers[at]]
        for link in links:
            link.show_life()
        meanwhile()
        pause.sleep()
    for link, answer, more in zip(links, answers, others, strict=True):
        link.put_back(more)
        if not answer:
            answer["error"] = f"host {link.name} did not answer within {limit_s:.0f} s"
    return answers


def greeted(links: Sequence[Link], limit_s: float, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Wait until every agent has told of its host; those that have not in time are lost. `meanwhile` is as in `ask`."""
    limit, pause = time.monotonic() + limit_s, Pause()
    others: list[list[Message]] = [[] for _ in links]
    while time.monotonic() < limit and not all(link.facts or link.lost for link in links):
        for link, more in zip(links, others, strict=True):
            more += [message for message in link.poll() if message["is"] != "facts"]
        meanwhile()
        pause.sleep()
    for link, more in zip(links, others, strict=True):
        link.put_back(more)  # a stop signal that reached the agent is told once
        if not link.facts and link.lost is None:
            link.give_up(limit_s)


def print_as_it_came(stream: int, text: str) -> None:
    """Print what rank 0 has printed elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end="", file=sys.stdout if stream == 1 else sys.stderr, flush=True)


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

    def __init__(
        self,
        link: Link,
        ranks: range,
        asked: Callable[[int], None],
        show: Callable[[int, str], None] = print_as_it_came,
    ) -> None:
        """Args:

        link: of the host.
        ranks: their numbers over all hosts.
        asked: told of a stop signal that reached the agent there.
        show: gets what rank 0 prints: 1 for its output, 2 for its errors, and the text.
        """
        self._show = show
        self.link = link
        self.members = [RemoteRank(rank, link.name) for rank in ranks]
        self._first = ranks.start
        self._asked = asked
        self._killed = False
        self._kill_by = 0.0

    @property
    def lost(self) -> str | None:
        """Why the host does not answer."""
        return self.link.lost

    def begin(
        self,
        args: Sequence[str],
        own: Mapping[str, str],
        env: Mapping[str, str],
        log_dir: Path,
        warm: bool,
        module: str = ENTRY_MODULE,
        beat_s: float = ALIVE_S,
    ) -> Message:
        """Return the message that starts the ranks.

        Args:
            args: of every rank.
            own: variables that the ranks must have.
            env: variables that travel.
            log_dir: folder of the logs.
            warm: fork them from one interpreter, where the device allows it.
            module: what they run.
            beat_s: how often the host tells of them.
        """
        return {
            "do": "start",
            "ranks": [self._first, self._first + len(self.members)],
            "args": list(args),
            "module": module,
            "own": dict(own),
            "env": dict(env),
            "log_dir": str(log_dir),
            "silence_s": self.link.silence_s,
            "beat_s": beat_s,
            "warm": warm,
        }

    def poll(self) -> None:
        """Take note of what the agent tells."""
        for message in self.link.poll():
            try:
                self._take(message)
            except LookupError as error:
                self.link.distrust(str(error))

    def _take(self, message: Message) -> None:
        kind = message["is"]
        if kind == "beats":
            now = time.monotonic()
            for rank, count, step, phase, age, stop, suspended, memory, *used in message["ranks"]:
                member = self._member(rank)
                member.beaten = Beat(count, step, phase, age, stop)
                member.beaten_at, member.suspended, member.memory = now, suspended, memory
                member.used = Use(*used)
        elif kind == "ended":
            for rank, code, said, lines in message["ranks"]:
                member = self._member(rank)
                member.code, member.told, member.lines, member.ended_at = code, said, lines, time.monotonic()
        elif kind == "output":
            self._show(message["stream"], message["text"])
        elif kind == "asked":
            self._asked(message["signal"])
        elif kind == "killed":
            self._killed = True

    def _member(self, rank: int) -> RemoteRank:
        """Return one of its ranks.

        Raises:
            LookupError: another host's, or nobody's.
        """
        if not 0 <= rank - self._first < len(self.members):
            raise LookupError(f"news of rank {rank}, which it does not have")
        return self.members[rank - self._first]

    def started(self, answer: Mapping[str, Any]) -> None:
        """Take note of the logs of the ranks that an agent has started."""
        for told in answer["ranks"]:
            try:
                self._member(told["rank"]).log = Path(told["log"])
            except LookupError as error:
                self.link.distrust(str(error))

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
        """Have the agent kill whatever is left."""
        self._killed = False
        self._kill_by = time.monotonic() + _KILL_S
        self.link.send({"do": "kill"})

    def killed(self) -> bool:
        """Return whether nothing is left, or nothing can be known of it any more; news of it comes by `poll`."""
        return self._killed or self.link.lost is not None or time.monotonic() > self._kill_by
