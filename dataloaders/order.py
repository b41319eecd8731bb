"""Which sample is where: a pure function of (number of samples, seed, epoch). No files, no ranks in the order.

    order(seed, epoch)            a permutation of all N samples
    step k of an epoch            positions [k B, (k + 1) B) of it, B = global batch
    rank r of W, accumulation a   the m of those positions from k B + (a W + r) m on, m = micro batch

So the samples of a batch depend on neither W, m nor the number of worker processes, and the whole state of a
training stream is a cursor of a few integers, equal on all ranks.

The N % B samples at the end of an epoch's order are left out of that epoch: other ones each time, since each
epoch has its own order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.seeding import Purpose, generator

CURSOR_FORMAT = 1

# The rule by which the permutation is made; part of every cursor, so a changed rule is never taken for this one.
ORDER_ID = "philox-argsort-1"


def epoch_order(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the permutation of an epoch, (N,) int64.

    It sorts one raw 64-bit Philox word per sample. numpy promises the raw words of a bit generator for ever,
    but not what `permutation` makes of them.
    """
    words = generator(Purpose.ORDER, seed, epoch).bit_generator.random_raw(num_samples)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Cut:
    """How one rank cuts the global order.

    Attributes:
        num_samples: N, samples in the split.
        global_batch: B, samples of all ranks in one optimizer step.
        micro_batch: m, samples of one rank in one accumulation step.
        rank: r, this rank.
        world_size: W, all ranks.

    Raises:
        ConfigError: B does not divide into W micro batches, or is larger than N.
    """

    num_samples: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.micro_batch < 1:
            raise ConfigError(f"global batch {self.global_batch} and micro batch {self.micro_batch} must be at least 1")
        if self.global_batch % (self.micro_batch * self.world_size):
            raise ConfigError(
                f"global batch {self.global_batch} is not a multiple of micro batch {self.micro_batch} x "
                f"{self.world_size} ranks: {self._repair()}"
            )
        if self.global_batch > self.num_samples:
            raise ConfigError(
                f"global batch {self.global_batch} is larger than the data set of {self.num_samples} samples: "
                f"set it to {self.num_samples} or less"
            )

    def _repair(self) -> str:
        per_rank, rest = divmod(self.global_batch, self.world_size)
        if rest:
            step = self.micro_batch * self.world_size
            near = sorted({max(step, self.global_batch // step * step), (self.global_batch // step + 1) * step})
            return "set the global batch to " + " or ".join(map(str, near))
        divisors = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
        return f"set the micro batch to one of {', '.join(map(str, divisors))}"

    @property
    def accumulation(self) -> int:
        """Micro batches of each rank in one optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, N // B."""
        return self.num_samples // self.global_batch

    def place(self, step: int) -> tuple[int, int]:
        """Return (epoch, step within the epoch) of an optimizer step counted from the start of the run."""
        return divmod(step, self.steps_per_epoch)

    def first_position(self, step_in_epoch: int, accumulation_step: int) -> int:
        """Return the first position of this rank's micro batch in the epoch's order."""
        slot = accumulation_step * self.world_size + self.rank
        return step_in_epoch * self.global_batch + slot * self.micro_batch


@dataclass(frozen=True)
class Cursor:
    """The whole state of a training stream at an optimizer step; the same on all ranks and for any W.

    Attributes:
        seed: of the run.
        epoch: that the next step belongs to.
        samples_consumed: positions of that epoch's order already trained on.
        fingerprint: of the data.
        num_samples: N.
        global_batch: B.
        order: the rule of the permutation, `ORDER_ID`.
        format: of this record.
    """

    seed: int
    epoch: int
    samples_consumed: int
    fingerprint: str
    num_samples: int
    global_batch: int
    order: str = ORDER_ID
    format: int = CURSOR_FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return the cursor as a JSON-able table."""
        return asdict(self)


def cursor_at(cut: Cut, seed: int, fingerprint: str, next_step: int) -> Cursor:
    """Return the cursor before optimizer step `next_step`."""
    epoch, step = cut.place(next_step)
    return Cursor(seed, epoch, step * cut.global_batch, fingerprint, cut.num_samples, cut.global_batch)


# What must agree between a cursor and the stream it continues, and what a user can do when it does not.
_MUST_AGREE = {
    "format": "it was written by another version of setformer_dist",
    "order": "it was written by another version of setformer_dist",
    "fingerprint": "the data are not those the run was trained on: restore them or start a new run",
    "num_samples": "the data are not those the run was trained on: restore them or start a new run",
    "seed": "set the run's seed back",
    "global_batch": "set the global batch back",
}


def step_of_cursor(state: Mapping[str, Any], cut: Cut, seed: int, fingerprint: str) -> int:
    """Return the optimizer step that a cursor stands before.

    Raises:
        DataError: the cursor is of other data, another seed, order, format or global batch, or not a cursor.
    """
    here = cursor_at(cut, seed, fingerprint, 0).to_json()
    for name, repair in _MUST_AGREE.items():
        if name not in state:
            raise DataError(f"data cursor has no {name!r}: it is not one of setformer_dist's, or is damaged")
        if state[name] != here[name]:
            raise DataError(f"data cursor says {name} {state[name]!r}, this run has {here[name]!r}: {repair}")
    epoch, consumed = state.get("epoch"), state.get("samples_consumed")
    if not isinstance(epoch, int) or not isinstance(consumed, int) or epoch < 0:
        raise DataError(f"data cursor stands at epoch {epoch!r}, sample {consumed!r}: it is damaged")
    if consumed % cut.global_batch or not 0 <= consumed < cut.steps_per_epoch * cut.global_batch:
        raise DataError(
            f"data cursor stands at sample {consumed} of epoch {epoch}, which is no step of {cut.global_batch} "
            f"samples among {cut.steps_per_epoch}: it is damaged"
        )
    return epoch * cut.steps_per_epoch + consumed // cut.global_batch


def evaluation_share(num_samples: int, rank: int, world_size: int) -> range:
    """Return the samples of a split that a rank evaluates: each sample on exactly one rank, in order."""
    per_rank = -(-num_samples // world_size)
    return range(min(rank * per_rank, num_samples), min((rank + 1) * per_rank, num_samples))


def evaluation_batches(num_samples: int, world_size: int, micro_batch: int) -> int:
    """Return the micro batches of every rank in one evaluation: equal on all, even on one with no samples.

    Equal, because ZeRO-3 gathers parameters in forward: a rank that stops early would leave the others waiting.
    """
    per_rank = -(-num_samples // world_size)
    return -(-per_rank // micro_batch)
