"""Global batch = micro batch × accumulation × groups of ranks: the one equation, solved in this one place.

A group is one rank, or with parallel.sequence = s the s ranks that share each image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from setformer_dist.core.errors import ConfigError
from setformer_dist.engine.config import BatchConfig


@dataclass(frozen=True)
class BatchPlan:
    """A solution of global = micro × accumulation × ranks / sequence."""

    global_size: int
    micro: int
    accumulation: int
    world_size: int
    sequence: int = 1

    @property
    def groups(self) -> int:
        """How many groups of ranks have images of their own."""
        return self.world_size // self.sequence


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
            f"parallel.sequence = {sequence} ranks share each image, and {world_size} ranks cannot be cut into groups "
            f"of {sequence}: use a multiple of {sequence} ranks, or parallel.sequence = {_or(possible)}"
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
    return BatchPlan(config.global_size, micro, config.global_size // (micro * groups), world_size, sequence)


def _or(values: list[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def _listed(values: list[int]) -> str:
    shown = [str(v) for v in values]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "…", *shown[-5:]])
