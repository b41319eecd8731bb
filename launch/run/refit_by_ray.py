"""New reference sets from a service on a Ray cluster: the end of it that rank 0 has.

    rank 0 --control socket, memory--> courier (`launch.ray.courier`, its child, the cluster's driver) --> service

The package ray is not imported: Ray ends a driver that loses its cluster, and the rank must survive that. What travels
lies in memory that both map (`memfd`), so that rank 0 never waits for the courier. Whatever becomes of courier, service
and cluster, `finish` ends after `refresh.wait_s`, and `refresh.late` says with what.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from launch.ranks.processes import die_with_parent
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.heartbeat import Heartbeat
from setformer_dist.engine.comm import TorchCollectives
from setformer_dist.engine.config import RefreshConfig
from setformer_dist.engine.refitter import InJob, Refitted, united
from setformer_dist.ops.refit import Problem
from setformer_dist.ops.refit_bytes import Figures, problem_bytes, solution_of

COURIER_MODULE = "launch.ray.courier"
_HOME = Path(__file__).resolve().parents[2]
_SLICE_S = 0.2  # of a wait, in which all ranks give signs of life
_AGAIN_S = 1.0  # between two starts of a courier that ends
_END_S = 5.0
_WORD = 1 << 16
# How to reach a cluster; all else is Ray's own, of a rank that is a worker of it.
_PASSED_ON = ("RAY_ADDRESS", "RAY_AUTH_", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")

log = logging.getLogger(__name__)


class ByRay:
    """A refitter (`engine.refitter.Refitter`) whose service is on a Ray cluster.

    Args:
        config: of the refreshes.
        comm: of all ranks.
        heartbeat: of this rank.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, config: RefreshConfig, comm: TorchCollectives, heartbeat: Heartbeat) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("refresh.by = 'ray' needs Ray: pip install 'setformer_dist[ray]', or take 'job'")
        self._config, self._comm, self._heartbeat = config, comm, heartbeat
        self._job = InJob(comm.ranks, torch.device("cpu"), comm.tensors)
        self._problem: Problem | None = None
        self._courier = Courier(config.address) if comm.ranks.is_main else None

    def begin(self, step: int, problem: Problem) -> None:
        """Hand a problem to the service, and go on."""
        self._problem = problem
        self._job.begin(step, problem)
        if self._courier is not None:
            self._courier.send(problem_bytes(problem, torch.get_num_threads()))

    def finish(self, step: int) -> Refitted:
        """Return what the service has found, or what `refresh.late` says."""
        problem, self._problem = self._problem, None
        assert problem is not None
        solution, late = self._wait(problem)
        if late and self._courier is not None:
            self._courier.give_up()
        if not late:
            new, found = solution or ({}, {})
            return Refitted(self._shared(new, problem), found, "ray")
        if self._config.late == "keep":
            return Refitted(None, {}, "ray", late)
        if self._comm.ranks.is_main:
            log.warning("the ranks compute the new references of step %d: %s", step, late)
        computed = self._job.finish(step)
        return Refitted(computed.sets, computed.figures, "job", late)

    def close(self) -> None:
        """End the courier; the service ends with it, unless another run has begun it."""
        if self._courier is not None:
            self._courier.close()

    def _wait(self, problem: Problem) -> tuple[tuple[dict[str, torch.Tensor], Figures] | None, str]:
        """Wait for the service; return its solution, on rank 0, or why there is none. All ranks agree."""
        limit = time.monotonic() + self._config.wait_s
        while True:
            self._heartbeat.beat("refresh")
            solution, word = None, ""
            if self._courier is not None:
                came = self._courier.look(max(0.0, min(_SLICE_S, limit - time.monotonic())))
                if isinstance(came, bytes):
                    try:
                        solution, word = solution_of(came, problem), "solved"
                    except ValueError as error:
                        word = f"the answer of the refresh service {error}"
                elif came is not None:
                    word = came
                elif time.monotonic() >= limit:
                    said = f" ({self._courier.said})" if self._courier.said else ""
                    word = f"no answer of the refresh service within {self._config.wait_s:g} s{said}"
            word = self._comm.broadcast_json(word)
            if word:
                return solution, "" if word == "solved" else word

    def _shared(self, new: dict[str, torch.Tensor], problem: Problem) -> dict[str, torch.Tensor]:
        """Return rank 0's sets on every rank, bit by bit. Collective."""
        shapes = {layer.parameter(kind): layer.shapes[kind] for layer, kind in problem.asked(*problem.sets)}
        bits = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
        if new:
            bits = {name: new[name].view(torch.int32) for name in shapes}
        return united(bits, self._comm.tensors)


