"""The command line as a user starts it, and what it left behind; for tests and benchmarks in a checkout.

Commands are forked from a process that has imported what they need, where that is possible (`warm.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.testing.warm import Warm, possible

ROOT = Path(__file__).parent.parent.parent
DEMO = str(ROOT / "configs" / "runs" / "demo.toml")

# A short run of the demo's config: 1 epoch of 22 steps, every loss on record. In fp32, as bf16 takes a CPU without
# instructions for it twice as long; one thread a rank, as other tests run at the same time.
SHORT = (
    "precision.dtype=fp32",
    "run.threads=1",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0.2",
    "run.log_every=1",
    "eval.every_epochs=0",
    "checkpoint.every_steps=5",
)

Process = subprocess.Popen[str] | Warm

_started: list[Process] = []


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """Return the lines that begin with "error:"."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def command(*words: str) -> list[str]:
    """Return the words that run `setformer` in this environment."""
    return [sys.executable, "-m", "launch.cli.main", *words]


def environment() -> dict[str, str]:
    """Return this process's environment without a rank's place, with the checkout's packages first."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "COLUMNS": "200"}


def setformer(*words: str, timeout: float = 280, cwd: Path = ROOT) -> Ended:
    """Run `setformer words` to its end."""
    return module("launch.cli.main", *words, timeout=timeout, cwd=cwd)


def module(*words: str, timeout: float = 280, cwd: Path = ROOT) -> Ended:
    """Run `python -m words` to its end; the first word is a module that is found from the checkout."""
    if possible():
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = Warm(words, environment(), cwd, out, err)
            try:
                said = process.communicate(timeout)
            finally:
                process.kill()
        assert process.returncode is not None
        return Ended(process.returncode, *said)
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def start(*words: str) -> Process:
    """Start `setformer words`; it obeys Ctrl-C even where this process does not (a shell's background job).

    What still runs when `end_all` is called is killed.
    """
    process: Process
    if possible():
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process is known
        process = Warm(["launch.cli.main", *words], environment(), ROOT, out, err)
    else:
        process = subprocess.Popen(
            command(*words),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=allow_ctrl_c,
            start_new_session=True,
        )
    _started.append(process)
    return process


def end_all() -> None:
    """Kill every command that `start` has started and that still runs; its ranks die with it."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def allow_ctrl_c() -> None:
    """Take SIGINT's default back, which a background job inherits as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train_words(data: Path, out: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """Return the words of a short training of the demo's config."""
    return ["train", DEMO, f"data.root={data}", f"run.out={out}", *SHORT, *overrides, "--ranks", str(ranks)]


def losses(run_folder: Path) -> dict[tuple[str, int], tuple[float, float | None]]:
    """Return every loss of a run by kind and step; the last line of a step counts."""
    found: dict[tuple[str, int], tuple[float, float | None]] = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line) if line.strip().endswith("}") else {}
        if "loss" in row:
            found[row["kind"], row["step"]] = (row["loss"], row.get("ema_loss"))
    return found


def wait_for(path: Path, process: Process, timeout: float = 300) -> None:
    """Wait until a file is there, while the process runs."""
    limit = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, f"{path} did not come"
        time.sleep(0.05)


def running(processes: Iterable[psutil.Process], word: str = "") -> list[psutil.Process]:
    """Return which of some processes still run, and have a word in their name or command."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it ends while it is looked at
            ended = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
            if not ended and word in " ".join((process.name(), *(process.cmdline() if word else ()))):
                found.append(process)
    return found


def children(pid: int) -> list[int]:
    """Return all descendants of a process, none of one that has ended."""
    found: list[int] = []
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it ended since it was named, or the kernel was built without this file
        with contextlib.suppress(psutil.Error):
            found = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        return found
    for child in pids:
        found += [int(child), *children(int(child))]
    return found


def alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids: list[int], timeout: float = 10) -> None:
    """Wait until none of the processes runs."""
    limit = time.monotonic() + timeout
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < limit, f"left behind: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.05)


def kill_ranks(process: Process) -> None:
    """Kill every rank of a run, and what it started, with SIGKILL."""
    for pid in children(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
