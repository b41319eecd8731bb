"""The nodes of a queue, and the command that starts a job on some of them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.queue.config import ClusterTable
from launch.queue.state import Placement
from launch.ranks.environment import has_gpu, usable_cores
from launch.ranks.processes import die_with_parent

_HOME = Path(__file__).resolve().parents[2]
_SILENT_S = 30.0
WATCH_MODULE = "launch.ray.watch"


def local_slots(table: ClusterTable) -> int:
    """Return how many ranks this machine has room for."""
    return table.slots or len(_gpus()) or usable_cores()


def _gpus() -> list[str]:
    """Return the GPUs that processes of this machine may use, as CUDA_VISIBLE_DEVICES names them."""
    if not has_gpu(os.environ):
        return []
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


class Nodes:
    """Looks at the nodes of a cluster."""

    def __init__(self, table: ClusterTable) -> None:
        self._table = table
        self._child: subprocess.Popen[bytes] | None = None
        self._came = b""
        self._rooms: dict[str, int] = {}
        self._heard = 0.0

    def look(self) -> dict[str, int]:
        """Return the slots of each node that is up."""
        if self._table.kind == "local":
            return {socket.gethostname(): local_slots(self._table)}
        if self._table.kind == "hosts":
            return dict(self._table.nodes)
        self._listen()
        return dict(self._rooms) if time.monotonic() - self._heard < _SILENT_S else {}

    def _listen(self) -> None:
        """Read what the child says, which is a driver of the Ray cluster; start it where it is gone."""
        if self._child is None or self._child.poll() is not None:
            path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", WATCH_MODULE, self._table.ray],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
            assert self._child.stdout is not None
            os.set_blocking(self._child.stdout.fileno(), False)
            self._came = b""
        assert self._child.stdout is not None
        self._came += self._child.stdout.read() or b""
        *lines, self._came = self._came.split(b"\n")
        for line in lines[-1:]:
            with contextlib.suppress(ValueError):
                self._rooms = {str(name): int(slots) for name, slots in json.loads(line).items()}
                self._heard = time.monotonic()

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()


def command(table: ClusterTable, words: Sequence[str], placement: Placement) -> list[str]:
    """Return the command of a run on some nodes, of the words that begin it."""
    if table.kind == "hosts":
        return [*words, "--hosts", named(placement)]
    if table.kind == "ray":
        return [*words, "--ray", table.ray, "--ray-nodes", named(placement)]
    return [*words, "--ranks", str(sum(count for _, count in placement))]


def named(placement: Placement) -> str:
    """Return nodes and the ranks of each as options take them."""
    return ",".join(f"{name}:{count}" for name, count in placement)


def program() -> list[str]:
    """Return the words that begin every command of this program."""
    safe = [] if Path.cwd().resolve() == _HOME else ["-P"]
    return [sys.executable, *safe, "-m", "launch.cli"]


def devices_for(table: ClusterTable, ranks: int, taken: Sequence[Sequence[str]]) -> list[str] | None:
    """Return the GPUs of a job on this machine that no other has; None where there are none to choose.

    Args:
        table: of the cluster.
        ranks: of the job.
        taken: GPUs of the jobs that run.
    """
    if table.kind != "local" or not (gpus := _gpus()):
        return None
    used = {device for devices in taken for device in devices}
    free = [gpu for gpu in gpus if gpu not in used]
    return free[:ranks] if len(free) >= ranks else None


def environment(table: ClusterTable, devices: Sequence[str] | None) -> Mapping[str, str]:
    """Return what a job finds in its environment.

    On this machine each rank has its share of the cores, however many ranks the job has: a job that is stopped and
    started elsewhere in the queue computes with the same number of threads, and so the same bits.
    """
    found = {"PYTHONPATH": os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))}
    if table.kind == "local":
        if "OMP_NUM_THREADS" not in os.environ:
            found["OMP_NUM_THREADS"] = str(max(1, usable_cores() // local_slots(table)))
        if devices is not None:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return found
