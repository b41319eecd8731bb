"""Task "detection" and its model: targets, rows, sizes, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.ops import box_iou

import setformer_dist.models  # noqa: F401 - registers our models
from setformer_dist.core import boxes
from setformer_dist.core.batch import Annotations, MicroBatch
from setformer_dist.core.boxes import NO_BOX, detection_loss
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.task import Counted, Dense, Ranked
from setformer_dist.engine.config import OptimConfig
from setformer_dist.engine.optim import parameter_groups
from setformer_dist.models.detector import Detector, levels_of
from setformer_dist.tasks.detection import Detection

CLASSES = ("cat", "dog", "bird")


def batch_of(annotations: Annotations | None, weights: tuple[float, ...] = (1.0, 1.0)) -> MicroBatch:
    count = len(weights)
    zeros = torch.zeros(count, dtype=torch.int64)
    ids = torch.arange(10, 10 + count)
    return MicroBatch(torch.zeros(count, 3, 64, 96), zeros, torch.tensor(weights), ids, annotations=annotations)


def training_annotations() -> Annotations:
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0], [5.0, 5.0, 60.0, 50.0]]), torch.zeros(0, 4)
    return Annotations(boxes=boxes, box_labels=(torch.tensor([2, 0]), torch.zeros(0, dtype=torch.int64)))


def whole_annotations() -> Annotations:
    """Return those of two images that are stored twice as large as they are seen; one box of the first is a crowd."""
    return Annotations(
        boxes=(torch.tensor([[2.0, 4.0, 60.0, 80.0], [0.0, 0.0, 90.0, 90.0]]), torch.tensor([[10.0, 10.0, 100, 90]])),
        box_labels=(torch.tensor([2, 0]), torch.tensor([1])),
        box_areas=(torch.tensor([1500.0, 4000.0]), torch.tensor([7200.0])),
        box_crowds=(torch.tensor([False, True]), torch.tensor([False])),
        sizes=torch.tensor([[128, 192], [128, 192]]),
    )


def small_model(size: tuple[int, int] = (64, 96)) -> Detector:
    torch.manual_seed(0)
    return Detector(timm.create_model("setformer_nano", num_classes=0), "setformer_nano", len(CLASSES), 32).eval()


def test_targets_are_boxes_in_pixels_of_the_inputs():
    task = Detection({}, CLASSES)
    assert isinstance(task, Dense)
    assert isinstance(task, Ranked)
    assert not isinstance(task, Counted)
    found = task.targets(batch_of(training_annotations()))
    assert found.shape == (2, 2, 5)
    assert found[0].tolist() == [[1, 2, 30, 40, 2], [5, 5, 60, 50, 0]]
    assert found[1, :, 4].tolist() == [NO_BOX, NO_BOX]
    whole = task.targets(batch_of(whole_annotations()))
    assert whole[0, 0].tolist() == [1, 2, 30, 40, 2]
    assert whole[0, 1, 4] == NO_BOX  # the crowd
    assert whole[1, 0].tolist() == [5, 5, 50, 45, 1]
    empty = Annotations(boxes=(torch.zeros(0, 4),) * 2, box_labels=(torch.zeros(0, dtype=torch.int64),) * 2)
    assert task.targets(batch_of(empty)).shape == (2, 1, 5)


def test_what_is_no_target_is_refused():
    task = Detection({}, CLASSES)
    with pytest.raises(DataError, match="samples have none: pack them with --coco"):
        task.targets(batch_of(None))
    wrong = Annotations(boxes=(torch.zeros(1, 4),) * 2, box_labels=(torch.tensor([0]), torch.tensor([3])))
    with pytest.raises(DataError, match="a box of sample 11 has class 3, and the data name 3 classes"):
        task.targets(batch_of(wrong))
    with pytest.raises(ConfigError, match=r"task.args.*anchors"):
        Detection({"anchors": 3}, CLASSES)


def test_rows_are_objects_and_detections_in_stored_pixels():
    task, model = Detection({}, CLASSES), small_model()
    with torch.no_grad():
        logits, offsets, anchors = model(torch.randn(2, 3, 64, 96))
    logits = torch.full_like(logits, -9.0)
    logits[0, 0, 1] = 2.0  # one box of a dog
    rows = task.rows((logits, offsets * 0, anchors), batch_of(whole_annotations(), (1.0, 1.0)))
    objects, found = rows[rows[:, 2].isnan()], rows[~rows[:, 2].isnan()]
    assert objects[:, [0, 1, 7, 8]].tolist() == [[10, 2, 1500, 0], [10, 0, 4000, 1], [11, 1, 7200, 0]]
    assert objects[2, 3:7].tolist() == [10, 10, 100, 90]
    assert found[:, :2].tolist() == [[10, 1]]
    assert found[0, 2] == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())
    corners = anchors[0, :4].clamp(min=0) * 2
    assert found[0, 3:7].tolist() == pytest.approx(corners.tolist(), rel=1e-6)
    padded = task.rows((logits, offsets * 0, anchors), batch_of(whole_annotations(), (0.0, 1.0)))
    assert padded[:, 0].tolist() == [11]  # filling has no rows


def test_the_loss_is_the_mean_of_those_of_images():
    task, model = Detection({}, CLASSES), small_model()
    outputs = model(torch.randn(2, 3, 64, 96))
    targets = task.targets(batch_of(training_annotations()))
    each = detection_loss(outputs, targets)
    torch.testing.assert_close(task.loss(outputs, targets), each.mean())
    sums = task.sums(outputs, batch_of(training_annotations(), (0.0, 1.0)), targets)
    assert task.figures(sums.tolist(), 1)["loss"] == pytest.approx(float(each[1].detach()))


def test_levels_begin_at_eight_pixels():
    assert levels_of([4, 8, 16, 32]) == [1, 2, 3]
    assert levels_of([2, 4, 8, 16, 32]) == [2, 3, 4]
    assert levels_of([4, 4, 8, 8, 16, 16]) == [3, 5]
    assert levels_of([2, 4]) == [1]
    assert levels_of([16] * 12) == [11]


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("setformer_nano", {}, (40, 56)),
        ("setformer_mini", {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}, (75, 64)),
        ("swin_tiny_patch4_window7_224", {"img_size": (64, 96), "embed_dim": 24, "depths": (1, 1, 1, 1)}, (64, 96)),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, (64, 96)),
        ("sam2_hiera_tiny", {"stages": (1, 1, 1, 1), "embed_dim": 32}, (64, 96)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "depth": 4}, (64, 96)),
    ],
)
def test_any_model_with_feature_maps_detects(name, arguments, size):
    encoder = timm.create_model(name, num_classes=0, **arguments)
    model = Detector(encoder, name, 5, 32)
    images = torch.randn(2, 3, *size)
    logits, offsets, anchors = model(images)
    a = len(anchors)
    assert (logits.shape, offsets.shape, anchors.shape) == ((2, a, 5), (2, a, 4), (a, 5))
    assert model.strides == [8, 16, 32, 64, 128]
    targets = torch.tensor([[[4.0, 4, 40, 36, 1]]]).expand(2, 1, 5)
    detection_loss((logits, offsets, anchors), targets).sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(n.startswith("encoder.") for n in idle), idle
    model.eval()
    with torch.no_grad():
        whole, alone = model(images), model(images[1:])
    torch.testing.assert_close(whole[0][1:], alone[0], rtol=1e-4, atol=1e-5)  # no image looks at another
    groups = parameter_groups(model, OptimConfig(layer_decay=0.7))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.head.classification_head.cls_logits.weight)] == 1.0
    assert min(scales.values()) < 0.75


def test_anchors_lie_at_the_centres_of_their_places():
    """On every level, also where rows and columns are rounded up."""
    model = small_model()
    with torch.no_grad():
        _, _, anchors = model(torch.randn(1, 3, 72, 100))
    for level, stride in enumerate(model.strides):
        of_level = anchors[anchors[:, 4] == level, :4]
        centres = (of_level[:, :2] + of_level[:, 2:]) / 2
        rows, columns = -(-72 // stride), -(-100 // stride)
        assert len(of_level) == rows * columns * 9
        assert centres[0].tolist() == pytest.approx([stride / 2] * 2, abs=1e-4)
        assert centres[-1].tolist() == pytest.approx([(columns - 0.5) * stride, (rows - 0.5) * stride], abs=1e-4)
        sides = (of_level[:, 2:] - of_level[:, :2]).prod(dim=1).sqrt()
        assert float(sides.min()) == pytest.approx(4 * stride, rel=1e-4)


def test_the_size_is_that_of_the_published_model():
    with torch.device("meta"):  # RetinaNet with Swin-T on COCO: 38.5 M
        encoder = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
        model = Detector(encoder, "swin_tiny_patch4_window7_224", 80, 256)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(38.5e6, rel=2e-3)


def test_impossible_heads_are_refused():
    encoder = timm.create_model("setformer_nano", num_classes=0)
    with pytest.raises(ConfigError, match="channels = 100 must be a multiple of 8, such as 96"):
        Detector(encoder, "setformer_nano", 5, 100)
    with pytest.raises(ConfigError, match="task detection: plain gives no feature maps"):
        Detector(torch.nn.Linear(3, 3), "plain", 5, 64)


def test_gradients_in_bf16_are_those_of_fp32_where_the_last_map_has_one_column():
    torch.manual_seed(0)
    images, known = torch.randn(4, 3, 64, 64), torch.tensor([[[3.0, 3, 40, 40, 1]]]).expand(4, -1, -1)
    model = small_model()
    detection_loss(model(images), known).sum().backward()
    wanted = [conv.weight.grad for conv in model.further]
    low = small_model().bfloat16()
    for _ in range(5):
        # What freed memory holds is in what a kernel leaves unwritten.
        junk = [torch.full((size,), 1e20, dtype=torch.bfloat16) for size in (32 * 32 * 9, 32 * 16 * 9, 4 * 32, 1024)]
        del junk
        low.zero_grad()
        detection_loss(low(images.bfloat16()), known).sum().backward()
        for conv, gradient in zip(low.further, wanted, strict=True):
            assert (conv.weight.grad.float() - gradient).norm() < 0.5 * gradient.norm()  # 0.25 by rounding


def test_many_boxes_are_matched_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    anchors = boxes.anchors_of([(16, 16), (8, 8)], [8, 16], torch.device("cpu"))
    corners = torch.rand(150, 2) * 100
    targets = torch.cat([corners, corners + 1 + torch.rand(150, 2) * 60, torch.zeros(150, 1)], dim=1)
    targets[140:, 4] = NO_BOX
    seen: list[int] = []

    def counted(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(len(one))
        return box_iou(one, other)

    monkeypatch.setattr(boxes, "box_iou", counted)
    which, found, counts = boxes.matched(anchors, targets)
    assert max(seen) <= 64
    overlaps = box_iou(targets[:140, :4], anchors[:, :4])
    largest = overlaps.amax(dim=0)
    closest = (overlaps == overlaps.amax(dim=1, keepdim=True)).any(dim=0)
    assert torch.equal(overlaps.gather(0, which.unsqueeze(0))[0], largest)
    assert torch.equal(found, (largest >= 0.5) | closest)
    assert torch.equal(counts, found | (largest < 0.4))