class Courier:
    """The process that carries problems to the service and solutions back; no call waits longer than it is told to.

    Attributes:
        said: what it said last beside answers: why there is none yet.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - of all couriers; closed with this object
        self._problem: bytes | None = None
        self._digest = ""
        self._started_at = 0.0
        self._silent = False  # it was told something and has said nothing since
        self._process: subprocess.Popen[bytes] | None = None
        self.said = ""
        self._start()  # its imports, and those of the service, then take none of the time of the first refresh

    def send(self, problem: bytes) -> None:
        """Send a problem; the one before it is forgotten."""
        digest = hashlib.sha256(problem).hexdigest()
        if digest == self._digest and self._problem is not None:
            return  # a run that goes back to a checkpoint asks again
        self.look(0.0)
        if self._silent:  # it is suspended
            self._end()
        self._problem, self._digest, self.said = problem, digest, ""
        self._hand_over()

    def look(self, seconds: float) -> bytes | str | None:
        """Wait for a while; return the solution, why there will be none, or None where nothing has come."""
        limit = time.monotonic() + seconds
        if self._process is None:
            if time.monotonic() - self._started_at < _AGAIN_S:
                time.sleep(seconds)
                return None
            self._hand_over()
        while self._process is not None:
            self._control.settimeout(max(0.001, limit - time.monotonic()))
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, _WORD, 1)
            except TimeoutError:
                return None
            except OSError:
                data, descriptors = b"", []
            if not data:
                self.said = self._last_line() or self.said
                self._end()
                return None
            word, self._silent = json.loads(data), False
            self.said = str(word.get("said", self.said))
            if self._problem is None or word.get("digest") != self._digest:
                for descriptor in descriptors:
                    os.close(descriptor)
            elif descriptors or "error" in word:
                self._problem = None
                if descriptors:
                    return _taken(descriptors[0], int(word["size"]))
                return f"the refresh service failed: {word['error']}"
        return None

    def give_up(self) -> None:
        """Ask for no answer any more, and have the courier see whether the service still lives."""
        self._problem, self._silent = None, True
        self._say({"late": True})

    def close(self) -> None:
        """End the process."""
        self._end(_END_S)
        self._errors.close()

    def _hand_over(self) -> None:
        """Give the problem to the process, which is started where there is none."""
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._start()
        if self._problem is not None:
            with contextlib.closing(_Memory(self._problem)) as memory:
                self._say({"digest": self._digest, "size": len(self._problem)}, memory.descriptor)

    def _say(self, word: dict[str, Any], *descriptors: int) -> None:
        if self._process is None:
            return
        try:
            self._control.setblocking(False)
            socket.send_fds(self._control, [json.dumps(word).encode()], descriptors)
        except OSError:  # it has ended, or is suspended and its buffer is full
            self._end()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
        kept = {n: v for n, v in os.environ.items() if not n.startswith("RAY_") or n.startswith(_PASSED_ON)}
        self._started_at, self._silent = time.monotonic(), False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", COURIER_MODULE, str(theirs.fileno()), self._address],
                env={**kept, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
                preexec_fn=die_with_parent(),
            )

    def _end(self, seconds: float = 0.0) -> None:
        """End the process, which may take some seconds to do so by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        self._control.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class _Memory:
    """Bytes in memory without a name, for another process; the kernel frees it when nobody has it open."""

    def __init__(self, data: bytes) -> None:
        self.descriptor = os.memfd_create("refit")
        os.truncate(self.descriptor, len(data))
        with mmap.mmap(self.descriptor, len(data)) as memory:
            memory[:] = data

    def close(self) -> None:
        os.close(self.descriptor)


def _taken(descriptor: int, size: int) -> bytes:
    try:
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as memory:
            return memory[:]
    finally:
        os.close(descriptor)
