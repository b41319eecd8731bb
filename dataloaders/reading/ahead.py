"""Which files the coming steps need, for storage that fetches whole ones: they come while earlier steps compute.

Any plan is asked, which is a pure function: a copy of it walks ahead of the stream, so far that it has named enough
files, and names each by its first need. With order = "block" that is the block being read and the one after it.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dataloaders.order.order import Ints, Plan


def coming_files(
    plan: Plan, places: Ints, shards: npt.NDArray[np.integer], first_step: int, count: int, behind: int
) -> Iterator[tuple[int, ...]]:
    """Yield, for each step from `first_step` on, the files that it and the steps after it need, by first need.

    Args:
        plan: of the samples.
        places: (k,) of this rank in each global batch.
        shards: (N,) number of the file that holds each sample.
        first_step: optimizer step.
        count: files to look ahead for; an epoch is looked ahead at most.
        behind: steps whose files are still named after them, as readers may be at work on them.
    """
    plan = copy.deepcopy(plan)  # plans keep the epoch that they were asked for last
    window: deque[list[int]] = deque()
    needs: dict[int, int] = {}  # file -> steps of the window that need it
    for step in itertools.count(first_step):
        if len(window) and step - behind > first_step:
            for file in window.popleft():
                needs[file] -= 1
                if not needs[file]:
                    del needs[file]
        begin = max(first_step, step - behind)
        while (end := begin + len(window)) <= step or (len(needs) < count and end < step + plan.steps_per_epoch):
            files = list(dict.fromkeys(shards[plan.pick(end, places)[0]].tolist()))
            window.append(files)
            for file in files:
                needs[file] = needs.get(file, 0) + 1
        yield tuple(needs)


def coming_of_split(
    shards: npt.NDArray[np.integer], behind: int, share: range, begin: int, end: int
) -> tuple[int, ...]:
    """Return the files of a share's samples, `behind` before `begin` to `end`, and the one after: evaluation's way."""
    if not len(share):
        return ()
    first, last = (int(shards[share[min(max(place, 0), len(share) - 1)]]) for place in (begin - behind, end))
    return tuple(range(first, min(last + 1, int(shards[share[-1]])) + 1))
