"""Decoding, augmentation, mixing and what reaches the model."""

import io
import itertools
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from dataloaders import AugmentConfig, DataConfig, Prepare, decode_for_eval
from dataloaders.decode import UndecodableError, decode, image_size, suffix_for
from dataloaders.mixing import draw_mix
from dataloaders.transforms import TrainTransform, kept_random_state, random_box
from setformer_dist.core.batch import MicroBatch, MixSpec
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError

SHARED = Path(os.environ.get("SETFORMER_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def encoded(pixels, form="JPEG", mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form, **options)
    return out.getvalue()


def smooth(height, width, seed=0):
    """A photograph-like image: smooth colours with some noise."""
    noise = np.random.default_rng(seed)
    coarse = noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return (image + noise.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


# Decoding


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P")])
def test_decoding_equals_pil_bit_for_bit(form, mode):
    data = encoded(smooth(37, 53), form, mode)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert image_size(data) == (37, 53)


def test_cmyk_alpha_and_sixteen_bits_become_rgb():
    pixels = smooth(20, 30)
    for data in (encoded(pixels, "JPEG", "CMYK", quality=98), encoded(pixels, "PNG", "RGBA")):
        assert decode(data).shape == (20, 30, 3)
        assert np.abs(decode(data).astype(int) - pixels).mean() < 6
    out = io.BytesIO()
    Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(out, "PNG")
    assert np.array_equal(decode(out.getvalue())[..., 1].ravel(), np.arange(256))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_cut_images_never_decode(form):
    data = encoded(smooth(40, 40), form)
    last = len(data) - (13 if form == "PNG" else 3)  # PNG's last chunk holds nothing
    for end in range(0, last, max(1, last // 60)):
        with pytest.raises(UndecodableError):
            decode(data[:end])


def test_what_is_no_image_does_not_decode():
    for data in (b"", b"\xff\xd8", b"<html>404</html>", bytes(1000)):
        with pytest.raises(UndecodableError):
            decode(data)
        with pytest.raises(UndecodableError):
            image_size(data)
    data = bytearray(encoded(smooth(64, 64)))
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    with pytest.raises(UndecodableError):
        decode(bytes(data))


def test_suffix_follows_content():
    assert suffix_for(encoded(smooth(8, 8)), ".png") == "jpg"
    assert suffix_for(encoded(smooth(8, 8), "PNG"), ".JPEG") == "png"
    assert suffix_for(encoded(smooth(8, 8), "WEBP"), ".WEBP") == "webp"


# Evaluation


def against_timm(data, size, crop, interpolation):
    reference = timm.data.create_transform(
        (3, size, size), is_training=False, crop_pct=crop, interpolation=interpolation, normalize=False
    )
    expected = np.asarray(reference(Image.open(io.BytesIO(data)).convert("RGB")))
    config = DataConfig(root="", image_size=size, eval_crop=crop, interpolation=interpolation)
    ours = decode_for_eval(data, config).numpy()
    assert ours.shape == expected.shape == (3, size, size)
    return np.abs(ours.astype(int) - expected.astype(int))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (256, 256), (100, 140), (224, 300), (64, 64)])
@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (64, 1.0), (96, 0.9)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_timm(height, width, size, crop, interpolation):
    if height == width == size and crop != 1.0:
        return  # taken as it is, by our own rule
    difference = against_timm(encoded(smooth(height, width), "PNG"), size, crop, interpolation)
    assert difference.mean() < 0.5
    assert difference.max() <= 2


def test_evaluation_equals_timm_on_photographs():
    archive = SHARED / "imagenet_sample.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive.name} is absent: set SETFORMER_SHARED_DATA")
    with tarfile.open(archive) as tar:
        files = [member for member in tar if member.isfile()][:20]
        worst = max(against_timm(tar.extractfile(f).read(), 224, 0.875, "bicubic").mean() for f in files)
    assert worst < 0.5


# Augmentation


def transform_of(size=32, **augment):
    config = DataConfig(root="", image_size=size, augment=AugmentConfig(**augment))
    return TrainTransform(config, (size, size), (size, size), "here")


def draws_of(transform, data, height, width, count):
    images = []
    with kept_random_state():
        for seed in range(count):
            torch.default_generator.manual_seed(seed)
            images.append(transform(data, height, width))
    return images


def test_padded_crop_is_a_window_of_the_padded_image_and_covers_all_offsets():
    pixels = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    images = draws_of(transform_of(crop="pad", pad=2, flip=False), encoded(pixels, "PNG"), 32, 32, 400)
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(5) for x in range(5)}
    offsets = [windows[np.ascontiguousarray(image.permute(1, 2, 0).numpy()).tobytes()] for image in images]
    counts = np.unique(np.array(offsets), axis=0, return_counts=True)[1]
    assert len(counts) == 25
    # chi-square, 24 degrees of freedom, 99.9 % at 51.2
    assert ((counts - 16) ** 2 / 16).sum() < 51.2


def test_flip_mirrors_half_of_the_images():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = draws_of(transform_of(crop="none", flip=True), encoded(pixels, "PNG"), 32, 32, 400)
    plain = torch.from_numpy(pixels).permute(2, 0, 1)
    flipped = sum(torch.equal(image, plain.flip(-1)) for image in images)
    assert flipped + sum(torch.equal(image, plain) for image in images) == 400
    assert 160 < flipped < 240  # 4 standard deviations


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (50, 900), (900, 50), (1, 7)])
def test_random_boxes_keep_to_image_area_and_ratio(height, width):
    augment = AugmentConfig(scale=(0.1, 0.6), ratio=(0.75, 1.5))
    shares = []
    with kept_random_state():
        for seed in range(300):
            torch.default_generator.manual_seed(seed)
            top, left, box_height, box_width = random_box(height, width, augment)
            assert 0 <= top <= height - box_height
            assert 0 <= left <= width - box_width
            assert box_height >= 1
            assert box_width >= 1
            if min(height, width) > 300:
                assert 0.74 < box_width / box_height < 1.52
                shares.append(box_height * box_width / (height * width))
    if shares:
        assert 0.095 < min(shares) < 0.13
        assert 0.57 < max(shares) < 0.61


