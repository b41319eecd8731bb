"""Image sizes by step and by shape: pure functions, exact at their borders, the same after a resumption."""

import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig, ResolutionStage
from dataloaders.opening import open_source
from dataloaders.order.order import Cut, cursor_at, step_of_cursor
from dataloaders.order.resolution import BucketPlan, ImageSizes, assign_buckets, bucket_shape
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.reading.device import Prepare
from dataloaders.reading.streams import ShardTrainStream
from launch.run.inputs import training_shapes
from setformer_dist.core.config import build
from setformer_dist.core.continuing import differences
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.batch_plan import solve
from setformer_dist.engine.config import BatchConfig

STAGES = ({"epoch": 0, "image_size": 16}, {"step": 5, "image_size": 24}, {"epoch": 2, "image_size": 32})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """90 images: wide, high and square ones."""
    root = tmp_path_factory.mktemp("shapes")
    for i in range(90):
        height, width = ((30, 46), (44, 30), (36, 36))[i % 3]
        path = root / "source" / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        path.write_bytes(out.getvalue())
    pack_image_folder(root / "source", root / "train", PackOptions(samples_per_shard=30))
    return root


def config_of(data, **changes):
    augment = AugmentConfig(cutmix=1.0, mixup=0.5)
    return DataConfig(**{"root": str(data), "image_size": 32, "augment": augment, **changes})


def stages(*tables):
    return tuple(ResolutionStage(**table) for table in tables)


def stream_of(data, config, world=1, rank=0, micro=10):
    return ShardTrainStream(open_source(str(data), "train", config), config, 3, RankInfo(rank, world), 20, micro)


def take(stream, first, count):
    batches = stream.micro_batches(first)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def test_stages_begin_at_their_step():
    sizes = ImageSizes(DataConfig(root="", image_size=32, resolutions=stages(*STAGES)), steps_per_epoch=4)
    assert [sizes.shape(step)[0] for step in range(10)] == [16] * 5 + [24] * 3 + [32] * 2
    assert sizes.shape(10**9) == (32, 32)
    plain = ImageSizes(DataConfig(root="", image_size=32, resolutions=stages({"step": 7, "image_size": 8})), 4)
    assert [plain.side(step) for step in (0, 6, 7)] == [32, 32, 8]


def test_two_stages_at_one_step_are_refused():
    both = stages({"epoch": 2, "image_size": 16}, {"step": 8, "image_size": 24})
    ImageSizes(DataConfig(root="", resolutions=both), steps_per_epoch=5)
    with pytest.raises(ConfigError, match="two stages begin at step 8"):
        ImageSizes(DataConfig(root="", resolutions=both), steps_per_epoch=4)


def test_a_ramp_gives_every_size_as_many_steps_and_ends_where_the_next_stage_begins():
    ramp = {"step": 2, "image_size": 16, "ramp_to": 32, "multiple": 8}
    config = DataConfig(root="", image_size=12, resolutions=stages(ramp, {"epoch": 2, "image_size": 40}))
    sizes = ImageSizes(config, steps_per_epoch=4)
    assert [sizes.side(step) for step in range(10)] == [12, 12, 16, 16, 24, 24, 32, 32, 40, 40]
    down = {"step": 0, "image_size": 96, "ramp_to": 32}
    config = DataConfig(root="", resolutions=stages(down, {"step": 4, "image_size": 32}))
    assert [ImageSizes(config, 4).side(step) for step in range(6)] == [96, 96, 64, 32, 32, 32]
    assert training_shapes(config) == [(32, 32), (64, 64), (96, 96), (224, 224)]
    with pytest.raises(ConfigError, match=r"the ramp to 32 that begins at step 0 has no end: add the stage"):
        ImageSizes(DataConfig(root="", resolutions=stages(down)), 4)
    with pytest.raises(ConfigError, match="has 3 sizes and 2 steps"):
        ImageSizes(DataConfig(root="", resolutions=stages(down, {"step": 2, "image_size": 32})), 4)


