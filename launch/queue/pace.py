"""How long the scheduler's decisions take: a small file in the queue's folder, for the page's figures.

decisions.json     {"count": decisions of this scheduler, "seconds": of all of them, "longest": of one}
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setformer_dist.core.files import read_plain, replacing

FILE = "decisions.json"
_EVERY_S = 10.0


@dataclass(frozen=True)
class Seen:
    """Decisions of one scheduler.

    Attributes:
        count: of them.
        seconds: of all.
        longest: seconds of one.
    """

    count: int = 0
    seconds: float = 0.0
    longest: float = 0.0


@dataclass
class Pace:
    """Counts decisions, and writes them down now and then; a fault of the disk costs the figures alone."""

    folder: Path
    _seen: Seen = field(default_factory=Seen)
    _written: float = float("-inf")

    def note(self, seconds: float) -> None:
        """Count a decision."""
        self._seen = Seen(self._seen.count + 1, self._seen.seconds + seconds, max(self._seen.longest, seconds))
        if time.monotonic() - self._written < _EVERY_S:
            return
        self._written = time.monotonic()
        with contextlib.suppress(OSError), replacing(self.folder / FILE) as aside:
            aside.write_text(json.dumps(asdict(self._seen)))


def read(folder: Path) -> Seen | None:
    """Return what the scheduler has written; None where there is nothing to read."""
    try:
        found = json.loads(read_plain(folder / FILE, 4096))
        return Seen(int(found["count"]), float(found["seconds"]), float(found["longest"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
