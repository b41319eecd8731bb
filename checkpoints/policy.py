"""Which checkpoints stay: a pure function, tested without a disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from checkpoints.config import CheckpointConfig

KEEP_TAG = "keep"
ASIDE_KEPT = 3  # folders that did not verify and stay for inspection, the newest ones

# "sound": manifest readable and sizes right; "damaged": not so; "unknown": could not be read, or is of a later format.
State = Literal["sound", "damaged", "unknown"]


@dataclass(frozen=True)
class Candidate:
    """What the policy knows of a folder.

    Attributes:
        step: optimizer steps done.
        state: see `State`.
        metrics: as in the manifest.
        tags: as in the manifest; `KEEP_TAG` is never deleted.
    """

    step: int
    state: State = "sound"
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Sequence[str] = ()


def best_first(candidates: Iterable[Candidate], config: CheckpointConfig) -> list[Candidate]:
    """Return those with a finite value of the metric, best first; among equals the later step first."""
    sign = -1.0 if config.best_mode == "max" else 1.0
    having = [c for c in candidates if math.isfinite(c.metrics.get(config.best_metric, math.nan))]
    return sorted(having, key=lambda c: (sign * c.metrics[config.best_metric], -c.step))


def steps_to_delete(candidates: Iterable[Candidate], newest_saved: int, config: CheckpointConfig) -> list[int]:
    """Return the steps that may go, oldest first.

    Checkpoints beyond the one just saved are of an abandoned branch or damaged: they are neither counted nor
    touched, or else a run that fell back to an older step would delete its own new checkpoints.
    Damaged folders count for nothing and go once they are older than all that stays for being new. What could not
    be read counts for nothing either, and stays: nobody knows that it is of no use.

    Args:
        candidates: all folders.
        newest_saved: step of the checkpoint just committed; it always stays.
        config: how many stay.
    """
    within = [c for c in candidates if c.step <= newest_saved and c.state != "unknown"]
    sound = sorted((c for c in within if c.state == "sound"), key=lambda c: -c.step)
    last = {newest_saved, *(c.step for c in sound[: config.keep_last])}
    best = {c.step for c in best_first(sound, config)[: config.keep_best]}
    tagged = {c.step for c in within if KEEP_TAG in c.tags}
    nth = {c.step for c in sound if config.keep_every and c.step % config.keep_every == 0}
    stays = last | best | tagged | nth
    old = [c for c in within if c.step not in stays and (c.state == "sound" or c.step < min(last))]
    return sorted(c.step for c in old)
