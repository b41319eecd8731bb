"""Repeated augmentation: which samples come how often, which never mix, the same on any ranks, and what excludes it."""

import dataclasses
import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataloaders.config import DataConfig, MixtureEntry
from dataloaders.opening import open_source
from dataloaders.order.mixture import MixtureSource
from dataloaders.order.order import counts_samples, cursor_at, step_of_cursor
from dataloaders.order.plans import plan_of
from dataloaders.order.repeated import RepeatedPlan, copies_of
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.testing.determinism import FULL_RECIPE, Pixels, make_images, pack_images, pixel_config, step_ids
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.seeding import Purpose, sample_keys
from setformer_dist.engine.step import TrainStep
from setformer_dist.tasks.mae import HidingConfig, MaskedPrepare

COUNT, BATCH, REPEATS = 61, 24, 3
KINDS = {
    "full": {},
    "block": {"order": "block", "block_shards": 2},
    "wrap": {"epoch_end": "wrap"},
    "mixture": {"mixture": (MixtureEntry(root="a"), MixtureEntry(root="b"))},
    "buckets": {"aspect_buckets": (0.8, 1.2), "bucket_multiple": 8},
}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("repeats")
    return pack_images(make_images(root / "images", COUNT), root / "train")


def config_of(repeats=REPEATS, augment=None, **changes):
    recipe = FULL_RECIPE.model_copy(update={"repeats": repeats, "mix_prob": 1.0, **(augment or {})})
    return pixel_config(augment=recipe, **changes)


def source_of(split, config):
    one = open_source(str(split.parent), split.name, config)
    if not config.mixture:
        return one
    return MixtureSource([one, open_source(str(split.parent), split.name, config)], [1.0, 1.0])


def picked(plan, steps):
    """Return (sample, epoch) at every place of each step's batch."""
    places = np.arange(plan.global_batch)
    return [list(zip(*(part.tolist() for part in plan.pick(step, places)), strict=True)) for step in steps]


