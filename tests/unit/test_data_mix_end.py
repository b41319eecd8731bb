"""Mixup and cutmix end at a step: on any ranks, after any resumption, with stages and mixtures; smoothing stays."""

import functools
import itertools
from pathlib import Path

import pytest
import torch

from dataloaders.config import AugmentConfig, DataConfig, MixtureEntry, ResolutionStage
from dataloaders.opening import open_source
from dataloaders.order.mixture import MixtureSource
from dataloaders.reading.device import Prepare
from dataloaders.reading.streams import ShardTrainStream
from dataloaders.testing.determinism import FULL_RECIPE, Pixels, make_images, pack_images, pixel_config
from launch.run.config import load_run
from launch.run.dry_run import _mixing
from launch.testing.commands import DEMO
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.ranks import RankInfo

BATCH = 24  # of 61 images: 2 steps per epoch


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("mix-end")
    return pack_images(make_images(root / "images"), root / "train")


def config_of(**augment):
    changes = {name: augment.pop(name) for name in ("resolutions", "mixture", "aspect_buckets") if name in augment}
    recipe = FULL_RECIPE.model_copy(update={"mix_prob": 1.0, "smoothing": 0.1, **augment})
    return pixel_config(augment=recipe, **changes)


def source_of(split, config):
    one = functools.partial(open_source, str(split.parent), split.name, config)
    return MixtureSource([one(), one()], [2.0, 1.0]) if config.mixture else one()


def mixed_steps(split, config, steps, first=0, world=1, micro=12):
    """Return which of the steps from a first one on mix, as every rank sees it."""
    found = {}
    for rank in range(world):
        stream = ShardTrainStream(source_of(split, config), config, 7, RankInfo(rank, world), BATCH, micro)
        batches = stream.micro_batches(first)
        for one in itertools.islice(batches, steps * stream.accumulation):
            found.setdefault(one.step, set()).add(one.mix is not None)
        batches.close()
        stream.close()
    assert all(len(seen) == 1 for seen in found.values())
    return [step for step, (seen,) in sorted(found.items()) if seen]


@pytest.mark.parametrize(
    ("augment", "last"),
    [
        ({}, 7),
        ({"mix_off_step": 3}, 2),
        ({"mix_off_epoch": 2}, 3),
        ({"mix_off_epoch": 2, "resolutions": (ResolutionStage(step=2, image_size=24),)}, 3),
        # Two sets of 61 images make an epoch of 5 steps.
        ({"mix_off_epoch": 1, "mixture": (MixtureEntry(root="a"), MixtureEntry(root="b"))}, 4),
    ],
)
def test_mixing_ends_at_its_step_on_any_ranks_and_after_a_resumption(split, augment, last):
    config = config_of(**augment)
    assert mixed_steps(split, config, 8) == list(range(last + 1))
    assert mixed_steps(split, config, 8, world=3, micro=4) == list(range(last + 1))
    assert mixed_steps(split, config, 5, first=3, world=2) == list(range(3, last + 1))


def test_steps_before_the_end_are_as_without_and_those_after_it_have_the_same_images(split):
    def of_steps(config, world=1, micro=BATCH, steps=range(4), **changes):
        config = config.model_copy(update=changes)
        return Pixels(lambda: source_of(split, config), config, world, micro, steps).by_step()

    ends, never, plain = config_of(mix_off_step=2), config_of(), config_of(mixup=0.0, cutmix=0.0)
    found = of_steps(ends)
    assert {step: found[step] for step in (0, 1)} == of_steps(never, steps=range(2))
    assert {step: found[step] for step in (2, 3)} == of_steps(plain, steps=range(2, 4))
    assert of_steps(ends, 3, 4, workers=2) == found
    assert of_steps(ends, 2, 6, steps=(1, 3), threads=3) == {step: found[step] for step in (1, 3)}


def test_smoothing_stays(split):
    config = config_of(mix_off_step=1)
    stream = ShardTrainStream(source_of(split, config), config, 7, RankInfo(), BATCH, BATCH)
    (one,) = itertools.islice(stream.micro_batches(1), 1)
    stream.close()
    _, targets = Prepare(config, 3, "cpu")(one, train=True)
    assert targets.amax(1).tolist() == pytest.approx([0.9 + 0.1 / 3] * BATCH)
    assert torch.equal(targets.argmax(1), one.labels)


def test_the_micro_batch_keeps_whole_groups_while_any_step_mixes():
    assert DataConfig(root="x", augment=AugmentConfig(mixup=0.2, mix_off_step=1, mix_group=4)).group == 4


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"mix_off_epoch": 3, "mix_off_step": 9}, "ends at an epoch or at a step: give mix_off_epoch or mix_off_step"),
        ({"mix_off_epoch": 0}, "mix_off_epoch = 0"),
    ],
)
def test_two_ends_and_none_at_all_are_refused(table, fault):
    with pytest.raises(ConfigError, match=fault):
        build(DataConfig, {"root": "data", "augment": {"mixup": 0.2, **table}}, "data")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.augment.mixup=0.2"], []),
        (["data.augment.mix_off_epoch=2"], []),  # nothing mixes
        (["data.augment.mixup=0.2", "data.augment.mix_off_epoch=2"], ["in the first 20 steps, off in the last 10"]),
        (["data.augment.cutmix=1", "data.augment.mix_off_step=7"], ["in the first 7 steps, off in the last 23"]),
        (["data.augment.mixup=1", "data.augment.mix_off_epoch=3"], ["in all steps: it would be off from step 30 on"]),
    ],
)
def test_a_dry_run_says_which_steps_mix(words, said):
    config = load_run(Path(DEMO), ["schedule.epochs=3", *words])
    assert [text for _, text in _mixing(config, 10)] == said
