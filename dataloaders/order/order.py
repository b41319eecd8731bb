"""Which sample is where: a pure function of (samples, seed, epoch, step). No files, no ranks in the order.

    plan.pick(step, places)       the samples at some of the B places of a step's global batch, B = global batch
    rank r of W, accumulation a   the m places from (a W + r) m on, m = micro batch

So the samples of a batch depend on neither W, m nor the number of workers or threads, and the whole state of a
training stream is a cursor of a few integers, equal on all ranks.

A plan is made of orders. An order reshuffles one data set in each epoch: all of it (`FullOrder`), or shards and
then samples within blocks of shards (`BlockOrder`). Nothing is ever written down as a table of N entries: any place
of any epoch is computed when it is asked for (`order.permutation`), so a resumption costs what a step costs.

    SetPlan, wrap = False    epoch e is steps e s .. (e + 1) s - 1, s = N // B; the N % B samples at the end of an
                             epoch's order are left out of it, other ones each time
    SetPlan, wrap = True     positions run on through the epochs: step k is places k B .. (k + 1) B - 1 of all orders
                             joined, and an epoch counts as s = ceil(N / B) steps, so that after the steps of e
                             epochs each sample was seen at least e times
    MixturePlan, BucketPlan  several sets with shares; batches of one shape (`dataloaders.order.mixture`, `.resolution`)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Protocol

import numpy as np
import numpy.typing as npt

from dataloaders.order.permutation import Permutation
from setformer_dist.core.continuing import Agreed, Position, agreements
from setformer_dist.core.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]

CURSOR_FORMAT = 2

_OTHER_DATA = "the data are not those the run was trained on: restore them or start a new run"
_OTHER_VERSION = "it was written by another version of setformer_dist, with another order and other augmentations"

# The rule by which permutations are made; part of every cursor, so a changed rule is never taken for this one.
ORDER_ID = "feistel-1"

# What a permutation is of, as part of its key: no two of them share a stream.
OF_SAMPLES, OF_SHARDS, OF_BLOCK, OF_SHARES, OF_BATCHES = range(5)


class Order(Protocol):
    """The order of one data set, another one in each epoch."""

    @property
    def size(self) -> int:
        """N, samples in the set."""
        ...

    @property
    def id(self) -> str:
        """The rule, for the cursor."""
        ...

    def __call__(self, epoch: int, places: Ints) -> Ints:
        """Return the samples at places 0 .. N - 1 of an epoch's order."""
        ...


class FullOrder:
    """All samples permuted.

    Args:
        size: N.
        seed: of the run.
        member: which set of several this is, so that each has an order of its own.
    """

    id = "full"

    def __init__(self, size: int, seed: int, member: int = 0) -> None:
        self.size = size
        self._key = seed, member
        self._known: tuple[int, Permutation] | None = None

    def __call__(self, epoch: int, places: Ints) -> Ints:
        """Return the samples at places of an epoch's order."""
        known = self._known
        if known is None or known[0] != epoch:
            seed, member = self._key
            known = self._known = epoch, Permutation(self.size, OF_SAMPLES, seed, member, epoch)
        return known[1](places)


class BlockOrder:
    """Shards permuted, then the samples within blocks of some shards: reads stay within one block for a while.

    Args:
        shards: (N,) number of the shard that holds each sample, never falling.
        block_shards: shards per block.
        seed: of the run.
        member: which set of several this is.
    """

    def __init__(self, shards: npt.NDArray[np.int32], block_shards: int, seed: int, member: int = 0) -> None:
        self.size = len(shards)
        self.id = f"block {block_shards}"
        self._first = np.flatnonzero(np.diff(shards, prepend=-1)).astype(np.int64)
        self._counts = np.diff(self._first, append=self.size)
        self._block_shards = block_shards
        self._key = seed, member
        self._known: tuple[int, _Blocks] | None = None

    def __call__(self, epoch: int, places: Ints) -> Ints:
        """Return the samples at places of an epoch's order."""
        known = self._known
        if known is None or known[0] != epoch:
            known = self._known = epoch, _Blocks(self._first, self._counts, self._block_shards, *self._key, epoch)
        return known[1](places)


