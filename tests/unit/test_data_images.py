"""Decoding, augmentation, mixing and what reaches the model."""

import io
import itertools
import math
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms import v2

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.pixels.augment import OPERATIONS, color_jitter, erased_box, rand_augment
from dataloaders.pixels.decode import UndecodableError, decode, decode_mask, image_size, suffix_for
from dataloaders.pixels.depth import MAX_PIXELS
from dataloaders.pixels.draws import Lane, sample_words, uniforms
from dataloaders.pixels.formats import FORMATS
from dataloaders.pixels.mixing import draw_mix
from dataloaders.pixels.transforms import TrainTransform, decode_for_eval, draw_choices, show_for_eval
from dataloaders.pixels.view import (
    DRAWS_OF_CROP,
    centre_view,
    random_box,
    random_view,
    see_boxes,
    see_image,
    see_mask,
    window_view,
)
from dataloaders.reading.device import Prepare
from dataloaders.source import NO_BOXES, Boxes, Stored
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


def test_formats_that_start_programs_are_not_opened():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS"  # PIL itself would
    for data in (eps, encoded(smooth(10, 10), "ICO"), encoded(smooth(10, 10), "TGA")):
        for reads in (decode, image_size, lambda data: decode_mask(data, (10, 10))):
            with pytest.raises(UndecodableError):
                reads(data)
    for form in FORMATS:
        assert decode(encoded(smooth(10, 10), form)).shape == (10, 10, 3)


@pytest.mark.parametrize("crop", ["none", "eval"])
def test_images_too_long_for_a_centre_crop_are_damage_and_not_the_end_of_memory(crop):
    config = DataConfig(root="x", image_size=64, augment=AugmentConfig(crop="none"))
    long, panorama = (Stored(np.zeros((side, 1, 3), np.uint8)) for side in (60_000, 2_000))
    transform = TrainTransform(config, Facts((64, 1), (64, 1)))
    choices = draw_choices(config.augment, 0, np.zeros(1, np.int64), np.zeros(1, np.int64))[0]

    def shown(sample):
        if crop == "eval":
            return show_for_eval(sample, config)
        return transform(sample, sample.image.shape[:2], (64, 64), choices)

    with pytest.raises(UndecodableError, match="too long for a centre crop"):
        shown(long)
    view = centre_view((60_000, 1), (64, 64), 0.875)
    with pytest.raises(UndecodableError, match="60000 x 1 pixels would be resized to"):
        see_mask(view, np.zeros((60_000, 1), np.uint8))
    assert shown(panorama).image.shape == (3, 64, 64)


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


