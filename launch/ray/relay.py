"""The driver of a run on Ray, a process of its own: an actor for each bundle runs an agent and relays its pipes.

    supervisor --sockets--> relay (this process) --calls--> actor --pipes--> agent --> ranks

Ray ends its driver when it loses the cluster, and starts threads in it; the supervisor must survive the one and cannot
have the other, as it forks. What comes over the control socket:

    first       {"address": A, "ranks": N, "per_node": R | null, "nodes": [[address, ranks], ..], "slots": [..] | null,
                 "wait": W, "directory": D}
    then        {"open": index of a bundle}, with a socket for its agent's messages; its end ends the agent

The answer to the first is {"slots": ranks of each bundle, "address": host:port} or {"error": sentence}. If W is true,
{"waiting": sentence} may come before: the cluster has no room yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.ray.cluster import connected
from launch.ray.room import Room, bundles, on_nodes
from setformer_dist.core.errors import LaunchError, SetformerError

AGENT_MODULE = "launch.hosts.agent"
_HOME = Path(__file__).resolve().parents[2]
_ROOM_S = 15.0  # how long a run that was killed may take to give its bundles back
_GONE_S = 4.0  # how long an agent may take to end by itself
_CHUNK = 1 << 16
_ERROR_BYTES = 4096
_HERE = 0.001  # of the resource that Ray gives each node under its address


class AgentActor:
    """Runs one agent on a node of the cluster. Pickled by value: no node needs this module to be importable."""

    def __init__(self, home: str, directory: str, ranks_on_node: int, address: str) -> None:
        """Start the agent; the ranks know the cluster's address, and who they are to it (`refresh.by = "ray"`)."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        reach = ("RAY_AUTH_", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        environ |= {name: value for name, value in os.environ.items() if name.startswith(reach)}
        environ["RAY_ADDRESS"] = address
        with open("/proc/self/environ", "rb") as file:  # noqa: PTH123 - pickled by value, with as few names as can be
            if b"OMP_NUM_THREADS=" not in file.read():  # Ray has set it to the CPUs of this actor
                cores = len(os.sched_getaffinity(0))
                environ["OMP_NUM_THREADS"] = str(max(1, cores // ranks_on_node))
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (home, environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", AGENT_MODULE, "--directory", directory],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        with contextlib.suppress(OSError):  # Ray's workers have low priority, for the sake of Ray; takes the right to
            os.setpriority(os.PRIO_PROCESS, self.process.pid, os.getpriority(os.PRIO_PROCESS, os.getppid()))
        self.errors = b""

    def read(self) -> bytes | None:
        """Wait a while for what the agent says; None once it has ended."""
        out, err = self.process.stdout, self.process.stderr
        assert out is not None
        assert err is not None
        readable, _, _ = select.select([out, err], [], [], 1.0)
        if err in readable:
            self.errors = (self.errors + os.read(err.fileno(), _CHUNK))[-_ERROR_BYTES:]
        if out in readable:
            return os.read(out.fileno(), _CHUNK) or None
        if err in readable:
            time.sleep(0.01)  # its standard error may have ended first
        return b""

    def write(self, data: bytes) -> None:
        """Hand something to the agent; nothing ends it."""
        pipe = self.process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):
            if not data:
                pipe.close()
            while data:
                data = data[os.write(pipe.fileno(), data) :]

    def end(self) -> tuple[int, str]:
        """Return the exit code of an agent that has ended, and the last line of its errors."""
        code = self.process.wait()
        assert self.process.stderr is not None
        self.errors += self.process.stderr.read() or b""
        lines = [line.strip() for line in self.errors.decode(errors="replace").splitlines() if line.strip()]
        return code, lines[-1] if lines else ""


class Relay:
    """Carries messages between the supervisor and the agents of one placement group."""

    def __init__(self, control: socket.socket, asked: Mapping[str, Any], slots: list[int], address: str) -> None:
        self._control = control
        self._slots = slots
        self._cluster = address
        self._directory = asked["directory"]
        self._unit = unit_of_rank()
        made = on_named(asked["nodes"]) if asked["nodes"] else [_times(self._unit, count) for count in slots]
        strict = asked["per_node"] is not None
        self._group: PlacementGroup = placement_group(made, strategy="STRICT_SPREAD" if strict else "SPREAD")
        self._channels: set[asyncio.Task[None]] = set()

    def wait(self, patience: Patience) -> None:
        """Wait for the bundles.

        Raises:
            LaunchError: there is no room for them now.
        """
        while not self._group.wait(patience.step_s):
            if patience.over():
                raise LaunchError(
                    f"the Ray cluster has no room for {sum(self._slots)} ranks now: try again, or give fewer"
                )

    async def serve(self) -> None:
        """Serve until the supervisor goes away."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def look() -> None:
            data, descriptors, _, _ = socket.recv_fds(self._control, _CHUNK, 1)
            if not data:
                loop.remove_reader(self._control)
                over.set()
                return
            channel = socket.socket(fileno=descriptors[0])
            channel.setblocking(False)
            task = asyncio.create_task(self._carry(int(json.loads(data)["open"]), channel))
            self._channels.add(task)
            task.add_done_callback(self._channels.discard)

        loop.add_reader(self._control, look)
        await over.wait()
        if self._channels:
            await asyncio.wait(self._channels, timeout=2 * _GONE_S)

    def close(self) -> None:
        """Give the bundles back."""
        remove_placement_group(self._group)

    async def _carry(self, at: int, channel: socket.socket) -> None:
        """Run an agent in a bundle, until it or the supervisor's end of its socket has ended."""
        count, node = self._slots[at], self._node(at)
        shared = sum(n for other, n in enumerate(self._slots) if self._node(other) == node) if node else count
        actor = (
            ray.remote(AgentActor)
            .options(
                num_cpus=self._unit["CPU"] * count,
                num_gpus=self._unit.get("GPU", 0) * count,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=at),
            )
            .remote(str(_HOME), self._directory, shared, self._cluster)
        )
        down = asyncio.create_task(self._down(actor, channel))
        up = asyncio.create_task(_up(actor, channel))
        try:
            await asyncio.wait({down, up}, return_when=asyncio.FIRST_COMPLETED)
            if not down.done():  # the supervisor has no more use for it
                await asyncio.wait({down}, timeout=_GONE_S)
            if down.done():
                await asyncio.get_running_loop().sock_sendall(channel, f"\n{down.result()}\n".encode())
        except RayError:
            said = f"its node {self._address(node)}, or its Ray worker there, is gone"
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(channel, f"\n{said}\n".encode())
        except OSError:
            pass  # the supervisor is gone
        finally:
            for task in (down, up):
                task.cancel()
            channel.close()
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)

    async def _down(self, actor: Any, channel: socket.socket) -> str:
        """Hand on what the agent says; return how it has ended."""
        while (data := await actor.read.remote()) is not None:
            if data:
                await asyncio.get_running_loop().sock_sendall(channel, data)
        code, said = await actor.end.remote()
        return f"exit code {code}" + (f": {said}" if said else "")

    def _node(self, at: int) -> str:
        """Return the id of the node that has a bundle; "" where none has."""
        return str(placement_group_table(self._group)["bundles_to_node_id"].get(at) or "")

    def _address(self, node: str) -> str:
        return next((str(n["NodeManagerAddress"]) for n in ray.nodes() if n["NodeID"] == node), "")


