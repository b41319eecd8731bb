"""How often to save, and how much of the time is progress, on machines that fail at a known rate.

J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974).
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Saving:
    """What a checkpoint costs.

    Attributes:
        size: bytes.
        pause_s: seconds that training stands still.
        write_s: seconds until it is durable, behind training.
    """

    size: int
    pause_s: float
    write_s: float


def best_interval(pause_s: float, between_failures_s: float) -> float:
    """Return the seconds of work between two checkpoints that lose the least time (Daly 2006, equation 37).

    Args:
        pause_s: that a checkpoint holds up training.
        between_failures_s: mean seconds between two failures of the whole job.
    """
    ratio = pause_s / (2 * between_failures_s)
    if ratio >= 1:
        return between_failures_s
    young = math.sqrt(2 * pause_s * between_failures_s)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - pause_s


def goodput(interval_s: float, saving: Saving, between_failures_s: float, restart_s: float) -> float:
    """Return the share of the time that is progress (Daly 2006, equation 20), failures being a Poisson process.

    What a failure costs besides the interval it hits: the restart, and the work done while the checkpoint before it was
    still being written.
    """
    lost = math.exp((restart_s + saving.write_s) / between_failures_s)
    return interval_s / (between_failures_s * lost * math.expm1((interval_s + saving.pause_s) / between_failures_s))