def test_a_size_that_is_drawn_depends_on_seed_and_step_alone():
    drawn = {"step": 3, "image_size": 16, "random_to": 48, "multiple": 16}
    config = DataConfig(root="", image_size=8, resolutions=stages(drawn, {"step": 300, "image_size": 64}))
    sizes, again, other = (ImageSizes(config, 4, seed) for seed in (5, 5, 6))
    steps = range(3, 300)
    found = [sizes.side(step) for step in steps]
    assert [again.side(step) for step in reversed(steps)] == found[::-1]
    assert [other.side(step) for step in steps] != found
    assert {side: found.count(side) > 70 for side in found} == {16: True, 32: True, 48: True}
    assert [sizes.side(step) for step in (0, 2, 300)] == [8, 8, 64]


def test_a_run_with_stages_of_before_ramps_goes_on():
    config = DataConfig(root="", resolutions=stages(*STAGES))
    older = config.model_dump(mode="json")
    for stage in older["resolutions"]:
        del stage["ramp_to"], stage["random_to"], stage["multiple"]
    assert differences(older, config) == []
    older["resolutions"][0]["ramp_to"] = 64
    assert [found.key for found in differences(older, config)] == ["resolutions"]


@pytest.mark.parametrize("threads", [0, 2])
def test_sizes_change_at_exact_steps_also_after_a_resumption(data, threads):
    config = config_of(data, resolutions=stages(*STAGES), threads=threads, prefetch=3)
    stream = stream_of(data, config)
    assert stream.steps_per_epoch == 4
    whole = take(stream, 0, 20)
    for one in whole:
        side = 16 if one.step < 5 else 24 if one.step < 8 else 32
        assert one.inputs.shape == (10, 3, side, side)
        assert one.mix.box.max() <= side
        assert Prepare(config, 2, "cpu")(one, True)[0].shape == one.inputs.shape
    for first in (3, 4, 5, 7, 8):
        for one, other in zip(take(stream, first, 3), whole[2 * first :], strict=False):
            assert one.step == other.step
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.mix.box, other.mix.box)
    stream.close()


# Buckets


@settings(max_examples=50, deadline=None)
@given(st.integers(32, 512), st.floats(0.3, 3.0), st.sampled_from([1, 8, 16, 32]))
def test_bucket_shapes_have_about_the_pixels_of_the_square(side, aspect, multiple):
    height, width = bucket_shape(side, aspect, multiple)
    assert height % multiple == width % multiple == 0
    exact = side / np.sqrt(aspect), side * np.sqrt(aspect)
    assert abs(height - exact[0]) <= max(multiple / 2, multiple - exact[0])
    assert abs(width - exact[1]) <= max(multiple / 2, multiple - exact[1])


def test_samples_go_to_the_nearest_bucket_that_can_fill_a_batch():
    sizes = np.array([[100, 200]] * 30 + [[100, 100]] * 30 + [[200, 100]] * 5 + [[100, 140]] * 2, np.int32)
    members = assign_buckets(sizes, (0.5, 1.0, 2.0), 20)
    assert [len(ids) for ids in members] == [0, 37, 30]
    assert sorted(np.concatenate(members).tolist()) == list(range(67))
    assert [len(ids) for ids in assign_buckets(sizes, (0.5, 1.0, 2.0), 5)] == [5, 32, 30]
    assert [len(ids) for ids in assign_buckets(sizes, (0.5, 1.0, 2.0), 100)].count(0) == 2


