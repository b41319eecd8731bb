"""The training and the evaluation stream: requests cut from the global order, answered by readers.

    plan (pure) -> requests -> readers (threads, processes) -> micro batches, in the order of the requests

The position of a training stream is the optimizer step it is asked to begin at, and nothing else: what readers
have prepared ahead is thrown away, never counted.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dataloaders.config import DataConfig
from dataloaders.order.order import Cut, Plan, cursor_at, evaluation_batches, evaluation_share, step_of_cursor
from dataloaders.order.plans import plan_of
from dataloaders.order.repeated import copies_of
from dataloaders.order.resolution import ImageSizes, Shape
from dataloaders.pixels.mixing import MixArrays, check_groups
from dataloaders.reading.ahead import coming_files, coming_of_split
from dataloaders.reading.damage import DamageCount
from dataloaders.reading.loading import EvalLoading, Request, TrainLoading
from dataloaders.reading.readers import Readers
from dataloaders.source import Fetching, Source
from setformer_dist.core.batch import MicroBatch, MixSpec
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.ranks import RankInfo


def _nothing_comes(first_step: int) -> Iterator[tuple[int, ...]]:
    return itertools.repeat(())


def _nothing_needed(share: range, begin: int, end: int) -> tuple[int, ...]:
    return ()


def _under_way(config: DataConfig) -> int:
    """Return how many micro batches readers may be at work on at once."""
    return max(1, config.workers) * (config.prefetch + 1)


def train_requests(
    plan: Plan,
    cut: Cut,
    first_step: int,
    sizes: ImageSizes | None = None,
    coming: Callable[[int], Iterator[tuple[int, ...]]] = _nothing_comes,
    micro_at: Callable[[Shape], int] | None = None,
    mixed_steps: int | None = None,
) -> Iterator[Request]:
    """Yield one rank's `accumulation` requests per optimizer step, endlessly, from `first_step` on.

    Args:
        plan: of the samples.
        cut: this rank's part of them.
        first_step: optimizer step.
        sizes: of each step's images.
        coming: from a step on, the files that each step and those after it need.
        micro_at: the micro batch of images of a size; the cut's own without it.
        mixed_steps: steps from the start of the run that may mix; None for all.
    """
    places = cut.places()
    for step, files in zip(itertools.count(first_step), coming(first_step), strict=False):
        size = sizes.shape(step, plan.aspect(step)) if sizes is not None else (0, 0)
        scale = sizes.scale(step) if sizes is not None else None
        if micro_at is not None:
            places = cut.at(micro_at(size)).places()
        mixed = mixed_steps is None or step < mixed_steps
        samples, epochs = (found.reshape(places.shape) for found in plan.pick(step, places.ravel()))
        for part, first in enumerate((step * plan.global_batch + places[:, 0]).tolist()):
            epoch = step // plan.steps_per_epoch
            yield Request(samples[part], epochs[part], first, step, epoch, size, files, scale, mixed)


def evaluation_requests(
    num_samples: int,
    ranks: RankInfo,
    micro_batch: int,
    coming: Callable[[range, int, int], tuple[int, ...]] = _nothing_needed,
) -> Iterator[Request]:
    """Yield one rank's share of a split: as many requests as on every other rank, the last ones short or empty.

    Args:
        num_samples: N.
        ranks: this process's place.
        micro_batch: samples in each request.
        coming: (share, begin, end) -> files that the samples of the share from begin to end need, and the next one.
    """
    share = evaluation_share(num_samples, ranks.rank, ranks.world_size)
    samples = np.array(share, dtype=np.int64)
    for begin in range(0, micro_batch * evaluation_batches(num_samples, ranks.world_size, micro_batch), micro_batch):
        end = begin + micro_batch
        yield Request(samples[begin:end], coming=coming(share, begin, end))


class ShardTrainStream:
    """Endless augmented training samples of one rank (`TrainStream`).

    Args:
        source: the training samples.
        config: of the data.
        seed: of the run.
        ranks: this process's place.
        global_batch: B, samples of all ranks in one optimizer step.
        micro_batch: m, samples of this rank in one accumulation step.
        micro_at: that of images of a size, at most `micro_batch`; without it, all have `micro_batch`.

    Raises:
        ConfigError: the batch sizes, the mix group or the image size do not fit the data.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        seed: int,
        ranks: RankInfo,
        global_batch: int,
        micro_batch: int,
        micro_at: Callable[[Shape], int] | None = None,
    ) -> None:
        self._source = source
        self._micro_at = micro_at
        self._seed = seed
        self._cut = Cut(global_batch, micro_batch, ranks.rank, ranks.world_size)
        self._plan = plan_of(source, config, seed, global_batch)
        self._sizes = ImageSizes(config, self._plan.steps_per_epoch, seed)
        check_groups(config.augment, micro_batch)
        self._repeats = config.augment.repeats
        self._mixed_steps = config.augment.mixed_steps(self._plan.steps_per_epoch)
        self._max_bad_share = config.max_bad_share
        self._coming: Callable[[int], Iterator[tuple[int, ...]]] = _nothing_comes
        if isinstance(source, Fetching) and source.fetches:
            self._coming = self._coming_files
            # The block being read and the one after it, and the first file after both.
            self._files_ahead = min(len(np.unique(source.shards)), 2 * config.block_shards + 1)
            self._steps_behind = -(-_under_way(config) // self._cut.accumulation) + 1
        self._readers = Readers(TrainLoading(source, config, seed), config)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, equal on all ranks."""
        return self._plan.steps_per_epoch

    @property
    def accumulation(self) -> int:
        """Micro batches per optimizer step, the fewest."""
        return self._cut.accumulation

    @property
    def fingerprint(self) -> str:
        """Identity of the data set."""
        return self._source.fingerprint

    def micro_batches(self, first_step: int) -> Iterator[MicroBatch]:
        """Yield `accumulation` micro batches per optimizer step, endlessly, from `first_step` on.

        A second call ends the first one's iterator.

        Raises:
            DataError: the data cannot be read, or too much of it is damaged (`dataloaders.reading.damage`).
        """
        damage = DamageCount(self._max_bad_share)
        requests = functools.partial(
            train_requests,
            self._plan,
            self._cut,
            first_step,
            self._sizes,
            self._coming,
            self._micro_at,
            self._mixed_steps,
        )
        for loaded in self._readers.answers(requests):
            damage.add(loaded.request.epoch, len(loaded.samples), loaded.bad)
            yield MicroBatch(
                inputs=loaded.images,
                labels=self._source.labels(loaded.samples),
                weights=torch.ones(len(loaded.samples)),
                sample_ids=torch.from_numpy(loaded.samples),
                mix=_mix_spec(loaded.mix),
                step=loaded.request.step,
                substitutions=[line for _, line in loaded.bad],
                annotations=loaded.annotations,
                soft=loaded.soft,
                copies=self._copies(loaded.request),
            )

    def _copies(self, request: Request) -> torch.Tensor | None:
        if self._repeats == 1 or request.epochs is None:
            return None
        return torch.from_numpy(copies_of(request.epochs, self._repeats))

    def _coming_files(self, first_step: int) -> Iterator[tuple[int, ...]]:
        places, shards = self._cut.places().ravel(), self._source.shards
        return coming_files(self._plan, places, shards, first_step, self._files_ahead, self._steps_behind)

    def state(self, next_step: int) -> dict[str, Any]:
        """Return the cursor before an optimizer step, JSON-able and equal on all ranks."""
        return cursor_at(self._plan, self._seed, self.fingerprint, next_step).to_json()

    def check_state(self, state: dict[str, Any]) -> int:
        """Return the optimizer step to resume from.

        Raises:
            DataError: the cursor is of other data, order, seed or global batch.
        """
        return step_of_cursor(state, self._plan, self._seed, self.fingerprint)

    def close(self) -> None:
        """End the readers and close the files."""
        self._readers.close()
        self._source.close()


class ShardEvalStream:
    """Each sample of a split exactly once over all ranks (`EvalStream`).

    Args:
        source: the samples.
        config: of the data.
        ranks: this process's place.
        micro_batch: samples of this rank in one step, at least 1. Where images are shown as a whole and are of several
            sizes, it is 1; where they have one size at native scale, as many as have the pixels of so many windows.
    """

    def __init__(self, source: Source, config: DataConfig, ranks: RankInfo, micro_batch: int) -> None:
        if micro_batch < 1:
            raise ConfigError(f"micro batch {micro_batch} must be at least 1")
        if config.eval_view == "whole":
            smallest, largest = source.extent()
            if smallest != largest:
                micro_batch = 1
            elif config.augment.crop == "window":  # far larger than a window, maybe
                micro_batch = max(1, min(micro_batch, micro_batch * math.prod(config.shape) // math.prod(largest)))
        self._source = source
        self._ranks = ranks
        self._micro_batch = micro_batch
        self._coming: Callable[[range, int, int], tuple[int, ...]] = _nothing_needed
        if isinstance(source, Fetching) and source.fetches:
            behind = micro_batch * _under_way(config)
            self._coming = functools.partial(coming_of_split, source.shards, behind)
        self._readers = Readers(EvalLoading(source, config, micro_batch), config)

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return self._source.num_samples

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's share; the same number of micro batches on all ranks, filling has weight 0.

        Filling is black, of label 0 and sample id -1. A damaged sample that the config bears has weight 0 too,
        and a line in `substitutions`.

        Raises:
            DataError: the data cannot be read, or a sample is damaged and the config does not bear it.
        """
        requests = functools.partial(
            evaluation_requests, self.num_samples, self._ranks, self._micro_batch, self._coming
        )
        for loaded in self._readers.answers(requests):
            weights = torch.from_numpy((loaded.samples >= 0).astype(np.float32))
            for place, _ in loaded.bad:
                weights[place] = 0.0
            yield MicroBatch(
                inputs=loaded.images,
                labels=self._source.labels(loaded.samples),
                weights=weights,
                sample_ids=torch.from_numpy(loaded.samples),
                substitutions=[line for _, line in loaded.bad],
                annotations=loaded.annotations,
                soft=loaded.soft,
            )

    def close(self) -> None:
        """End the readers and close the files."""
        self._readers.close()
        self._source.close()


def _mix_spec(mix: MixArrays | None) -> MixSpec | None:
    if mix is None:
        return None
    partner, lam, box = mix
    return MixSpec(torch.from_numpy(partner), torch.from_numpy(lam), torch.from_numpy(box))
