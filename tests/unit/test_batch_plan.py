import time
from dataclasses import dataclass

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from setformer_dist.core.errors import ConfigError
from setformer_dist.engine.batch_plan import possible_micros, solve
from setformer_dist.engine.config import BatchConfig


@given(st.integers(1, 512), st.integers(1, 16), st.sampled_from([1, 2, 4]))
def test_auto_solves_the_equation_or_says_what_would(global_size: int, world: int, group: int) -> None:
    config = BatchConfig(global_size=global_size, max_micro=64)
    if not [m for m in possible_micros(global_size, world) if m % group == 0 and m <= 64]:
        with pytest.raises(ConfigError, match=r"possible|use at most"):
            solve(config, world, group)
        return
    plan = solve(config, world, group)
    assert plan.micro * plan.accumulation * world == global_size
    assert plan.micro <= 64
    assert plan.micro % group == 0


def test_a_given_micro_batch_fixes_the_accumulation() -> None:
    plan = solve(BatchConfig(global_size=64, micro=4), 2)
    assert (plan.micro, plan.accumulation) == (4, 8)


def test_an_impossible_micro_batch_lists_the_possible_ones() -> None:
    with pytest.raises(ConfigError, match="possible micro batches are 1, 2, 4, 8, 16, 32"):
        solve(BatchConfig(global_size=64, micro=7), 2)


def test_ranks_that_do_not_divide_list_those_that_do() -> None:
    with pytest.raises(ConfigError, match="possible numbers of ranks are 1, 2, 4, 8, 16, 32, 64"):
        solve(BatchConfig(global_size=64), 3)


def test_more_ranks_than_samples_per_step() -> None:
    with pytest.raises(ConfigError, match="fewer samples per step than the 8 ranks: use at most 4 ranks"):
        solve(BatchConfig(global_size=4), 8)


def test_mix_groups_must_fit_into_a_micro_batch() -> None:
    with pytest.raises(ConfigError, match=r"in groups of 8 \(data.augment.mix_group\)"):
        solve(BatchConfig(global_size=64), 16, 8)


def test_every_divisor_is_possible_and_an_absurd_batch_ends_at_once() -> None:
    for global_size, world in ((64, 2), (36, 1), (97, 1), (1, 1), (90, 3)):
        per_rank = global_size // world
        assert possible_micros(global_size, world) == [m for m in range(1, per_rank + 1) if per_rank % m == 0]
    began = time.monotonic()
    assert solve(BatchConfig(global_size=2**31 - 1), 1).micro == 1  # a prime
    with pytest.raises(ConfigError, match="possible numbers of ranks are 1"):
        solve(BatchConfig(global_size=2**31 - 1), 2)
    assert time.monotonic() - began < 20
    with pytest.raises(pydantic.ValidationError, match="less than or equal"):
        BatchConfig(global_size=2**63 - 1)


def test_micro_batches_follow_the_size_of_images_within_micro_pixels() -> None:
    plan = solve(BatchConfig(global_size=64, max_micro=16, micro_pixels=8 * 32 * 32), 2)
    assert [plan.micro_at((side, side)) for side in (16, 32, 33, 64, 90)] == [16, 8, 4, 2, 1]
    assert plan.micro == 16
    with pytest.raises(ConfigError, match=r"micro_pixels = 8192 is less than the 8281 pixels .* \(1 x 91 x 91\)"):
        plan.micro_at((91, 91))
    shared = solve(BatchConfig(global_size=64, micro_pixels=8 * 32 * 32), 4, sequence=2)  # each rank has half an image
    assert shared.micro_at((32, 32)) == 16
    grouped = solve(BatchConfig(global_size=96, micro_pixels=4000), 2, multiple_of=3)
    assert grouped.micro_at((16, 16)) == 12
    assert solve(BatchConfig(global_size=64, micro=4), 2).micro_at((4096, 4096)) == 4


def test_a_step_of_a_stream_is_as_many_micro_batches_as_its_first_one_says() -> None:
    plan = solve(BatchConfig(global_size=16), 2)
    stream = iter([_Ids([0] * size) for size in (8, 2, 2, 2, 2, 4, 4)])
    found = []
    for _ in range(3):
        count, of_step = plan.of_step(stream)
        found.append((count, [len(batch.sample_ids) for batch in of_step]))
    assert found == [(1, [8]), (4, [2, 2, 2, 2]), (2, [4, 4])]


@dataclass(frozen=True)
class _Ids:
    sample_ids: list[int]
