"""The faults of the drill, and the run they are made in.

Everything here acts on the run from outside, as the world does: by signals, and by changing its files.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.examples.demo import PAGE
from launch.ranks.processes import die_with_parent
from setformer_dist.core import ledger
from setformer_dist.core.errors import DrillError
from setformer_dist.core.stopping import exit_code_of

CHECKPOINT_EVERY = 20
_SILENCE_S = 180.0  # longest time without a word from the run
_LIMIT_S = 1800.0  # longest time that a recovery or a run's end may take, whatever it says


class Run:
    """One run of the demo's page as a user starts it, and a hand on its processes."""

    def __init__(self, out: Path, data: Path, ranks: int, seed: int, epochs: int) -> None:
        self.folder = out / "demo"
        self.data = data
        self._words = [
            sys.executable,
            *("-m", "launch.cli.main", "train", str(PAGE), f"data.root={data}", f"run.out={out}", f"run.seed={seed}"),
            *(f"schedule.epochs={epochs}", "run.log_every=1", "run.record_samples=true", "eval.every_epochs=0"),
            *(f"checkpoint.every_steps={CHECKPOINT_EVERY}", "checkpoint.keep_last=3", "restart.backoff_s=0.1"),
            *("restart.limit=1000", "restart.hang_after_s=8", "restart.start_after_s=60", "restart.same_step=20"),
            *("--ranks", str(ranks)),
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
        """Return the process ids of the ranks, by rank; empty between two attempts."""
        try:
            return [int(p) for p in Path(f"/proc/{self.launcher}/task/{self.launcher}/children").read_text().split()]
        except OSError:
            return []

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
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


@dataclass
class Hand:
    """What makes the faults. Each returns what it hit, and the step from which the run must go on at least:

    that of the newest complete checkpoint (of the one before, where a file of the newest is damaged), and the very
    step that it had reached where it was asked to stop.

    Attributes:
        run: the run they are made in.
        draw: the seed's own generator.
        disk: the small file system that the run is on, None where none could be made.
    """

    run: Run
    draw: random.Random
    disk: Path | None

    def kill_rank(self) -> tuple[str, int]:
        """SIGKILL to one rank."""
        newest = self.run.newest()
        return self._signal_a_rank(signal.SIGKILL), newest

    def stop_rank(self) -> tuple[str, int]:
        """SIGSTOP to one rank: it hangs."""
        self.run.wait(lambda: bool(self.run.ranks()) and self.run.trains())
        newest = self.run.newest()
        return self._signal_a_rank(signal.SIGSTOP), newest

    def kill_launcher(self) -> tuple[str, int]:
        """SIGKILL to the supervisor; all ranks must die with it."""
        ranks, newest = self.run.ranks(), self.run.newest()
        self.run.end()
        self._none_left(ranks)
        self.run.start()
        return "supervisor", newest

    def terminate(self) -> tuple[str, int]:
        """SIGTERM to the supervisor, as a scheduler does: nothing may be lost."""
        return self._asked_to_stop(self.run.launcher, signal.SIGTERM, "supervisor")

    def warn(self) -> tuple[str, int]:
        """SIGUSR1 to one rank alone, as Slurm's --signal may: nothing may be lost."""
        ranks = self.run.ranks()
        rank = self.draw.randrange(len(ranks)) if ranks else 0
        return self._asked_to_stop(ranks[rank] if ranks else self.run.launcher, signal.SIGUSR1, f"rank {rank}")

    def flip(self) -> tuple[str, int]:
        """A flipped byte in a file of the newest checkpoint."""
        return self._damage(self._flip_byte)

    def cut(self) -> tuple[str, int]:
        """A file of the newest checkpoint cut short."""
        return self._damage(lambda path: os.truncate(path, self.draw.randrange(path.stat().st_size)))

    def lose(self) -> tuple[str, int]:
        """A file of the newest checkpoint that is gone."""
        return self._damage(Path.unlink)

    def fill_disk(self) -> tuple[str, int]:
        """A full disk, for a while."""
        assert self.disk is not None
        newest = self.run.newest()
        ballast = self.disk / "ballast"
        free = shutil.disk_usage(self.disk).free
        with contextlib.suppress(OSError), ballast.open("wb") as file:  # closing fails, too, where the run was faster
            file.write(b"\0" * max(0, free - self.draw.randrange(64 << 10)))
        self.run.wait(lambda: self.run.code is not None, limit_s=self.draw.uniform(1, 4))
        ballast.unlink()
        if self.run.code is None:  # it went on without a checkpoint: let the next fault find out what that cost
            self.run.end()
        self.run.start()
        return f"{free >> 20} MiB taken", newest

    def _signal_a_rank(self, number: int) -> str:
        self.run.wait(lambda: bool(self.run.ranks()) or self.run.code is not None, limit_s=10)
        ranks = self.run.ranks()
        if not ranks:
            return "nobody there"
        rank = self.draw.randrange(len(ranks))
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank], number)
        return f"rank {rank}"

    def _asked_to_stop(self, pid: int, number: int, name: str) -> tuple[str, int]:
        """Signal, wait for the clean end, start again."""
        begun, reached, newest = self.run.trains(), self.run.reached(), self.run.newest()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        ended = self.run.wait(lambda: self.run.code is not None, limit_s=60)
        if not ended:
            raise DrillError(f"{signal.Signals(number).name} to the {name} did not end the run within 60 s")
        if begun and self.run.code not in (exit_code_of(number), 0):
            raise DrillError(
                f"{signal.Signals(number).name} to the {name} ended the run with exit code {self.run.code}:\n"
                f"{self.run.said()}"
            )
        if self.run.code:
            self.run.start()
        return name, reached if begun else newest

    def _damage(self, how: Callable[[Path], Any]) -> tuple[str, int]:
        """Kill the run, damage a file of its newest checkpoint, start again."""
        ranks = self.run.ranks()
        self.run.end()
        self._none_left(ranks)
        *older, newest = [0, *self.run.complete()]
        detail, floor = "no checkpoint yet", newest
        if newest:
            folder = self.run.folder / "checkpoints" / f"step-{newest:08d}"
            path = self.draw.choice(sorted(folder.iterdir()))
            how(path)
            detail, floor = f"{folder.name}/{path.name}", older[-1]
        self.run.start()
        return detail, floor

    def _flip_byte(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        path.write_bytes(data)

    def _none_left(self, pids: list[int]) -> None:
        gone = self.run.wait(lambda: not any(map(_alive, pids)), limit_s=10)
        if not gone:
            raise DrillError("ranks outlived their supervisor")


FAULTS: dict[str, Callable[[Hand], tuple[str, int]]] = {
    "SIGKILL of a rank": Hand.kill_rank,
    "SIGKILL of the launcher": Hand.kill_launcher,
    "SIGTERM to the launcher": Hand.terminate,
    "SIGUSR1 to one rank": Hand.warn,
    "SIGSTOP of a rank (hang)": Hand.stop_rank,
    "flipped byte": Hand.flip,
    "cut file": Hand.cut,
    "lost file": Hand.lose,
    "full disk": Hand.fill_disk,
}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
