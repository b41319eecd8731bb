"""The order of samples: a pure function that ranks and micro batches only cut."""

import itertools
import json
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders.order.order import (
    BlockOrder,
    Cut,
    FullOrder,
    SetPlan,
    cursor_at,
    distinct_shards,
    epoch_order,
    evaluation_batches,
    evaluation_share,
    step_of_cursor,
)
from dataloaders.order.permutation import Permutation
from setformer_dist.core.errors import ConfigError, DataError


def plan_for(num_samples, batch, seed=11, wrap=False):
    return SetPlan(FullOrder(num_samples, seed), batch, wrap)


def global_batch_of(plan, micro, world, step):
    """What all ranks together see at a step, put back into the order of places."""
    seen = {}
    for rank in range(world):
        places = Cut(plan.global_batch, micro, rank, world).places().ravel()
        samples, _ = plan.pick(step, places)
        assert not seen.keys() & set(places.tolist())
        seen.update(zip(places.tolist(), samples.tolist(), strict=True))
    return [seen[place] for place in sorted(seen)]


# The permutation


def test_order_is_fixed_for_ever():
    # Golden: a change of these numbers breaks the resumption of every run; then ORDER_ID must change too.
    assert epoch_order(10, seed=0, epoch=0).tolist() == [0, 6, 1, 8, 7, 4, 9, 5, 3, 2]
    assert epoch_order(10, seed=7, epoch=3).tolist() == [2, 7, 9, 1, 3, 8, 4, 6, 5, 0]
    assert Permutation(10**12, 5)(np.arange(3)).tolist() == [804526005334, 41646369825, 674041118561]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 1000))
def test_order_is_a_permutation(num_samples, seed, epoch):
    assert np.array_equal(np.sort(epoch_order(num_samples, seed, epoch)), np.arange(num_samples))


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 99991, 10**6])
def test_large_orders_are_permutations(size):
    assert np.array_equal(np.sort(Permutation(size, 3)(np.arange(size))), np.arange(size))


def test_any_place_can_be_asked_for_alone():
    whole = epoch_order(5000, 1, 2)
    order = FullOrder(5000, 1)
    places = np.random.default_rng(0).integers(0, 5000, 200)
    assert np.array_equal(order(2, places), whole[places])
    assert [int(order(2, places[i : i + 1])[0]) for i in range(50)] == whole[places[:50]].tolist()


def test_order_differs_by_seed_and_epoch():
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for one, other in itertools.combinations(orders, 2):
        # Two independent permutations agree in one place on average.
        assert (one == other).sum() < 12


@pytest.mark.parametrize("size", [8, 10, 13, 50])
def test_every_sample_lands_everywhere_equally_often(size):
    # chi-square over (sample, place): (size - 1)^2 degrees of freedom, five standard deviations.
    epochs = 4000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[epoch_order(size, 5, epoch), np.arange(size)] += 1
    expected = epochs / size
    freedom = (size - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [1000, 4096, 99991])
def test_order_looks_random_in_what_a_batch_would_notice(size):
    """Neighbours in storage, rises, correlation and cycles, each against what random permutations have."""
    epochs = 20
    neighbours = rises = cycles = 0
    correlations = []
    for epoch in range(epochs):
        order = epoch_order(size, 2, epoch)
        steps = np.diff(order)
        neighbours += int((np.abs(steps) == 1).sum())
        rises += int((steps > 0).sum())
        correlations.append(np.corrcoef(order[:-1], order[1:])[0, 1] * np.sqrt(size))
        cycles += int((order == np.arange(size)).sum())
    assert abs(neighbours - 2 * epochs) < 5 * np.sqrt(2 * epochs)
    assert abs(rises - epochs * (size - 1) / 2) < 5 * np.sqrt(epochs * size / 12)
    assert abs(np.mean(correlations)) < 5 / np.sqrt(epochs)
    assert abs(cycles - epochs) < 5 * np.sqrt(epochs)


def test_a_hundred_million_samples_cost_nothing_at_start():
    """Simulated without data: the first batches of a run, and of one resumed in the middle, on 8 ranks."""
    tracemalloc.start()
    before = time.process_time()
    for rank in range(8):
        plan = plan_for(100_000_000, 4096)
        places = Cut(4096, 64, rank, 8).places().ravel()
        for step in (0, 1, 12_345, 1_000_000):
            samples, _ = plan.pick(step, places)
            assert len(set(samples.tolist())) == 512
    seconds, (_, peak) = time.process_time() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1.0 * 8
    assert peak < 10e6


# Blocks