def test_scaled_decoding_shows_the_same_crop():
    """A large JPEG decoded at a fraction of its size gives nearly the pixels of the whole decoding.

    Nearly: the crop then begins on a pixel of the smaller image, up to a quarter of an output pixel away.
    """
    data = encoded(smooth(1600, 2000), quality=95)
    transform = transform_of(size=64, crop="resized", flip=False)
    shrunk = draws_of(transform, data, 1600, 2000, 20)
    whole = draws_of(transform, encoded(decode(data), "PNG", compress_level=0), 1600, 2000, 20)
    differences = [(a.int() - b.int()).abs().float().mean().item() for a, b in zip(shrunk, whole, strict=True)]
    others = [(a.int() - b.int()).abs().float().mean().item() for a, b in itertools.pairwise(whole)]
    assert max(differences) < 4.0
    assert max(differences) > 0.0  # else nothing was scaled and the test shows nothing
    assert np.mean(others) > 20  # what another crop looks like


def test_each_augmentation_changes_images_and_keeps_their_form():
    data = encoded(smooth(32, 32), "PNG")
    plain = draws_of(transform_of(crop="none", flip=False), data, 32, 32, 1)[0]
    for augment in ({"randaugment_ops": 2}, {"color_jitter": 0.5}, {"erasing": 1.0}):
        images = draws_of(transform_of(crop="none", flip=False, **augment), data, 32, 32, 20)
        assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in images)
        assert sum(not torch.equal(image, plain) for image in images) > 10


def test_erased_pixels_are_zero_once_normalised():
    data = encoded(np.full((32, 32, 3), 255, np.uint8), "PNG")
    image = draws_of(transform_of(crop="none", flip=False, erasing=1.0), data, 32, 32, 1)[0]
    batch = micro_batch(image[None], [0])
    values = Prepare(DataConfig(root=""), 2, "cpu")(batch, True)[0]
    erased = (image != 255).any(0)
    assert erased.any()
    assert values[0][:, erased].abs().max() < 0.01  # half a step of 1/255 over the smallest deviation, 0.224


# Mixing


