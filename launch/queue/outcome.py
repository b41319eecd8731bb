"""What the end of an attempt means: done, stopped as asked, the job's own failure, or the machine's.

code 0                      done
143 and other stops         as the queue asked; otherwise somebody else stopped the supervisor: the machine's
2, 3, 4, 7                  a mistake in config, data, checkpoint or training: the job's own, never tried again
6 and the ledger's reason   "error" is the job's own; killed, hang, host, transient, unsaved are the machine's
5, 9, a signal, unknown     the machine's
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from launch.queue.attempts import Ended
from setformer_dist.core import ledger
from setformer_dist.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    RankFailedError,
    TrainingError,
)

_MISTAKES = {error.exit_code for error in (ConfigError, DataError, CheckpointError, TrainingError)}
_BACKOFF_S, BACKOFF_MAX_S = 10.0, 600.0
_SOON = 5  # a machine's failures in a row after which a LaunchError counts as the job's own


@dataclass(frozen=True)
class Outcome:
    """What an end means.

    Attributes:
        how: "done", "stopped", "mistake", "error" (the job's own), or a machine's failure: "killed", "hang", "host",
            "transient", "unsaved", "launch".
        blames_machine: the nodes are to blame.
    """

    how: str
    blames_machine: bool = False


def judge(ended: Ended, asked: bool, last_why: str, launch_failures: int = 0) -> Outcome:
    """Return what an end means.

    Args:
        ended: how.
        asked: the queue had asked it to stop.
        last_why: the reason of the last attempt in the run's ledger, "" where there is none.
        launch_failures: failures in a row before this one.
    """
    code = ended.code
    if not ended.began:
        return Outcome("stopped")
    if code == 0:
        return Outcome("done")
    # -15: it was asked before it could listen.
    if asked and (ended.killed or (code is not None and (code > 128 or code == -signal.SIGTERM))):
        return Outcome("stopped")
    if code in _MISTAKES:
        return Outcome("mistake")
    if code == LaunchError.exit_code:
        return Outcome("launch") if launch_failures < _SOON else Outcome("mistake")
    if code == RankFailedError.exit_code and last_why not in ("killed", "hang", "host", "transient", "unsaved"):
        return Outcome("error")
    if code == RankFailedError.exit_code:
        return Outcome(last_why, last_why in ("killed", "hang", "host"))
    if code == 1:  # a defect of ours, with its traceback
        return Outcome("error")
    return Outcome("killed" if code is None or code < 0 else "transient", code is None or code < 0)


def backoff(failures_in_row: int) -> float:
    """Return the seconds before the next attempt: 10 s, doubled by each further failure, 10 minutes at most."""
    return float(min(BACKOFF_MAX_S, _BACKOFF_S * 2.0 ** min(16, failures_in_row - 1)))


def why(folder: Path) -> str:
    """Return how the last attempt in a run's ledger ended."""
    ends = [event for event in ledger.read_events(folder) if event["event"] == "ended"]
    return str(ends[-1].get("why", "")) if ends else ""


def last_saved(folder: Path, since: float) -> float:
    """Return the time of a run's newest checkpoint after a moment, or that moment."""
    saved = [float(event["time"]) for event in ledger.read_events(folder) if event["event"] == "saved"]
    return max([since, *saved])