class _Blocks:
    """One epoch's block shuffle."""

    def __init__(self, first: Ints, counts: Ints, block_shards: int, seed: int, member: int, epoch: int) -> None:
        self._key = seed, member, epoch
        shuffled = Permutation(len(first), OF_SHARDS, *self._key)(np.arange(len(first)))
        self._first = first[shuffled]
        self._ends = np.cumsum(counts[shuffled])
        self._starts = self._ends - counts[shuffled]
        self._block_starts = self._starts[::block_shards]
        self._block_ends = np.append(self._block_starts[1:], self._ends[-1])
        self._within: dict[int, Permutation] = {}

    def __call__(self, places: Ints) -> Ints:
        blocks = np.searchsorted(self._block_ends, places, side="right")
        found = np.empty_like(places)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            start = self._block_starts[block]
            found[here] = start + self._permutation(block)(places[here] - start)
        shard = np.searchsorted(self._ends, found, side="right")
        samples: Ints = self._first[shard] + found - self._starts[shard]
        return samples

    def _permutation(self, block: int) -> Permutation:
        if block not in self._within:
            if len(self._within) >= 8:  # steps walk from block to block: old ones do not come back
                self._within.clear()
            size = int(self._block_ends[block] - self._block_starts[block])
            self._within[block] = Permutation(size, OF_BLOCK, *self._key, block)
        return self._within[block]


def epoch_order(num_samples: int, seed: int, epoch: int) -> Ints:
    """Return the whole permutation of an epoch of `FullOrder`, (N,) int64."""
    return FullOrder(num_samples, seed)(epoch, np.arange(num_samples))


def walk(order: Order, places: Ints) -> tuple[Ints, Ints]:
    """Return samples and epochs at places of all epochs' orders joined, (k,) int64 each."""
    epochs, within = np.divmod(places, order.size)
    samples = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        samples[here] = order(epoch, within[here])
    return samples, epochs


class Plan(Protocol):
    """Which samples make each global batch, endlessly."""

    @property
    def num_samples(self) -> int:
        """N, samples in all sets together."""
        ...

    @property
    def global_batch(self) -> int:
        """B, samples of all ranks in one optimizer step."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that count as an epoch."""
        ...

    @property
    def id(self) -> str:
        """The rule, for the cursor; another rule is another id."""
        ...

    def pick(self, step: int, places: Ints) -> tuple[Ints, Ints]:
        """Return samples, and the epoch that each is in of its set, at places 0 .. B - 1 of a step's batch."""
        ...

    def aspect(self, step: int) -> float:
        """Return width / height of the images of a step's batch."""
        ...


class SetPlan:
    """One data set, epoch after epoch.

    Args:
        order: of the set.
        global_batch: B.
        wrap: whether batches cross the border of epochs.

    Raises:
        ConfigError: without wrap, B is larger than N.
    """

    def __init__(self, order: Order, global_batch: int, wrap: bool = False) -> None:
        self.num_samples = order.size
        self.global_batch = global_batch
        self.id = f"{ORDER_ID} {order.id} {'wrap' if wrap else 'drop'}"
        self._order = order
        self._wrap = wrap
        self.steps_per_epoch = -(-order.size // global_batch) if wrap else order.size // global_batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"global batch {global_batch} is larger than the data set of {order.size} samples: set it to "
                f'{order.size} or less, or data.epoch_end = "wrap"'
            )

    def pick(self, step: int, places: Ints) -> tuple[Ints, Ints]:
        """Return samples and epochs at places of a step's batch."""
        if self._wrap:
            return walk(self._order, step * self.global_batch + places)
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order(epoch, within * self.global_batch + places), np.full_like(places, epoch)

    def aspect(self, step: int) -> float:
        """Return 1: images are square."""
        return 1.0


@dataclass(frozen=True)
class Cut:
    """How one rank cuts each global batch.

    Attributes:
        global_batch: B, samples of all ranks in one optimizer step.
        micro_batch: m, samples of one rank in one accumulation step.
        rank: r, this rank.
        world_size: W, all ranks.

    Raises:
        ConfigError: B does not divide into W micro batches.
    """

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

    def _repair(self) -> str:
        if self.global_batch % self.world_size == 0:
            per_rank = self.global_batch // self.world_size
            fitting = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
            shown = fitting if len(fitting) <= 12 else [*fitting[:6], *fitting[-6:]]
            return f"set the micro batch to one of {', '.join(map(str, shown))}"
        unit = self.micro_batch * self.world_size
        below = self.global_batch // unit * unit
        choices = [str(value) for value in (below, below + unit) if value > 0]
        return f"set the global batch to {' or '.join(choices)}"

    @property
    def accumulation(self) -> int:
        """Micro batches of one rank in one optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def places(self) -> Ints:
        """Return this rank's places in every global batch, (accumulation, m)."""
        slots = np.arange(self.accumulation)[:, None] * self.world_size + self.rank
        return slots * self.micro_batch + np.arange(self.micro_batch)

    def at(self, micro_batch: int) -> Cut:
        """Return the cut into micro batches of another size."""
        return replace(self, micro_batch=micro_batch)