# Which samples


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_each_image_as_often_as_asked_and_never_twice_alike(split, kind):
    config = config_of(**KINDS[kind])
    source = source_of(split, config)
    plan = plan_of(source, config, 5, BATCH)
    assert isinstance(plan, RepeatedPlan)
    plain = plan_of(source, config_of(1, **KINDS[kind]), 5, BATCH)
    assert (plan.num_samples, plan.global_batch) == (plain.num_samples, BATCH)
    assert plan.steps_per_epoch == plain.steps_per_epoch
    batches = picked(plan, range(6 * plan.steps_per_epoch))
    part = BATCH // REPEATS
    for batch in batches:
        samples = [sample for sample, _ in batch]
        assert samples == samples[:part] * REPEATS
        epochs = np.array([epoch for _, epoch in batch]).reshape(REPEATS, part)
        assert copies_of(epochs, REPEATS).tolist() == [[copy] * part for copy in range(REPEATS)]
        assert len({epoch // REPEATS for epoch in epochs.ravel().tolist()}) <= 2  # where epochs meet
    seen = Counter(itertools.chain.from_iterable(batches))
    assert set(seen.values()) == {1}, "the same augmentation of a sample twice"


def test_every_sample_is_shown_as_often_as_without_repeats(split):
    """With wrap nothing is left out: over R epochs of 61 images, the same (sample, epoch) in another order."""
    config = config_of(**KINDS["wrap"])
    source = source_of(split, config)
    steps = range(COUNT)  # 61 x 24 places are 24 epochs of the 61 images
    plans = [plan_of(source, one, 5, BATCH) for one in (config, config_of(1, **KINDS["wrap"]))]
    ours, theirs = (sorted(itertools.chain.from_iterable(picked(plan, steps))) for plan in plans)
    assert ours == theirs


def test_samples_left_out_are_others_each_time(split):
    config = config_of()
    plan = plan_of(source_of(split, config), config, 5, BATCH)
    # 7 batches of 8 images make an epoch of the set; 5 of 61 are left out.
    passes = [{s for batch in picked(plan, range(7 * e, 7 * e + 7)) for s, _ in batch} for e in range(4)]
    assert [len(one) for one in passes] == [56] * 4
    assert set.union(*passes) == set(range(COUNT))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_depend_on_the_cut_or_on_an_interruption(split, kind):
    config = config_of(**KINDS[kind])
    source = source_of(split, config)
    plan = plan_of(source, config, 5, BATCH)
    whole = step_ids(plan, 1, BATCH, 0, 9)
    for world, micro in ((1, 2), (2, 6), (3, 4), (4, 2)):
        assert step_ids(plan, world, micro, 0, 9) == whole
        state = json.loads(json.dumps(cursor_at(plan, 5, "data", 4).to_json()))
        again = plan_of(source, config, 5, BATCH)
        assert step_of_cursor(state, again, 5, "data") == 4
        assert step_ids(again, world, micro, 4, 5) == whole[4:]
    for other in (1, 2):
        with pytest.raises(DataError, match=r"order .* and augment.repeats back"):
            step_of_cursor(state, plan_of(source, config_of(other, **KINDS[kind]), 5, BATCH), 5, "data")
    assert not counts_samples(plan.id)  # so another global batch is refused


# What is shown


def batches_of(split, config, steps, micro=BATCH):
    stream = ShardTrainStream(source_of(split, config), config, 5, RankInfo(), BATCH, micro)
    found = list(itertools.islice(stream.micro_batches(0), steps * stream.accumulation))
    stream.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_is_mixed_with_its_copy(split, kind):
    for one in batches_of(split, config_of(augment={"mix_group": 4}, **KINDS[kind]), 4):
        assert (one.mix.partner != torch.arange(BATCH)).any()
        itself = one.mix.partner == torch.arange(BATCH)
        same = one.sample_ids[one.mix.partner] == one.sample_ids
        # Where epochs of a set meet, or sets of a mixture have like images, a sample may come next to itself.
        assert (same == itself).all() or kind in ("wrap", "mixture")


def test_copies_look_different_and_draw_other_paths(split):
    (one,) = batches_of(split, config_of(), 1)
    part = BATCH // REPEATS
    assert one.copies.tolist() == [copy for copy in range(REPEATS) for _ in range(part)]
    for place in range(part):
        copies = [one.inputs[place + copy * part] for copy in range(REPEATS)]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(copies, 2))
        assert len({int(one.labels[place + copy * part]) for copy in range(REPEATS)}) == 1
    keys = sample_keys(Purpose.DROP_PATH, 0, 0, one.drawn_ids)
    assert len(set(keys.tolist())) == BATCH


COPIES = torch.tensor([0, 0, 1])


@pytest.fixture
def copied():
    """Two copies of sample 5, and one of 7."""
    ids = torch.tensor([5, 7, 5])
    return MicroBatch(torch.zeros(3, 3, 16, 16), ids, torch.ones(3), ids, copies=COPIES)


def test_draws_of_runs_without_copies_are_as_ever(copied):
    assert dataclasses.replace(copied, copies=None).drawn_ids.tolist() == [5, 7, 5]
    assert copied.drawn_ids.tolist() == [5, 7, 5 + (1 << 40)]


def test_copies_hide_other_parts_and_drop_other_paths(copied):
    def whole(batch, train):
        return batch.inputs, None

    prepare = MaskedPrepare(whole, HidingConfig(unit=2, ratio=0.5), torch.float32, 0, 10, None)
    hidden = prepare(copied, train=True)[0][:, 3]
    assert not torch.equal(hidden[0], hidden[2])
    once = prepare(dataclasses.replace(copied, copies=None), train=True)[0][:, 3]
    assert torch.equal(once[0], once[2])
    assert torch.equal(once[:2], hidden[:2])
    keys = []
    step = SimpleNamespace(_set_sample_keys=keys.append, _seed=0, _keys={})
    TrainStep._key_drop_path(step, 4, copied, torch.device("cpu"))
    assert keys[0].tolist() == sample_keys(Purpose.DROP_PATH, 0, 4, copied.drawn_ids).tolist()


def test_pixels_do_not_depend_on_ranks_readers_and_resumption(split):
    def pixels(world=1, micro=BATCH, steps=range(4), **changes):
        config = config_of(**changes)
        return Pixels(lambda: source_of(split, config), config, world, micro, steps).by_step()

    whole = pixels()
    assert pixels(2, 4, threads=3) == whole
    assert pixels(3, 8, workers=2) == whole
    assert pixels(4, 2, (1, 3)) == {step: whole[step] for step in (1, 3)}


def test_evaluation_shows_each_sample_once(split):
    config = config_of()
    stream = ShardEvalStream(source_of(split, config), config, RankInfo(), 8)
    ids = [i for one in stream.micro_batches() for i in one.sample_ids[one.weights == 1].tolist()]
    stream.close()
    assert sorted(ids) == list(range(COUNT))


# What is refused


@pytest.mark.parametrize(
    ("batch", "augment", "fault"),
    [
        (20, {"mixup": 0.0, "cutmix": 0.0}, r"20 is no multiple of 3: set batch.global_size = 18 or 21, or other rep"),
        (24, {"mix_group": 12}, r"in groups of mix_group = 12 that mix, and 24 is no multiple of 36: .*_size = 36, or"),
    ],
)
def test_batches_that_are_not_whole_copies_of_whole_groups_are_refused(split, batch, augment, fault):
    config = config_of(augment=augment)
    with pytest.raises(ConfigError, match=fault):
        plan_of(source_of(split, config), config, 5, batch)


def test_repeats_are_at_least_one():
    with pytest.raises(ConfigError, match="repeats = 0"):
        build(DataConfig, {"root": "data", "augment": {"repeats": 0}}, "data")
