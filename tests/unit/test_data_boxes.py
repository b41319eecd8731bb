"""What COCO's evaluation needs of boxes: crowds and areas, from the annotation file to the micro batch."""

from __future__ import annotations

import json
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.inspection import inspect, pictures
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.packing.verify import verify
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.source import Boxes
from dataloaders.sources.shards import open_split
from setformer_dist.core.batch import Annotations, MicroBatch
from setformer_dist.core.ranks import RankInfo

SIZES = [(30, 40), (50, 36), (30, 40)]  # (height, width)
PLAIN = [
    {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 10, 20]},
    {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 40.4, 30]},
    {"id": 3, "image_id": 11, "category_id": 3, "bbox": [5, 5, 3, 3.125]},
]
# What the packing of PLAIN was before there were crowds and areas.
PLAIN_TABLES = [
    b'{"boxes": [[1.0, 2.0, 11.0, 22.0], [0.0, 0.0, 40.0, 30.0]], "labels": [1, 0]}',
    b'{"boxes": [[5.0, 5.0, 8.0, 8.125]], "labels": [0]}',
    b'{"boxes": [], "labels": []}',
]
# An outline, none said, a crowd, and a box that no crop that covers the image shows.
FULL = [
    {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 10, 20], "area": 123.4567, "iscrowd": 0},
    {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 0},
    {"id": 3, "image_id": 11, "category_id": 3, "bbox": [5, 5, 30, 20], "area": 99, "iscrowd": 1},
    {"id": 4, "image_id": 11, "category_id": 7, "bbox": [5, 5, 20, 30], "area": 600, "iscrowd": 0},
    {"id": 5, "image_id": 11, "category_id": 3, "bbox": [0, 0, 0.5, 0.5], "area": 0, "iscrowd": 0},
]


def packed(folder: Path, rows: list[dict[str, Any]], name: str = "val", **options: Any) -> Path:
    source = folder / f"source-{name}"
    source.mkdir()
    for i, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(source / f"{i}.png")
    table = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(len(SIZES))],
        "categories": [{"id": 7, "name": "bee"}, {"id": 3, "name": "ant"}],
        "annotations": rows,
    }
    (source / "coco.json").write_text(json.dumps(table))
    pack_image_folder(source, folder / name, PackOptions(coco="coco.json", **options))
    return folder


def tables(split: Path) -> list[bytes]:
    with tarfile.open(split / "shard-000000.tar") as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".boxes.json")]


def evaluated(folder: Path, micro: int = 2, **keys: Any) -> list[MicroBatch]:
    config = DataConfig(**{"root": str(folder), "image_size": 32, "bucket_multiple": 16, "eval_view": "whole", **keys})
    stream = ShardEvalStream(open_source(str(folder), "val", config), config, RankInfo(), micro)
    try:
        return list(stream.micro_batches())
    finally:
        stream.close()


def trained(folder: Path, **keys: Any) -> MicroBatch:
    augment = AugmentConfig(crop="none", flip=False)
    config = DataConfig(root=str(folder), image_size=32, eval_crop=1.0, augment=augment, **keys)
    stream = ShardTrainStream(open_source(str(folder), "val", config), config, 0, RankInfo(), 3, 3)
    try:
        return next(iter(stream.micro_batches(0)))
    finally:
        stream.close()


def lists(annotations: Annotations) -> dict[str, Any]:
    """Return annotations in a form that is compared by `==`."""
    found = {field.name: getattr(annotations, field.name) for field in fields(annotations)}
    return {
        name: [one.tolist() for one in value]
        if isinstance(value, tuple)
        else value
        if value is None
        else value.tolist()
        for name, value in found.items()
    }


def test_boxes_without_more_are_packed_as_ever_and_have_the_areas_of_their_boxes(tmp_path: Path) -> None:
    split = packed(tmp_path, PLAIN) / "val"
    assert tables(split) == PLAIN_TABLES
    boxes = [open_split(split).read(sample).boxes for sample in range(3)]
    assert [one.areas.tolist() for one in boxes] == [[200, 1200], [9.375], []]
    assert [one.crowds.tolist() for one in boxes] == [[False, False], [False], []]
    assert all((one.areas.dtype, one.crowds.dtype) == (np.float32, np.bool_) for one in boxes)


def test_crowds_and_areas_are_packed(tmp_path: Path) -> None:
    split = packed(tmp_path, FULL) / "val"
    first, second, third = (json.loads(table) for table in tables(split))
    assert first["areas"] == [123.457, 1200]
    assert "crowds" not in first
    assert second["areas"] == [99, 600, 0]
    assert second["crowds"] == [True, False, False]
    assert third.keys() == {"boxes", "labels"}
    read = open_split(split).read(1).boxes
    assert (read.areas.tolist(), read.crowds.tolist()) == ([99, 600, 0], [True, False, False])
    assert not verify(split).damaged
    again = packed(tmp_path, FULL, "again") / "again"
    repacked = tmp_path / "repacked"
    pack_image_folder(split, repacked, PackOptions())
    shards = {(folder / "shard-000000.tar").read_bytes() for folder in (split, again, repacked)}
    assert len(shards) == 1