@dataclass(frozen=True)
class Cursor:
    """The whole state of a training stream at an optimizer step; the same on all ranks and for any W.

    Attributes:
        format: of this record.
        seed: of the run.
        epoch: that the next step belongs to.
        samples_consumed: samples of that epoch's steps already trained on.
        global_batch: B.
        fingerprint: of the data.
        num_samples: N.
        order: the rule, `Plan.id`.
    """

    format: Annotated[int, Agreed(_OTHER_VERSION)]
    seed: Annotated[int, Agreed("set the run's seed back")]
    epoch: Annotated[int, Position()]
    samples_consumed: Annotated[int, Position()]
    global_batch: Annotated[int, Agreed("set the global batch back", by="global_batch")]
    fingerprint: Annotated[str, Agreed(_OTHER_DATA, by="data")]
    num_samples: Annotated[int, Agreed(_OTHER_DATA, by="data")]
    order: Annotated[
        str, Agreed("set data.order, block_shards, epoch_end, mixture, aspect_buckets and augment.repeats back")
    ]

    def to_json(self) -> dict[str, object]:
        """Return the cursor as a JSON-able table."""
        return asdict(self)


def cursor_at(plan: Plan, seed: int, fingerprint: str, next_step: int) -> Cursor:
    """Return the cursor before optimizer step `next_step`."""
    epoch, step = divmod(next_step, plan.steps_per_epoch)
    consumed = step * plan.global_batch
    size, batch = plan.num_samples, plan.global_batch
    return Cursor(CURSOR_FORMAT, seed, epoch, consumed, batch, fingerprint, size, plan.id)


def step_of_cursor(state: Mapping[str, object], plan: Plan, seed: int, fingerprint: str) -> int:
    """Return the optimizer step that a cursor stands before.

    Raises:
        DataError: the cursor is of other data, another seed, order, format or global batch, or not a cursor.
    """
    here = cursor_at(plan, seed, fingerprint, 0).to_json()
    for name, rule in agreements(Cursor).items():
        if name not in state:
            raise DataError(f"data cursor has no {name!r}: it is not one of setformer_dist's, or is damaged")
        if state[name] != here[name]:
            raise DataError(f"data cursor says {name} {state[name]!r}, this run has {here[name]!r}: {rule.repair}")
    epoch, consumed = state.get("epoch"), state.get("samples_consumed")
    if not isinstance(epoch, int) or not isinstance(consumed, int) or epoch < 0:
        raise DataError(f"data cursor stands at epoch {epoch!r}, sample {consumed!r}: it is damaged")
    if consumed % plan.global_batch or not 0 <= consumed < plan.steps_per_epoch * plan.global_batch:
        raise DataError(
            f"data cursor stands at sample {consumed} of epoch {epoch}, which is no step of {plan.global_batch} "
            f"samples among {plan.steps_per_epoch}: it is damaged, or the data were larger when it was written"
        )
    return epoch * plan.steps_per_epoch + consumed // plan.global_batch


def counts_samples(rule: str) -> bool:
    """Return whether a cursor of a rule (`Plan.id`) says which samples were seen, whatever the global batch was.

    So it is for one set without wrap: the first `samples_consumed` of the epoch's order. With wrap an epoch's first
    step depends on the global batch, and shares and buckets deal samples out by it.
    """
    return re.fullmatch(rf"{re.escape(ORDER_ID)} (full|block \d+) drop", rule) is not None


def distinct_shards(
    order: Order, shards: npt.NDArray[np.int32], batch: int, epoch: int = 0, batches: int = 20
) -> float:
    """Return how many different shards feed a batch, the mean over some batches of an epoch.

    The measure of a shuffle: a batch of samples drawn at random from S shards would hold
    S (1 - (1 - 1 / S)^batch) different ones.
    """
    starts = np.linspace(0, order.size - batch, batches).astype(np.int64)
    counts = [len(np.unique(shards[order(epoch, np.arange(start, start + batch))])) for start in starts]
    return float(np.mean(counts))


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
