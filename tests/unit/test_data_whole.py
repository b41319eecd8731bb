"""Evaluation of whole images (data.eval_view = "whole"): shapes, masks as stored, each image once on any ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.pixels.depth import UndecodableError
from dataloaders.pixels.transforms import evaluated_shape
from dataloaders.pixels.view import see_image, see_mask, whole_shape, whole_view
from dataloaders.reading.streams import ShardEvalStream
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import DataError
from setformer_dist.core.ranks import RankInfo

SIZES = [(40, 40), (40, 64), (57, 36), (20, 90), (40, 64), (33, 33), (40, 40)]


@pytest.mark.parametrize(
    ("stored", "shape", "expected"),
    [
        ((360, 480), (180, 240), (180, 240)),  # of its proportions: no multiple is asked for
        ((100, 100), (224, 224), (224, 224)),
        ((400, 640), (224, 224), (224, 352)),  # 358.4
        ((640, 400), (224, 224), (352, 224)),
        ((1000, 30), (64, 64), (2144, 64)),
        ((30, 31), (8, 8), (8, 8)),  # within rounding
        ((30, 40), (8, 8), (32, 32)),
        ((90, 100), (96, 128), (128, 128)),  # the width decides
    ],
)
def test_a_whole_image_covers_the_shape_and_keeps_its_proportions(stored, shape, expected):
    assert whole_shape(stored, shape, 32) == expected


@pytest.mark.parametrize(
    ("stored", "expected"),
    [((480, 640), (800, 1056)), ((427, 640), (800, 1184)), ((240, 640), (512, 1344)), ((640, 51), (1344, 96))],
)
def test_a_limit_of_the_longer_side_is_kept(stored, expected):
    """As COCO's images are usually seen: the shorter side 800, the longer at most 1333, in multiples of 32."""
    config = DataConfig(root="x", image_size=800, eval_view="whole", eval_longest=1333)
    assert evaluated_shape(stored, config) == expected


def test_a_limit_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="eval_longest = 1333 limits whole images that are resized"):
        DataConfig(root="x", image_size=800, eval_longest=1333)
    with pytest.raises(ValueError, match="eval_longest = 700 must be at least 800"):
        DataConfig(root="x", image_size=800, eval_view="whole", eval_longest=700)


def test_windows_are_of_native_scale():
    config = DataConfig(root="x", eval_view="whole", augment={"crop": "window"})
    assert evaluated_shape((531, 77), config) == (531, 77)


def packed(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    for part in ("images", "masks"):
        (folder / "source" / part).mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "source" / "images" / f"{i}.png")
        mask = (np.add.outer(np.arange(height), np.arange(width)) % (i + 2)).astype(np.uint8)
        Image.fromarray(mask).save(folder / "source" / "masks" / f"{i}.png")
    pack_image_folder(folder / "source", folder / "val", PackOptions(masks="masks"))
    return folder


def batches(folder: Path, ranks: RankInfo, micro: int, **keys: object) -> list[MicroBatch]:
    config = DataConfig(root=str(folder), image_size=32, bucket_multiple=16, eval_view="whole", **keys)
    stream = ShardEvalStream(open_source(str(folder), "val", config), config, ranks, micro)
    try:
        return list(stream.micro_batches())
    finally:
        stream.close()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("threads", [0, 2])
def test_each_image_is_seen_once_with_its_mask_as_stored(tmp_path, world, threads):
    folder = packed(tmp_path, SIZES)
    shares = [batches(folder, RankInfo(rank, world, rank, world), 4, threads=threads) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # the same number of forward passes on all ranks
    seen = []
    for batch in (batch for share in shares for batch in share):
        assert len(batch.inputs) == len(batch.weights) == 1
        if not batch.weights[0]:
            assert int(batch.sample_ids[0]) == -1
            continue
        sample = int(batch.sample_ids[0])
        seen.append(sample)
        height, width = SIZES[sample]
        masks = batch.annotations.masks
        assert masks.shape == (1, height, width)
        expected = np.add.outer(np.arange(height), np.arange(width)) % (sample + 2)
        assert (masks[0].numpy() == expected).all()
        assert batch.inputs.shape[2:] == whole_shape((height, width), (32, 32), 16)
    assert sorted(seen) == list(range(len(SIZES)))


def test_images_of_one_size_are_seen_in_micro_batches(tmp_path):
    found = batches(packed(tmp_path, [(40, 60)] * 5), RankInfo(), 3)
    assert [tuple(batch.inputs.shape) for batch in found] == [(3, 3, 32, 48)] * 2
    assert torch.cat([batch.weights for batch in found]).tolist() == [1, 1, 1, 1, 1, 0]
    assert found[0].annotations.masks.shape == (3, 40, 60)


@pytest.mark.parametrize(("micro", "expected"), [(3, 1), (4, 1), (8, 3)])
def test_images_at_native_scale_are_seen_in_no_more_pixels_than_windows(tmp_path, micro, expected):
    folder = packed(tmp_path, [(40, 60)] * 5)
    found = batches(folder, RankInfo(), micro, augment={"crop": "window"})
    assert {tuple(batch.inputs.shape) for batch in found} == {(expected, 3, 40, 60)}
    assert sum(float(batch.weights.sum()) for batch in found) == 5


def test_whole_images_beyond_the_usual_limit_are_shown_where_none_is_resized(monkeypatch):
    monkeypatch.setattr("dataloaders.pixels.view.MAX_PIXELS", 2000)
    pixels, mask = np.zeros((50, 60, 3), np.uint8), np.zeros((50, 60), np.uint8)
    native = whole_view((50, 60), (50, 60))
    assert see_image(native, pixels, (50, 60), "bilinear").shape == (3, 50, 60)
    assert see_mask(native, mask).shape == (50, 60)
    with pytest.raises(UndecodableError, match="would be resized to 100 x 60"):
        see_image(whole_view((50, 60), (100, 60)), pixels, (50, 60), "bilinear")


def test_an_image_of_another_size_than_the_index_says_is_damaged(tmp_path):
    folder = packed(tmp_path, [(40, 60)] * 3)
    config = DataConfig(root=str(folder), eval_view="whole", image_size=32)
    source = open_source(str(folder), "val", config)
    source.size = lambda sample: (40, 61)  # what a wrong index would say
    with pytest.raises(DataError, match="it is 40 x 60 pixels, its container says 40 x 61"):
        list(ShardEvalStream(source, config, RankInfo(), 2).micro_batches())
