"""The driver of a run's refreshes on Ray, a child of rank 0: carries problems to the service and solutions back.

    rank 0 --socket--> courier (this process) --object store--> service, an actor that all runs of a cluster share

What comes over the control socket, and what goes back:

    {"digest": D, "size": N} with a descriptor of N bytes: a problem; the one before it is forgotten
    {"late": true}: nobody waits for it any more
    {"digest": D, "size": N} with a descriptor: its solution; or {"digest": D, "error": sentence}
    {"said": sentence}: why there is no solution yet

The service is an actor with a name, and with a number, as the name of a dead one cannot be used again. The courier that
finds none begins one, and it ends with that courier; the couriers of other runs then begin the next one. So no service
outlives the runs of its cluster. One that has died, or does not answer, is replaced, and the problem is given to the
next one: equal problems have equal solutions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.ray.cluster import NAMESPACE, connected
from setformer_dist.core.errors import LaunchError, SetformerError

_HOME = Path(__file__).resolve().parents[2]
_PREFIX = "refit-"  # of the names of services; then come the version of the code, and a number
_WORD = 1 << 16
_TICK_S = 0.05
_AGAIN_S = 0.5  # between two tries
_ASK_S = 3.0  # between two signs of life of the service
_DEAF_S = 15.0  # a service that answered once and does not for so long is replaced
_DUMB_S = 120.0  # likewise one that never answered: it may still import
_FOUND_S = 40.0  # likewise, where another courier has begun it
_ANSWER_S = 3.0


class RefitService:
    """Solves problems on a node of the cluster. Pickled by value: no node needs this module to be importable."""

    def __init__(self, home: str) -> None:
        """Import what solves."""
        sys.path.insert(0, home)
        os.setpriority(os.PRIO_PROCESS, 0, max(15, os.getpriority(os.PRIO_PROCESS, 0)))  # ranks may be beside it
        self._fits = importlib.import_module("launch.ray.fits").Fits()

    def fit(self, problem: Any) -> bytes:
        """Return the solution of a problem, an array of bytes."""
        return bytes(self._fits.fit(problem.tobytes()))

    def lives(self) -> int:
        """Return the process id; answered also while it solves."""
        return os.getpid()


class Job:
    """A problem that is being solved."""

    def __init__(self, digest: str, descriptor: int, size: int) -> None:
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as memory:
            self.problem = np.frombuffer(memory[:], dtype=np.uint8)
        os.close(descriptor)
        self.digest = digest
        self.answer: Any = None  # of the service
        self.not_before = 0.0


class Courier:
    """Serves rank 0."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._version = version()
        self._service: Any = None
        self._number = 0  # of the service
        self._dead: set[int] = set()  # numbers of those that have ended
        self._asked: Any = None  # for a sign of life
        self._asked_at = 0.0
        self._heard = False
        self._found = False  # the service, which another courier has begun
        self._job: Job | None = None
        self._told = ""

    def serve(self) -> None:
        """Serve until rank 0 goes away."""
        self._try(self._begin_service)
        while True:
            readable, _, _ = select.select([self._control], [], [], _TICK_S if self._job else None)
            if readable and not self._receive():
                return
            if self._job is not None and time.monotonic() >= self._job.not_before:
                self._try(self._carry)

    def _receive(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, _WORD, 1)
        if not data:
            return False
        word = json.loads(data)
        if "late" in word:
            self._job = None
            self._try(self._replace_deaf, _ANSWER_S)
            self._say({"said": ""})
        else:
            self._job = Job(word["digest"], descriptors[0], word["size"])
            self._told = ""
        return True

    def _try(self, act: Callable[..., object], *args: object) -> None:
        """Call something; where the service or its node is gone, the problem is for the next one."""
        job = self._job
        try:
            act(*args)
        except RayTaskError as error:
            if job is not None:
                self._say({"digest": job.digest, "error": _short(error)})
            self._job = None
        except (RayError, ValueError) as error:  # a ValueError is an actor's name that has just become free
            self._tell(_short(error))
            if isinstance(error, ActorUnavailableError):  # it may live, and be suspended
                self._kill()
            self._forget_service(dead=isinstance(error, RayActorError))

    def _carry(self) -> None:
        """Give the problem to the service, or its solution to rank 0."""
        job = self._job
        assert job is not None
        if job.answer is None:
            job.answer = self._begin_service().fit.remote(ray.put(job.problem))
        done, _ = ray.wait([job.answer], timeout=0)
        if done:
            self._deliver(job, ray.get(job.answer))
        elif time.monotonic() - self._asked_at > _ASK_S:
            self._replace_deaf()

    def _deliver(self, job: Job, solution: bytes) -> None:
        descriptor = os.memfd_create("refitted")
        try:
            os.truncate(descriptor, len(solution))
            with mmap.mmap(descriptor, len(solution)) as memory:
                memory[:] = solution
            self._say({"digest": job.digest, "size": len(solution)}, descriptor)
        finally:
            os.close(descriptor)
        self._job = None

    def _tell(self, why: str) -> None:
        """Say why there is no solution yet, each reason once: rank 0 looks now and then."""
        if why != self._told:
            self._say({"said": why})
            self._told = why

    def _say(self, word: dict[str, Any], *descriptors: int) -> None:
        socket.send_fds(self._control, [json.dumps(word).encode()], descriptors)

    # The service.

    def _begin_service(self) -> Any:
        """Return the service of this cluster and version, which is begun where there is none."""
        if self._service is None:
            self._number, self._found = self._chosen()
            self._service = (
                ray.remote(RefitService)
                .options(
                    name=f"{_PREFIX}{self._version}-{self._number}",
                    namespace=NAMESPACE,
                    get_if_exists=True,
                    num_cpus=0,  # it takes no rank's place
                    max_concurrency=4,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(emptiest_node(), soft=True),
                )
                .remote(str(_HOME))
            )
            self._asked, self._heard = None, False
            self._ask()
        return self._service

    def _chosen(self) -> tuple[int, bool]:
        """Return the number of the service that lives, or of the next one, and whether one lives.

        Ray's client takes a name for that of an actor of another driver for ever, also once that is dead.
        """
        beginning = f"{_PREFIX}{self._version}-"
        named = [name.removeprefix(beginning) for name in list_named_actors() if name.startswith(beginning)]
        living = {int(number) for number in named} - self._dead
        return (max(living), True) if living else (max(self._dead, default=-1) + 1, False)

    def _ask(self) -> None:
        self._asked, self._asked_at = self._service.lives.remote(), time.monotonic()

    def _replace_deaf(self, patience_s: float = 0.0) -> None:
        """Ask the service for a sign of life; end it where it should give one and does not.

        Args:
            patience_s: how long to wait for it now; 0 looks at what was asked before.
        """
        if self._service is None:
            return
        if patience_s and self._heard:
            self._ask()
        longest_s = _DEAF_S if self._heard else _FOUND_S if self._found else _DUMB_S
        done, _ = ray.wait([self._asked], timeout=patience_s)
        if done:
            ray.get(self._asked)
            self._heard = True
            self._ask()
        elif (self._heard and patience_s) or time.monotonic() - self._asked_at > longest_s:
            self._tell("the refresh service gave no sign of life, and was ended")
            self._kill()
            self._forget_service(dead=True)

    def _kill(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self._service)

    def _forget_service(self, dead: bool) -> None:
        if dead:
            self._dead.add(self._number)
            self._service = None
        if self._job is not None:
            self._job.answer, self._job.not_before = None, time.monotonic() + _AGAIN_S


def version() -> str:
    """Return a digest of the code that solves: other code may find other bits, and has a service of its own."""
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for path in sorted([*(_HOME / "setformer_dist" / "ops").rglob("*.py"), Path(__file__).with_name("fits.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def emptiest_node() -> str:
    """Return the id of the node with the most free CPUs."""
    free = ray._private.state.available_resources_per_node()
    alive = [str(node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    return max(alive, key=lambda node: free.get(node, {}).get("CPU", 0.0))


def _short(error: Exception) -> str:
    """Return what an error of Ray says, without its list of common causes."""
    lines = [line.strip() for line in str(error).split(" Some common causes")[0].splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def main() -> int:
    """Serve rank 0 at the other end of a control socket; the arguments are its descriptor and the cluster's address."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the rank, which then ends this process
    try:
        with connected(sys.argv[2]):
            Courier(control).serve()
    except SetformerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except RayError as error:
        print(f"the Ray cluster does not answer any more: {_short(error)}", file=sys.stderr)
        return LaunchError.exit_code
    except OSError as error:  # rank 0 is gone
        print(error, file=sys.stderr)
        return LaunchError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
