"""Soft labels: read from shards, packed with other class maps, handed on, smoothed and mixed, or refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.reading.device import Prepare
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.source import DamagedSampleError
from dataloaders.sources.classes import soft_label
from dataloaders.sources.foreign import find_shards, open_foreign
from dataloaders.sources.shards import ShardDataset, open_split
from setformer_dist.core.batch import MicroBatch, MixSpec
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.task_config import TaskConfig
from setformer_dist.tasks.build import build_task

CLASSES = ("ant", "bee", "cow")
SOFT = [[0.7, 0.2, 0.1], {"bee": 0.9, "cow": 0.1}, None, [0.0, 0.5, 0.5]]
WANTED = [[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0], [0.0, 0.5, 0.5]]  # the third has only its label, cow


def write_shard(root: Path, soft: list[object]) -> Path:
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    with tarfile.open(root / "a.tar", "w") as tar:
        for number, said in enumerate(soft):
            out = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "PNG")
            members = [("png", out.getvalue()), ("cls", b"%d" % (number % 3))]
            members += [] if said is None else [("soft.json", json.dumps(said).encode())]
            for name, data in members:
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root


def opened(root: Path) -> ShardDataset:
    return open_foreign(find_shards(str(root), "*.tar", 5), root.parent / "cache", 5)


def rows(source: ShardDataset) -> list[list[float] | None]:
    found = [source.read(i).soft for i in range(source.num_samples)]
    return [None if one is None else [round(value, 6) for value in one.tolist()] for one in found]


def test_shards_and_what_is_packed_of_them_have_the_soft_labels(tmp_path: Path) -> None:
    source = opened(write_shard(tmp_path / "shards", SOFT))
    assert source.parts == {"soft"}
    wanted = [WANTED[0], WANTED[1], None, WANTED[3]]
    assert rows(source) == wanted
    pack_image_folder(tmp_path / "shards", tmp_path / "packed")
    packed = open_split(tmp_path / "packed")
    assert packed.parts == {"soft"}
    order = [packed.key(i)[-1] for i in range(4)]
    assert order == sorted(order)
    assert rows(packed) == wanted
    exact = [source.read(i).soft for i in (0, 1, 3)], [packed.read(i).soft for i in (0, 1, 3)]
    assert all(a is not None and b is not None and (a == b).all() for a, b in zip(*exact, strict=True))


def test_soft_labels_follow_another_order_of_classes(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards", SOFT)
    other = tmp_path / "other"
    for name in ("zebu", "cow", "bee", "ant"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(other / name / "0.png")
    pack_image_folder(other, tmp_path / "four")
    pack_image_folder(tmp_path / "shards", tmp_path / "again", PackOptions(classes_from=tmp_path / "four"))
    again = open_split(tmp_path / "again")
    assert again.classes == ("ant", "bee", "cow", "zebu")
    assert rows(again) == [None if row is None else [*row, 0.0] for row in rows(opened(tmp_path / "shards"))]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([0.5, 0.5], "2 numbers for 3 classes"),
        ([0.5, 0.4, 0.4], "sums to 1.3"),
        ([1.5, -0.5, 0.0], "1.5 is no probability"),
        ([0.5, "0.5", 0.0], "'0.5' is no probability"),
        ([True, 0, 0], "True is no probability"),
        ({"ant": 0.5, "dog": 0.5}, "'dog' is no class"),
        ({}, "sums to 0"),
        (0.5, "neither a list of numbers nor a table"),
    ],
)
def test_what_is_no_distribution_is_a_damaged_sample(said: object, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        soft_label(said, CLASSES)
    source = opened(write_shard(tmp_path / "shards", [[1, 0, 0], said]))
    with pytest.raises(DamagedSampleError, match=r"sample 1 \(1\) of .*a\.tar: its soft label is none"):
        source.read(1)


def test_numbers_that_are_no_numbers_do_not_pass() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no probability"):
            soft_label([value, 0.5, 0.5], CLASSES)


def test_streams_hand_them_on_in_every_cut(tmp_path: Path) -> None:
    source = opened(write_shard(tmp_path / "shards", SOFT))
    config = DataConfig(root="", image_size=16, augment=AugmentConfig(crop="none", flip=False), threads=0)
    seen = {}
    for ranks, micro in ((1, 4), (1, 2), (2, 2)):
        for rank in range(ranks):
            stream = ShardTrainStream(source, config, 3, RankInfo(rank, ranks, rank, ranks), 4, micro)
            batches = stream.micro_batches(0)
            for _ in range(stream.accumulation):
                batch = next(batches)
                targets = Prepare(config, 3, "cpu")(batch, True)[1]
                for sample, row in zip(batch.sample_ids.tolist(), targets, strict=True):
                    seen.setdefault(sample, []).append([round(value, 6) for value in row.tolist()])
    assert seen == {sample: [WANTED[sample]] * 3 for sample in range(4)}
    batches = list(ShardEvalStream(source, config, RankInfo(0, 1, 0, 1), 3).micro_batches())
    targets = torch.cat([Prepare(config, 3, "cpu")(batch, False)[1] for batch in batches])
    torch.testing.assert_close(targets[:4], torch.tensor(WANTED))
    source.close()


def test_they_are_smoothed_and_mixed_as_labels_are() -> None:
    soft = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 0.0]])
    mix = MixSpec(torch.tensor([1, 0]), torch.tensor([0.6, 0.6]), torch.zeros(2, 4, dtype=torch.int64))
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batch = MicroBatch(images, torch.tensor([0, 2]), torch.ones(2), torch.arange(2), mix, soft=soft)
    config = DataConfig(root="", augment=AugmentConfig(smoothing=0.3))
    targets = Prepare(config, 3, "cpu")(batch, True)[1]
    one, two = 0.7 * soft[0] + 0.1, torch.tensor([0.1, 0.1, 0.8])
    torch.testing.assert_close(targets, torch.stack([0.6 * one + 0.4 * two, 0.6 * two + 0.4 * one]))


def test_an_evaluation_has_the_loss_against_them() -> None:
    logits, soft = torch.randn(4, 3), torch.tensor(WANTED)
    batch = MicroBatch(logits, torch.tensor([0, 1, 2, 1]), torch.ones(4), torch.arange(4), soft=soft)
    for name, classes in (("classification", CLASSES), ("multilabel", ("a", "b", "a+b"))):
        task = build_task(TaskConfig(name=name), classes)
        outputs = logits[:, : len(task.outputs)]
        sums = task.sums(outputs, batch, soft)
        assert task.figures(sums.tolist(), 4)["loss"] == pytest.approx(task.loss(outputs, soft).item(), rel=1e-5)
