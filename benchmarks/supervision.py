"""What supervision costs on thousands of hosts: the real supervisor and its protocol, agents that only pretend.

    python -m benchmarks.supervision [--hosts 4096] [--slots 8]

The agents live in a second process and answer as real ones do (`launch.hosts.agent`): what they are, that the folder
is shared, that they meet, that ranks run, and the heartbeats of all ranks as often as the supervisor asks. They start
nothing. Links go over socket pairs; those of a real run go over ssh, which takes time of its own in processes of its
own. Seconds are those that the supervisor's process was on a core, and those that passed.

    start     connect, check, meet, and start all ranks of the first attempt
    steady    ten seconds of training
    lost      from the end of one host to the start of all ranks of the next attempt without it
    stop      from SIGTERM to the end of all ranks
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import write
from launch.hosts.config import LaunchConfig
from launch.hosts.facts import facts
from launch.hosts.fleet import Fleet
from launch.hosts.names import HostSpec
from launch.hosts.wire import ALIVE_S, Message, Wire, alive_s
from launch.ranks.restarts import RestartConfig
from launch.ranks.supervise import run_supervised
from setformer_dist.core import ledger

_STEADY_S = 10.0
_LOOK_S = 0.1  # how often the agents look at their ranks
_STEP_S = 1.0  # how fast the ranks pretend to train
_LOST = 7  # the host that is lost
_STOPPED = 128 + signal.SIGTERM


class Pair:
    """A channel over one end of a socket pair."""

    unanswered = "its thread may be busy"

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.reads = end.fileno()
        self.writes = os.dup(end.fileno())

    def said(self) -> str:
        """Return nothing: it says nothing beside the messages."""
        return ""

    def listen(self) -> None:
        """Nothing is said beside the messages."""

    def end(self) -> tuple[str, str]:
        """Say that the agent is gone."""
        return "its agent has ended", ""

    def close(self) -> None:
        """Close both directions."""
        if self._end.fileno() >= 0:
            self._end.close()
            os.close(self.writes)

    def wait(self, seconds: float) -> None:
        """Nobody is there to wait for."""


@dataclass
class Pretender:
    """One agent."""

    wire: Wire
    at: int
    ranks: Sequence[int] = ()
    begun: float = 0.0
    beaten_at: float = 0.0
    beat_s: float = ALIVE_S
    seen: set[str] = field(default_factory=set)

    def answer(self, message: Message, said: dict[str, Any], folders: dict[str, set[str]]) -> None:
        """Do what a message says."""
        do = message.get("do")
        if do == "look":
            folders.setdefault(message["prefix"], set()).add(message["name"])
            self._say(do, seen=str(len(folders[message["prefix"]])), config="same")
        elif do == "forget":
            self._say(do, done=True)
        elif do == "code":
            self._say(do, packages={"": {"files": None, "git": None}})
        elif do == "listen":
            self._say(do, port=29500, interface="eth0")
        elif do == "reach":
            self._say(do, address=f"10.0.{self.at >> 8}.{self.at & 255}", interface="eth0", seconds=0.001)
        elif do == "start":
            self.ranks, self.begun = range(*message["ranks"]), time.monotonic()
            self.wire.alive_s, self.beat_s = alive_s(message["silence_s"]), message["beat_s"]
            self._say(do, ranks=[{"rank": rank, "log": f"/logs/rank-{rank:05d}.log", "pid": 1} for rank in self.ranks])
        elif do == "terminate":
            self.wire.send({"is": "ended", "ranks": [[rank, _STOPPED, "", []] for rank in self.ranks]})
            self.ranks = ()
        elif do == "kill":
            self.ranks = ()
            self.wire.send({"is": "killed"})

    def _say(self, to: str, **values: object) -> None:
        self.wire.send({"is": "answer", "to": to, **values})

    def beat(self, now: float) -> None:
        """Tell of the ranks, or show life."""
        if self.ranks and now - self.beaten_at > self.beat_s:
            self.beaten_at = now
            step = int((now - self.begun) / _STEP_S)
            rows = [[rank, 8 * step, step, "forward", 0.01, 0, False, 2048.0, 1.0, None] for rank in self.ranks]
            self.wire.send({"is": "beats", "ranks": rows})
        self.wire.show_life()


def pretend(ends: Sequence[socket.socket], orders: Connection) -> None:
    """Be all agents, until no supervisor is there; an order names one that is to end."""
    said = facts()
    agents = {end.fileno(): Pretender(Wire(end.fileno(), os.dup(end.fileno())), at) for at, end in enumerate(ends)}
    for agent in agents.values():
        agent.wire.send({"is": "facts", **said, "gpus": 0, "addresses": [["eth0", f"10.0.0.{agent.at & 255}"]]})
    news = select.poll()
    for descriptor in agents:
        news.register(descriptor, select.POLLIN)
    folders: dict[str, set[str]] = {}
    looked_at = 0.0
    while agents:
        for descriptor, _ in news.poll(100):
            agent = agents[descriptor]
            for message in agent.wire.receive():
                agent.answer(message, said, folders)
            if agent.wire.ended:
                news.unregister(descriptor)
                del agents[descriptor]
        now = time.monotonic()
        if now - looked_at > _LOOK_S:  # not at each message: every agent would wait for all others
            looked_at = now
            for agent in agents.values():
                agent.beat(now)
        if orders.poll():
            lost = orders.recv()
            news.unregister(ends[lost].fileno())
            agents.pop(ends[lost].fileno())
            ends[lost].shutdown(socket.SHUT_RDWR)


class Clock:
    """Seconds on a core and seconds passed, since the last look."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self._begun = (time.process_time(), time.monotonic())

    def lap(self, phase: str) -> None:
        """Note what a phase took."""
        now = (time.process_time(), time.monotonic())
        core, passed = (after - before for after, before in zip(now, self._begun, strict=True))
        self.rows.append({"phase": phase, "core_s": core, "passed_s": passed, "cores": core / passed})
        self._begun = now


