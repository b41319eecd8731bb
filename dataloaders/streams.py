"""The training and the evaluation stream: requests cut from the global order, answered by reader processes.

    order (pure) -> requests -> reader processes (or this one) -> micro batches, in the order of the requests

The position of a training stream is the optimizer step it is asked to begin at, and nothing else: what readers
have prepared ahead is thrown away, never counted.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataloaders.config import DataConfig
from dataloaders.damage import DamageCount
from dataloaders.loading import EvalLoading, Loaded, Request, TrainLoading
from dataloaders.mixing import MixArrays, check_groups
from dataloaders.order import (
    Cut,
    cursor_at,
    epoch_order,
    evaluation_batches,
    evaluation_share,
    step_of_cursor,
)
from dataloaders.processes import begin_helper, helper_context, lean_start
from dataloaders.shards import ShardDataset
from setformer_dist.core.batch import MicroBatch, MixSpec
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo

# How torch's DataLoader words the death of a worker, in a RuntimeError.
_DEATHS = ("exited unexpectedly", "killed by signal")


def train_requests(cut: Cut, seed: int, first_step: int) -> Iterator[Request]:
    """Yield one rank's `accumulation` requests per optimizer step, endlessly, from `first_step` on."""
    known_epoch, step = -1, first_step
    order = np.empty(0, np.int64)
    while True:
        epoch, step_in_epoch = cut.place(step)
        if epoch != known_epoch:
            order, known_epoch = epoch_order(cut.num_samples, seed, epoch), epoch
        for accumulation_step in range(cut.accumulation):
            first = cut.first_position(step_in_epoch, accumulation_step)
            yield Request(order[first : first + cut.micro_batch].copy(), epoch, first, step)
        step += 1


def evaluation_requests(num_samples: int, ranks: RankInfo, micro_batch: int) -> Iterator[Request]:
    """Yield one rank's share of a split: as many requests as on every other rank, the last ones short or empty."""
    share = np.array(evaluation_share(num_samples, ranks.rank, ranks.world_size), dtype=np.int64)
    for batch in range(evaluation_batches(num_samples, ranks.world_size, micro_batch)):
        yield Request(share[batch * micro_batch : (batch + 1) * micro_batch])


class Loading(Protocol):
    """Answers requests, in any process."""

    def __getitem__(self, request: Request) -> Loaded:
        """Return the answer."""
        ...


