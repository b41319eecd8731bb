"""Random damage to shards, indexes and .beton files: no hang, no crash, nothing lost or changed in silence."""

import io
import itertools
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.measure import peak_bytes
from dataloaders.beton.reader import BetonSample, open_beton, write_beton
from dataloaders.beton.sidecar import sidecar_path
from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.pixels.decode import UndecodableError, decode
from dataloaders.reading.streams import ShardTrainStream
from dataloaders.source import DamagedSampleError
from setformer_dist.core.errors import DataError
from setformer_dist.core.ranks import RankInfo

COUNT, SIZE = 24, 16
PACKED = ("shards", "jpg.beton", "raw.beton")  # with checksums of ours
FOREIGN = ("tars", "bare.beton")  # without


def picture(number, kind):
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All containers, with the same pictures: JPEG, and a PNG here and there."""
    folder = tmp_path_factory.mktemp("whole")
    files = [picture(number, "PNG" if number % 8 == 5 else "JPEG") for number in range(COUNT)]
    for number, data in enumerate(files):
        path = folder / "images" / f"class{number % 3}" / f"{number:02d}.{'png' if number % 8 == 5 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    pack_image_folder(folder / "images", folder / "shards", PackOptions(samples_per_shard=10))
    shutil.copytree(folder / "shards", folder / "tars", ignore=shutil.ignore_patterns("index*"))
    for mode in ("jpg", "raw"):
        samples = (BetonSample(data, number % 3, SIZE, SIZE) for number, data in enumerate(files))
        write_beton(folder / f"{mode}.beton", samples, COUNT, classes=("a", "b", "c"), mode=mode)
    shutil.copy(folder / "jpg.beton", folder / "bare.beton")
    shutil.rmtree(folder / "images")
    return folder


def config_of(**changes):
    return DataConfig(root="x", image_size=SIZE, max_bad_share=1.0, augment=AugmentConfig(crop="none"), **changes)


def opened(folder, name):
    return open_source(str(folder), name, config_of())


def contents(source):
    """Return every sample as stored, or None where it is reported as damaged."""
    found = []
    for sample in range(source.num_samples):
        try:
            found.append(source.read(sample).image)
        except DamagedSampleError:
            found.append(None)
    return found


def equal(one, other):
    return type(one) is type(other) and (one == other if isinstance(one, bytes) else np.array_equal(one, other))


# Damage


def flip(data, numbers):
    for _ in range(numbers.choice((1, 1, 8))):
        data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)


def overwrite(data, numbers):
    length = min(len(data), numbers.choice((1, 8, 100, 2000)))
    start = numbers.randrange(len(data) - length + 1)
    data[start : start + length] = numbers.choice((bytes(length), b"\xff" * length, numbers.randbytes(length)))


def truncate(data, numbers):
    del data[numbers.randrange(len(data)) :]


def lengthen(data, numbers):
    data += numbers.randbytes(numbers.randrange(1, 3000))


def insert(data, numbers):
    place = numbers.randrange(len(data))
    data[place:place] = numbers.randbytes(numbers.choice((1, 24, 512)))


def remove(data, numbers):
    place = numbers.randrange(len(data))
    del data[place : place + numbers.choice((1, 24, 512))]


def move(data, numbers):
    """Copy one stretch over another: all bytes are plausible, but in the wrong place."""
    length = min(len(data) // 2, numbers.choice((8, 24, 512, 3000)))
    start, to = (numbers.randrange(len(data) - length + 1) for _ in range(2))
    data[to : to + length] = data[start : start + length]


KINDS = (flip, flip, overwrite, overwrite, truncate, lengthen, insert, remove, move)


def spots(data, name, numbers):
    """Return (start, end) of where a .beton file is damaged: half of the time its tables, which are a small part."""
    if not name.endswith(".beton") or numbers.random() < 0.3:
        return 0, len(data)
    if numbers.random() < 0.5:
        return 0, 3000
    return max(0, len(data) - COUNT * 1000), len(data)


def damaged_copy(whole, name, folder, numbers):
    """Copy a container and damage one or two of its files; return whether anything changed."""
    target = folder / name
    if (whole / name).is_dir():
        shutil.copytree(whole / name, target)
        files = sorted(target.iterdir())
    else:
        files = [target]
        shutil.copy(whole / name, target)
        if sidecar_path(whole / name).exists():
            files.append(sidecar_path(target))
            shutil.copy(sidecar_path(whole / name), files[1])
    changed = False
    for path in numbers.sample(files, min(len(files), numbers.choice((1, 1, 2)))):
        before = path.read_bytes()
        start, end = spots(before, path.name, numbers)
        part = bytearray(before[start:end])
        numbers.choice(KINDS)(part, numbers)
        after = before[:start] + part + before[end:]
        path.write_bytes(after)
        changed |= after != before
    return changed


def one_case(whole, expected, folder, number):
    """Damage, open, read all; return what became of it."""
    numbers = random.Random(number)
    name = numbers.choice(PACKED + FOREIGN)
    case = folder / str(number)
    case.mkdir()
    try:
        damaged_copy(whole, name, case, numbers)
        said = ""
        try:
            source = opened(case, name)
        except DataError as error:
            said = str(error)
        if said:
            assert str(case) in said  # it says where
            return "refused"
        found = contents(source)
        assert len(found) == source.num_samples == len(source.labels(np.arange(source.num_samples)))
        for image in found:
            try_to_decode(image)
        if name in PACKED:
            assert len(found) == COUNT
            assert all(one is None or equal(one, other) for one, other in zip(found, expected[name], strict=True))
        source.close()
        return "reported" if any(one is None for one in found) else "whole"
    finally:
        shutil.rmtree(case)


def try_to_decode(image):
    if image is None:
        return
    try:
        pixels = decode(image)
    except UndecodableError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)


def run_cases(whole, tmp_path, numbers):
    expected = {name: contents(opened(whole, name)) for name in PACKED}
    outcomes = [one_case(whole, expected, tmp_path, number) for number in numbers]
    for outcome in ("refused", "reported", "whole"):
        assert outcomes.count(outcome) > len(outcomes) / 20  # each of the three does happen
    return outcomes


def test_random_damage(whole, tmp_path):
    run_cases(whole, tmp_path, range(250))


@pytest.mark.drill
def test_five_thousand_damaged_shards_and_beton_files(whole, tmp_path):
    run_cases(whole, tmp_path, range(250, 5250))


def test_a_stream_over_random_damage_never_changes_its_counts(whole, tmp_path):
    """The undamaged places of every batch hold what they always held, and the damaged ones another sample, named."""

    def batches(folder, name):
        stream = ShardTrainStream(opened(folder, name), config_of(), 1, RankInfo(), 8, 8)
        found = list(itertools.islice(stream.micro_batches(0), 6))
        stream.close()
        return found

    expected = {name: batches(whole, name) for name in PACKED}
    ran = 0
    for number in range(60):
        numbers = random.Random(10_000 + number)
        name = numbers.choice(PACKED)
        case = tmp_path / str(number)
        case.mkdir()
        damaged_copy(whole, name, case, numbers)
        try:
            found = batches(case, name)
        except DataError:
            continue
        ran += 1
        for one, other in zip(expected[name], found, strict=True):
            moved = one.sample_ids != other.sample_ids
            assert int(moved.sum()) <= len(other.substitutions)
            assert torch.equal(one.inputs[~moved], other.inputs[~moved]) or other.substitutions
            assert one.inputs.shape == other.inputs.shape
    assert ran > 10


# Images that claim to be enormous


def jpeg_that_claims(height, width):
    data = bytearray(picture(0, "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def test_absurd_dimensions_are_refused_before_anything_is_allocated(tmp_path):
    """A record, a JPEG header and a .beton that all agree on 65,500 x 65,500 pixels, 12.9 GB."""
    data = jpeg_that_claims(65500, 65500)
    path = tmp_path / "a.beton"
    write_beton(path, [BetonSample(data, 0, 65500, 65500)], 1, classes=("a",))
    beton = open_beton(path)
    stored = beton.read(0)

    def try_it():
        with pytest.raises(UndecodableError, match="65500 x 65500"):
            decode(stored.image)

    try_it()
    assert peak_bytes(try_it) < 1 << 25
    beton.close()
