"""Whether and when a failed run is restarted: a pure function of its failures.

A failure with an outside cause (a machine, a driver, another job) does not repeat at the same step. One that does has
its cause in the run (a bad batch, a bug), so a restart would only waste machine time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pydantic

from setformer_dist.core.config import FrozenConfig


class RestartConfig(FrozenConfig):
    """The `[restart]` table: what `setformer train` does when a rank dies or hangs.

    Attributes:
        limit: largest number of restarts within `window_minutes`; 0 never restarts.
        window_minutes: length of the window of `limit`.
        backoff_s: seconds before the first restart; each further failure without progress doubles them, up to
            `backoff_max_s`.
        backoff_max_s: longest backoff in seconds.
        same_step: number of failures at the same step after which the run ends.
        hang_after_s: hang timeout in seconds: without a heartbeat from a rank for so long, all stacks are written to
            the logs and the ranks are ended; 0 turns it off. Must exceed the longest forward, backward or save.
        start_after_s: hang timeout in seconds until the first step, while models are built and compiled.
        save_after_s: hang timeout in seconds while training waits for a checkpoint to be written; must exceed
            checkpoint.write_timeout_minutes.
    """

    limit: int = pydantic.Field(default=10, ge=0)
    window_minutes: float = pydantic.Field(default=60.0, gt=0)
    backoff_s: float = pydantic.Field(default=1.0, ge=0)
    backoff_max_s: float = pydantic.Field(default=60.0, ge=0)
    same_step: int = pydantic.Field(default=3, ge=1)
    hang_after_s: float = pydantic.Field(default=300.0, ge=0)
    start_after_s: float = pydantic.Field(default=1800.0, ge=0)
    save_after_s: float = pydantic.Field(default=900.0, ge=0)


@dataclass(frozen=True)
class Failure:
    """One attempt that failed.

    Attributes:
        at: seconds of a monotonic clock.
        step: optimizer step the ranks were at; -1 before the first.
        how: as `launch.ranks.attempt.AttemptError.how`.
    """

    at: float
    step: int
    how: str


@dataclass(frozen=True)
class Restart:
    """Restart after a backoff."""

    after_s: float


@dataclass(frozen=True)
class GiveUp:
    """Give up; `reason` says why."""

    reason: str


def verdict(failures: Sequence[Failure], config: RestartConfig) -> Restart | GiveUp:
    """Decide on the last failure, given those before it; `failures` is not empty, oldest first."""
    last = failures[-1]
    if config.limit == 0:
        return GiveUp("")
    if last.step < 0 and last.how == "error" and all(f.step < 0 for f in failures):
        return GiveUp("it failed before its first step, so a restart would fail again")
    same = 0 if last.how == "host" else _in_a_row(failures)
    if same >= config.same_step:
        return GiveUp(f"it failed {same} times at step {last.step}, so the cause is in the run: a bad batch or a bug")
    recent = sum(f.at > last.at - 60 * config.window_minutes for f in failures)
    if recent > config.limit:
        return GiveUp(
            f"it failed {recent} times within {config.window_minutes:g} minutes (restart.limit = {config.limit})"
        )
    return Restart(min(config.backoff_max_s, config.backoff_s * 2 ** (_without_progress(failures) - 1)))


def _in_a_row(failures: Sequence[Failure]) -> int:
    """Return how many of the last failures were at the step of the last one; lost hosts do not count."""
    count = 0
    for failure in reversed([failure for failure in failures if failure.how != "host"]):
        if failure.step != failures[-1].step:
            break
        count += 1
    return count


def _without_progress(failures: Sequence[Failure]) -> int:
    """Return how many of the last failures made no progress over the one before."""
    count = 1
    for earlier, later in zip(failures[-2::-1], failures[:0:-1], strict=False):
        if later.step > earlier.step:
            break
        count += 1
    return count
