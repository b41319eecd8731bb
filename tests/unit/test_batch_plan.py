import time

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
