"""Data sets in Python: the same samples and soft labels through the streams; what is no sample is refused."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes

import setformer
from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.reading.device import Prepare
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.sources.python import PythonSource
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo

CLASSES = ("ant", "bee", "cow")
SOFT = ([0.7, 0.2, 0.1], {"bee": 0.9, "cow": 0.1}, None, np.array([0.0, 0.5, 0.5]))
WANTED = ((0.7, 0.2, 0.1), (0.0, 0.9, 0.1), (0.0, 0.0, 1.0), (0.0, 0.5, 0.5))  # the third has only its label, cow


class Colours(torch.utils.data.Dataset[Any]):
    """Sample i is one colour, (i, i, i), with the soft label of i % 4."""

    def __init__(self, count: int = 12, soft: bool = True) -> None:
        self.count, self.soft = count, soft

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[object, ...]:
        image = torch.full((8, 8 + index % 3, 3), index, dtype=torch.uint8)
        return (image, np.int64((index % 4) % 3), SOFT[index % 4]) if self.soft else (image, (index % 4) % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_have_the_soft_labels(workers: int) -> None:
    source = PythonSource(Colours(), CLASSES)
    assert (source.num_samples, source.parts, source.extent()) == (12, {"soft"}, ((8, 8), (8, 10)))
    config = DataConfig(root="colours", image_size=8, workers=workers, threads=0, augment=AugmentConfig(flip=False))
    prepare = Prepare(config, 3, "cpu")
    stream = ShardTrainStream(source, config, 0, RankInfo(), 4, 4)
    seen = set()
    for batch, _ in zip(stream.micro_batches(0), range(3), strict=False):
        targets = prepare(batch, train=True)[1]
        for sample, target, image in zip(batch.sample_ids.tolist(), targets, batch.inputs, strict=True):
            seen.add(sample)
            assert image.unique().tolist() == [sample]
            torch.testing.assert_close(target, torch.tensor(WANTED[sample % 4]))
    stream.close()
    assert seen == set(range(12))
    stream = ShardEvalStream(source, config, RankInfo(), 4)
    for batch in stream.micro_batches():
        wanted = torch.tensor([WANTED[sample % 4] for sample in batch.sample_ids.tolist()])
        torch.testing.assert_close(prepare(batch, train=False)[1], wanted)
    stream.close()


class Locked(Colours):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_readers_that_cannot_have_the_data_set_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(root="c", image_size=8, workers=1, threads=0, augment=AugmentConfig(flip=False))
    with pytest.raises(DataError, match=r"cannot be sent to the processes of data\.workers \(.*lock"):
        next(iter(ShardTrainStream(PythonSource(Locked(), CLASSES), config, 0, RankInfo(), 4, 4).micro_batches(0)))
    monkeypatch.setattr(Colours, "__module__", "__main__")
    with pytest.raises(DataError, match=r"is a Colours of the main program.*define it in a module"):
        next(iter(ShardTrainStream(PythonSource(Colours(), CLASSES), config, 0, RankInfo(), 4, 4).micro_batches(0)))


def test_the_fingerprint_is_that_of_the_samples() -> None:
    first = PythonSource(Colours(), CLASSES).fingerprint
    assert first == PythonSource(Colours(), CLASSES, "another name").fingerprint
    others = (PythonSource(Colours(11), CLASSES), PythonSource(Colours(soft=False), CLASSES))
    assert first not in {other.fingerprint for other in others}
    assert PythonSource(Colours(soft=False), CLASSES).parts == frozenset()


def test_streams_have_the_masks() -> None:
    masks = np.random.default_rng(0).choice([0, 1, 2, 255], (6, 8, 10))
    samples = [(np.full((8, 10, 3), i, np.uint8), torch.from_numpy(mask)) for i, mask in enumerate(masks)]
    source = PythonSource(samples, CLASSES)
    assert source.parts == {"mask"}
    config = DataConfig(root="masks", image_size=8, image_width=10, augment=AugmentConfig(crop="none", flip=False))
    stream = ShardTrainStream(source, config, 0, RankInfo(), 6, 6)
    batch = next(stream.micro_batches(0))
    stream.close()
    assert batch.annotations is not None
    assert batch.annotations.masks is not None
    assert np.array_equal(batch.annotations.masks.numpy(), masks[batch.sample_ids.numpy()])
    other = [*samples[:5], (samples[5][0], np.zeros((8, 10), np.int32))]
    assert PythonSource(other, CLASSES).fingerprint != source.fingerprint
    with pytest.raises(DataError, match="5 of the 6 samples of the data set in Python have masks: give all of them"):
        PythonSource([*samples[:5], (samples[5][0], 1)], CLASSES)


def detected(count: int) -> list[tuple[Any, dict[str, Any]]]:
    """Images with 0 to 3 boxes, as torchvision's data sets have them."""
    samples: list[tuple[Any, dict[str, Any]]] = []
    for i in range(count):
        boxes = torch.tensor([[k, k + 1, k + 4.5, k + 6] for k in range(i % 4)]).reshape(-1, 4)
        samples.append((np.full((16, 20, 3), i, np.uint8), {"boxes": boxes, "labels": torch.arange(i % 4) % 3}))
    samples[3][1].update(iscrowd=torch.tensor([0, 1, 0]), area=torch.tensor([7.5, 8, 9]))
    return samples