def counted_plan(wrap, counts=(25, 41, 13), batch=6):
    ends = np.cumsum(counts)
    members = [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return BucketPlan(members, (0.5, 1.0, 2.0), batch, 3, wrap), members


@pytest.mark.parametrize("wrap", [False, True])
def test_each_batch_is_of_one_bucket(wrap):
    plan, members = counted_plan(wrap)
    assert plan.steps_per_epoch == (14 if wrap else 4 + 6 + 2)
    for step in range(60):
        samples, _ = plan.pick(step, np.arange(6))
        bucket = (0.5, 1.0, 2.0).index(plan.aspect(step))
        assert set(samples.tolist()) <= set(members[bucket].tolist())


def test_buckets_drop_their_tails_and_others_each_epoch():
    plan, _ = counted_plan(False)
    dropped, sequences = [], []
    for epoch in range(6):
        steps = range(epoch * 12, (epoch + 1) * 12)
        picked = [plan.pick(step, np.arange(6)) for step in steps]
        seen = np.concatenate([samples for samples, _ in picked]).tolist()
        assert len(set(seen)) == len(seen) == 72
        assert {int(e) for _, epochs in picked for e in epochs} == {epoch}
        dropped.append(frozenset(range(79)) - set(seen))
        sequences.append(tuple(plan.aspect(step) for step in steps))
    assert len(set(dropped)) == len(set(sequences)) == 6
    assert [sequence.count(1.0) for sequence in sequences] == [6] * 6


def test_wrapping_buckets_leaves_nothing_out():
    plan, members = counted_plan(True)
    samples, epochs = (
        np.concatenate(part) for part in zip(*(plan.pick(step, np.arange(6)) for step in range(300)), strict=True)
    )
    for ids in members:
        mine = np.isin(samples, ids)
        walked, its_epochs = samples[mine], epochs[mine]
        assert np.array_equal(its_epochs, np.arange(len(walked)) // len(ids))
        for epoch in range(int(its_epochs[-1])):
            assert sorted(walked[its_epochs == epoch]) == ids.tolist()
        # To a batch, the share that it has of all samples.
        assert abs(len(walked) - 1800 * len(ids) / 79) <= 2 * 6


@pytest.mark.parametrize(("world", "micro"), [(2, 3), (3, 1), (6, 1)])
def test_buckets_do_not_depend_on_the_cut(world, micro):
    plan, _ = counted_plan(False)
    for step in (0, 7, 30):
        expected, _ = plan.pick(step, np.arange(6))
        seen = np.full(6, -1)
        for rank in range(world):
            places = Cut(6, micro, rank, world).places().ravel()
            seen[places] = plan.pick(step, places)[0]
        assert np.array_equal(seen, expected)


def test_cursor_of_other_buckets_is_refused():
    plan, _ = counted_plan(False)
    state = cursor_at(plan, 3, "f", 20).to_json()
    assert step_of_cursor(state, plan, 3, "f") == 20
    for other in (counted_plan(True)[0], counted_plan(False, (25, 40, 14))[0]):
        with pytest.raises(DataError, match=r"order .*aspect_buckets"):
            step_of_cursor(state, other, 3, "f")


def test_bucketed_streams_show_each_batch_in_one_shape(data):
    shapes = {"aspect_buckets": (0.7, 1.0, 1.5), "bucket_multiple": 8}
    config = config_of(data, augment=AugmentConfig(), threads=1, **shapes)
    seen = {}
    for world, micro in ((1, 20), (2, 5)):
        for rank in range(world):
            stream = stream_of(data, config, world, rank, micro)
            assert stream.steps_per_epoch == 3
            for one in take(stream, 0, 6 * 20 // (world * micro)):
                shapes = seen.setdefault((world, one.step), set())
                shapes.add(tuple(one.inputs.shape[2:]))
                source = open_source(str(data), "train", config)
                aspects = {source.size(int(i))[1] / source.size(int(i))[0] for i in one.sample_ids}
                assert len(aspects) == 1
                height, width = one.inputs.shape[2:]
                assert (height > width) == (min(aspects) < 1)
            stream.close()
    assert all(len(shapes) == 1 for shapes in seen.values())
    assert {step: shape for (world, step), shape in seen.items() if world == 1} == {
        step: shape for (world, step), shape in seen.items() if world == 2
    }
    assert set().union(*seen.values()) == {(40, 24), (32, 32), (24, 40)}


def test_impossible_sizes_are_refused(data):
    for fault, change in {
        "exactly one": {"resolutions": [{"epoch": 1, "step": 3, "image_size": 8}]},
        "give ramp_to or random_to": {
            "resolutions": [{"step": 1, "image_size": 8, "ramp_to": 16, "random_to": 16, "multiple": 8}]
        },
        "cannot go from 8 to 20 by 8: its sizes end at 16": {
            "resolutions": [{"step": 1, "image_size": 8, "ramp_to": 20, "multiple": 8}]
        },
        "has 1993 sizes, and 256 at most": {
            "resolutions": [{"step": 1, "image_size": 8, "random_to": 2000, "multiple": 1}]
        },
        "give ramp_to, random_to": {"resolutions": [{"step": 1, "image_size": 8, "multiple": 8}]},
        "excludes resolutions": {"augment": {"crop": "pad"}, "resolutions": [{"step": 3, "image_size": 8}]},
        "leave one out": {"aspect_buckets": [1.0, 1.5], "order": "block"},
        "must be positive": {"aspect_buckets": [1.0, -1.5]},
        "names a shape twice": {"aspect_buckets": [1.5, 1.5]},
    }.items():
        with pytest.raises(ConfigError, match=fault):
            build(DataConfig, {"root": "d", **change}, "data")
    config = config_of(data, aspect_buckets=(1.0, 2.0))
    with pytest.raises(ConfigError, match="larger than the data set of 90"):
        ShardTrainStream(open_source(str(data), "train", config), config, 3, RankInfo(), 120, 120)


def test_a_rare_shape_is_blamed_on_the_buckets():
    members = [np.arange(300_000), np.arange(300_000, 300_001)]
    with pytest.raises(ConfigError, match=r"data\.aspect_buckets: 1 samples are near .*: leave that entry out"):
        BucketPlan(members, (1.0, 2.0), 1, 3, wrap=True)


@pytest.mark.parametrize("threads", [0, 2])
def test_larger_images_in_smaller_micro_batches_are_the_same_images(data, threads):
    config = config_of(
        data, threads=threads, resolutions=stages({"step": 0, "image_size": 16}, {"step": 2, "image_size": 32})
    )
    plan = solve(BatchConfig(global_size=20, micro_pixels=16 * 16 * 10), 2)
    source = open_source(str(data), "train", config)
    small = ShardTrainStream(source, config, 3, RankInfo(1, 2), 20, plan.micro, plan.micro_at)
    found, batches = [], small.micro_batches(0)
    for _ in range(4):
        count, of_step = plan.of_step(batches)
        found.append((count, list(of_step)))
    batches.close()
    assert [count for count, _ in found] == [1, 1, 5, 5]
    expected = {}  # by step and sample: the cut of a rank changes with its micro batch
    for rank in (0, 1):
        for one in take(stream_of(data, config, 2, rank), 0, 4):
            expected |= {
                (one.step, int(i)): (image, one.labels[k])
                for k, (i, image) in enumerate(zip(one.sample_ids, one.inputs, strict=True))
            }
    for _, of_step in found:
        for one in of_step:
            for k, sample in enumerate(one.sample_ids.tolist()):
                image, label = expected[one.step, sample]
                assert torch.equal(one.inputs[k], image)
                assert torch.equal(one.labels[k], label)


def test_a_stage_may_have_crops_of_another_scale(data):
    small, large = (0.08, 0.2), (0.9, 1.0)
    one = {"step": 0, "image_size": 24}
    two = {"step": 2, "image_size": 24}

    def images(scale, *tables):
        config = config_of(data, augment=AugmentConfig(scale=scale), resolutions=stages(*tables))
        return [batch.inputs for batch in take(stream_of(data, config, micro=20), 0, 4)]

    both = images(small, one, {**two, "scale": large})
    alone = images(small, one, two)[:2] + images(large, one, two)[2:]
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    assert not torch.equal(both[2], images(small, one, two)[2])
    with pytest.raises(ValueError, match="0 < first <= second"):
        stages({**one, "scale": (0.5, 0.2)})
    with pytest.raises(ValueError, match=r'the crop here is "none": leave scale out'):
        config_of(data, augment=AugmentConfig(crop="none"), resolutions=stages({**one, "scale": large}))
