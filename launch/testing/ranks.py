"""Run a function on N gloo ranks as an ordinary test: processes, a file to meet at, a hard time limit.

python -m launch.testing.ranks MODULE FUNCTION ARGUMENTS RESULT    is what each of them runs
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from launch.testing.warm import Warm, possible
from setformer_dist.core.exits import leave


class RanksFailedError(AssertionError):
    """A rank failed or the time limit passed; the message holds every rank's output."""


def run_ranks(
    function: Any,
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    env: dict[str, str] | None = None,
    cold: bool = False,
) -> list[Any]:
    """Run `function(*args)` in `world_size` processes with RANK and the rest set; return their results by rank.

    Args:
        function: at the top level of an importable module; arguments and result must go through JSON.
        world_size: number of processes.
        args: JSON-able arguments.
        timeout: seconds until all processes are killed.
        env: added to each process's environment.
        cold: start each process by itself, though it could be forked (`warm.py`): where memory or time is measured.

    Raises:
        RanksFailedError: a process exits with an error, or the time is up.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        files = []
        for rank in range(world_size):
            out = Path(folder) / f"result-{rank}.json"
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "SETFORMER_RENDEZVOUS": f"file://{folder}/meet",
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                **(env or {}),
            }
            log = (Path(folder) / f"log-{rank}.txt").open("w+b")
            files.append((out, log))
            what = [__name__, _module_of(function), function.__name__, json.dumps(args), str(out)]
            processes.append(_start(what, environment, log, cold))
        try:
            _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(p.returncode for p in processes):
            raise RanksFailedError(_outputs(processes, files))
        return [json.loads(out.read_text()) for out, _ in files]


def _start(what: list[str], environment: dict[str, str], log: IO[bytes], cold: bool) -> subprocess.Popen[bytes] | Warm:
    if possible() and not cold:
        return Warm(what, environment, Path.cwd(), log)
    return subprocess.Popen(
        [sys.executable, "-m", *what],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _module_of(function: Any) -> str:
    """Return the name by which another process can import the function's module."""
    if function.__module__ != "__main__":
        return str(function.__module__)
    spec = sys.modules["__main__"].__spec__  # started with `python -m`
    assert spec is not None, "a script's functions cannot be imported: start it with python -m"
    return spec.name


def _wait(processes: Sequence[subprocess.Popen[bytes] | Warm], timeout: float) -> None:
    """Return when all ended, one failed, or the time is up."""
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        codes = [p.poll() for p in processes]
        if all(c is not None for c in codes):
            return
        if any(c for c in codes):
            time.sleep(1.0)  # let the others say what they saw
            return
        time.sleep(0.02)


def _outputs(processes: Sequence[subprocess.Popen[bytes] | Warm], files: list[Any]) -> str:
    parts = []
    for rank, (process, (_, log)) in enumerate(zip(processes, files, strict=True)):
        log.seek(0)
        text = log.read().decode(errors="replace")[-4000:]
        parts.append(f"--- rank {rank}, exit code {process.returncode}\n{text}")
    return "\n".join(parts)


def _main(module: str, name: str, arguments: str, out: str) -> None:
    function = getattr(importlib.import_module(module), name)
    Path(out).write_text(json.dumps(function(*json.loads(arguments))))
    leave(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
