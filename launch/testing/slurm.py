"""A real Slurm of one node on this machine: munged, slurmctld and slurmd from Debian. For tests and drills.

It takes root and the packages slurm-wlm and munge. Everything lies in one folder and is removed with it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil

_TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_READY_S = 40.0


def why_impossible() -> str | None:
    """Return why there can be no Slurm here, None where there can."""
    if os.geteuid() != 0:
        return "slurmd takes root"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)" if missing else None


class Slurm:
    """A cluster of this machine until the end of a with statement.

    Attributes:
        environment: in which Slurm's commands find it.
        folder: with its config, state and logs.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sf-slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _configure(self) -> None:
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        host, ports = socket.gethostname().partition(".")[0], _free_ports(2)
        (self.folder / "slurm.conf").write_text(
            f"""ClusterName=setformer
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
        )

    def _start(self) -> None:
        munge = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                 f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munge.pid",
                 f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"]  # fmt: skip
        conf = str(self.folder / "slurm.conf")
        for command in (munge, ["slurmctld", "-D", "-f", conf], ["slurmd", "-D", "-f", conf]):
            with (self.folder / f"{command[0]}.out").open("wb") as log:
                self._daemons.append(
                    subprocess.Popen(
                        command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True,
                    )
                )  # fmt: skip
            time.sleep(0.5)
        limit = time.monotonic() + _READY_S
        while "idle" not in self.run("sinfo", "--noheader", "--format=%T").stdout:
            if time.monotonic() > limit:
                raise RuntimeError("\n".join(p.read_text(errors="replace")[-2000:] for p in self.folder.glob("*.log")))
            time.sleep(0.5)

    def run(self, *words: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False)

    def close(self) -> None:
        """End all jobs and daemons, and remove the folder."""
        if len(self._daemons) > 1:
            self.run("scancel", "--signal=KILL", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for step in self._steps():  # each waits for a slurmctld that takes its report
            step.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[psutil.Process]:
        """Return the processes that look after jobs of this Slurm."""
        found = []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if process.info["name"] == "slurmstepd" and any(
                    file.path.startswith(str(self.folder)) for file in process.open_files()
                ):
                    found.append(process)
        return found


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