def micro_batch(images, labels, mix=None):
    count = len(labels)
    return MicroBatch(images, torch.tensor(labels), torch.ones(count), torch.arange(count), mix)


def test_mix_depends_on_position_alone_and_stays_in_the_group():
    augment = AugmentConfig(mixup=0.4, cutmix=1.0, mix_group=4, mix_prob=0.7)
    partner, lam, box = draw_mix(augment, 32, 1, 2, 0, 400)
    assert set(np.arange(400) // 4 - partner // 4) == {0}
    for first in (0, 40, 396):
        part = draw_mix(augment, 32, 1, 2, first, 4)
        assert np.array_equal(part[0] + first, partner[first : first + 4])
        assert np.array_equal(part[1], lam[first : first + 4])
        assert np.array_equal(part[2], box[first : first + 4])
    mixed = partner != np.arange(400)
    assert 240 < mixed.sum() < 320
    assert (lam[~mixed] == 1).all()
    cut = box.any(1)
    assert 80 < (mixed & ~cut).sum() < 200
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    np.testing.assert_allclose(lam[cut], 1 - area[cut] / 1024, atol=1e-6)
    assert draw_mix(AugmentConfig(), 32, 1, 2, 0, 4) is None


def test_prepare_mixes_images_and_targets_by_the_same_share():
    config = DataConfig(root="", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = torch.tensor([0, 255, 102], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 10, 10)
    mix = MixSpec(
        partner=torch.tensor([1, 0, 2]),
        lam=torch.tensor([0.76, 0.3, 1.0]),
        box=torch.tensor([[1, 5, 2, 8], [0, 0, 0, 0], [0, 0, 0, 0]]),
    )
    values, targets = Prepare(config, 4, "cpu")(micro_batch(images, [3, 1, 0], mix), True)
    torch.testing.assert_close(targets, torch.tensor([[0, 0.24, 0, 0.76], [0, 0.3, 0, 0.7], [1.0, 0, 0, 0]]))
    torch.testing.assert_close(values.mean((1, 2, 3)), torch.tensor([0.24, 0.3, 0.4]))
    assert values[0, :, 1:5, 2:8].unique().tolist() == [1.0]
    assert values[0].sum() == 3 * 24
    plain, hard = Prepare(config, 4, "cpu")(micro_batch(images, [3, 1, 0], mix), False)
    assert hard.argmax(1).tolist() == [3, 1, 0]
    assert plain[0].max() == 0


def test_prepare_normalises_and_smooths():
    config = DataConfig(root="", augment=AugmentConfig(smoothing=0.1))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    values, targets = Prepare(config, 5, "cpu", torch.bfloat16)(micro_batch(images, [1, 4]), True)
    assert values.dtype == torch.bfloat16
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets[0], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
    expected = (images.double() / 255 - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(
        3, 1, 1
    )
    exact = Prepare(config, 5, "cpu")(micro_batch(images, [1, 4]), False)[0]
    torch.testing.assert_close(exact.double(), expected.double(), atol=1e-5, rtol=0)


# Config


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"std": [0.2, 0.0, 0.2]}, "must be positive"),
        ({"image_size": 4, "augment": {"crop": "pad"}}, "smaller than image_size"),
        ({"augment": {"scale": [0.5, 0.2]}}, "augment: scale"),
        ({"augment": {"mixupp": 0.2}}, "did you mean augment.mixup"),
        ({"augment": {"smoothing": 1.0}}, "augment.smoothing = 1.0"),
        ({"mean": [0.5, 0.5]}, "mean.2"),
        ({"workers": -1}, "workers = -1"),
        ({"workers": "4"}, "workers = '4'"),
    ],
)
def test_impossible_configs_are_refused(table, fault):
    with pytest.raises(ConfigError, match=fault):
        build(DataConfig, {"root": "data", **table}, "data")


def test_config_reads_what_toml_gives():
    table = {"root": "d", "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "augment": {"scale": [0.3, 1], "mixup": 1}}
    config = build(DataConfig, table, "data")
    assert config.mean == (0.5, 0.5, 0.5)
    assert math.isclose(config.augment.scale[0], 0.3)
