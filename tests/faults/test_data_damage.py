"""Damage to a packed split: found, named, counted, replaced, and without effect on anything else."""

import io
import itertools
import json
import os
import random
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.packing.verify import verify_split
from dataloaders.reading.damage import MAX_IN_ROW, SPARED, DamageCount
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.sources.index import INDEX_NAME, ShardFacts, write_index
from dataloaders.sources.shards import ShardDataset, open_split
from setformer_dist.core.errors import DataError
from setformer_dist.core.ranks import RankInfo

COUNT, SIZE, BATCH = 90, 12, 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    for i in range(COUNT):
        path = root / "source" / f"class{i % 3}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=95)
    pack_image_folder(root / "source", root / "data", PackOptions(samples_per_shard=20))
    return root / "data"


@pytest.fixture
def split(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "data")


def config_of(**changes):
    plain = AugmentConfig(crop="pad", pad=2, color_jitter=0.3)
    return DataConfig(**{"root": "", "image_size": SIZE, "augment": plain, **changes})


def train(folder, ranks=None, micro=BATCH, seed=4, **changes):
    dataset = open_split(folder)
    return ShardTrainStream(dataset, config_of(**changes), seed, ranks or RankInfo(), BATCH, micro)


def damage_bytes(folder, sample, change=lambda data: bytes(len(data))):
    """Change a sample's bytes within its shard; the shard keeps its size."""
    dataset = open_split(folder)
    columns = dataset.index.columns
    offset, size = int(columns["offset"][sample]), int(columns["size"][sample])
    with (folder / dataset.index.shards[int(columns["shard"][sample])].name).open("r+b") as file:
        file.seek(offset)
        data = file.read(size)
        file.seek(offset)
        file.write(change(data))


def flip_a_bit(data):
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


def repack_undecodable(folder, samples):
    """Put bytes that do not decode into a split whose checksums all agree, as another packer might."""
    dataset = open_split(folder)
    for sample in samples:
        damage_bytes(folder, sample)
    columns = dict(dataset.index.columns)
    checksums = columns["crc32"].copy()
    zeros = {int(s): bytes(int(columns["size"][s])) for s in samples}
    for sample, data in zeros.items():
        checksums[sample] = zlib.crc32(data)
    keys = [dataset.index.key(i) for i in range(dataset.num_samples)]
    columns["crc32"] = checksums
    write_index(folder, dataset.classes, dataset.index.shards, columns, keys, dataset.index.options)


# What is found on opening


@pytest.mark.parametrize("cut", [1, 700, 10**9])
def test_a_cut_shard_is_found_on_opening(split, cut):
    path = split / "shard-000003.tar"
    size = path.stat().st_size
    os.truncate(path, max(0, size - cut))
    with pytest.raises(DataError, match=rf"shard-000003.tar has {max(0, size - cut)} bytes, .* says {size}: restore"):
        open_split(split)


