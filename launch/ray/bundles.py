"""The supervisor's end of a run on Ray: channels to the agents in the bundles of a placement group.

The package ray is not imported: `launch.ray.relay`, a child, is the cluster's driver. Where it dies, because the
cluster does, all agents are lost to the supervisor, which starts another relay when it tries them again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.hosts.names import HostSpec
from launch.ranks.processes import die_with_parent
from launch.ray.installed import require_ray
from setformer_dist.core.errors import LaunchError

RELAY_MODULE = "launch.ray.relay"
_HOME = Path(__file__).resolve().parents[2]
_NAME = "bundle-"
_START_S = 120.0
_END_S = 10.0
_TICK_S = 0.1


class UnwantedError(Exception):
    """Nobody wants the bundles any more."""


class Bundles:
    """The agents of one run.

    Attributes:
        specs: a host for each bundle.
        address: of the cluster, host:port.
    """

    def __init__(
        self,
        address: str,
        ranks: int,
        per_node: int | None,
        unwanted: Callable[[], bool] = lambda: False,
        waiting: Callable[[str], None] | None = None,
        nodes: Sequence[HostSpec] = (),
    ) -> None:
        """Connect to a cluster and make the bundles.

        Args:
            address: host:port, or "auto".
            ranks: in all.
            per_node: ranks of each node; by default as many as it has room for.
            unwanted: whether to give up waiting.
            waiting: is told once why there is no room yet; without it, no room is an error.
            nodes: by address, with the ranks of each; by default Ray chooses them.

        Raises:
            LaunchError: there is no such cluster, or no room for them.
            UnwantedError: as asked.
        """
        require_ray()
        if ranks < 1 or (per_node is not None and per_node < 1):
            raise LaunchError("--ranks and --ranks-per-node are 1 or more")
        self._asked: dict[str, Any] = {
            "address": address, "ranks": ranks, "per_node": per_node, "slots": None,
            "nodes": [[node.name, node.slots] for node in nodes],
            "wait": waiting is not None, "directory": str(Path.cwd()),
        }  # fmt: skip
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - of all relays; closed with this object
        self._start()
        try:
            answer = self._answer(unwanted, waiting)
        except BaseException:
            self.close()
            raise
        self._asked["slots"], self.address = answer["slots"], str(answer["address"])
        made = [HostSpec(f"{_NAME}{at}", n) for at, n in enumerate(answer["slots"])]
        self.specs: Sequence[HostSpec] = list(nodes) or made

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
        with theirs:
            self._relay = subprocess.Popen(
                [sys.executable, "-P", "-m", RELAY_MODULE, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
                preexec_fn=die_with_parent(),
            )
        self._control.send(json.dumps(self._asked).encode())

    def _answer(self, unwanted: Callable[[], bool], waiting: Callable[[str], None] | None) -> dict[str, Any]:
        """Wait for the answer to what was asked first; raises as the constructor."""
        limit = time.monotonic() + _START_S
        self._control.settimeout(_TICK_S)
        while time.monotonic() < limit:
            if unwanted():
                raise UnwantedError
            with contextlib.suppress(TimeoutError):
                answer = json.loads(self._control.recv(1 << 16) or "{}")
                if "slots" in answer:
                    return dict(answer)
                if "waiting" in answer and waiting is not None:
                    waiting(answer["waiting"])
                    limit = math.inf
                    continue
                raise LaunchError(answer.get("error") or f"the driver on Ray has ended: {self._last_line()}")
        raise LaunchError(f"the Ray cluster did not answer within {_START_S:.0f} s")

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no word")

    def open(self, name: str) -> Tunnel:
        """Open a channel to the agent of a bundle; see `launch.hosts.channel.Opener`. Never waits."""
        if self._relay.poll() is not None:
            self._control.close()
            self._start()
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):  # it dies just now: its end of the channel says so
            at = next(at for at, spec in enumerate(self.specs) if spec.name == name)
            word = json.dumps({"open": at}).encode()
            socket.send_fds(self._control, [word], [theirs.fileno()])
        return Tunnel(ours)

    def close(self) -> None:
        """Give the bundles back, and end the relay."""
        self._control.close()
        try:
            self._relay.wait(_END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._relay.pid, signal.SIGKILL)
            self._relay.wait()
        self._errors.close()


class Tunnel:
    """A channel to an agent through the relay; see `launch.hosts.channel.Channel`."""

    unanswered = "no node of the Ray cluster may have room for its bundle"

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.reads = self.writes = end.fileno()

    def listen(self) -> None:
        """What was said beside the messages comes with them."""

    def said(self) -> str:
        """Say nothing: see `listen`."""
        return ""

    def end(self) -> tuple[str, str]:
        """Say how it has ended: the relay's last words came beside the messages."""
        return "its agent has ended", ""

    def close(self) -> None:
        """Close both directions."""
        with contextlib.suppress(OSError):
            self._end.close()

    def wait(self, seconds: float) -> None:
        """The relay waits for it."""
