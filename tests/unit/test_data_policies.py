"""TrivialAugment and 3-Augment: against torchvision, PIL and timm, on any ranks, and what excludes them."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import timm.data.auto_augment as timms
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.opening import open_source
from dataloaders.pixels.augment import WIDE_OPERATIONS, augment_by
from dataloaders.pixels.transforms import TrainTransform, draw_choices
from dataloaders.source import Stored
from dataloaders.testing.determinism import FULL_RECIPE, Pixels, make_images, pixel_config
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError

FILL = [124.0, 116.0, 104.0]
POLICIES = ("trivialaugment", "3augment")


def photograph(height=40, width=56):
    """Smooth colours with some noise."""
    noise = np.random.default_rng(0)
    coarse = Image.fromarray(noise.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return (smooth + noise.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def as_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


# TrivialAugment


@pytest.mark.parametrize("name", WIDE_OPERATIONS)
def test_trivialaugment_does_what_torchvision_does(name):
    """Of every operation, at every strength and sign; strengths are double here and single precision there."""
    noise = np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    image = as_tensor(np.concatenate([photograph(24, 28), noise], axis=1))
    theirs = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR, fill=FILL)
    assert list(WIDE_OPERATIONS) == list(theirs._AUGMENTATION_SPACE)
    strongest, is_signed, _ = WIDE_OPERATIONS[name]
    strengths, signed = theirs._AUGMENTATION_SPACE[name]
    assert is_signed == signed
    which = (list(WIDE_OPERATIONS).index(name) + 0.5) / len(WIDE_OPERATIONS)
    table = strengths(31, 24, 48)
    for step in range(31):
        strength = strongest * step / 30
        strength = {"Posterize": 8 - round(strength), "Solarize": 1 - strength}.get(name, strength)
        assert strength == pytest.approx(0.0 if table is None else float(table[step]), abs=1e-5)
        for sign in (0.2, 0.8) if signed else (0.2,):
            signed_strength = -strength if signed and sign < 0.5 else strength
            expected = theirs._apply_image_or_video_transform(
                image, name, signed_strength, theirs.interpolation, theirs._fill
            )
            found = augment_by("trivialaugment", image, [which, (step + 0.5) / 31, sign], FILL)
            assert torch.equal(found, expected), (step, sign)


def test_trivialaugment_draws_every_operation_and_every_strength_alike(monkeypatch):
    seen = []
    spied = [(31.0, False, lambda image, by, fill, name=name: seen.append((name, by)) or image) for name in range(14)]
    monkeypatch.setattr("dataloaders.pixels.augment._WIDE_IN_TURN", spied)
    count = 14 * 31 * 40
    choices = draw_choices(AugmentConfig(policy="trivialaugment"), 3, np.zeros(count, np.int64), np.arange(count))
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    for one in choices:
        augment_by("trivialaugment", image, one.policy, FILL)
    pairs = np.array([14 * round(by * 30 / 31) + name for name, by in seen])
    counts = np.bincount(pairs, minlength=14 * 31)
    assert len(counts) == 14 * 31
    # Chi-square of the 434 cells, five standard deviations.
    assert ((counts - 40) ** 2 / 40).sum() < 433 + 5 * np.sqrt(2 * 433)
    signs = np.array([one.policy[2] < 0.5 for one in choices])
    assert abs(signs.mean() - 0.5) < 5 * 0.5 / np.sqrt(count)


# 3-Augment


def test_three_augment_has_the_pixels_of_deit_iii():
    """Grayscale, solarizing and blur of DeiT III's augment.py are PIL's: to the last bit."""
    for pixels in (photograph(), np.random.default_rng(1).integers(0, 256, (40, 56, 3), dtype=np.uint8)):
        picture, image = Image.fromarray(pixels), as_tensor(pixels)
        grey = augment_by("3augment", image, [0.1, 0.5, 0.5], FILL)
        assert torch.equal(grey, as_tensor(v2.Grayscale(3)(picture)))
        assert torch.equal(augment_by("3augment", image, [0.4, 0.5, 0.5], FILL), as_tensor(ImageOps.solarize(picture)))
        for strength in (0.0, 0.3, 0.999):
            radius = 0.1 + 1.9 * strength
            blurred = picture.filter(ImageFilter.GaussianBlur(radius))
            assert torch.equal(augment_by("3augment", image, [0.8, strength, 0.5], FILL), as_tensor(blurred))


def test_three_augment_has_the_pixels_of_timm(monkeypatch):
    """Timm's "3a" at the same draws; its grey differs from PIL's own by no bit either."""
    policy = timms.auto_augment_policy_3a({"magnitude_std": 0})
    picture, image = Image.fromarray(photograph()), as_tensor(photograph())
    monkeypatch.setattr("timm.data.auto_augment.random.uniform", lambda low, high: low + (high - low) * 0.3)
    by_name = {step.name: step for (step,) in policy}
    for which, name in ((0.1, "Desaturate"), (0.4, "Solarize"), (0.8, "GaussianBlurRand")):
        expected = as_tensor(by_name[name](picture))
        assert torch.equal(augment_by("3augment", image, [which, 0.3, 0.5], FILL), expected), name
    assert len(by_name) == 3


def test_three_augment_draws_each_operation_alike():
    count = 30_000
    choices = draw_choices(AugmentConfig(policy="3augment"), 3, np.zeros(count, np.int64), np.arange(count))
    counts = np.bincount([int(3 * one.policy[0]) for one in choices])
    assert ((counts - count / 3) ** 2 / (count / 3)).sum() < 2 + 5 * np.sqrt(2 * 2)


# Both


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("policy", POLICIES)
def test_pixels_do_not_depend_on_ranks_readers_and_resumption(images, policy):
    def pixels(world=1, micro=24, steps=range(4), **changes):
        augment = FULL_RECIPE.model_copy(update={"randaugment_ops": 0, "policy": policy})
        config = pixel_config(augment=augment, **changes)
        return Pixels(lambda: open_source(str(images), ".", config), config, world, micro, steps).by_step()

    whole = pixels()
    assert len(set(whole.values())) == 4
    assert pixels(2, 4, threads=3) == whole
    assert pixels(3, 8, workers=2) == whole
    resumed = pixels(4, 2, (1, 3))
    assert resumed == {step: whole[step] for step in (1, 3)}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_leaves_the_numbers_of_the_others_alone(policy):
    some, more = (
        draw_choices(AugmentConfig(color_jitter=0.3, policy=one), 1, np.zeros(4, np.int64), np.arange(4))
        for one in ("none", policy)
    )
    for one, other in zip(some, more, strict=True):
        assert one.policy == []
        assert len(other.policy) == 3
        assert one._replace(policy=other.policy) == other


@dataclass
class Facts:
    """What a transform asks of a source."""

    parts: frozenset = frozenset()
    name: str = "here"
    classes: tuple = tuple(map(str, range(255)))

    def extent(self):
        return (32, 32), (32, 32)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_images_and_keeps_their_form(policy):
    out = io.BytesIO()
    Image.fromarray(photograph(32, 32)).save(out, "PNG")
    config = DataConfig(root="", image_size=32, augment=AugmentConfig(crop="none", flip=False, policy=policy))
    transform = TrainTransform(config, Facts())
    choices = draw_choices(config.augment, 1, np.zeros(30, np.int64), np.arange(30))
    shown = [transform(Stored(out.getvalue()), (32, 32), (32, 32), one).image for one in choices]
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in shown)
    for policy_draws in (one.policy for one in choices):  # an augmentation of the user's own may write into it
        assert augment_by(policy, as_tensor(photograph()), policy_draws, FILL).add_(0).is_contiguous()
    plain = as_tensor(photograph(32, 32))
    assert sum(not torch.equal(image, plain) for image in shown) > 15


def test_masks_and_boxes_follow_three_augment_and_not_trivialaugment():
    def transform(policy):
        config = DataConfig(root="", image_size=32, augment=AugmentConfig(policy=policy))
        return TrainTransform(config, Facts(frozenset({"mask", "boxes"})))

    transform("3augment")
    with pytest.raises(ConfigError, match=r'policy = "trivialaugment" shears.*boxes and mask.*set it to "3augment"'):
        transform("trivialaugment")


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"policy": "trivial"}, "policy = 'trivial': input should be 'none', 'trivialaugment' or '3augment'"),
        ({"policy": "3augment", "randaugment_ops": 2}, r'policy = "3augment" takes the place.*set randaugment_ops = 0'),
    ],
)
def test_impossible_policies_are_refused(table, fault):
    with pytest.raises(ConfigError, match=fault):
        build(DataConfig, {"root": "data", "augment": table}, "data")


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_need_rgb_of_eight_bits(policy):
    table = {"root": "data", "pixels": "uint16", "augment": {"policy": policy}}
    with pytest.raises(ConfigError, match=rf'augment.policy = "{policy}" changes colours .*: set it to "none"'):
        build(DataConfig, table, "data")
