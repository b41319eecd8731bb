"""Mixtures: exact shares, epochs of each set, one set of sample numbers, the same guarantees as one data set has."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig, MixtureEntry
from dataloaders.opening import open_source
from dataloaders.order.mixture import WINDOW, MixturePlan, MixtureSource, Shares, quotas, set_of
from dataloaders.order.order import BlockOrder, Cut, FullOrder, cursor_at, step_of_cursor
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.reading.streams import ShardTrainStream
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo


def make_split(root, name, count, classes=("cat", "dog")):
    for i in range(count):
        path = root / f"{name}-source" / classes[i % len(classes)] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([len(name), count, i]).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        path.write_bytes(out.getvalue())
    pack_image_folder(root / f"{name}-source", root / name / "train", PackOptions(samples_per_shard=10))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    make_split(root, "large", 61)
    make_split(root, "small", 14)
    make_split(root, "other", 6, classes=("cat", "horse"))
    return root


def mixed(data, *names, weights=None, **changes):
    weights = weights or [1.0] * len(names)
    entries = tuple(MixtureEntry(root=str(data / name), weight=w) for name, w in zip(names, weights, strict=True))
    config = DataConfig(mixture=entries, image_size=12, augment=AugmentConfig(crop="resized"), **changes)
    sources = [open_source(entry.root, entry.train, config) for entry in entries]
    return MixtureSource(sources, weights), config


# Shares


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 100))
def test_shares_are_exact_in_every_stretch(weights, seed):
    shares = Shares(weights, seed)
    members, before = shares.at(np.arange(WINDOW - 3000, WINDOW + 3000))
    share = shares.quotas / WINDOW
    assert shares.quotas.sum() == WINDOW
    np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=1 / WINDOW)
    numbers = np.random.default_rng(seed)
    for member in range(len(weights)):
        allowed = 1 + share[member] * max(0, len(weights) - 2) + 1e-6
        if len(weights) == 1:
            allowed = 1e-6
        seen = np.cumsum(members == member)
        # From the start of the run on: what came before the stretch is in `before` of its first place.
        places = np.flatnonzero(members == member)
        if len(places):
            exact = (WINDOW - 3000 + places) * share[member]
            assert np.abs(before[places] - exact).max() <= allowed
        for _ in range(20):
            start, end = np.sort(numbers.integers(0, 5999, 2))
            count = seen[end] - seen[start]
            assert abs(count - (end - start) * share[member]) <= 2 * allowed


def test_every_place_of_a_set_comes_once_and_in_turn():
    shares = Shares([5, 2, 1], 3)
    members, before = shares.at(np.arange(2 * WINDOW + 777))
    for member in range(3):
        assert np.array_equal(before[members == member], np.arange((members == member).sum()))
    some = np.random.default_rng(0).integers(0, 2 * WINDOW, 500)
    again = shares.at(some)
    assert np.array_equal(again[0], members[some])
    assert np.array_equal(again[1], before[some])


def test_who_follows_whom_is_random():
    members, _ = Shares([1, 1], 3).at(np.arange(WINDOW))
    pairs = members.reshape(-1, 2)
    assert (pairs.sum(1) == 1).all()  # exact shares leave no other way
    assert 0.48 < pairs[:, 0].mean() < 0.52
    repeats = (pairs[1:, 0] == pairs[:-1, 1]).mean()
    assert 0.3 < repeats < 0.7  # a mere alternation has none
    assert not np.array_equal(members, Shares([1, 1], 4).at(np.arange(WINDOW))[0])


def test_weights_too_small_are_refused():
    assert quotas([1, 1, 2]).tolist() == [WINDOW // 4, WINDOW // 4, WINDOW // 2]
    with pytest.raises(ConfigError, match=r"weight 1e-06 is less than 1 / 65536 .*leave that entry out"):
        quotas([1.0, 1e-6])


# The plan


@pytest.mark.parametrize("block", [False, True])
def test_each_set_walks_its_own_epochs(block):
    sizes = (50, 7)
    orders = [
        BlockOrder(np.arange(size, dtype=np.int32) // 5, 2, 3, member) if block else FullOrder(size, 3, member)
        for member, size in enumerate(sizes)
    ]
    plan = MixturePlan(orders, [1.0, 1.0], 12, 3)
    assert (plan.num_samples, plan.steps_per_epoch) == (57, 4)
    picked = [plan.pick(step, np.arange(12)) for step in range(60)]
    samples, epochs = (np.concatenate(part) for part in zip(*picked, strict=True))
    for low, high in ((0, 50), (50, 57)):
        mine = (samples >= low) & (samples < high)
        assert abs(mine.sum() - 360) <= 1
        walked, its_epochs = samples[mine], epochs[mine]
        assert np.array_equal(its_epochs, np.arange(len(walked)) // (high - low))
        for epoch in range(int(its_epochs[-1])):
            assert sorted(walked[its_epochs == epoch]) == list(range(low, high))


def test_cursor_of_other_weights_or_sets_is_refused():
    def plan(weights, sizes=(50, 7)):
        return MixturePlan([FullOrder(size, 3, i) for i, size in enumerate(sizes)], weights, 12, 3)

    state = cursor_at(plan([1, 2]), 3, "f", 17).to_json()
    assert len(json.dumps(state)) < 1000
    assert step_of_cursor(state, plan([2, 4]), 3, "f") == 17
    for other in (plan([1, 3]), plan([1, 2], (49, 8))):
        with pytest.raises(DataError, match=r"order .*mixture"):
            step_of_cursor(state, other, 3, "f")


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 6), (3, 4), (4, 1)])
def test_a_mixture_does_not_depend_on_the_cut(world, micro):
    plan = MixturePlan([FullOrder(30, 3, 0), FullOrder(9, 3, 1)], [3, 1], 12, 3)
    for step in (0, 5, 100):
        expected, _ = plan.pick(step, np.arange(12))
        seen = np.full(12, -1)
        for rank in range(world):
            places = Cut(12, micro, rank, world).places().ravel()
            seen[places] = plan.pick(step, places)[0]
        assert np.array_equal(seen, expected)


# Sources and streams


def test_a_mixed_source_is_its_sets_one_after_the_other(data):
    source, _ = mixed(data, "large", "small")
    one, two = source.sources
    assert source.num_samples == 75
    assert source.classes == one.classes
    assert source.shards.tolist() == [*one.shards.tolist(), *(two.shards + one.shards[-1] + 1).tolist()]
    assert len(source.sizes()) == 75
    for sample in (0, 60, 61, 74):
        own, number = (one, sample) if sample < 61 else (two, sample - 61)
        assert source.read(sample) == own.read(number)
        assert source.key(sample) == own.key(number)
        assert source.place(sample) == own.place(number)
        assert source.size(sample) == own.size(number)
        assert set_of(source, sample) == (range(61) if sample < 61 else range(61, 75))
    asked = np.array([74, -1, 3, 61])
    assert source.labels(asked).tolist() == [
        int(two.labels(np.array([13]))),
        0,
        int(one.labels(np.array([3]))),
        int(two.labels(np.array([0]))),
    ]
    assert source.extent() == ((12, 12), (12, 12))
    turned, _ = mixed(data, "small", "large")
    assert turned.fingerprint != source.fingerprint


def test_sets_of_other_classes_are_refused(data):
    with pytest.raises(DataError, match=r"data.mixture: label 1 is 'dog' in .*large.* but 'horse' in .*other"):
        mixed(data, "large", "other")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mixed_stream_delivers_shares_and_resumes(data, workers):
    source, config = mixed(data, "large", "small", weights=[1, 3], workers=workers, threads=1)
    stream = ShardTrainStream(source, config, 5, RankInfo(), 16, 8)
    assert stream.steps_per_epoch == 75 // 16
    batches = stream.micro_batches(0)
    taken = [next(batches) for _ in range(16)]
    small = sum(int((one.sample_ids >= 61).sum()) for one in taken)
    assert abs(small - 96) <= 1
    for one in taken:
        assert one.labels.tolist() == source.labels(one.sample_ids.numpy()).tolist()
    first = stream.check_state(stream.state(5))
    again = stream.micro_batches(first)
    for one in taken[10:]:
        other = next(again)
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert torch.equal(one.inputs, other.inputs)
    stream.close()


def test_a_damaged_sample_is_replaced_from_its_own_set(data, tmp_path):
    make_split(tmp_path, "small", 14)
    image = open_source(str(tmp_path / "small"), "train", DataConfig()).read(3).image
    (shard,) = (path for path in (tmp_path / "small" / "train").glob("*.tar") if image in path.read_bytes())
    content = bytearray(shard.read_bytes())
    content[content.index(image) + 40] ^= 1
    shard.write_bytes(content)
    config = DataConfig(mixture=(MixtureEntry(root=str(data)),), image_size=12, augment=AugmentConfig())
    sources = [open_source(str(data / "large"), "train", config), open_source(str(tmp_path / "small"), "train", config)]
    stream = ShardTrainStream(MixtureSource(sources, [1, 1]), config, 5, RankInfo(), 16, 16)
    lines = []
    for _, one in zip(range(8), stream.micro_batches(0), strict=False):
        lines += [(line, one.sample_ids.tolist()) for line in one.substitutions]
    assert lines
    for line, _ in lines:
        assert "sample 3 (" in line
        assert 61 <= int(line.split("replaced by sample ")[1].split()[0]) < 75
    stream.close()


def test_config_of_a_mixture():
    table = {"mixture": [{"root": "a", "weight": 2}, {"root": "b", "train": "x"}], "root": "c"}
    config = build(DataConfig, table, "data")
    assert [(entry.root, entry.train, entry.weight) for entry in config.mixture] == [("a", "train", 2), ("b", "x", 1)]
    for fault, change in {
        "weight": {"mixture": [{"root": "a", "weight": 0}]},
        "leave one out": {"mixture": [{"root": "a"}], "aspect_buckets": [1.0, 1.5]},
    }.items():
        with pytest.raises(ConfigError, match=fault):
            build(DataConfig, {**table, **change}, "data")