def test_streams_have_the_boxes() -> None:
    samples = detected(6)
    source = PythonSource([*samples, (samples[0][0], {"image_id": 7})], CLASSES)  # torchvision's image without objects
    assert source.parts == {"boxes"}
    config = DataConfig(root="boxes", image_size=16, eval_view="whole", augment=AugmentConfig(flip=False))
    stream = ShardEvalStream(source, config, RankInfo(), 7)
    (batch,) = stream.micro_batches()
    stream.close()
    found = batch.annotations
    assert found is not None
    assert found.boxes is not None
    assert found.box_labels is not None
    assert found.box_areas is not None
    assert found.box_crowds is not None
    for i, (_, target) in enumerate(samples):
        assert torch.equal(found.boxes[i], target["boxes"])
        assert torch.equal(found.box_labels[i], target["labels"])
    assert len(found.boxes[6]) == 0
    assert (found.box_areas[2].tolist(), found.box_areas[3].tolist()) == ([22.5, 22.5], [7.5, 8, 9])
    assert (found.box_crowds[2].tolist(), found.box_crowds[3].tolist()) == ([False] * 2, [False, True, False])
    other = detected(6)
    other[1][1]["boxes"] += 1
    assert PythonSource(other, CLASSES).fingerprint != PythonSource(samples, CLASSES).fingerprint
    with pytest.raises(DataError, match="6 of the 7 samples of the data set in Python have boxes: give all of them"):
        PythonSource([*samples, (samples[0][0], 1)], CLASSES)


def test_torchvisions_detection_data_sets_have_boxes() -> None:
    image, corners = np.zeros((16, 20, 3), np.uint8), [[1, 2, 9, 8]]
    for form, said in (("XYXY", None), ("XYWH", "they are XYWH, not x0, y0, x1, y1")):
        samples = [(image, {"boxes": BoundingBoxes(corners, format=form, canvas_size=(16, 20)), "labels": [2]})]
        if said is None:
            boxes = PythonSource(samples, CLASSES).read(0).boxes
            assert boxes is not None
            assert boxes.corners.tolist() == corners
        else:
            with pytest.raises(DataError, match=said):
                PythonSource(samples, CLASSES)