def test_crowds_are_told_of(tmp_path: Path) -> None:
    source = packed(tmp_path, FULL) / "source-val"
    result = pack_image_folder(source, tmp_path / "more", PackOptions(coco="coco.json"))
    assert result.notes[0] == "1 box is of a crowd: kept, not learnt from"


def test_areas_follow_the_size_of_the_image(tmp_path: Path) -> None:
    boxes = open_split(packed(tmp_path, FULL, max_side=20) / "val").read(0).boxes
    assert boxes.corners[0].tolist() == [0.5, 1, 5.5, 11]
    assert boxes.areas.tolist() == pytest.approx([123.457 / 4, 300], abs=0.001)


def test_crowds_are_no_objects_of_a_class(tmp_path: Path) -> None:
    split = open_split(packed(tmp_path, FULL) / "val")
    found = inspect(split)
    assert (found.counts.tolist(), found.counted) == ([2, 2], "boxes")  # ants, bees
    assert sorted(pictures(split, 3, 40)[1].caption.split(", ")) == ["1 × ant", "1 × bee", "1 × crowd of ant"]


def test_whole_images_have_their_boxes_as_stored(tmp_path: Path) -> None:
    found = [batch.annotations for batch in evaluated(packed(tmp_path, FULL))]
    assert [one.sizes.tolist() for one in found] == [[list(size)] for size in SIZES]
    assert found[0].sizes.dtype == torch.int64
    assert found[1].boxes[0].tolist() == [[5, 5, 35, 25], [5, 5, 25, 35], [0, 0, 0.5, 0.5]]
    assert found[1].box_labels[0].tolist() == [0, 1, 0]
    assert found[1].box_areas[0].tolist() == [99, 600, 0]
    assert found[1].box_crowds[0].tolist() == [True, False, False]
    assert (found[1].box_areas[0].dtype, found[1].box_crowds[0].dtype) == (torch.float32, torch.bool)
    assert [tuple(column[0].shape) for column in (found[2].boxes, found[2].box_areas, found[2].box_crowds)] == [
        (0, 4), (0,), (0,),
    ]  # fmt: skip


def test_filling_and_damaged_samples_have_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SIZES", [(30, 40)] * 3)
    folder = packed(tmp_path, FULL[:2])
    split = open_split(folder / "val")
    shard = folder / "val" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[int(split.index.columns["offset"][0]) + 60] ^= 1
    shard.write_bytes(data)
    first, second = evaluated(folder, bad_validation="zero_weight")
    assert first.weights.tolist() == [0, 1]
    assert first.annotations.sizes.tolist() == [[0, 0], [30, 40]]
    assert [len(boxes) for boxes in first.annotations.boxes] == [0, 0]
    assert second.annotations.sizes.tolist() == [[30, 40], [0, 0]]


@pytest.mark.parametrize("centre", [False, True])
def test_crowds_are_left_out_of_what_is_learnt_from_and_of_centres(tmp_path: Path, centre: bool) -> None:
    folder = packed(tmp_path, FULL)
    if centre:
        (batch,) = evaluated(folder, 3, eval_view="centre", eval_crop=1.0)
    else:
        batch = trained(folder)
    found = batch.annotations
    assert (found.box_areas, found.box_crowds, found.sizes) == (None, None, None)
    place = batch.sample_ids.tolist().index(1)
    assert found.box_labels[place].tolist() == [1]  # the box of half a pixel is too small to be seen
    assert found.boxes[place].shape == (1, 4)
    assert found.boxes[place].dtype == torch.float32


@pytest.mark.parametrize("keys", [{"threads": 0}, {"threads": 3}, {"workers": 1}, {"workers": 2, "threads": 2}])
def test_workers_and_threads_deliver_the_same(tmp_path: Path, keys: dict[str, int]) -> None:
    folder = packed(tmp_path, FULL)
    whole, again = evaluated(folder), evaluated(folder, **keys)
    assert [lists(batch.annotations) for batch in again] == [lists(batch.annotations) for batch in whole]
    assert lists(trained(folder, **keys).annotations) == lists(trained(folder).annotations)


def test_boxes_in_python_need_corners_and_labels_alone() -> None:
    boxes = Boxes(np.array([[1, 2, 4, 6]], np.float32), np.array([0]))
    assert (boxes.crowds.tolist(), boxes.areas.tolist()) == ([False], [12])
