"""One door to all containers: the same samples from a folder, a URL, by ranges, cache or memory; indexes at scale."""

import json
import os
import pickle
import shutil
import time

import numpy as np
import pytest
import safetensors.numpy
import torch

import dataloaders.sources.index
from dataloaders.beton.reader import BetonDataset
from dataloaders.beton.writer import BetonSample, write_beton
from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.reading.streams import ShardTrainStream
from dataloaders.sources import image_folder
from dataloaders.sources.arrays import CHUNK_ROWS, map_arrays, write_arrays
from dataloaders.sources.image_folder import ImageFolderDataset
from dataloaders.sources.index import (
    ARRAYS_NAME,
    INDEX_NAME,
    PARTS,
    ShardFacts,
    fingerprint_of,
    read_index,
    write_index,
)
from dataloaders.sources.shards import ShardDataset, check_same_classes, open_split
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from tests.unit.serving import served
from tests.unit.test_data_foreign import picture, sample, write_tar

COUNT = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same images three times: class folders, packed, and as external shards."""
    root = tmp_path_factory.mktemp("data")
    for number in range(COUNT):
        path = root / "images" / "abc"[number % 3] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    pack_image_folder(root / "images", root / "packed", PackOptions(samples_per_shard=7))
    packed = open_split(root / "packed")
    (root / "shards").mkdir()
    (root / "shards" / "classes.txt").write_text("a\nb\nc\n")
    for shard in range(4):
        files = []
        for number in range(shard * 6, shard * 6 + 6):
            label = packed.labels(np.array([number])).item()
            files += [(f"{number}.jpg", packed.read(number).image), (f"{number}.cls", b"%d" % label)]
        write_tar(root / "shards" / f"s-{shard}.tar", files)
    return root


def config_of(**changes):
    return DataConfig(**{"root": "unused", "read_timeout": 5.0, **changes})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "setformer"


def everything(source):
    numbers = np.arange(source.num_samples)
    assert source.sizes().tolist() == [list(source.size(i)) for i in range(source.num_samples)]
    low, high = source.sizes().min(axis=0), source.sizes().max(axis=0)
    assert source.extent() == (tuple(low), tuple(high))
    shards = source.shards
    assert len(shards) == source.num_samples
    assert bool((shards[1:] >= shards[:-1]).all())
    assert source.labels(np.array([-1])).tolist() == [0]
    assert source.labels(numbers).dtype == torch.int64
    assert all(source.key(i) and source.key(i) in source.place(i) for i in range(source.num_samples))
    return (
        source.classes,
        source.labels(numbers).tolist(),
        source.sizes().tolist(),
        [source.read(int(i)).image for i in numbers],
    )


@pytest.fixture(scope="module")
def expected(root):
    return everything(open_split(root / "packed"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("packed", ShardDataset),
        ("images", ImageFolderDataset),
        ("shards", ShardDataset),
        ("shards/*.tar", ShardDataset),
        ("shards/s-{0..3}.tar", ShardDataset),
    ],
)
@pytest.mark.parametrize("access", ["random", "sequential"])
def test_the_same_samples_from_every_container(root, expected, name, kind, access):
    source = open_source(str(root), name, config_of(access=access))
    assert isinstance(source, kind)
    assert everything(source) == expected
    copy = pickle.loads(pickle.dumps(source))
    assert everything(copy) == expected
    assert copy.fingerprint == source.fingerprint == open_source(str(root), name, config_of()).fingerprint
    assert source.name
    source.close()
    assert source.read(3).image == expected[3][3]
    source.close()
    copy.close()


@pytest.mark.parametrize("name", ["packed", "shards/s-{0..3}.tar"])
@pytest.mark.parametrize("how", ["ranges", "cache", "memory", "no ranges, cache", "no ranges, memory"])
def test_the_same_samples_from_a_url(root, expected, own_cache, tmp_path, name, how):
    changes = {}
    if "cache" in how:
        changes["cache"] = str(tmp_path / "cache")
    if "memory" in how:
        changes["access"] = "sequential"
    with served(root) as server:
        server.ranges = "no ranges" not in how
        source = open_source(server.url, name, config_of(**changes))
        assert everything(source) == expected
        copy = pickle.loads(pickle.dumps(source))
        assert copy.read(5).image == expected[3][5]
        again = open_source(server.url, name, config_of(**changes))
        assert again.fingerprint == source.fingerprint
        fetched = server.fetched(f"{name.partition('/')[0]}/" + ("shard-000001.tar" if name == "packed" else "s-1.tar"))
        if "cache" in how:
            assert len(fetched) == 1
            assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 4
            assert not own_cache.exists()
        assert any(asked for _, _, asked in fetched) == (how == "ranges")
        for one in (source, copy, again):
            one.close()


def test_the_fingerprint_of_a_packed_split_is_the_same_behind_a_url(root, own_cache):
    with served(root) as server:
        source = open_source(server.url, "packed", config_of())
        assert source.fingerprint == open_split(root / "packed").fingerprint
        assert server.url in source.place(3)
        source.close()


def test_a_beton_file_here_and_behind_a_url(root, tmp_path):
    source = open_split(root / "packed")
    samples = [BetonSample(source.read(i).image, 0, *source.size(i)) for i in range(COUNT)]
    (tmp_path / "files").mkdir()
    write_beton(tmp_path / "files" / "a.beton", samples, COUNT, classes=("a",))
    local = open_source(str(tmp_path / "files"), "a.beton", config_of())
    assert isinstance(local, BetonDataset)
    with served(tmp_path / "files") as server:
        with pytest.raises(ConfigError, match=r"a\.beton is read from a local copy: set data\.cache"):
            open_source(server.url, "a.beton", config_of())
        for _ in range(2):
            remote = open_source(server.url, "a.beton", config_of(cache=str(tmp_path / "cache")))
            assert remote.fingerprint == local.fingerprint
            assert [remote.read(i).image for i in range(COUNT)] == [local.read(i).image for i in range(COUNT)]
        assert len(server.fetched("a.beton")) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "none",
            r"none does not exist: set data\.root or data\.train and data\.val \(in .* there are .*images",
        ),
        ("none-*.tar", r"no shard matches .*none-\*\.tar: the folder holds .*"),
        ("none-{0..3}.tar", r"none-0\.tar cannot be opened"),
        ("text", r"data folder .*text has no index\.json"),
        ("empty", r"data folder .*empty is empty"),
        ("packed/shard-000000.tar", r"keys|labels|key"),
        ("images/a/00.jpg", "is a file, not a folder"),
    ],
)
def test_what_is_not_there_is_said(root, name, said):
    (root / "empty").mkdir(exist_ok=True)
    (root / "text").mkdir(exist_ok=True)
    (root / "text" / "a.txt").write_text("x")
    if name.startswith("packed"):
        assert open_source(str(root), name, config_of()).num_samples == 7
        shutil.rmtree(root / "packed" / ".setformer-index")
        return
    with pytest.raises(DataError, match=said):
        open_source(str(root), name, config_of())


def test_what_a_url_does_not_have_is_said(root, own_cache):
    with served(root) as server:
        with pytest.raises(DataError, match=r"none/index\.json is not there .*name external shards as train-\{0"):
            open_source(server.url, "none", config_of())
        with pytest.raises(DataError, match=r"s-9\.tar is not there .status 404.*one of 2 shards"):
            open_source(server.url, "shards/s-{3,9}.tar", config_of())
        server.always["/packed/shard-000002.tar"] = ("status", 404)
        with pytest.raises(DataError, match=r"shard .*packed/shard-000002\.tar that index\.json names is not there"):
            open_source(server.url, "packed", config_of())
        server.always.clear()
        server.ranges = False
        with pytest.raises(DataError, match=r"shard-000000\.tar is served without byte ranges: set data\.cache"):
            open_source(server.url, "packed", config_of())


def test_a_shard_cut_on_the_server_is_found_on_opening(root, own_cache, tmp_path):
    shutil.copytree(root / "packed", tmp_path / "packed")
    os.truncate(tmp_path / "packed" / "shard-000001.tar", 5000)
    with (
        served(tmp_path) as server,
        pytest.raises(DataError, match=r"shard-000001\.tar has 5000 bytes, index\.json says"),
    ):
        open_source(server.url, "packed", config_of())


def test_a_cached_index_damaged_on_disk_is_fetched_again(root, own_cache):
    with served(root) as server:
        first = open_source(server.url, "packed", config_of())
        first.close()
        [path] = own_cache.glob("indexes/*/index.safetensors")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        again = open_source(server.url, "packed", config_of())
        assert again.fingerprint == first.fingerprint
        assert again.read(2) == open_split(root / "packed").read(2)
        again.close()


def test_a_cache_too_small_for_the_order_is_refused(root, tmp_path):
    sizes = sorted((path.stat().st_size for path in (root / "packed").glob("*.tar")), reverse=True)
    with served(root) as server:

        def open_with(gib, name="packed", **changes):
            config = config_of(cache=str(tmp_path / "cache"), cache_gib=gib, val="shards/s-{0..3}.tar", **changes)
            return open_source(server.url, name, config).close()

        small = (sizes[0] + sizes[1] + 100) / 2**30
        with pytest.raises(ConfigError, match=r"does not hold the 4 shards .*order = .full.*order = .block"):
            open_with(small)
        with pytest.raises(ConfigError, match=r"does not hold the 3 shards .*order = .block.*lower data\.block_shards"):
            open_with(small, order="block", block_shards=3)
        open_with(small, order="block", block_shards=2)
        open_with(small, "shards/s-{0..3}.tar")  # evaluation


def test_classes_are_compared_over_any_containers(root):
    sources = [open_source(str(root), name, config_of()) for name in ("packed", "images", "shards")]
    check_same_classes(sources[0], sources[1])
    check_same_classes(sources[1], sources[2])
    other = open_source(str(root), "shards/s-0.tar", config_of())
    check_same_classes(other, sources[0])
    numbered = root / "numbered"
    numbered.mkdir()
    write_tar(numbered / "a.tar", [*sample(1), *sample(2)])
    with pytest.raises(DataError, match=r"label 0 is 'a' in .*images but '0' in .*numbered"):
        check_same_classes(sources[1], open_source(str(root), "numbered", config_of()))


# Image folders


@pytest.fixture
def images(tmp_path):
    for number in range(9):
        path = tmp_path / "images" / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return tmp_path / "images"


def test_an_image_that_comes_or_changes_is_noticed(images):
    first = open_source(str(images), "", config_of())
    assert sorted(path.name for path in images.iterdir()) == ["a", "b", "c"]  # nothing of ours among the classes
    (images / "a" / "new.jpg").write_bytes(picture(50))
    second = open_source(str(images), "", config_of())
    assert (first.num_samples, second.num_samples) == (9, 10)
    assert first.fingerprint != second.fingerprint
    (images / "b" / "1.jpg").write_bytes(b"other")
    place = next(i for i in range(10) if second.key(i) == "b/1.jpg")
    with pytest.raises(DataError, match=r"sample .*images/b/1\.jpg\) has 5 bytes, .* when it was indexed"):
        second.read(place)


def test_a_copy_of_an_image_folder_has_the_same_fingerprint(images, tmp_path):
    first = open_source(str(images), "", config_of())
    copy = shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    assert open_source(str(copy), "", config_of()).fingerprint == first.fingerprint
    data = bytearray((copy / "a" / "0.jpg").read_bytes())
    data[-30] ^= 1
    (copy / "a" / "0.jpg").unlink()
    (copy / "a" / "0.jpg").write_bytes(data)
    assert open_source(str(copy), "", config_of()).fingerprint != first.fingerprint


def test_who_waits_for_an_index_sees_it_continue(images, tmp_path, monkeypatch):
    """Looking into the images of a large folder takes longer than others wait; each part of it is a sign of life."""
    monkeypatch.setattr(image_folder, "_PROGRESS_EVERY", 3)
    signs = []
    monkeypatch.setattr(os, "utime", lambda path: signs.append(path.name))
    image_folder.open_image_folder(images, tmp_path / "cache", 1)
    assert signs == [".lock"] * 4  # before files 0, 3 and 6 of 9, and before writing


def test_an_index_where_nothing_can_be_written_is_read(images, tmp_path, monkeypatch):
    first = image_folder.open_image_folder(images, tmp_path / "cache", 1)

    def refused(homes, shown):
        raise DataError(f"the index of {shown} cannot be written anywhere")

    monkeypatch.setattr(image_folder, "own_folder", refused)  # permissions do not bind the superuser
    assert image_folder.open_image_folder(images, tmp_path / "cache", 1).fingerprint == first.fingerprint
    (images / "a" / "new.jpg").write_bytes(picture(50))
    with pytest.raises(DataError, match="cannot be written anywhere"):
        image_folder.open_image_folder(images, tmp_path / "cache", 1)


def test_a_broken_image_keeps_its_place(images):
    (images / "a" / "0.jpg").write_bytes(b"not a picture")
    source = open_source(str(images), "", config_of())
    assert source.num_samples == 9
    assert source.read(0).image == b"not a picture"
    assert source.extent()[0][0] >= 10


# The index


def columns_of(count, shards=4):
    numbers = np.arange(count)
    per = -(-count // shards)
    return {
        "shard": numbers // per,
        "offset": numbers % per * 1000 + 512,
        "size": np.full(count, 400),
        "label": numbers % 7,
        "width": 10 + numbers % 5,
        "height": 20 + numbers % 6,
        "crc32": numbers * 2654435761 % 2**32,
    }


def write_large(folder, count, **changes):
    folder.mkdir(exist_ok=True)
    per = -(-count // 4)
    facts = tuple(ShardFacts(f"{n}.tar", per * 1000 + 2000, "0" * 64, min(per, count - n * per)) for n in range(4))
    keys = np.zeros((count, 9), np.uint8)
    for digit in range(9):
        keys[:, 8 - digit] = 48 + np.arange(count) // 10**digit % 10
    return write_index(folder, tuple("abcdefg"), facts, {**columns_of(count), **changes}, keys, {})


def test_arrays_are_safetensors_and_mapped(tmp_path):
    arrays = {"a": np.arange(5, dtype=np.int64), "b": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    write_arrays(tmp_path / "x", arrays)
    for read in (safetensors.numpy.load_file(tmp_path / "x"), map_arrays(tmp_path / "x")):
        assert {name: value.tolist() for name, value in read.items()} == {k: v.tolist() for k, v in arrays.items()}
        assert {name: value.dtype for name, value in read.items()} == {k: v.dtype for k, v in arrays.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", {"made": "elsewhere"})
    assert map_arrays(tmp_path / "theirs")["b"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_parts_are_read_back(tmp_path):
    zeros = np.zeros(40, np.int64)
    parts = {f"{part}_{name}": zeros for part in PARTS for name in ("offset", "size", "crc32")}
    parts["mask_size"] = zeros + 3
    write_large(tmp_path / "d", 40, **parts)
    index = read_index(tmp_path / "d")
    assert index.parts == set(PARTS)
    assert index.columns["mask_size"].tolist() == [3] * 40
    assert index.columns["boxes_crc32"].dtype == np.uint32
    for changed in ({"mask_offset": zeros + 10**6}, {"boxes_size": zeros - 1}, {"mask_offset": zeros - 1}):
        write_large(tmp_path / "d", 40, **{**parts, **changed})
        with pytest.raises(DataError, match="outside its shards"):
            read_index(tmp_path / "d")
    del parts["boxes_size"]
    write_large(tmp_path / "d", 40, **parts)
    with pytest.raises(DataError, match="does not have the columns"):
        read_index(tmp_path / "d")


def test_an_index_of_format_1_is_still_read(tmp_path):
    write_large(tmp_path / "d", 40)
    path = tmp_path / "d" / INDEX_NAME
    table = json.loads(path.read_text())
    table["format"] = 1
    del table["extent"], table["arrays"]["chunks"]
    table["fingerprint"] = fingerprint_of(table)
    path.write_text(json.dumps(table))
    index = read_index(tmp_path / "d")
    assert index.extent == ((20, 10), (25, 14))
    assert index.key(7) == "000000007"


def test_a_large_index_is_checked_where_it_is_touched(tmp_path, monkeypatch):
    """Beyond what is read at once, each chunk is checked before anything of it is used."""
    count = 3 * CHUNK_ROWS + 100
    write_large(tmp_path / "d", count)
    path = tmp_path / "d" / ARRAYS_NAME
    index = read_index(tmp_path / "d")
    assert index.chunks == ()
    monkeypatch.setattr(dataloaders.sources.index, "_READ_AT_ONCE", 1000)
    whole = read_index(tmp_path / "d")
    assert len(whole.chunks) == 4
    source = ShardDataset(tmp_path / "d", whole)
    numbers = np.array([5, -1, count - 1, CHUNK_ROWS])
    assert source.labels(numbers).tolist() == [5, 0, (count - 1) % 7, CHUNK_ROWS % 7]
    assert source.size(2 * CHUNK_ROWS) == (20 + 2 * CHUNK_ROWS % 6, 10 + 2 * CHUNK_ROWS % 5)
    assert source.extent() == ((20, 10), (25, 14))
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    for column in ("label", "offset", "height", "crc32"):
        data = bytearray(original)
        place = header[column]["data_offsets"][0] + (CHUNK_ROWS + 7) * index.columns[column].itemsize
        data[8 + length + place] ^= 1
        other = path.with_name("changed")
        other.write_bytes(data)
        other.replace(path)
        source = ShardDataset(tmp_path / "d", read_index(tmp_path / "d"))
        assert source.labels(np.array([CHUNK_ROWS - 1])).tolist() == [(CHUNK_ROWS - 1) % 7]
        for use in (
            lambda: source.labels(np.array([3, CHUNK_ROWS])),  # noqa: B023
            lambda: source.size(CHUNK_ROWS),  # noqa: B023
            lambda: source.read(2 * CHUNK_ROWS - 1),  # noqa: B023
            lambda: source.sizes(),  # noqa: B023
        ):
            with pytest.raises(DataError, match="does not have the sha256"):
                use()


def test_an_index_of_imagenets_size_opens_at_once(tmp_path):
    write_large(tmp_path / "d", 1_281_167)
    begun = time.process_time()
    index = read_index(tmp_path / "d")
    assert time.process_time() - begun < 1.0  # CPU seconds; 0.08 measured
    assert len(index) == 1_281_167


# Training


@pytest.mark.parametrize("order", ["full", "block"])
def test_training_sees_the_same_pixels_wherever_the_bytes_are(root, own_cache, tmp_path, order):
    def pixels(place, name, **changes):
        config = config_of(image_size=8, order=order, block_shards=2, **changes)
        stream = ShardTrainStream(open_source(place, name, config), config, 3, RankInfo(), 4, 4)
        batches = stream.micro_batches(1)
        taken = [next(batches) for _ in range(7)]
        batches.close()
        stream.close()
        return torch.stack([one.inputs for one in taken]), torch.cat([one.sample_ids for one in taken])

    here = pixels(str(root), "packed")
    with served(root) as server:
        for changes in ({}, {"cache": str(tmp_path / "cache"), "workers": 1}, {"access": "sequential"}):
            there = pixels(server.url, "packed", **changes)
            assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))
    if order == "full":  # its order knows numbers of samples alone, not how they are dealt out to shards
        for name in ("images", "shards"):
            other = pixels(str(root), name)
            assert all(torch.equal(one, two) for one, two in zip(here, other, strict=True))
