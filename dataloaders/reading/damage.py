"""What a damaged training sample does: it is replaced, named and counted, and never changes a count.

The replacement is a function of (seed, epoch, sample id) and the data alone: a keyed sequence of candidates out of
the same data set, of which the first whole one is taken. All other positions of the stream hold what they would have
held.

A run stops when damage is no longer an accident. Counted on each rank over the samples it saw since the epoch
began (or since it resumed within it):

    damaged > SPARED + max_bad_share x seen     too large a share; SPARED keeps a small data set alive
    MAX_IN_ROW damaged one after the other      a shard is gone, whatever the share allowed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from setformer_dist.core.errors import DataError
from setformer_dist.core.seeding import Purpose, generator

SPARED = 5
MAX_IN_ROW = 100

# Tries for one replacement. Among data of which half are damaged, 30 tries all fail once in a thousand million.
_MAX_CANDIDATES = 30


def candidates(among: range, seed: int, epoch: int, sample: int) -> Iterator[int]:
    """Yield the samples, out of some in a row, that may stand in for a damaged one, best first."""
    random = generator(Purpose.SUBSTITUTE, seed, epoch, sample)
    for _ in range(_MAX_CANDIDATES):
        # From raw words, which numpy promises for ever; the bias of the remainder is below N / 2^64.
        yield among[int(random.bit_generator.random_raw() % len(among))]


class DamageCount:
    """Counts damage on one rank and says when it is too much."""

    def __init__(self, max_bad_share: float) -> None:
        self._max_bad_share = max_bad_share
        self._epoch = -1
        self._seen = 0
        self._bad = 0
        self._in_row = 0

    def add(self, epoch: int, count: int, bad: Sequence[tuple[int, str]]) -> None:
        """Count `count` samples of which `bad` (place within them in rising order, line) were replaced.

        Raises:
            DataError: too many, by the limits above.
        """
        if epoch != self._epoch:
            self._epoch, self._seen, self._bad = epoch, 0, 0
        self._seen += count
        self._bad += len(bad)
        before = -1
        for place, line in bad:
            self._in_row = self._in_row + 1 if place == before + 1 else 1
            before = place
            if self._in_row >= MAX_IN_ROW:
                raise DataError(f"{self._in_row} samples in a row are damaged, the last: {line}; restore the shards")
        if before != count - 1:
            self._in_row = 0
        if self._bad > SPARED + self._max_bad_share * self._seen:
            raise DataError(
                f"{self._bad} of {self._seen} samples of epoch {epoch} are damaged, more than {SPARED} + "
                f"data.max_bad_share = {self._max_bad_share} of them, the last: {bad[-1][1]}; restore the shards, "
                "or raise max_bad_share"
            )