def simulate(hosts: int, slots: int) -> list[dict[str, object]]:
    """Run one supervision; return seconds for each phase."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    pairs = [socket.socketpair() for _ in range(hosts)]
    orders, its = multiprocessing.Pipe()
    agents = multiprocessing.get_context("fork").Process(target=_pretend_alone, args=(pairs, its), daemon=True)
    agents.start()
    for _, far in pairs:
        far.close()
    specs = [HostSpec(f"node{at:04d}", slots) for at in range(hosts)]
    ends = {spec.name: near for spec, (near, _) in zip(specs, pairs, strict=True)}
    folder = Path(tempfile.mkdtemp(prefix="supervision-"))
    (folder / "run").mkdir()
    config = LaunchConfig(silence_s=60.0, take_back="never", retry_s=3600.0)
    fleet = Fleet(specs, ["run.toml"], folder / "run", config, lambda ranks: ranks % slots == 0, print,
                  lambda name: Pair(ends[name]))  # fmt: skip
    clock = Clock()
    conductor = threading.Thread(target=_conduct, args=(folder / "run", clock, orders), daemon=True)
    conductor.start()
    try:
        code = run_supervised(fleet, folder / "run", RestartConfig(backoff_s=0.0), say=print)
    finally:
        clock.lap("stop")
        agents.terminate()
        shutil.rmtree(folder)
    assert code == _STOPPED, code
    attempts = [row["phase"] for row in clock.rows]
    assert attempts == ["start", "steady", "lost", "stop"], attempts
    return clock.rows


def _pretend_alone(pairs: Sequence[tuple[socket.socket, socket.socket]], orders: Connection) -> None:
    for near, _ in pairs:
        near.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pretend([far for _, far in pairs], orders)


def _conduct(run: Path, clock: Clock, orders: Connection) -> None:
    """Note each phase as it ends, and begin the next one."""
    _until_started(run, 1)
    clock.lap("start")
    time.sleep(_STEADY_S)
    clock.lap("steady")
    orders.send(_LOST)
    _until_started(run, 2)
    clock.lap("lost")
    os.kill(os.getpid(), signal.SIGTERM)


def _until_started(run: Path, attempt: int) -> None:
    """Wait until the ranks of an attempt have beaten: `live.json` is newer than the attempt."""
    while True:
        time.sleep(0.02)
        started = [event["time"] for event in ledger.read_events(run) if event["event"] == "attempt"]
        with contextlib.suppress(OSError):
            if len(started) >= attempt and (run / "live.json").stat().st_mtime > started[attempt - 1]:
                return


def main() -> None:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = Table("hosts", "ranks", "phase", "s on a core", "s passed", "cores", title=describe())
    rows = []
    for hosts in arguments.hosts:
        for row in simulate(hosts, arguments.slots):
            rows.append({"hosts": hosts, "ranks": hosts * arguments.slots, **row})
            values = [f"{row[name]:.2f}" for name in ("core_s", "passed_s", "cores")]
            table.add_row(str(hosts), str(hosts * arguments.slots), str(row["phase"]), *values)
    Console(width=110).print(table)
    if arguments.json is not None:
        write(arguments.json, {"machine": describe(), "rows": rows})


if __name__ == "__main__":
    main()