class _Requests:
    """An iterable that begins anew whenever it is iterated."""

    def __init__(self, make: Callable[[], Iterator[Request]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Request]:
        return self._make()


class _Readers:
    """Has requests answered in order, by `workers` processes or by this one."""

    def __init__(self, loading: Loading, config: DataConfig) -> None:
        self._loading = loading
        self._workers = config.workers
        self._prefetch = config.prefetch
        self._answers: Any = None

    def answers(self, make_requests: Callable[[], Iterator[Request]]) -> Iterator[Loaded]:
        """Yield the answers; the ones being made for an earlier call are given up.

        Raises:
            DataError: a reader process died, or found what a user must repair.
        """
        self.close()
        if not self._workers:
            yield from map(_checked, map(self._loading.__getitem__, make_requests()))
            return
        with lean_start():
            answers = iter(self._loader(_Requests(make_requests)))
        self._answers = answers
        try:
            while self._answers is answers:  # not after close(), whose readers would never answer
                yield _checked(next(answers))
        except StopIteration:
            return
        except RuntimeError as error:
            if not any(words in str(error) for words in _DEATHS):
                raise  # a defect within a reader, with its traceback
            raise DataError(
                f"a data reader process died ({error}): if memory or /dev/shm ran out, lower data.workers "
                "or data.prefetch"
            ) from None
        finally:
            if self._answers is answers:
                self.close()

    def _loader(self, requests: Iterable[Request]) -> DataLoader[Loaded]:
        return DataLoader(
            self._loading,  # type: ignore[arg-type]
            batch_size=None,  # a request is a whole micro batch already
            sampler=requests,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            multiprocessing_context=helper_context(),
            worker_init_fn=functools.partial(_begin_reader, os.getpid()),
            generator=torch.Generator(),  # else it draws a seed from the run's own generator
        )

    def close(self) -> None:
        """End the reader processes."""
        answers, self._answers = self._answers, None
        if answers is not None:
            answers._shutdown_workers()


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _begin_reader(starter: int, worker: int) -> None:
    begin_helper(starter)


def _checked(loaded: Loaded) -> Loaded:
    if loaded.error is not None:
        raise loaded.error
    return loaded


class ShardTrainStream:
    """Endless augmented training samples of one rank (`TrainStream`).

    Args:
        dataset: the packed split.
        config: of the data.
        seed: of the run.
        ranks: this process's place.
        global_batch: B, samples of all ranks in one optimizer step.
        micro_batch: m, samples of this rank in one accumulation step.

    Raises:
        ConfigError: the batch sizes, the mix group or the image size do not fit the data.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        config: DataConfig,
        seed: int,
        ranks: RankInfo,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._cut = Cut(dataset.num_samples, global_batch, micro_batch, ranks.rank, ranks.world_size)
        check_groups(config.augment, micro_batch)
        self._max_bad_share = config.max_bad_share
        self._readers = _Readers(TrainLoading(dataset, config, seed), config)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, equal on all ranks."""
        return self._cut.steps_per_epoch

    @property
    def accumulation(self) -> int:
        """Micro batches per optimizer step."""
        return self._cut.accumulation

    @property
    def fingerprint(self) -> str:
        """Identity of the data set."""
        return self._dataset.fingerprint

    def micro_batches(self, first_step: int) -> Iterator[MicroBatch]:
        """Yield `accumulation` micro batches per optimizer step, endlessly, from `first_step` on.

        A second call ends the first one's iterator.

        Raises:
            DataError: the data cannot be read, or too much of it is damaged (`dataloaders.damage`).
        """
        damage = DamageCount(self._max_bad_share)
        for loaded in self._readers.answers(lambda: train_requests(self._cut, self._seed, first_step)):
            damage.add(loaded.request.epoch, len(loaded.samples), loaded.bad)
            yield MicroBatch(
                inputs=loaded.images,
                labels=self._dataset.labels(loaded.samples),
                weights=torch.ones(len(loaded.samples)),
                sample_ids=torch.from_numpy(loaded.samples),
                mix=_mix_spec(loaded.mix),
                step=loaded.request.step,
                substitutions=[line for _, line in loaded.bad],
            )

    def state(self, next_step: int) -> dict[str, Any]:
        """Return the cursor before an optimizer step, JSON-able and equal on all ranks."""
        return cursor_at(self._cut, self._seed, self.fingerprint, next_step).to_json()

    def check_state(self, state: dict[str, Any]) -> int:
        """Return the optimizer step to go on from.

        Raises:
            DataError: the cursor is of other data, order, seed or global batch.
        """
        return step_of_cursor(state, self._cut, self._seed, self.fingerprint)

    def close(self) -> None:
        """End the reader processes."""
        self._readers.close()
        self._dataset.close()


class ShardEvalStream:
    """Each sample of a split exactly once over all ranks (`EvalStream`).

    Args:
        dataset: the packed split.
        config: of the data.
        ranks: this process's place.
        micro_batch: samples of this rank in one step, at least 1.
    """

    def __init__(self, dataset: ShardDataset, config: DataConfig, ranks: RankInfo, micro_batch: int) -> None:
        if micro_batch < 1:
            raise ConfigError(f"micro batch {micro_batch} must be at least 1")
        self._dataset = dataset
        self._ranks = ranks
        self._micro_batch = micro_batch
        self._readers = _Readers(EvalLoading(dataset, config, micro_batch), config)

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return self._dataset.num_samples

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's share; the same number of micro batches on all ranks, filling has weight 0.

        Filling is black, of label 0 and sample id -1. A damaged sample that the config bears has weight 0 too,
        and a line in `substitutions`.

        Raises:
            DataError: the data cannot be read, or a sample is damaged and the config does not bear it.
        """
        requests = functools.partial(evaluation_requests, self.num_samples, self._ranks, self._micro_batch)
        for loaded in self._readers.answers(requests):
            weights = torch.from_numpy((loaded.samples >= 0).astype(np.float32))
            for place, _ in loaded.bad:
                weights[place] = 0.0
            yield MicroBatch(
                inputs=loaded.images,
                labels=self._dataset.labels(loaded.samples),
                weights=weights,
                sample_ids=torch.from_numpy(loaded.samples),
                substitutions=[line for _, line in loaded.bad],
            )

    def close(self) -> None:
        """End the reader processes."""
        self._readers.close()
        self._dataset.close()


def _mix_spec(mix: MixArrays | None) -> MixSpec | None:
    if mix is None:
        return None
    partner, lam, box = mix
    return MixSpec(torch.from_numpy(partner), torch.from_numpy(lam), torch.from_numpy(box))