def test_a_missing_shard_is_found_on_opening(split):
    (split / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar .* cannot be opened .*restore"):
        open_split(split)


def test_any_flipped_byte_of_the_index_is_found_on_opening(split):
    numbers = random.Random(1)
    for name in ("index.json", "index.safetensors"):
        path = split / name
        original = path.read_bytes()
        for _ in range(150):
            changed = bytearray(original)
            changed[numbers.randrange(len(original))] ^= 1 << numbers.randrange(8)
            path.write_bytes(changed)
            if name == "index.json" and same_meaning(original, bytes(changed)):
                continue
            with pytest.raises(DataError, match="index"):
                open_split(split)
        for size in (0, 1, len(original) // 2, len(original) - 2):
            path.write_bytes(original[:size])
            with pytest.raises(DataError, match="index"):
                open_split(split)
        path.write_bytes(original)
    open_split(split)


def same_meaning(one, other):
    """White space of JSON may change without changing anything."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_other_folders_are_refused_with_what_to_do(whole, split, tmp_path):
    (tmp_path / "empty").mkdir()
    (split / "index.safetensors").unlink()
    for folder, said in (
        (tmp_path / "none", "does not exist.*setformer data pack"),
        (tmp_path / "empty", "is empty.*setformer data pack"),
        (whole.parent / "source", "holds images and no shards.*setformer data pack"),
        (whole.parent, r"packed splits \(data\): name one"),
        (whole / "index.json", "is a file"),
        (split, r"index\.safetensors cannot be read"),
    ):
        with pytest.raises(DataError, match=said):
            open_split(folder)
    (split / "index.json").unlink()
    with pytest.raises(DataError, match=r"has shards but no index\.json, so it is not whole"):
        open_split(split)


def test_another_format_is_refused(split):
    table = json.loads((split / INDEX_NAME).read_text())
    (split / INDEX_NAME).write_text(json.dumps({**table, "format": 99}))
    with pytest.raises(DataError, match=r"format 99.*reads 1"):
        open_split(split)


@pytest.mark.parametrize(
    ("column", "value"),
    [("label", 3), ("label", -1), ("shard", 9), ("shard", -1), ("offset", -5), ("offset", 10**8), ("size", -1)],
)
def test_an_index_that_points_outside_is_refused(split, column, value):
    index = open_split(split).index
    columns = {name: values.copy() for name, values in index.columns.items()}
    columns[column][7] = value
    write_index(split, index.classes, index.shards, columns, [index.key(i) for i in range(COUNT)], {})
    with pytest.raises(DataError, match="outside its shards"):
        open_split(split)


def test_fingerprint_follows_bytes_labels_and_places(whole, tmp_path):
    source = shutil.copytree(whole.parent / "source", tmp_path / "s")
    fingerprints = [open_split(whole).fingerprint]

    def pack(name, **options):
        pack_image_folder(source, tmp_path / name, PackOptions(**{"samples_per_shard": 20, **options}))
        fingerprints.append(open_split(tmp_path / name).fingerprint)

    pack("same")
    assert fingerprints[0] == fingerprints.pop()
    pack("mixed", shuffle_seed=0)
    pack("cut", samples_per_shard=21)
    (source / "class0" / "000.jpg").rename(source / "class1" / "000.jpg")
    pack("moved")
    (source / "class1" / "000.jpg").write_bytes((source / "class1" / "001.jpg").read_bytes())
    pack("changed")
    assert len(set(fingerprints)) == 5


@pytest.mark.parametrize("sample", [0, 33, COUNT - 1])
def test_verify_finds_a_flipped_bit_anywhere(split, sample):
    assert verify_split(split) == 5
    damage_bytes(split, sample, flip_a_bit)
    with pytest.raises(DataError, match=rf"1 of 5 shards .* restore shard-00000{sample // 20}\.tar,"):
        verify_split(split)


# What is found on reading


@pytest.mark.parametrize("change", [flip_a_bit, lambda data: bytes(len(data)), lambda data: data[::-1]])
def test_changed_bytes_are_found_on_reading(split, change):
    damage_bytes(split, 33, change)
    dataset = open_split(split)
    with pytest.raises(DataError, match=r"sample 33 \(000000033-.*shard-000001\.tar.*checksum"):
        dataset.read(33)
    assert dataset.labels(np.array([32])).tolist() == [1]


def test_a_damaged_tar_header_loses_nothing(split):
    dataset = open_split(split)
    before = [dataset.read(i).image for i in range(COUNT)]
    with (split / "shard-000002.tar").open("r+b") as file:
        file.seek(int(dataset.index.columns["offset"][45]) - 512)
        file.write(bytes(512))
    assert [open_split(split).read(i).image for i in range(COUNT)] == before


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_never_delivered(split, seed):
    """Overwrite random stretches of shards: every sample is either delivered as packed or refused."""
    before = [open_split(split).read(i).image for i in range(COUNT)]
    numbers = random.Random(seed)
    for _ in range(12):
        path = split / f"shard-{numbers.randrange(5):06d}.tar"
        start, length = numbers.randrange(path.stat().st_size - 400), numbers.randrange(1, 400)
        with path.open("r+b") as file:
            file.seek(start)
            file.write(numbers.randbytes(length))
    dataset, refused = open_split(split), 0
    for i in range(COUNT):
        try:
            assert dataset.read(i).image == before[i]
        except DataError:
            refused += 1
    assert refused > 0


# Training


def steps_of(stream, count, first=0):
    taken = list(itertools.islice(stream.micro_batches(first), count))
    stream.close()
    return taken


@pytest.mark.parametrize("how", ["checksum", "undecodable"])
def test_damage_replaces_one_place_and_leaves_all_others(whole, split, how):
    bad = {5, 33, 71}
    if how == "undecodable":
        repack_undecodable(split, bad)
    else:
        for sample in bad:
            damage_bytes(split, sample, flip_a_bit)
    replaced = 0
    for one, other in zip(steps_of(train(whole), 14), steps_of(train(split), 14), strict=True):
        hit = torch.tensor([sample in bad for sample in one.sample_ids.tolist()])
        assert torch.equal(one.inputs[~hit], other.inputs[~hit])
        assert torch.equal(one.sample_ids[~hit], other.sample_ids[~hit])
        assert not set(other.sample_ids.tolist()) & bad
        assert len(other.substitutions) == int(hit.sum())
        for line, sample in zip(other.substitutions, one.sample_ids[hit].tolist(), strict=True):
            assert f"sample {sample} (" in line
            assert "shard-00000" in line
            assert "replaced by sample" in line
        dataset = open_split(split)
        assert other.labels.tolist() == dataset.labels(other.sample_ids.numpy()).tolist()
        replaced += int(hit.sum())
    assert replaced == 5  # three samples, two epochs of seven steps; one of them is once in the dropped tail


def test_a_stand_in_is_not_the_same_picture_twice_in_an_epoch(split):
    """It takes the random choices of the place it fills, so its own appearance in the epoch looks different."""
    for sample in (5, 33, 71):
        damage_bytes(split, sample)
    looks = {}
    for one in steps_of(train(split, max_bad_share=1.0), 7):
        for sample, image in zip(one.sample_ids.tolist(), one.inputs, strict=True):
            looks.setdefault(sample, []).append(image)
    twice = [images for images in looks.values() if len(images) > 1]
    assert twice
    assert not any(torch.equal(images[0], images[1]) for images in twice)


@pytest.mark.parametrize(("world", "micro", "workers"), [(2, 6, 0), (3, 2, 0), (4, 3, 0), (1, 4, 2)])
def test_replacement_does_not_depend_on_ranks_or_workers(split, world, micro, workers):
    for sample in (5, 33, 71, 72, 73):
        damage_bytes(split, sample, flip_a_bit)
    expected = steps_of(train(split), 7)
    slots = {}
    accumulation = BATCH // (micro * world)
    for rank in range(world):
        stream = train(split, RankInfo(rank, world), micro, workers=workers)
        for i, one in enumerate(steps_of(stream, 7 * accumulation)):
            slots[one.step, i % accumulation, rank] = one
    for step, other in enumerate(expected):
        parts = [slots[key] for key in sorted(slots) if key[0] == step]
        assert torch.equal(torch.cat([p.inputs for p in parts]), other.inputs)
        assert torch.equal(torch.cat([p.sample_ids for p in parts]), other.sample_ids)
        assert [line for p in parts for line in p.substitutions] == other.substitutions


def test_too_much_damage_stops_the_run(split):
    for sample in range(0, COUNT, 5):
        damage_bytes(split, sample)
    with pytest.raises(DataError, match=r"damaged, more than 5 \+ data.max_bad_share = 0.001"):
        steps_of(train(split), 7)
    assert len(steps_of(train(split, max_bad_share=0.5), 7)) == 7


def test_all_damaged_stops_the_run_whatever_the_share(split):
    for sample in range(COUNT):
        damage_bytes(split, sample)
    for workers in (0, 1):
        with pytest.raises(DataError, match="so is every stand-in tried"):
            steps_of(train(split, max_bad_share=1.0, workers=workers), 1)


def test_damage_count_limits():
    line = "sample 1 is damaged"
    count = DamageCount(0.01)
    for i in range(SPARED):
        count.add(0, 1, [(0, f"{line} {i}")])
        count.add(0, 1, [])
    with pytest.raises(DataError, match="6 of 11 samples of epoch 0"):
        count.add(0, 1, [(0, line)])
    count = DamageCount(0.01)
    count.add(0, 100, [(3 * i, line) for i in range(6)])
    with pytest.raises(DataError, match="more than"):
        count.add(0, 10, [(3, line)])
    count.add(1, 10, [(3, line)])  # a new epoch counts again
    count = DamageCount(1.0)
    count.add(0, 100, [(i, line) for i in range(1, 100)])
    with pytest.raises(DataError, match=f"{MAX_IN_ROW} samples in a row"):
        count.add(1, 5, [(0, line)])
    count = DamageCount(1.0)
    count.add(0, 100, [(i, line) for i in range(1, 100)])
    count.add(0, 100, [(i, line) for i in range(1, 100)])  # the whole one between them breaks the row


# Evaluation


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_validation_stops_or_counts_nothing(split, workers):
    damage_bytes(split, 40)
    stream = ShardEvalStream(open_split(split), config_of(workers=workers), RankInfo(), 16)
    with pytest.raises(DataError, match=r"sample 40 .*bad_validation"):
        list(stream.micro_batches())
    config = config_of(workers=workers, bad_validation="zero_weight")
    stream = ShardEvalStream(open_split(split), config, RankInfo(), 16)
    batches = list(stream.micro_batches())
    counted = [s for b in batches for s in b.sample_ids[b.weights == 1].tolist()]
    assert counted == [i for i in range(COUNT) if i != 40]
    (line,) = [line for b in batches for line in b.substitutions]
    assert "sample 40" in line
    stream.close()


# Storage that fails


def test_a_read_that_fails_for_a_while_is_tried_again(split, monkeypatch):
    waits = []
    real, failures = os.pread, iter([OSError(5, "Input/output error"), b"short", OSError(116, "Stale file handle")])

    def failing(file, size, offset):
        failure = next(failures, None)
        if isinstance(failure, OSError):
            raise failure
        return real(file, size, offset) if failure is None else failure

    index = open_split(split).index
    dataset = ShardDataset(split, index, sleep=waits.append)
    expected = open_split(split).read(8)
    monkeypatch.setattr(os, "pread", failing)
    assert dataset.read(8) == expected
    assert waits == sorted(waits)
    assert len(waits) == 3


def test_a_shard_that_vanishes_or_shrinks_stops_the_run_and_is_not_taken_for_damage(split):
    waits = []
    dataset = ShardDataset(split, open_split(split).index, sleep=waits.append)
    dataset.read(0)
    os.truncate(split / "shard-000000.tar", 3000)
    with pytest.raises(DataError, match=r"sample 15 .*cannot be read after 5 tries \(0 of .* bytes"):
        dataset.read(15)
    stream = ShardTrainStream(dataset, config_of(), 4, RankInfo(), BATCH, BATCH)
    (split / "shard-000003.tar").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(itertools.islice(stream.micro_batches(0), 7))
    assert len(waits) >= 8  # readers that are ahead try as well


def test_more_shards_than_open_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dataloaders.storage.base._MAX_OPEN", 3)
    for i in range(12):
        out = io.BytesIO()
        Image.new("RGB", (4, 4), (i, 0, 0)).save(out, "PNG")
        path = tmp_path / "s" / "a" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
    pack_image_folder(tmp_path / "s", tmp_path / "d", PackOptions(samples_per_shard=1))
    dataset = open_split(tmp_path / "d")
    for i in [*range(12), 0, 5, 11, 0]:
        dataset.read(i)
        assert dataset.key(i) == f"{i:09d}-{i:02d}"
        assert len(dataset.storage._files) <= 3


def test_packing_again_during_a_run_is_noticed_by_readers_that_start_later(split):
    dataset = open_split(split)
    state = dataset.__getstate__()
    index = dataset.index
    facts = (*index.shards[:-1], ShardFacts(**{**vars(index.shards[-1]), "sha256": "0" * 64}))
    write_index(split, index.classes, facts, index.columns, [index.key(i) for i in range(COUNT)], {})
    with pytest.raises(DataError, match="repacked"):
        ShardDataset.__new__(ShardDataset).__setstate__(state)
