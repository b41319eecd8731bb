"""A Ray cluster on two hosts that are network namespaces, for tests."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.drill.namespaces import Cluster
from launch.testing.commands import ROOT

PORT = 6399
TOKEN = "0123456789abcdef" * 4


class RayNodes:
    """A head on host a and a node on host b.

    Args:
        cluster: the hosts.
        cpus: that Ray counts of each.

    Attributes:
        address: of the cluster.
        folder: with what the nodes said.
    """

    def __init__(self, cluster: Cluster, cpus: int = 1) -> None:
        self.cluster = cluster
        self._cpus = cpus
        self.folder = Path(tempfile.mkdtemp(prefix="sf-ray-"))
        self.address = f"{cluster.address('a')}:{PORT}"
        self._started: list[subprocess.Popen[str]] = []

    def on(self, host: str, words: list[str], log: Path) -> subprocess.Popen[str]:
        """Run a command on a host, in its namespaces."""
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
                     "PYTHONPATH": str(ROOT)}  # fmt: skip
        line = f"cd {ROOT} && exec env {shlex.join([*(f'{k}={v}' for k, v in variables.items()), *words])}"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["ssh", "-F", str(self.cluster.config), host, line], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                text=True, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def boot(self, host: str) -> None:
        """Start a host's Ray, and wait for it."""
        where = ["--head", "--port", str(PORT), "--include-dashboard", "false"] if host == "a" else [
            "--address", self.address]  # fmt: skip
        ray = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block", "--num-cpus", str(self._cpus),
            "--node-ip-address", self.cluster.address(host), "--object-store-memory", str(80_000_000),
            "--dashboard-agent-listen-port", "0", "--include-log-monitor", "false",
        ]  # fmt: skip
        ray += ["--temp-dir", str(self.folder / host)]
        log = self.folder / f"{host}.log"
        reachable = ["ssh", "-F", str(self.cluster.config), host, "true"]
        while subprocess.run(reachable, check=False, capture_output=True, timeout=30).returncode:
            time.sleep(0.2)  # its sshd starts
        process = self.on(host, ray, log)
        limit = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.1)

    def close(self) -> None:
        """End all that runs on the hosts."""
        for host in self.cluster.names:
            self.cluster.kill(host)
        for process in self._started:
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
