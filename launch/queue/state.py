"""What the policy sees and says: nodes, jobs, running jobs, rules; a plan with actions and reasons. Plain values.

A slot holds one rank: a GPU, or a core where there is none. A placement is a tuple of (node, ranks), in order of rank.
Times are seconds of one clock.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

Placement = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        name: unique.
        slots: ranks that it has room for.
        usable: up and not drained.
        failures: decayed number of failures that it is blamed for; nodes with fewer come first.
    """

    name: str
    slots: int
    usable: bool = True
    failures: float = 0.0


@dataclass(frozen=True)
class Job:
    """A job that waits or runs.

    Attributes:
        id: in order of submission.
        user: who pays for it in the fair share.
        priority: higher goes first.
        waiting_since: when it last began to wait.
        sizes: numbers of ranks that it may run on, ascending; more than one for an elastic job.
        per_node: ranks on each of its nodes; None for any.
        limit_s: seconds that it may still run, or of its turn.
        hard: whether it ends for good at `limit_s`; otherwise it gives way to others then.
        eligible_at: it may not start before, after a failure.
        held: by its user.
        after: jobs that must be done before.
    """

    id: int
    user: str
    priority: int
    waiting_since: float
    sizes: tuple[int, ...]
    per_node: int | None = None
    limit_s: float = 86400.0
    hard: bool = False
    eligible_at: float = 0.0
    held: bool = False
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Running:
    """A job that runs.

    Attributes:
        job: with `limit_s` counted from `started`.
        placement: of its ranks.
        started: when.
        saved: time of its last checkpoint, or `started`; what came later is lost where it cannot save.
        stopping: it was asked to save and end.
        then: where it starts again at once, if it stops to be resized.
        boosted: it had starved; nobody preempts it for a while.
    """

    job: Job
    placement: Placement
    started: float
    saved: float
    stopping: bool = False
    then: Placement = ()
    boosted: bool = False

    @functools.cached_property
    def ranks(self) -> int:
        """Ranks that run."""
        return sum(count for _, count in self.placement)


@dataclass(frozen=True)
class Rules:
    """What the policy may do.

    Attributes:
        shares: weight of each user, 1 where none is named.
        quotas: most ranks that a user may run at a time.
        starve_after_s: a job that has waited so long goes before all others, in order of arrival.
        protect_s: a job that had starved is not preempted for so long.
        save_s: expected time of a stop with a checkpoint.
        grow_after_s: an elastic job is not grown sooner than this after its last start.
        depth: blocked jobs that get a reservation.
        most_starts: of one decision; the next one comes at once.
        most_preempting: jobs that others stop for in one decision.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    quotas: Mapping[str, int] = field(default_factory=dict)
    starve_after_s: float = 86400.0
    protect_s: float = 3600.0
    save_s: float = 30.0
    grow_after_s: float = 600.0
    depth: int = 3
    most_starts: int = 64
    most_preempting: int = 4


@dataclass(frozen=True)
class Start:
    """Start a job on a placement."""

    job: int
    placement: Placement
    boosted: bool = False


@dataclass(frozen=True)
class Stop:
    """Have a job save and end.

    Attributes:
        job: its id.
        why: "preempted", "drained" or "turn" (waits again), "limit" (ended for good), or "resize".
        then: placement that it starts again on at once, for "resize".
        by: the job that it makes room for; 0 for none.
    """

    job: int
    why: str
    then: Placement = ()
    by: int = 0


@dataclass(frozen=True)
class Wait:
    """Why a job waits.

    Attributes:
        reason: one phrase.
        expected: when it is expected to start; None where that is not known.
    """

    reason: str
    expected: float | None = None


@dataclass(frozen=True)
class Plan:
    """One decision.

    Attributes:
        starts: in the order in which they were decided.
        stops: likewise.
        waits: by job.
        order: ids of the jobs that may start, first first; of thousands, at least the first 200.
        reserved: (start, placement) by job, for blocked jobs.
        more: whether a further decision at once may start more.
    """

    starts: tuple[Start, ...]
    stops: tuple[Stop, ...]
    waits: Mapping[int, Wait]
    order: tuple[int, ...] = ()
    reserved: Mapping[int, tuple[float, Placement]] = field(default_factory=dict)
    more: bool = False