def huge_header(form, side=60000):
    """The beginning of an image of side x side pixels, as its own format says it."""
    if form == "PNG":
        body = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + body
        head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = zlib.compress(bytes(1000))
        chunks = [(b"IDAT", data), (b"IEND", b"")]
        return head + b"".join(
            struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
        )
    data = bytearray(encoded(smooth(40, 40)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_absurd_sizes_are_refused_before_anything_is_allocated(form):
    assert MAX_PIXELS < 60000 * 60000
    data = huge_header(form)
    tracemalloc.start()
    for what in (decode, image_size, lambda data: decode(data, 100, 100)):
        with pytest.raises(UndecodableError, match=r"60000 x 60000|more than 178,956,970 pixels"):
            what(data)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_large_image_is_refused_in_our_own_words_alone():
    """Pillow warns of a bomb from 89 million pixels on; of colour we read 76 million (docs/data.md)."""
    code = (
        "from tests.unit.test_data_images import huge_header; from dataloaders.pixels.decode import decode\n"
        "try: decode(huge_header('PNG', 9500))\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "9500 x 9500" in done.stdout


def test_a_flipped_byte_anywhere_in_a_png_is_refused():
    data = encoded(smooth(24, 24), "PNG")
    for at in range(8, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(UndecodableError):
            decode(bytes(damaged))


def test_masks_keep_their_classes_and_must_fit():
    classes = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(classes).save(out, "PNG")
    assert np.array_equal(decode_mask(out.getvalue(), (20, 30)), classes)
    palette = Image.fromarray(classes % 7).convert("P")
    palette.putpalette([value for place in range(7) for value in (place * 30, 0, 255 - place)])
    painted = io.BytesIO()
    palette.save(painted, "PNG")
    assert np.array_equal(decode_mask(painted.getvalue(), (20, 30)), np.asarray(palette))
    with pytest.raises(UndecodableError, match=r"20 x 30 of mode L, not 30 x 20"):
        decode_mask(out.getvalue(), (30, 20))
    with pytest.raises(UndecodableError, match="mode RGB"):
        decode_mask(encoded(smooth(20, 30), "PNG"), (20, 30))


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


@dataclass
class Facts:
    """What a transform asks of a source: image sizes and parts."""

    smallest: tuple
    largest: tuple
    parts: frozenset = frozenset()
    name: str = "here"
    classes: tuple = tuple(map(str, range(255)))

    def extent(self):
        return self.smallest, self.largest


def transform_of(size=32, parts=(), **augment):
    config = DataConfig(root="", image_size=size, augment=AugmentConfig(**augment))
    transform = TrainTransform(config, Facts((size, size), (size, size), frozenset(parts)))
    return lambda sample, stored, choices: transform(sample, stored, (size, size), choices), config.augment


def draws_of(transform, data, height, width, count):
    show, augment = transform
    choices = draw_choices(augment, 1, np.zeros(count, np.int64), np.arange(count))
    return [show(Stored(data), (height, width), one).image for one in choices]


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


def test_a_vertical_flip_has_its_probability_and_leaves_all_else_as_it_was():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain = draws_of(transform_of(crop="pad", pad=2, erasing=0.5), encoded(pixels, "PNG"), 32, 32, 400)
    images = draws_of(transform_of(crop="pad", pad=2, erasing=0.0, vflip=0.3), encoded(pixels, "PNG"), 32, 32, 400)
    whole = draws_of(transform_of(crop="pad", pad=2, erasing=0.0), encoded(pixels, "PNG"), 32, 32, 400)
    turned = [torch.equal(image, one.flip(-2)) for image, one in zip(images, whole, strict=True)]
    for image, one, is_turned in zip(images, whole, turned, strict=True):
        assert is_turned or torch.equal(image, one)
    assert 84 < sum(turned) < 156  # 4 standard deviations
    always = draws_of(transform_of(crop="pad", pad=2, erasing=0.5, vflip=1.0), encoded(pixels, "PNG"), 32, 32, 400)
    assert sum(torch.equal(image, one.flip(-2)) for image, one in zip(always, plain, strict=True)) > 150  # not erased
    # Golden: which of the first samples are turned is part of what a run is.
    assert [number for number, is_turned in enumerate(turned) if is_turned][:4] == [4, 7, 9, 10]


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (50, 900), (900, 50), (1, 7)])
def test_random_boxes_keep_to_image_area_and_ratio(height, width):
    augment = AugmentConfig(scale=(0.1, 0.6), ratio=(0.75, 1.5))
    shares = []
    for draws in np.random.default_rng(0).random((300, DRAWS_OF_CROP)).tolist():
        top, left, box_height, box_width = random_box((height, width), 1.0, augment, draws)
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


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("sign", [0.2, 0.8])
def test_randaugment_does_what_torchvision_does(name, magnitude, sign):
    """The operation, its strength and its sign, against torchvision's own transform made to draw the same."""
    image = torch.from_numpy(smooth(40, 56)).permute(2, 0, 1).contiguous()
    which = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    fill = [124.0, 116.0, 104.0]
    theirs = v2.RandAugment(1, magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
    strengths, signed = theirs._AUGMENTATION_SPACE[name]
    strengths = strengths(31, 40, 56)
    strength = 0.0 if strengths is None else float(strengths[magnitude])
    strength = -strength if signed and sign < 0.5 else strength
    expected = theirs._apply_image_or_video_transform(image, name, strength, theirs.interpolation, theirs._fill)
    found = rand_augment(image, magnitude, [which, sign], fill)
    assert found.dtype == torch.uint8
    difference = (found.int() - expected.int()).abs()
    # Strengths are computed in double precision here and in single there.
    assert difference.float().mean() < 0.02
    assert set(OPERATIONS) == set(theirs._AUGMENTATION_SPACE)


def test_color_jitter_does_what_torchvision_does():
    image = torch.from_numpy(smooth(40, 56)).permute(2, 0, 1).contiguous()
    theirs = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
    for draws in np.random.default_rng(0).random((40, 4)).tolist():
        order = list(itertools.permutations(range(3)))[int(draws[3] * 6)]
        factors = [0.6 + 0.8 * draw for draw in draws[:3]]
        names = ("brightness_factor", "contrast_factor", "saturation_factor")
        params = dict(zip(names, factors, strict=True), fn_idx=torch.tensor(order), hue_factor=None)
        assert torch.equal(color_jitter(image, 0.4, draws), theirs.transform(image, params))


def test_erasing_takes_what_torchvision_takes():
    """Shares and ratios of the rectangles have the quantiles of torchvision's."""
    ours, theirs = [], []
    transform = v2.RandomErasing(p=1.0)
    torch.manual_seed(0)
    image = torch.zeros(3, 200, 300)
    for draws in np.random.default_rng(0).random((2000, 41)).tolist():
        assert erased_box(200, 300, 0.0, draws) is None
        top, left, height, width = erased_box(200, 300, 1.0, draws)
        assert 0 <= top <= 200 - height
        assert 0 <= left <= 300 - width
        ours.append((height * width, height / width))
        params = transform.make_params([image])
        theirs.append((params["h"] * params["w"], params["h"] / params["w"]))
    for mine, other in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        quantiles = np.quantile(mine, (0.1, 0.5, 0.9)), np.quantile(other, (0.1, 0.5, 0.9))
        np.testing.assert_allclose(*quantiles, rtol=0.2)


def test_random_crops_are_distributed_as_torchvisions():
    augment = AugmentConfig()
    draws = np.random.default_rng(0).random((3000, DRAWS_OF_CROP)).tolist()
    ours = np.array([random_box((375, 500), 1.0, augment, one) for one in draws])
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500)
    transform = v2.RandomResizedCrop(224)
    drawn = [transform.make_params([image]) for _ in range(3000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    np.testing.assert_allclose(
        np.quantile(ours, (0.25, 0.5, 0.75), 0), np.quantile(theirs, (0.25, 0.5, 0.75), 0), atol=16
    )


def test_numbers_are_keyed_by_seed_epoch_sample_and_lane():
    samples = np.arange(50_000)
    zeros = np.zeros_like(samples)
    words = sample_words(3, zeros, samples)
    numbers = uniforms(words, Lane.CROP, 8)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Uniform in each column (chi-square of 100 cells, five standard deviations), and no two columns correlate.
    for column in numbers.T:
        counts = np.histogram(column, 100, (0, 1))[0]
        assert ((counts - 500) ** 2 / 500).sum() < 99 + 5 * np.sqrt(2 * 99)
    others = [
        uniforms(sample_words(4, zeros, samples), Lane.CROP, 1),
        uniforms(sample_words(3, zeros + 1, samples), Lane.CROP, 1),
        uniforms(sample_words(3, zeros, samples + 1), Lane.CROP, 1),
        uniforms(words, Lane.FLIP, 1),
        uniforms(words, Lane.VFLIP, 1),
    ]
    table = np.corrcoef(np.concatenate([numbers, *others], axis=1).T)
    assert np.abs(table - np.eye(len(table))).max() < 5 / np.sqrt(50_000)
    part = uniforms(sample_words(3, zeros[:7], samples[20:27]), Lane.CROP, 8)
    assert np.array_equal(part, numbers[20:27])
    # Golden: a change of these numbers changes what runs see; then CURSOR_FORMAT must change too.
    assert numbers[:2, 0].tolist() == [0.7437499307463624, 0.0617554156539849]


def test_one_augmentation_leaves_the_numbers_of_the_others_alone():
    some = draw_choices(AugmentConfig(erasing=0.5), 1, np.zeros(4, np.int64), np.arange(4))
    more = draw_choices(
        AugmentConfig(erasing=0.5, randaugment_ops=2, color_jitter=0.3), 1, np.zeros(4, np.int64), np.arange(4)
    )
    for one, other in zip(some, more, strict=True):
        assert (one.crop, one.flip, one.vflip, one.erasing) == (other.crop, other.flip, other.vflip, other.erasing)


# Masks and boxes


def drawn_rectangle(height, width, box):
    """An image, a mask and a box of one bright rectangle on black."""
    x0, y0, x1, y1 = box
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    mask = np.zeros((height, width), np.uint8)
    mask[y0:y1, x0:x1] = 9
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    boxes = Boxes(np.array([box], np.float32), np.array([4]))
    return Stored(encoded(pixels, "PNG"), out.getvalue(), boxes)


def outline(inside):
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def assert_together(shown):
    """Image, mask and box show one rectangle, to a pixel; True if it is seen at all."""
    corners = torch.from_numpy(shown.boxes.corners)
    if not len(corners):
        return False
    assert shown.boxes.labels.tolist() == [4]
    by_mask, by_image = outline(shown.mask == 9), outline(shown.image[0] > 127)
    assert (by_mask - corners[0]).abs().max() <= 1.01
    assert (by_image - corners[0]).abs().max() <= 1.01
    return True


@pytest.mark.parametrize(
    "augment",
    [{}, {"scale": (0.5, 1.0)}, {"crop": "none"}, {"erasing": 0.0, "color_jitter": 0.01}, {"vflip": 0.5}],
)
@pytest.mark.parametrize(("height", "width"), [(120, 160), (160, 120), (64, 64)])
def test_masks_and_boxes_follow_the_image(augment, height, width):
    show, config = transform_of(size=64, parts=("mask", "boxes"), **augment)
    seen = 0
    choices = draw_choices(config, 5, np.zeros(60, np.int64), np.arange(60))
    for i, one in enumerate(choices):
        numbers = np.random.default_rng(i)
        x0, y0 = int(numbers.integers(0, width // 2)), int(numbers.integers(0, height // 2))
        box = (x0, y0, x0 + int(numbers.integers(20, width // 2)), y0 + int(numbers.integers(20, height // 2)))
        seen += assert_together(show(drawn_rectangle(height, width, box), (height, width), one))
    assert seen > 40


def test_masks_and_boxes_follow_padded_crops_and_evaluation():
    show, config = transform_of(size=64, parts=("mask", "boxes"), crop="pad", pad=9)
    sample = drawn_rectangle(64, 64, (20, 24, 44, 40))
    outside = 0
    for one in draw_choices(config, 5, np.zeros(40, np.int64), np.arange(40)):
        shown = show(sample, (64, 64), one)
        assert assert_together(shown)
        outside += int((shown.mask == 255).sum())
    assert outside > 0
    for height, width in ((90, 140), (140, 90), (64, 64)):
        assert assert_together(
            show_for_eval(drawn_rectangle(height, width, (34, 30, 60, 62)), DataConfig(root="", image_size=64))
        )


def test_boxes_are_clipped_and_tiny_ones_left_out():
    view = random_view((100, 100), (50, 50), AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0)), [0.5] * DRAWS_OF_CROP)
    view = view._replace(box=(20, 20, 50, 50))
    corners = [
        [0, 0, 100, 100],
        [60, 60, 80, 80],
        [0, 0, 19, 19],
        [66, 30, 96, 40],
        [69.5, 30, 70.4, 60],
        [30, 40, 50, 60],
    ]
    boxes = Boxes(np.array(corners, np.float32), np.arange(6))
    found = see_boxes(view, boxes)
    # 0 is clipped but keeps a quarter; 1 keeps a quarter; 2 is outside; 3 keeps 4 of 30; 4 is half a pixel wide.
    assert found.labels.tolist() == [0, 1, 3, 5]
    assert found.corners.tolist() == [[0, 0, 50, 50], [40, 40, 50, 50], [46, 10, 50, 20], [10, 20, 30, 40]]
    assert see_boxes(view.mirror(True), boxes).corners[3].tolist() == [20, 20, 40, 40]
    assert see_boxes(view.mirror(True, True), boxes).corners[3].tolist() == [20, 10, 40, 30]
    nothing = see_boxes(view, NO_BOXES)
    assert nothing.corners.shape == (0, 4)
    assert nothing.labels.shape == (0,)
    crowded = Boxes(boxes.corners, boxes.labels, np.arange(6) == 1)
    assert see_boxes(view, crowded).labels.tolist() == [0, 3, 5]


def test_an_object_that_fills_a_window_keeps_its_box_however_large_it_is():
    view = window_view((1000, 1000), (50, 100), (0.5, 0.5))  # rows 475 to 525, columns 450 to 550
    corners = [[0, 0, 1000, 1000], [0, 0, 461, 1000], [0, 0, 459, 1000], [440, 470, 470, 480]]
    found = see_boxes(view, Boxes(np.array(corners, np.float32), np.arange(4)))
    # 0 fills the window, 1 a tenth of it, 2 less; 3 keeps a third of itself.
    assert found.corners.tolist() == [[0, 0, 100, 50], [0, 0, 11, 50], [0, 0, 20, 5]]
    assert found.labels.tolist() == [0, 1, 3]


def test_erased_pixels_do_not_count_in_masks():
    show, config = transform_of(size=64, parts=("mask",), crop="none", flip=False, erasing=1.0)
    sample = drawn_rectangle(64, 64, (0, 0, 64, 64))
    for one in draw_choices(config, 5, np.zeros(10, np.int64), np.arange(10)):
        shown = show(sample, (64, 64), one)
        erased = (shown.image != 255).any(0)
        assert erased.any()
        assert torch.equal(shown.mask == 255, erased)


def test_what_masks_and_boxes_cannot_follow_is_refused():
    with pytest.raises(ConfigError, match=r"randaugment_ops = 2 shears.*come with boxes and mask"):
        transform_of(parts=("mask", "boxes"), randaugment_ops=2)
    with pytest.raises(ConfigError, match=r"mixup and augment.cutmix mix .* come with mask"):
        transform_of(parts=("mask",), mixup=0.2)


def test_an_image_of_another_size_than_its_container_says_is_damaged():
    show, config = transform_of(size=32)
    (choices,) = draw_choices(config, 5, np.zeros(1, np.int64), np.arange(1))
    with pytest.raises(UndecodableError, match="40 x 50 pixels, its container says 41 x 50"):
        show(Stored(encoded(smooth(40, 50))), (41, 50), choices)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (32, 128), (50, 50)])
@pytest.mark.parametrize("stored", [(200, 300), (300, 200), (64, 96), (77, 78)])
def test_centre_views_of_any_shape_lie_within_the_image_and_keep_its_ratio(shape, stored):
    view = centre_view(stored, shape, 0.9)
    assert view.shape == shape
    assert 0 <= view.offset[0] <= view.resized[0] - shape[0]
    assert 0 <= view.offset[1] <= view.resized[1] - shape[1]
    if stored != shape:
        assert abs(view.resized[0] / stored[0] - view.resized[1] / stored[1]) < 1 / min(stored) + 1 / min(view.resized)
    mask = np.arange(stored[0] * stored[1], dtype=np.int64).reshape(stored) % 251
    assert see_mask(view, mask.astype(np.uint8)).shape == shape
    assert see_image(view, smooth(*stored), stored, "bilinear").shape == (3, *shape)


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
    partner, lam, box = draw_mix(augment, (32, 32), 1, 0, 400)
    assert set(np.arange(400) // 4 - partner // 4) == {0}
    for first in (0, 40, 396):
        part = draw_mix(augment, (32, 32), 1, first, 4)
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
    assert draw_mix(AugmentConfig(), (32, 32), 1, 0, 4) is None


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


def test_channels_last_is_another_layout_of_the_same_images():
    images = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8)
    plain, other = (
        Prepare(DataConfig(root="", channels_last=last), 5, "cpu", torch.bfloat16)(micro_batch(images, [1, 4]), True)[0]
        for last in (False, True)
    )
    assert torch.equal(plain, other)
    assert plain.is_contiguous()
    assert other.is_contiguous(memory_format=torch.channels_last)


# Config


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"std": [0.2, 0.0, 0.2]}, "must be positive"),
        ({"image_size": 4, "augment": {"crop": "pad"}}, "smaller than image_size"),
        ({"augment": {"scale": [0.5, 0.2]}}, "augment: scale"),
        ({"augment": {"mixupp": 0.2}}, "did you mean augment.mixup"),
        ({"augment": {"smoothing": 1.0}}, "augment.smoothing = 1.0"),
        ({"mean": [0.5, 0.5]}, "mean names 2 bands and std names 3"),
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