@pytest.mark.parametrize(
    ("objects", "why"),
    [
        ({"boxes": [[0, 0, 1, 1]]}, "its boxes are none (there are no 'labels')"),
        ({"boxes": [[0, 0, 1]], "labels": [1]}, "they are int64 (1, 3), not (k, 4)"),
        ({"boxes": [[0, 0, 1, 1]], "labels": [1.0]}, "their labels are float64, not integers"),
        ({"boxes": [[0, 0, 1, 1]], "labels": [1, 2]}, "1 boxes have 2 labels"),
        ({"boxes": [[0, 0, 1, 1]], "labels": [3]}, "box (0, 0, 1, 1) has class 3, but there are 3 classes"),
        ({"boxes": [[0, 0, 30, 1]], "labels": [1]}, "box (0, 0, 30, 1) extends beyond its image of 20x16 pixels"),
        ({"boxes": [[4, 4, 3, 5]], "labels": [1]}, "box (4, 4, 3, 5) has no area"),
        ({"boxes": [[0, 0, 1, 1]], "labels": [1], "area": [-1]}, "an area is no number from 0 on"),
        ({"bboxes": [], "labels": []}, "there are no 'boxes'"),
    ],
)
def test_boxes_that_are_none_are_refused(objects: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match=re.escape(why)):
        PythonSource([(np.zeros((16, 20, 3), np.uint8), objects)], CLASSES)


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ((np.zeros((8, 8), np.uint8), 0), r"sample 0 of .*: its image is uint8 \(8, 8\), not uint8 \(H, W, 3\)"),
        ((np.zeros((8, 8, 3), np.float32), 0), "its image is float32"),
        ((np.zeros((8, 8, 3), np.uint8), 3), "has label 3: it must be from 0 to 2"),
        ((np.zeros((8, 8, 3), np.uint8), "bee"), "has label 'bee'"),
        ((np.zeros((8, 8, 3), np.uint8), 0, [0.5, 0.2]), r"its soft label is none \(it has 2 numbers for 3 classes\)"),
        ((np.zeros((8, 8, 3), np.uint8), 0, {"dog": 1.0}), "'dog' is no class"),
        ((np.zeros((8, 8, 3), np.uint8), 0, [0.5, 0.2, 0.1]), "it sums to 0.8 and not to 1"),
        (np.zeros((8, 8, 3), np.uint8), r"is not \(image, label\)"),
        ((np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9), int)), r"its mask is int64 \(8, 9\), not integers \(8, 8\)"),
        ((np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8))), "its mask is float64"),
        (
            (np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 3)),
            "its mask has class 3, which must be from 0 to 2, or 255",
        ),
    ],
)
def test_what_is_no_sample_is_refused(sample: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        PythonSource([sample], CLASSES)


class Broken(list[Any]):
    def __getitem__(self, index: Any) -> Any:
        raise ZeroDivisionError("division by zero")


class Random(Colours):
    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng().integers(0, 255, (8, 8, 3), np.uint8), 0


@pytest.mark.parametrize(
    ("data", "classes", "why"),
    [
        (Broken([1]), CLASSES, "sample 0 of the training data cannot be read: ZeroDivisionError: division by zero"),
        (Random(), CLASSES, "sample 0 of the training data differs when it is read again: leave random transforms"),
        (iter([1]), CLASSES, "the training data is list_iterator, which has no length"),
        (Colours(), "ab", "must be a list of names, such as .*, not 'ab'"),
        (Colours(), 2, "must be a list of names, such as .*, not 2"),
    ],
)
def test_what_is_no_data_set_is_refused(data: Any, classes: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        setformer.own_data(data, Colours(), classes)


def test_an_empty_set_and_other_classes_are_refused() -> None:
    with pytest.raises(DataError, match="the training data is empty"):
        setformer.own_data([], Colours(), CLASSES)
    config = setformer.load_config("demo", data={"root": "colours", "image_size": 8, "augment": {"crop": "pad"}})
    data = setformer.own_data(Colours(64), Colours(), CLASSES)
    with pytest.raises(ConfigError, match="needs images of 8 x 8"):  # they are 8 to 10 pixels wide
        setformer.train_stream(config, data, RankInfo())