def shards_of(*counts):
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 5))
def test_block_order_is_a_permutation_that_keeps_to_its_blocks(counts, block_shards, epoch):
    shards = shards_of(*counts)
    order = BlockOrder(shards, block_shards, seed=3)(epoch, np.arange(len(shards)))
    assert np.array_equal(np.sort(order), np.arange(len(shards)))
    blocks, start = [], 0
    while start < len(order):
        # A block is whole when as many samples have come as its shards hold.
        end = start
        seen = set()
        while end < len(order) and (len(seen | {shards[order[end]]}) <= block_shards):
            seen.add(shards[order[end]])
            end += 1
            if len(seen) == block_shards and end - start == sum(counts[shard] for shard in seen):
                break
        assert end - start == sum(counts[shard] for shard in seen)
        blocks.append(seen)
        start = end
    assert len(blocks) == -(-len(counts) // block_shards)


def test_shuffle_quality_grows_with_the_block():
    """The figures of design and facts: different shards among 1024 samples, of 1000 shards of 1281 samples."""
    shards = shards_of(*[1281] * 1000)
    found = {blocks: distinct_shards(BlockOrder(shards, blocks, 1), shards, 1024) for blocks in (1, 8, 64, 256)}
    full = distinct_shards(FullOrder(len(shards), 1), shards, 1024)
    random = 1000 * (1 - (1 - 1 / 1000) ** 1024)
    assert 1 <= found[1] < 2.5
    assert 8 <= found[8] < 12
    assert 60 < found[64] < 90
    assert 235 < found[256] < 280
    assert abs(full - random) < 15


# Cutting


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("wrap", [False, True])
def test_batches_do_not_depend_on_the_cut(world, micro, wrap):
    plan = plan_for(250, 96, wrap=wrap)
    for step in (0, 1, 2, 5):
        expected = global_batch_of(plan, 96, 1, step)
        assert len(expected) == 96
        assert global_batch_of(plan, micro, world, step) == expected


def test_an_epoch_repeats_nothing_and_drops_another_tail_each_time():
    plan = plan_for(130, 48, 3)
    assert plan.steps_per_epoch == 2
    tails = []
    for epoch in range(4):
        seen = [s for step in (0, 1) for s in global_batch_of(plan, 48, 1, 2 * epoch + step)]
        assert len(set(seen)) == 96
        tails.append(frozenset(range(130)) - set(seen))
    assert len(set(tails)) == 4


@pytest.mark.parametrize(("num_samples", "batch"), [(130, 48), (96, 48), (7, 48)])
def test_wrapping_leaves_nothing_out(num_samples, batch):
    plan = plan_for(num_samples, batch, 3, wrap=True)
    assert plan.steps_per_epoch == -(-num_samples // batch)
    picked = [plan.pick(step, np.arange(batch)) for step in range(20)]
    samples = np.concatenate([s for s, _ in picked])
    epochs = np.concatenate([e for _, e in picked])
    assert np.array_equal(epochs, np.arange(20 * batch) // num_samples)
    for epoch in range(int(epochs[-1])):
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(num_samples))
    for passed in (1, 2, 3):  # after the steps of an epoch, each sample was seen once more at least
        counts = np.bincount(samples[: passed * plan.steps_per_epoch * batch], minlength=num_samples)
        assert counts.min() >= passed


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 400),
    st.integers(0, 5000),
    st.booleans(),
)
def test_cursor_returns_to_its_step_on_any_number_of_ranks(world, micro, accumulation, extra, step, wrap):
    batch = world * micro * accumulation
    plan = plan_for(batch + extra, batch, wrap=wrap)
    state = cursor_at(plan, 9, "data" * 16, step).to_json()
    assert step_of_cursor(state, plan_for(batch + extra, batch, wrap=wrap), 9, "data" * 16) == step
    assert len(json.dumps(state)) < 1000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"fingerprint": "other"}, "fingerprint"),
        ({"num_samples": 99}, "num_samples"),
        ({"global_batch": 8}, "global_batch"),
        ({"order": "mt19937"}, "order"),
        ({"order": "feistel-1 full wrap"}, "order 'feistel-1 full wrap'.*epoch_end"),
        ({"format": 1, "order": "philox-argsort-1"}, "another version of setformer_dist"),
        ({"samples_consumed": 5}, "sample 5"),
        ({"samples_consumed": 96}, "sample 96"),
        ({"samples_consumed": -4}, "sample -4"),
        ({"epoch": -1}, "epoch -1"),
        ({"epoch": "3"}, "epoch '3'"),
    ],
)
def test_cursor_of_something_else_is_refused(change, named):
    plan = plan_for(98, 4)
    state = {**cursor_at(plan, 1, "data", 30).to_json(), **change}
    with pytest.raises(DataError, match=named):
        step_of_cursor(state, plan, 1, "data")


def test_incomplete_cursor_is_refused():
    plan = plan_for(98, 4)
    for name in cursor_at(plan, 1, "data", 30).to_json():
        state = cursor_at(plan, 1, "data", 30).to_json()
        del state[name]
        with pytest.raises(DataError):
            step_of_cursor(state, plan, 1, "data")


@pytest.mark.parametrize(
    ("batch", "micro", "world", "repair"),
    [
        (64, 24, 2, "micro batch to one of 1, 2, 4, 8, 16, 32"),
        (64, 8, 3, "global batch to 48 or 72"),
        (0, 8, 1, "at least 1"),
    ],
)
def test_impossible_cut_names_the_repair(batch, micro, world, repair):
    with pytest.raises(ConfigError, match=repair):
        Cut(batch, micro, 0, world)


def test_a_batch_larger_than_the_data_names_the_repair():
    with pytest.raises(
        ConfigError, match=r'data set of 100 samples: set it to 100 or less, or data.epoch_end = "wrap"'
    ):
        plan_for(100, 200)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 33))
def test_evaluation_counts_each_sample_once(num_samples, world, micro):
    shares = [evaluation_share(num_samples, rank, world) for rank in range(world)]
    assert [sample for share in shares for sample in share] == list(range(num_samples))
    batches = evaluation_batches(num_samples, world, micro)
    assert max(map(len, shares)) <= batches * micro < max(map(len, shares)) + micro
