"""The faults of the drill on several hosts: processes, power and links.

The run has one host more than it trains on, so the number of ranks stays the same whichever host is away, and losses
can be compared bit by bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from launch.drill.faults import none_left
from launch.drill.namespaces import Cluster
from launch.drill.run import DrillRun, children, is_rank, runs_module, words_of
from setformer_dist.core.errors import DrillError
from setformer_dist.core.stopping import exit_code_of

SILENCE_S = 5.0
_AGENT = "launch.hosts.agent"
_BRIEFLY_S = 1.5  # a link that is away for so long is no lost host
_SLOW_S, _SLOW_KBIT, _LOSS = 4.0, 2000, 0.01


def crew_of(cluster: Cluster) -> list[str]:
    """Return the words of a command that trains on all hosts of a cluster but one, which stands by."""
    train = str(len(cluster.names) - 1)
    return [
        *("--hosts", ",".join(f"{name}:1" for name in cluster.names), "--via", cluster.via),
        *(f"launch.silence_s={SILENCE_S:g}", "launch.retry_s=0.5", "launch.connect_s=15"),
        *(f"launch.min_hosts={train}", f"launch.max_hosts={train}"),
    ]


@dataclass
class HostFaultInjector:
    """What makes the faults of hosts; see `launch.drill.faults.FaultInjector`.

    Attributes:
        run: the run they are made in.
        draw: the seed's own generator.
        cluster: its hosts.
    """

    run: DrillRun
    draw: random.Random
    cluster: Cluster
    _broken: dict[str, Callable[[str], None]] = field(default_factory=dict)  # host -> what mends it

    def mend(self) -> None:
        """Mend the hosts that are broken."""
        for name, mend in self._broken.items():
            mend(name)
        self._broken = {}

    def kill_rank(self) -> tuple[str, int]:
        """SIGKILL to one rank."""
        return self._signal(is_rank, signal.SIGKILL)

    def stop_rank(self) -> tuple[str, int]:
        """SIGSTOP to one rank: it hangs."""
        self.run.wait(self.run.trains)
        return self._signal(is_rank, signal.SIGSTOP)

    def kill_agent(self) -> tuple[str, int]:
        """SIGKILL to one agent; its ranks must die with it."""
        return self._signal(lambda pid: runs_module(pid, _AGENT), signal.SIGKILL)

    def stop_agent(self) -> tuple[str, int]:
        """SIGSTOP to one agent: nothing is heard of its host, whose ranks continue for a while."""
        host, newest = self._one(), self.run.newest()
        stopped = self._signal_on(host, lambda pid: runs_module(pid, _AGENT), signal.SIGSTOP)
        self._broken[host] = lambda _: _signal_all(stopped, signal.SIGCONT)
        return host, newest

    def kill_ssh(self) -> tuple[str, int]:
        """SIGKILL to the ssh that reaches a host."""
        host, newest = self._one(), self.run.newest()
        words = {pid: words_of(pid) for pid in children(self.run.launcher)}
        _signal_all([pid for pid, said in words.items() if said[:1] == ["ssh"] and host in said], signal.SIGKILL)
        return host, newest

    def power_off(self) -> tuple[str, int]:
        """Everything on a host ends at once and its address answers no more; it starts again later."""
        host, newest = self._one(), self.run.newest()
        self.cluster.cut(host)
        self.cluster.kill(host)
        self._broken[host] = self._power_on
        return host, newest

    def _power_on(self, host: str) -> None:
        self.cluster.join(host)
        self.cluster.boot(host)

    def cut(self) -> tuple[str, int]:
        """The link of a host is cut; its ranks live, and must end by themselves."""
        return self._part(self.cluster.cut)

    def mute(self) -> tuple[str, int]:
        """A link that is half open: a host hears, and is not heard."""
        return self._part(self.cluster.mute)

    def _part(self, how: Callable[[str], None]) -> tuple[str, int]:
        host, newest = self._one(), self.run.newest()
        pids = [pid for pid in self.cluster.processes(host) if is_rank(pid)]
        how(host)
        self._broken[host] = lambda name: self._join(name, pids)
        return host, newest

    def _join(self, host: str, pids: list[int]) -> None:
        # By now the run continues elsewhere: whoever was cut off must be gone, or two runs would write one folder.
        none_left(self.run, pids)
        self.cluster.join(host)
        self.cluster.mend(host)

    def cut_briefly(self) -> tuple[str, int]:
        """The link of a host is away for a moment; that is no lost host."""
        host, newest = self._one(), self.run.newest()
        self.cluster.cut(host)
        time.sleep(_BRIEFLY_S)
        self.cluster.join(host)
        return f"{host}, {_BRIEFLY_S:g} s", newest

    def slow(self) -> tuple[str, int]:
        """A link with 1 % of its packets lost and 2 Mbit/s, for a while; that is no lost host."""
        host, newest = self._one(), self.run.newest()
        self.cluster.slow(host, _SLOW_KBIT)
        self.cluster.lose(host, _LOSS)
        time.sleep(_SLOW_S)
        self.cluster.mend(host)
        return host, newest

    def kill_supervisor(self) -> tuple[str, int]:
        """SIGKILL to the supervisor; all agents and ranks must end."""
        newest = self.run.newest()
        self.run.end()
        left = [pid for name in self.cluster.names for pid in self.cluster.processes(name)]
        none_left(self.run, left)
        self.run.start()
        return "supervisor", newest

    def terminate(self) -> tuple[str, int]:
        """SIGTERM to the supervisor, as a scheduler does: nothing may be lost."""
        begun, reached, newest = self.run.trains(), self.run.reached(), self.run.newest()
        os.kill(self.run.launcher, signal.SIGTERM)
        if not self.run.wait(lambda: self.run.code is not None, limit_s=60):
            raise DrillError("SIGTERM to the supervisor did not end the run within 60 s")
        if begun and self.run.code not in (exit_code_of(signal.SIGTERM), 0):
            raise DrillError(f"SIGTERM ended the run with exit code {self.run.code}:\n  {self.run.said()}")
        if self.run.code:
            self.run.start()
        return "supervisor", reached if begun else newest

    def _one(self) -> str:
        """Draw a host that takes part."""
        self.run.wait(lambda: bool(self.run.hosts()) or self.run.code is not None, limit_s=20)
        return self.draw.choice(self.run.hosts() or self.cluster.names[:1])

    def _signal(self, which: Callable[[int], bool], number: int) -> tuple[str, int]:
        host, newest = self._one(), self.run.newest()
        self.run.wait(lambda: any(map(which, self.cluster.processes(host))), limit_s=10)
        hit = self._signal_on(host, which, number)
        return host if hit else f"{host}: nobody there", newest

    def _signal_on(self, host: str, which: Callable[[int], bool], number: int) -> list[int]:
        pids = [pid for pid in self.cluster.processes(host) if which(pid)]
        _signal_all(pids, number)
        return pids


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# A fault that a run survives without starting again is marked with True.
HOST_FAULTS: dict[str, tuple[Callable[[HostFaultInjector], tuple[str, int]], bool]] = {
    "SIGKILL of a rank": (HostFaultInjector.kill_rank, False),
    "SIGSTOP of a rank (hang)": (HostFaultInjector.stop_rank, False),
    "SIGKILL of an agent": (HostFaultInjector.kill_agent, False),
    "SIGSTOP of an agent": (HostFaultInjector.stop_agent, False),
    "SIGKILL of ssh": (HostFaultInjector.kill_ssh, False),
    "power off": (HostFaultInjector.power_off, False),
    "link cut": (HostFaultInjector.cut, False),
    "link half open": (HostFaultInjector.mute, False),
    "link away for 1.5 s": (HostFaultInjector.cut_briefly, True),
    "link with 1 % loss, 2 Mbit/s": (HostFaultInjector.slow, True),
    "SIGKILL of the supervisor": (HostFaultInjector.kill_supervisor, False),
    "SIGTERM to the supervisor": (HostFaultInjector.terminate, False),
}