async def _up(actor: Any, channel: socket.socket) -> None:
    """Hand on what the supervisor says, to its end."""
    with contextlib.suppress(OSError, RayError):
        while data := await asyncio.get_running_loop().sock_recv(channel, _CHUNK):
            await actor.write.remote(data)
        await actor.write.remote(b"")


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:120] if lines else type(error).__name__


def unit_of_rank() -> dict[str, float]:
    """Return what one rank takes of a node."""
    gpus = ray.cluster_resources().get("GPU", 0) >= 1 and os.environ.get("DS_ACCELERATOR") != "cpu"
    return {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}


def _times(unit: dict[str, float], count: int) -> dict[str, float]:
    return {name: amount * count for name, amount in unit.items()}


def on_named(nodes: Iterable[tuple[str, int]]) -> list[dict[str, float]]:
    """Return the bundles of some ranks on each of some nodes, which are named by their addresses."""
    unit = unit_of_rank()
    return [{**_times(unit, count), f"node:{name}": _HERE} for name, count in nodes]


def rooms() -> list[Room]:
    """Return what the nodes of the cluster have room for."""
    unit = unit_of_rank()
    free = ray._private.state.available_resources_per_node()

    def fits(resources: dict[str, float]) -> int:
        return int(min(resources.get(name, 0.0) // amount for name, amount in unit.items()))

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Room(n["NodeManagerAddress"], fits(n["Resources"]), fits(free.get(n["NodeID"], {}))) for n in alive]


class Patience:
    """How long to wait for room: for what a run before this one still gives back, or for ever.

    Attributes:
        forever: whether the user asked to wait.
        step_s: seconds between two looks.
    """

    step_s = 0.5

    def __init__(self, control: socket.socket, forever: bool) -> None:
        self.forever = forever
        self._control = control
        self._limit = time.monotonic() + _ROOM_S
        self._told = False

    def over(self) -> bool:
        """Return whether to give up; leaves if the supervisor has gone."""
        if select.select([self._control], [], [], 0)[0]:  # nothing comes before the answer but the end
            sys.exit(0)
        return not self.forever and time.monotonic() > self._limit

    def tell(self, why: LaunchError) -> None:
        """Say what is waited for, once."""
        if self.forever and not self._told:
            self._told = True
            self._control.send(json.dumps({"waiting": str(why)}).encode())


def plan(asked: Mapping[str, Any], patience: Patience) -> list[int]:
    """Return the bundles, of what was asked first.

    Raises:
        LaunchError: they do not fit, also after a wait.
    """

    def fitting(now: bool = True) -> list[int]:
        if asked["nodes"]:
            return on_nodes(rooms(), asked["nodes"], now)
        return bundles(rooms(), asked["ranks"], asked["per_node"], now)

    if not patience.forever:
        fitting(now=False)
    while True:
        try:
            return fitting()
        except LaunchError as error:
            if patience.over():
                raise
            patience.tell(error)
            time.sleep(patience.step_s)


def _refuse(control: socket.socket, error: str) -> None:
    """Tell the supervisor, and every agent that it has asked for, why there is none."""
    with contextlib.suppress(OSError):
        control.send(json.dumps({"error": error}).encode())
        control.setblocking(False)
        while True:
            data, descriptors, _, _ = socket.recv_fds(control, _CHUNK, 1)
            if not data:
                return
            with socket.socket(fileno=descriptors[0]) as channel:
                channel.sendall(f"\n{error}\n".encode())


def main() -> int:
    """Serve the supervisor at the other end of the control socket, whose descriptor is the only argument."""
    control = socket.socket(fileno=int(sys.argv[1]))
    asked = json.loads(control.recv(_CHUNK))
    try:
        with connected(asked["address"]) as cluster:
            slots = asked["slots"] or plan(asked, Patience(control, asked["wait"]))
            relay = Relay(control, asked, slots, cluster.address)
            try:
                if asked["slots"] is None:
                    relay.wait(Patience(control, asked["wait"]))
                control.send(json.dumps({"slots": slots, "address": cluster.address}).encode())
                asyncio.run(relay.serve())
            finally:
                relay.close()
    except SetformerError as error:
        _refuse(control, str(error))
        return error.exit_code
    except RayError as error:
        _refuse(control, f"the Ray cluster does not answer any more: {_short(error)}")
        return LaunchError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
