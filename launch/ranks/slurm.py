"""What Slurm says of the hosts of a job."""

from __future__ import annotations

import re
import subprocess

from setformer_dist.core.errors import LaunchError

_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def hosts_of(nodes: str) -> list[str]:
    """Return the hosts of a list such as `node[1-4]`.

    Raises:
        LaunchError: scontrol does not name them.
    """
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"scontrol does not name the hosts of {nodes!r} ({error}): is it in PATH?") from None
    return done.stdout.split()


def tasks_of(text: str) -> list[int]:
    """Return the tasks on each host, of a text such as `4(x2),2`.

    Raises:
        LaunchError: it is not of this form.
    """
    tasks: list[int] = []
    for part in text.split(","):
        found = _TASKS.fullmatch(part.strip())
        if found is None:
            raise LaunchError(f"Slurm's tasks per host, {text!r}, cannot be read")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks
