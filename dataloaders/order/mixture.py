"""Several data sets as one, each with a share: which set a place of the endless order belongs to, and which sample.

A sample's number is its number within its set plus the samples of the sets before it, so cursors, messages and
damage know one set of `sum of N` samples. Each set walks epochs of its own, in an order of its own; an epoch of the
run is as many samples as all sets have together, so a small set with a large weight is seen several times in it.

Shares are exact: of every window of 65,536 places a set gets its quota, and of any first n places its share of n to
within 1 + share x (sets - 2) places (for two sets: 1). Within these bounds who follows whom is random; but of two
sets with equal weights, any two places (0 and 1, 2 and 3, …) hold one of each, so that mixup in groups of two always
mixes across the sets: `mix_group = 4` makes that one of several cases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.order.order import OF_SHARES, ORDER_ID, Ints, Order, walk
from dataloaders.source import Fetching, OwnRows, PartlyDecoded, Source, Stored
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.seeding import Purpose, generator

# Places after which the shares are exact again; a share is rounded to a multiple of 1 / 65,536.
WINDOW = 1 << 16

_RARE = "data.mixture: weight {weight:g} is {share}: raise it, or leave that entry out"

_TO_UNIT = 2.0**-53  # from the upper 53 bits of a word to [0, 1)


class Shares:
    """Deals the places of an endless sequence out to members.

    Args:
        weights: of the members, positive, in any unit.
        key: integers that say what is dealt out.
        rare: message, should a weight be too small, into which {weight} and {share} are put.

    Raises:
        ConfigError: a weight is less than 1 / 65,536 of all.
    """

    def __init__(self, weights: Sequence[float], *key: int, rare: str = _RARE) -> None:
        self._quotas = quotas(weights, rare)
        self._key = key
        self._known: tuple[int, Ints, Ints] | None = None

    @property
    def quotas(self) -> Ints:
        """Places of each member in a window of `WINDOW`."""
        return self._quotas

    def at(self, places: Ints) -> tuple[Ints, Ints]:
        """Return each place's member, and how many places that member had before it, (k,) int64 each."""
        windows, within = np.divmod(places, WINDOW)
        members, before = np.empty_like(places), np.empty_like(places)
        for window in np.unique(windows).tolist():
            here = windows == window
            _, dealt, rank = self._window(window)
            members[here] = dealt[within[here]]
            before[here] = rank[within[here]]
        before += windows * self._quotas[members]
        return members, before

    def _window(self, window: int) -> tuple[int, Ints, Ints]:
        """Return (window, member of each place, places of that member before it in the window)."""
        if self._known is None or self._known[0] != window:
            members = np.repeat(np.arange(len(self._quotas)), self._quotas)
            starts = np.cumsum(self._quotas) - self._quotas
            ranks: Ints = np.arange(WINDOW) - starts[members]
            words = generator(Purpose.ORDER, OF_SHARES, *self._key, window).bit_generator.random_raw(WINDOW)
            # The j-th place of a member falls somewhere in the j-th of its equal stretches of the window.
            times: npt.NDArray[np.float64] = (
                ranks + (words >> np.uint64(11)).astype(np.float64) * _TO_UNIT
            ) / self._quotas[members]
            order = np.argsort(times, kind="stable")
            self._known = window, members[order], ranks[order]
        return self._known


def quotas(weights: Sequence[float], rare: str = _RARE) -> Ints:
    """Return places per window in proportion to weights, summing to `WINDOW`: the largest remainders get one more.

    Args:
        weights: positive, in any unit.
        rare: as of `Shares`.

    Raises:
        ConfigError: a weight is too small to get any.
    """
    exact = np.array(weights, dtype=np.float64) / sum(weights) * WINDOW
    dealt = np.floor(exact).astype(np.int64)
    order = np.argsort(dealt - exact, kind="stable")
    dealt[order[: WINDOW - int(dealt.sum())]] += 1
    if dealt.min() < 1:
        weight = weights[int(dealt.argmin())]
        share = f"less than 1 / {WINDOW} of all together ({sum(weights):g})"
        raise ConfigError(rare.format(weight=weight, share=share))
    return dealt


class MixturePlan:
    """Several sets with shares, each walking its own epochs (`Plan`).

    Args:
        orders: of the sets.
        weights: of the sets.
        global_batch: B.
        seed: of the run.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], global_batch: int, seed: int) -> None:
        sizes = np.array([order.size for order in orders], np.int64)
        self.num_samples = int(sizes.sum())
        self.global_batch = global_batch
        self.steps_per_epoch = max(1, self.num_samples // global_batch)
        self._orders = tuple(orders)
        self._offsets: Ints = np.cumsum(sizes) - sizes
        self._shares = Shares(weights, seed)
        dealt = self._shares.quotas.tolist()
        rules = ", ".join(f"{order.size} {order.id} {quota}" for order, quota in zip(orders, dealt, strict=True))
        # A digest, as the cursor is to stay small however many sets there are.
        self.id = f"{ORDER_ID} mixture {hashlib.sha256(rules.encode()).hexdigest()[:16]}"

    def pick(self, step: int, places: Ints) -> tuple[Ints, Ints]:
        """Return samples and epochs at places of a step's batch."""
        members, before = self._shares.at(step * self.global_batch + places)
        samples, epochs = np.empty_like(places), np.empty_like(places)
        for member in np.unique(members).tolist():
            here = members == member
            samples[here], epochs[here] = walk(self._orders[member], before[here])
        return samples + self._offsets[members], epochs

    def aspect(self, step: int) -> float:
        """Return 1: images are square."""
        return 1.0


