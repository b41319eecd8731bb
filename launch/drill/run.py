"""The run that faults are made in: the demo's config as a user starts it, and a hand on its processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.examples.demo import CONFIG
from launch.ranks.processes import ENTRY_MODULE, die_with_parent
from setformer_dist.core import ledger

CHECKPOINT_EVERY = 20
_SILENCE_S = 180.0  # longest time without a word from the run
_LIMIT_S = 1800.0  # longest time that a recovery or a run's end may take, whatever it says


class DrillRun:
    """One run of the demo's config as a user starts it, and a hand on its processes.

    Args:
        out: folder of its run folder.
        data: packed digits.
        crew: words of the command that say where ranks run, as `--ranks 2`.
        epochs: its length.
    """

    def __init__(self, out: Path, data: Path, crew: Sequence[str], epochs: int) -> None:
        out.mkdir()
        self.out = out
        self.folder = out / "demo"
        self._words = [
            sys.executable,
            *("-m", "launch.cli.main", "train", str(CONFIG), f"data.root={data}", f"run.out={out}", "run.seed=0"),
            *(
                f"schedule.epochs={epochs}",
                "run.log_every=1",
                "run.threads=1",
                "run.record_samples=true",
                "eval.every_epochs=0",
            ),
            *(f"checkpoint.every_steps={CHECKPOINT_EVERY}", "checkpoint.keep_last=3", "restart.backoff_s=0.1"),
            *("restart.limit=1000", "restart.hang_after_s=8", "restart.start_after_s=120", "restart.same_step=20"),
            *crew,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._log = out / "drill.log"

    def start(self) -> None:
        """Start the command, or start it again; it does not outlive this process."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    @property
    def code(self) -> int | None:
        """The command's exit code, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def launcher(self) -> int:
        """Process id of the command."""
        assert self._process is not None
        return self._process.pid

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks on this machine, by rank; empty between two attempts."""
        return ranks_below(self.launcher)

    def events(self) -> list[dict[str, Any]]:
        """Return the ledger."""
        return ledger.read_events(self.folder)

    def reached(self) -> int:
        """Return the steps done so far in the present or the last attempt, as its lines say."""
        last = 0
        for event in self.events():
            if event["event"] in ("began", "spent"):
                last = int(event["step"])
        return last

    def complete(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        manifests = (self.folder / "checkpoints").glob("step-*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)

    def newest(self) -> int:
        """Return the step of the newest complete checkpoint, 0 where there is none."""
        return max(self.complete(), default=0)

    def began(self) -> int:
        """Return how many attempts have come to their first step."""
        return sum(e["event"] == "began" for e in self.events())

    def stepped(self, begun: int) -> bool:
        """Return whether an attempt after the first `begun` ones has done an optimizer step."""
        firsts = [int(e["step"]) for e in self.events() if e["event"] == "began"]
        return len(firsts) > begun and self.logged() > firsts[-1]

    def logged(self) -> int:
        """Return the last optimizer step that was logged, 0 before the first."""
        last = 0
        with contextlib.suppress(OSError):
            for line in (self.folder / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    last = int(row["step"]) if row["kind"] == "train" else last
        return last

    def hosts(self) -> list[str]:
        """Return the hosts of the last attempt; none where it is this machine."""
        return next((list(e.get("hosts", ())) for e in reversed(self.events()) if e["event"] == "attempt"), [])

    def noticed(self, since: float) -> float | None:
        """Return the seconds from a time of the clock to the next end of an attempt, None where none was recorded."""
        return next((e["time"] - since for e in self.events() if e["event"] == "ended" and e["time"] > since), None)

    def trains(self) -> bool:
        """Return whether an attempt has come to its first step and has not ended, as far as anybody wrote it."""
        return bool(events := self.events()) and events[-1]["event"] in ("began", "spent", "saved")

    def wait(self, until: Callable[[], bool], limit_s: float | None = None) -> bool:
        """Wait; return whether it came in time.

        Args:
            until: asked again and again.
            limit_s: time that it may take; by default as long as the run says something now and then, since a busy
                machine takes its time.
        """
        begun = silent = time.monotonic()
        said = self._size()
        while not until():
            now = time.monotonic()
            if self._size() != said:
                said, silent = self._size(), now
            late = now - begun > limit_s if limit_s else now - silent > _SILENCE_S or now - begun > _LIMIT_S
            if late:
                return False
            time.sleep(0.01)
        return True

    def _size(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0

    def end(self) -> None:
        """Kill the command; its ranks die with it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def said(self) -> str:
        """Return the last lines that the command printed."""
        return "\n  ".join(self._log.read_text(errors="replace").splitlines()[-15:])


def ranks_below(pid: int) -> list[int]:
    """Return the ranks that a process has started, and those that other processes have started for it."""
    return [rank for child in children(pid) for rank in ([child] if is_rank(child) else ranks_below(child))]


def children(pid: int) -> list[int]:
    """Return the processes that a process has started; none where it has ended."""
    return [int(child) for child in _read(pid, f"task/{pid}/children").split()]


def words_of(pid: int) -> list[str]:
    """Return a process's command line."""
    return _read(pid, "cmdline").split("\0")


def is_rank(pid: int) -> bool:
    """Return whether a process is a rank: started as one, or forked from an interpreter that has all imported."""
    return runs_module(pid, ENTRY_MODULE) or _read(pid, "comm").startswith("rank ")


def runs_module(pid: int, module: str) -> bool:
    """Return whether a process was started as `python -m module`."""
    words = words_of(pid)
    return any(pair == ("-m", module) for pair in itertools.pairwise(words))


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that nobody has waited for does not."""
    return _read(pid, "stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])
