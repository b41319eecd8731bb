"""Samples that lie in two splits are found by the checksums of the index, in every kind of container that has them."""

import numpy as np
import PIL.Image
import pytest

from dataloaders.order.mixture import MixtureSource
from dataloaders.packing.finding import open_container
from dataloaders.packing.inspection import inspect
from dataloaders.packing.overlap import Overlap, overlap
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.sources.shards import ShardDataset, open_split
from dataloaders.sources.subset import SubsetSource

# Which image, by the name of its file.
TRAIN = {"a/0": 0, "a/1": 1, "b/2": 2, "b/3": 3}
VAL = {"a/x": 7, "b/y": 2, "b/z": 8}


def folder_of(root, images):
    for name, number in images.items():
        pixels = np.random.default_rng(number).integers(0, 256, (60 + number, 70, 3), np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(root / f"{name}.png")
    return root


@pytest.fixture(params=[None, 32], ids=["whole", "tiles"])
def splits(tmp_path, request):
    opened = []
    for name, images in (("train", TRAIN), ("val", VAL)):
        folder_of(tmp_path / "images" / name, images)
        pack_image_folder(tmp_path / "images" / name, tmp_path / name, PackOptions(tiles=request.param))
        opened.append(open_split(tmp_path / name))
    return opened


def test_a_sample_of_both_splits_is_named(splits):
    train, val = splits
    found = overlap(train, val)
    assert found.samples == 1
    assert [key.rpartition("-")[2] for key in found.first] == ["2", "y"]
    assert overlap(val, train).samples == 1
    assert overlap(train, train).samples == 4


def test_subsets_and_mixtures_hold_what_their_sources_hold(splits):
    train, val = splits
    keys = [train.key(sample).rpartition("-")[2] for sample in range(4)]
    others = SubsetSource(train, np.array([at for at, key in enumerate(keys) if key != "2"]))
    assert overlap(others, val) == Overlap(0, ("", ""))
    assert overlap(MixtureSource([others, train], [1, 1]), val).samples == 1
    assert overlap(MixtureSource([others, others], [1, 1]), val).samples == 0


def test_folders_say_nothing_and_so_nothing_is_said(splits, tmp_path):
    train, _ = splits
    folder = open_container(tmp_path / "images" / "val")
    assert overlap(train, folder) is None
    assert overlap(folder, train) is None


class Elsewhere:
    """Storage that no table may be read from: it would fetch a whole shard for each."""

    name = "https://elsewhere"

    def read(self, name, offset, size):
        pytest.fail("it was read")


def test_nothing_is_fetched_nor_read_at_length(splits, monkeypatch):
    train, val = splits
    tiled = bool(train.index.options.get("tiles"))
    found = overlap(ShardDataset(Elsewhere(), train.index), val)
    assert (found is None) == tiled
    monkeypatch.setattr("dataloaders.packing.overlap.TABLES", 3)
    assert (overlap(train, val) is None) == tiled


def test_a_large_index_is_compared_in_blocks(splits, monkeypatch):
    train, val = splits
    monkeypatch.setattr("dataloaders.packing.overlap._BLOCK", 1)
    assert overlap(train, val).samples == 1
    assert overlap(train, train).samples == 4


def test_samples_without_an_image_are_no_twins(splits):
    train, val = splits
    for split in splits:
        split.index.columns["size"] = np.zeros_like(split.index.columns["size"])
        split.index.columns["crc32"] = np.zeros_like(split.index.columns["crc32"])
    assert overlap(ShardDataset(train.storage, train.index), ShardDataset(val.storage, val.index)) is None


@pytest.mark.parametrize("tiles", [None, 32])
def test_inspect_finds_doubles_in_one_split(tmp_path, tiles):
    folder_of(tmp_path / "images", {"a/0": 0, "a/1": 1, "b/2": 1})
    pack_image_folder(tmp_path / "images", tmp_path / "packed", PackOptions(tiles=tiles))
    found = inspect(open_split(tmp_path / "packed"))
    assert (found.duplicate_samples, found.duplicates_of) == (1, 3)
