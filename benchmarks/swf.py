"""Read a trace in the Standard Workload Format, that of the Parallel Workloads Archive.

A trace is text: lines that begin with ";" are comments, any other line has 18 numbers, -1 where a value is not known.
Of these, the benchmark of the queue reads (from 1): 1 job, 2 submit time in s, 4 run time in s, 5 processors used,
8 processors requested, 9 time requested in s. Source: Chapin et al. (1999), "Benchmarks and Standards for the
Evaluation of Parallel Job Schedulers", https://www.cs.huji.ac.il/labs/parallel/workload/swf.html.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

_FIELDS = 18


@dataclass(frozen=True)
class Work:
    """One job of a workload: when it comes, how wide it is, how long it runs and says it does.

    Attributes:
        id: from 1, in order of arrival.
        arrives: seconds from the first one.
        ranks: processors.
        seconds: for which it runs.
        estimate: of these, by its user; never less.
    """

    id: int
    arrives: float
    ranks: int
    seconds: float
    estimate: float


def read(path: Path, slots: int, most: int | None = None) -> tuple[list[Work], int]:
    """Return a trace's jobs in order of arrival, and how many were left out: without run time, or wider than `slots`.

    Args:
        path: of the trace; .gz is unpacked.
        slots: of the cluster that is simulated.
        most: jobs that are read.

    Raises:
        ValueError: it is no such trace; the message names the line.
        OSError: it cannot be read.
    """
    found: list[tuple[float, int, float, float]] = []
    left_out = 0
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if not words or words[0].startswith(";"):
                continue
            try:
                fields = [float(word) for word in words]
            except ValueError:
                fields = []
            if len(fields) != _FIELDS:
                raise ValueError(f"{path}, line {number}: a job has {_FIELDS} numbers in the Standard Workload Format")
            submitted, seconds, used, requested, estimate = (fields[index] for index in (1, 3, 4, 7, 8))
            ranks = int(requested if requested > 0 else used)
            if seconds <= 0 or not 0 < ranks <= slots:
                left_out += 1
                continue
            found.append((submitted, ranks, seconds, max(estimate, seconds)))
            if len(found) == most:
                break
    if not found:
        raise ValueError(f"{path} has no job that ran and fits {slots} slots")
    found.sort(key=lambda job: job[0])
    return [Work(n, job[0] - found[0][0], *job[1:]) for n, job in enumerate(found, 1)], left_out
