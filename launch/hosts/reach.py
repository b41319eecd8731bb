"""The command that starts an agent on a host: here, behind ssh, behind srun, or behind any prefix of the user's."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.hosts.channel import Command, Opener
from setformer_dist.core.errors import LaunchError

AGENT_MODULE = "launch.hosts.agent"
# What one rank of each host runs for `setformer doctor`, how its line begins, and what it reduces.
PROBE_MODULE, PROBE_MARK, PROBE_BYTES = "launch.run.probe", "setformer probe ", 8 << 20
_HOME = Path(__file__).resolve().parents[2]
_LOCAL = ("localhost", "127.0.0.1")
# No question can be answered over the agent's pipes; a connection that is dead is noticed by us, sooner than by ssh.
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10")

# Variables that travel by themselves; what belongs to one host (devices, paths, sessions) stays there.
_PREFIXES = ("OMP_", "MKL_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "DS_", "HF_",
             "WANDB_", "MLFLOW_", "AWS_", "UCX_", "FI_", "SETFORMER_", "PYTHON")  # fmt: skip
_STAY = ("SETFORMER_LOG_DIR", "SETFORMER_HEARTBEAT_FD", "SETFORMER_SCRATCH", "PYTHONPATH", "PYTHONHOME")


def agent_command(host: str, via: str | None, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the command that starts an agent.

    Args:
        host: its name.
        via: how to reach it: None for a child of this process where it is this machine and for ssh where it is not,
            "ssh", "srun", or a prefix with {host} in it.
        environ: of this process.

    Raises:
        LaunchError: a prefix that cannot be read.
    """
    path = os.pathsep.join(filter(None, (str(_HOME), environ.get("PYTHONPATH"))))
    agent = ["env", f"PYTHONPATH={path}", sys.executable, "-P", "-m", AGENT_MODULE, "--directory", str(Path.cwd())]
    if via is None and is_here(host):
        return agent
    if via in (None, "ssh"):
        return [*_SSH, host, shlex.join(agent)]
    if via == "srun":
        return ["srun", "--nodelist", host, "--nodes=1", "--ntasks=1", "--overlap", "--input=all", "--unbuffered",
                "--quit-on-interrupt", *agent]  # fmt: skip
    assert via is not None
    try:
        words = shlex.split(via)
    except ValueError as error:
        raise LaunchError(f"--via {via!r} cannot be split into words: {error}") from None
    if "{host}" not in via:
        raise LaunchError(f"--via {via!r} has no place for the host's name: write {{host}} where it belongs")
    prefix = [word.replace("{host}", host) for word in words]
    # ssh hands what it is given to a shell; docker and kubectl hand on words.
    return [*prefix, shlex.join(agent)] if Path(prefix[0]).name == "ssh" else [*prefix, *agent]


def opener(via: str | None) -> Opener:
    """Return what opens a channel to a host; `via` is as in `agent_command`."""
    return lambda host: Command(host, agent_command(host, via))


def is_here(host: str) -> bool:
    """Return whether a name is this machine's own."""
    return host in (*_LOCAL, socket.gethostname(), socket.gethostname().partition(".")[0])


def travelling(names: tuple[str, ...], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that go along to every host.

    Args:
        names: `launch.env`: names, or NAME=value.
        environ: of this process.

    Raises:
        LaunchError: a variable that is to travel is not set.
    """
    found = {name: value for name, value in environ.items() if name.startswith(_PREFIXES) and name not in _STAY}
    for entry in names:
        name, given, value = entry.partition("=")
        if not given and name not in environ:
            raise LaunchError(f"launch.env names {name}, which is not set here: set it, or take it out")
        found[name] = value if given else environ[name]
    return found
