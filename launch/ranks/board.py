"""What the supervisor shows of its ranks while they run: `live.json`, for `setformer runs top`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.ranks.attempt import Member
from setformer_dist.core import live

_EVERY_S = 1.0
_SHARE = 20  # a look at thousands of ranks takes its time: a twentieth of it at most
_LOOKS = 60  # over which shares and rates are taken


class Board:
    """Takes a look at the ranks now and then, and writes it down.

    Args:
        run_folder: of the run.
        tell: hears of each look.
    """

    def __init__(self, run_folder: Path, tell: Callable[[live.Live], None] = lambda seen: None) -> None:
        self._tell = tell
        self._folder = run_folder
        self._looked_at = self._took = 0.0
        self._steps: deque[tuple[float, int]] = deque(maxlen=_LOOKS)
        self._waited: dict[int, deque[bool]] = {}

    def look(self, members: Sequence[Member]) -> None:
        """Look at the ranks, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._looked_at < max(_EVERY_S, _SHARE * self._took) or not members:
            return
        self._looked_at = now
        rows = [self._row(member) for member in members]
        step = max(row.step for row in rows)
        if self._steps and step < self._steps[-1][1]:  # another attempt
            self._steps.clear()
        self._steps.append((now, step))
        (then, before), (_, after) = self._steps[0], self._steps[-1]
        rate = (after - before) / (now - then) if now > then else None
        seen = live.Live(time.time(), rate, tuple(rows))
        live.write(self._folder, seen)
        self._tell(seen)
        self._took = time.monotonic() - now

    def _row(self, member: Member) -> live.LiveRank:
        beat = member.beat()
        waited = self._waited.setdefault(member.rank, deque(maxlen=_LOOKS))
        waited.append(beat.phase == "data")
        phase = beat.phase if member.ended_at is None else "ended"
        share = sum(waited) / len(waited)
        memory, use = member.memory_mib(), member.use()
        return live.LiveRank(member.rank, member.host, beat.step, phase, beat.age, memory, share, use.cores, use.gpu)
