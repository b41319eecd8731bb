"""Global batch = micro batch × accumulation × groups of ranks: the one equation, solved in this one place.

A group is one rank, or with parallel.sequence = s the s ranks that share each image. With batch.micro_pixels, the
equation is solved for each size of images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol, TypeVar

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.words import counted
from setformer_dist.engine.config import BatchConfig


class _Sampled(Protocol):
    @property
    def sample_ids(self) -> Sized: ...


_Batch = TypeVar("_Batch", bound=_Sampled)


@dataclass(frozen=True)
class BatchPlan:
    """A solution of global = micro × accumulation × ranks / sequence.

    Attributes:
        global_size: samples of an optimizer step.
        micro: samples of a rank at once; the most, with `micro_pixels`.
        accumulation: micro batches of a step; the fewest, with `micro_pixels`.
        world_size: ranks.
        sequence: ranks that share each image.
        micro_pixels: of a rank at once.
        multiple_of: every micro batch is a multiple of this.
    """

    global_size: int
    micro: int
    accumulation: int
    world_size: int
    sequence: int = 1
    micro_pixels: int | None = None
    multiple_of: int = 1

    @property
    def groups(self) -> int:
        """How many groups of ranks have images of their own."""
        return self.world_size // self.sequence

    def micro_at(self, shape: tuple[int, int]) -> int:
        """Return the micro batch of images of (height, width).

        Raises:
            ConfigError: not even the smallest micro batch is within `micro_pixels`.
        """
        return _micro_at(self, *shape)

    def of_step(self, batches: Iterator[_Batch]) -> tuple[int, Iterator[_Batch]]:
        """Return how many micro batches the next step of a stream has, and those."""
        first = next(batches)
        count = self.global_size // (len(first.sample_ids) * self.groups)
        return count, chain([first], islice(batches, count - 1))


@functools.lru_cache(maxsize=4096)
def _micro_at(plan: BatchPlan, height: int, width: int) -> int:
    if plan.micro_pixels is None:
        return plan.micro
    pixels = -(-height * width // plan.sequence)
    micros = [m for m in possible_micros(plan.global_size, plan.groups) if m % plan.multiple_of == 0]
    fitting = [m for m in micros if m <= plan.micro and m * pixels <= plan.micro_pixels]
    if not fitting:
        raise ConfigError(
            f"batch.micro_pixels = {plan.micro_pixels} is less than the {micros[0] * pixels} pixels of a rank's "
            f"smallest micro batch ({micros[0]} x {height} x {width}): raise it, or use smaller images"
        )
    return fitting[-1]


def possible_micros(global_size: int, world_size: int) -> list[int]:
    """Return every micro batch that solves the equation on this many ranks, ascending."""
    if global_size % world_size:
        return []
    per_rank = global_size // world_size
    small = [micro for micro in range(1, math.isqrt(per_rank) + 1) if per_rank % micro == 0]
    return sorted({*small, *(per_rank // micro for micro in small)})


def solve(config: BatchConfig, world_size: int, multiple_of: int = 1, sequence: int = 1) -> BatchPlan:
    """Solve the equation for a number of ranks.

    Args:
        config: the global batch, and the micro batch or its bound.
        world_size: ranks that share the data.
        multiple_of: the micro batch must be a multiple of this (the group of mixup and cutmix).
        sequence: ranks that share each image.

    Raises:
        ConfigError: there is no solution; the message lists the possible ones.
    """
    if world_size < 1:
        raise ConfigError(f"{world_size} ranks cannot share a batch: give 1 or more")
    if world_size % sequence:
        possible = [s for s in range(1, world_size + 1) if world_size % s == 0]
        raise ConfigError(
            f"parallel.sequence = {sequence} ranks share each image, and {counted(world_size, 'rank')} cannot be cut "
            f"into groups of {sequence}: use a multiple of {sequence} ranks, or parallel.sequence = {_or(possible)}"
        )
    groups = world_size // sequence
    who = f"{world_size} ranks" if sequence == 1 else f"{groups} groups of {sequence} ranks (parallel.sequence)"
    micros = [m for m in possible_micros(config.global_size, groups) if m % multiple_of == 0]
    if config.global_size < groups:
        raise ConfigError(
            f"batch.global_size = {config.global_size} is fewer samples per step than the {who}: "
            f"use at most {config.global_size * sequence} ranks or a larger global batch"
        )
    if not micros:
        worlds = [
            w * sequence
            for w in range(1, 257)
            if any(m % multiple_of == 0 for m in possible_micros(config.global_size, w))
        ]
        group = f" in groups of {multiple_of} (data.augment.mix_group)" if multiple_of > 1 else ""
        raise ConfigError(
            f"batch.global_size = {config.global_size} cannot be shared by {who}{group}: "
            f"possible numbers of ranks are {_listed(worlds)}"
        )
    if config.micro == "auto":
        fitting = [m for m in micros if m <= config.max_micro]
        if not fitting:
            raise ConfigError(
                f"batch.max_micro = {config.max_micro} is below every possible micro batch for global_size "
                f"{config.global_size} on {who}: possible ones are {_listed(micros)}"
            )
        micro = fitting[-1]
    else:
        micro = config.micro
        if micro not in micros:
            raise ConfigError(
                f"batch.micro = {micro} does not solve global_size {config.global_size} = micro × accumulation × "
                f"{who}: possible micro batches are {_listed(micros)}"
            )
    accumulation = config.global_size // (micro * groups)
    return BatchPlan(config.global_size, micro, accumulation, world_size, sequence, config.micro_pixels, multiple_of)


def _or(values: list[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def _listed(values: list[int]) -> str:
    shown = [str(v) for v in values]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "…", *shown[-5:]])