class MixtureSource:
    """Several sources, one after the other (`Source`).

    Args:
        sources: with the same classes.
        weights: one each.

    Raises:
        DataError: classes or parts differ.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources = tuple(sources)
        self.weights = tuple(weights)
        for source in self.sources[1:]:
            _check_alike(self.sources[0], source)
        counts = [source.num_samples for source in self.sources]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    def decode_only(self, rows: OwnRows) -> None:
        """Hand on to the sets whose images may be in tiles (`dataloaders.source.PartlyDecoded`)."""
        for source in self.sources:
            if isinstance(source, PartlyDecoded):
                source.decode_only(rows)

    @property
    def num_samples(self) -> int:
        """Samples of all sets together."""
        return int(self._ends[-1])

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, the same in all sets."""
        return self.sources[0].classes

    @property
    def fingerprint(self) -> str:
        """Identity of the sets and their sequence."""
        return hashlib.sha256("\n".join(source.fingerprint for source in self.sources).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The names of the sets."""
        return " + ".join(source.name for source in self.sources)

    @property
    def parts(self) -> frozenset[str]:
        """What each sample has besides image and label, the same in all sets."""
        return self.sources[0].parts

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(N,) number of the file that holds each sample, counted through all sets."""
        counted, begin = [], 0
        for source in self.sources:
            counted.append(source.shards + np.int32(begin))
            begin = int(counted[-1][-1]) + 1
        return np.concatenate(counted)

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        found = torch.zeros(len(samples), dtype=torch.int64)
        members = np.where(samples < 0, -1, np.searchsorted(self._ends, samples, side="right"))
        for member in np.unique(members[members >= 0]).tolist():
            here = members == member
            found[torch.from_numpy(here)] = self.sources[member].labels(samples[here] - self._starts[member])
        return found

    def size(self, sample: int) -> tuple[int, int]:
        """Return a sample's stored (height, width) in pixels."""
        source, own = self._own(sample)
        return source.size(own)

    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the smallest and the largest (height, width), each number over all samples independently."""
        smallest, largest = zip(*(source.extent() for source in self.sources), strict=True)
        return _each(min, smallest), _each(max, largest)

    def sizes(self) -> npt.NDArray[np.int32]:
        """Return (N, 2) stored heights and widths."""
        return np.concatenate([source.sizes() for source in self.sources])

    def key(self, sample: int) -> str:
        """Return a sample's key within its shard."""
        source, own = self._own(sample)
        return source.key(own)

    def place(self, sample: int) -> str:
        """Name a sample for a message, by its number within its own set."""
        source, own = self._own(sample)
        return source.place(own)

    def read(self, sample: int) -> Stored:
        """Return a sample; raises as the sources do."""
        source, own = self._own(sample)
        return source.read(own)

    @property
    def fetches(self) -> bool:
        """Whether the storage of any set fetches whole files."""
        return any(source.fetches for source in self.sources if isinstance(source, Fetching))

    def expect(self, shards: npt.NDArray[np.integer], share: float = 1.0) -> None:
        """Say which files are being read, and which will be; each set gets an equal share of the room."""
        begin = 0
        for source in self.sources:
            end = begin + int(source.shards[-1]) + 1
            if isinstance(source, Fetching):
                own = shards[(shards >= begin) & (shards < end)] - begin
                source.expect(own, share / len(self.sources))
            begin = end

    def moved(self) -> int:
        """Return a number that changes as long as bytes come to any set."""
        return sum(source.moved() for source in self.sources if isinstance(source, Fetching))

    def set_of(self, sample: int) -> range:
        """Return the numbers of all samples of a sample's set."""
        member = int(np.searchsorted(self._ends, sample, side="right"))
        return range(int(self._starts[member]), int(self._ends[member]))

    def _own(self, sample: int) -> tuple[Source, int]:
        member = int(np.searchsorted(self._ends, sample, side="right"))
        return self.sources[member], sample - int(self._starts[member])

    def close(self) -> None:
        """Close all sources."""
        for source in self.sources:
            source.close()

    def __getstate__(self) -> dict[str, object]:
        return dict(vars(self))


def set_of(source: Source, sample: int) -> range:
    """Return the numbers of the samples among which a damaged one finds its stand-in: those of its own set."""
    return source.set_of(sample) if isinstance(source, MixtureSource) else range(source.num_samples)


def _each(choose: Callable[[Sequence[int]], int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return choose([size[0] for size in sizes]), choose([size[1] for size in sizes])


def _check_alike(first: Source, other: Source) -> None:
    for label, (ours, theirs) in enumerate(zip_longest(first.classes, other.classes)):
        if ours != theirs:
            raise DataError(
                f"data.mixture: label {label} is {ours!r} in {first.name} but {theirs!r} in {other.name}: sets that "
                "are mixed need the same classes; pack the latter with the class list of the former"
            )
    if first.parts != other.parts:
        raise DataError(
            f"data.mixture: samples of {first.name} come with {_listed(first.parts)}, those of {other.name} with "
            f"{_listed(other.parts)}: mix sets of one kind"
        )


def _listed(parts: frozenset[str]) -> str:
    return " and ".join(sorted(parts)) or "labels alone"
