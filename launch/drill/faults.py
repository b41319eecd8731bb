"""The faults of the drill on one machine.

Everything here acts on the run from outside, as the world does: by signals, and by changing its files.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.drill.run import DrillRun, alive
from setformer_dist.core.errors import DrillError
from setformer_dist.core.stopping import exit_code_of


@dataclass
class FaultInjector:
    """What makes the faults. Each returns what it hit, and the step from which the run must continue at least:

    that of the newest complete checkpoint (of the one before, where a file of the newest is damaged), and the very
    step that it had reached where it was asked to stop.

    Attributes:
        run: the run they are made in.
        draw: the seed's own generator.
        disk: the small file system that the run is on, None where none could be made.
    """

    run: DrillRun
    draw: random.Random
    disk: Path | None

    def mend(self) -> None:
        """Nothing of these faults stays."""

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
        none_left(self.run, ranks)
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
        if self.run.code is None:  # it continued without a checkpoint: let the next fault find out what that cost
            self.run.end()
        self.run.start()
        return f"{free >> 20} MiB taken", newest

    def _signal_a_rank(self, number: int) -> str:
        self.run.wait(lambda: bool(self.run.ranks()) or self.run.code is not None, limit_s=10)
        ranks = self.run.ranks()
        if not ranks:
            return "no such process"
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
                f"{signal.Signals(number).name} to the {name} ended the run with exit code {self.run.code}:\n  "
                f"{self.run.said()}"
            )
        if self.run.code:
            self.run.start()
        return name, reached if begun else newest

    def _damage(self, how: Callable[[Path], object]) -> tuple[str, int]:
        """Kill the run, damage a file of its newest checkpoint, start again."""
        ranks = self.run.ranks()
        self.run.end()
        none_left(self.run, ranks)
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


def none_left(run: DrillRun, pids: list[int]) -> None:
    """Wait for processes to go.

    Raises:
        DrillError: they stay.
    """
    gone = run.wait(lambda: not any(map(alive, pids)), limit_s=10)
    if not gone:
        raise DrillError("ranks outlived their supervisor")


FAULTS: dict[str, Callable[[FaultInjector], tuple[str, int]]] = {
    "SIGKILL of a rank": FaultInjector.kill_rank,
    "SIGKILL of the launcher": FaultInjector.kill_launcher,
    "SIGTERM to the launcher": FaultInjector.terminate,
    "SIGUSR1 to one rank": FaultInjector.warn,
    "SIGSTOP of a rank (hang)": FaultInjector.stop_rank,
    "flipped byte": FaultInjector.flip,
    "cut file": FaultInjector.cut,
    "lost file": FaultInjector.lose,
    "full disk": FaultInjector.fill_disk,
}
