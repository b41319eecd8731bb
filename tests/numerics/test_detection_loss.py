"""The loss and the detections against torchvision's RetinaNet, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet, retinanet_resnet50_fpn_v2
from torchvision.ops import box_iou, generalized_box_iou_loss

from setformer_dist.core.boxes import (
    ANCHORS_PER_PLACE,
    NO_BOX,
    anchors_of,
    boxes_of,
    detection_loss,
    detections_of,
    generalised_distance,
    matched,
)

_CLASSES = 6
_SIZES, _STRIDES = [(16, 20), (8, 10), (4, 5)], [8, 16, 32]
_SHAPE = (128, 160)


def peer() -> RetinaNet:
    """Return torchvision's model, of which only the arithmetic is used."""
    return retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=_CLASSES).eval()


def outputs_of(images: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchors = anchors_of(_SIZES, _STRIDES, torch.device("cpu"))
    logits = torch.randn(images, len(anchors), _CLASSES, generator=generator) * spread - 2
    offsets = torch.randn(images, len(anchors), 4, generator=generator) * 0.3
    return logits, offsets, anchors


def boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([100.0, 70.0])
    sides = torch.rand(count, 2, generator=generator) * 45 + 12
    labels = torch.randint(0, _CLASSES, (count, 1), generator=generator)
    return torch.cat([corners, corners + sides, labels.float()], dim=1)


def padded(images: list[torch.Tensor]) -> torch.Tensor:
    made = torch.zeros(len(images), max(1, *map(len, images)), 5)
    made[:, :, 4] = NO_BOX
    for image, rows in enumerate(images):
        made[image, : len(rows)] = rows
    return made


def test_the_loss_is_that_of_torchvision() -> None:
    model = peer()
    logits, offsets, anchors = outputs_of(3, 0)
    images = [boxes(5, 1), boxes(1, 2), boxes(9, 3)]
    targets = [{"boxes": rows[:, :4], "labels": rows[:, 4].long()} for rows in images]
    said = {"cls_logits": logits, "bbox_regression": offsets}
    losses = model.compute_loss(targets, said, [anchors[:, :4]] * 3)
    expected = losses["classification"] + losses["bbox_regression"]
    assert float(detection_loss((logits, offsets, anchors), padded(images)).mean()) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_the_gradients_are_those_of_torchvision() -> None:
    model = peer()
    images = [boxes(5, 1), boxes(2, 2)]
    logits, offsets, anchors = outputs_of(2, 0)
    targets = [{"boxes": rows[:, :4], "labels": rows[:, 4].long()} for rows in images]
    found = []
    for theirs in (True, False):
        leaves = logits.clone().requires_grad_(), offsets.clone().requires_grad_()
        if theirs:
            said = {"cls_logits": leaves[0], "bbox_regression": leaves[1]}
            sum(model.compute_loss(targets, said, [anchors[:, :4]] * 2).values()).backward()  # type: ignore[union-attr]
        else:
            detection_loss((*leaves, anchors), padded(images)).mean().backward()
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_distance_of_boxes_is_that_of_torchvision() -> None:
    one, other = boxes(200, 11)[:, :4].double(), boxes(200, 12)[:, :4].double()
    found, expected = [], []
    for into, function in ((found, generalised_distance), (expected, generalized_box_iou_loss)):
        leaf = one.clone().requires_grad_()
        distance = function(leaf, other)
        distance.sum().backward()
        into += [distance.detach(), leaf.grad]
    assert 0 < int((box_iou(one, other).diagonal() > 0).sum()) < 200  # some overlap, some do not
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_an_image_without_objects_has_the_loss_of_background_alone() -> None:
    logits, offsets, anchors = outputs_of(1, 4)
    loss = detection_loss((logits, offsets, anchors), padded([torch.zeros(0, 5)]))
    p = logits.double().sigmoid()
    expected = (-0.75 * p**2 * (1 - p).log()).sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_an_image_has_its_loss_in_any_micro_batch() -> None:
    outputs = outputs_of(2, 5)
    images = [boxes(7, 6), boxes(1, 7)]
    together = detection_loss(outputs, padded(images))
    for i, rows in enumerate(images):
        alone = detection_loss((outputs[0][i : i + 1], outputs[1][i : i + 1], outputs[2]), padded([rows]))
        assert torch.equal(together[i : i + 1], alone)


def test_a_box_that_no_anchor_fits_still_has_the_closest() -> None:
    anchors = anchors_of(_SIZES, _STRIDES, torch.device("cpu"))
    tiny = torch.tensor([[40.0, 40.0, 44.0, 44.0, 2.0]])
    which, found, counts = matched(anchors, tiny)
    overlaps = box_iou(tiny[:, :4], anchors[:, :4])[0]
    assert float(overlaps.max()) < 0.4
    assert torch.equal(found, overlaps == overlaps.max())
    assert bool(counts.all())
    assert not bool(which.any())


def test_a_box_outside_of_all_anchors_has_none() -> None:
    anchors = anchors_of(_SIZES, _STRIDES, torch.device("cpu"))
    _, found, _ = matched(anchors, torch.tensor([[9000.0, 9000.0, 9010.0, 9010.0, 0.0]]))
    assert not bool(found.any())


def test_offsets_are_those_of_torchvision() -> None:
    _, offsets, anchors = outputs_of(1, 8)
    coder = peer().box_coder
    theirs = coder.decode_single(offsets[0] * 20, anchors[:, :4])
    torch.testing.assert_close(boxes_of(offsets[0] * 20, anchors), theirs, rtol=1e-4, atol=1e-2)


def test_anchors_have_the_sides_of_retinanet() -> None:
    """Up to its rounding to whole pixels, and its centres at the corners of places."""
    ours = anchors_of([(2, 3)], [8], torch.device("cpu"))[:, :4]
    sizes = tuple(4 * 8 * 2 ** (i / 3) for i in range(3))
    generator = AnchorGenerator((sizes,), ((0.5, 1.0, 2.0),))
    images = ImageList(torch.zeros(1, 3, 16, 24), [(16, 24)])
    [theirs] = generator(images, [torch.zeros(1, 1, 2, 3)])
    assert (ours - 4 - theirs).abs().max() <= 0.5
    assert len(ours) == 2 * 3 * ANCHORS_PER_PLACE


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_detections_are_those_of_torchvision(spread: float) -> None:
    logits, offsets, anchors = outputs_of(2, 9, spread)
    counts = [rows * columns * ANCHORS_PER_PLACE for rows, columns in _SIZES]
    model = peer()
    model.detections_per_img = 100
    said = {
        "cls_logits": list(logits.split(counts, dim=1)),
        "bbox_regression": list(offsets.split(counts, dim=1)),
    }
    theirs = model.postprocess_detections(said, [list(anchors[:, :4].split(counts))] * 2, [_SHAPE] * 2)
    ours = detections_of((logits, offsets, anchors), _SHAPE)
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine.scores) > 0
        torch.testing.assert_close(mine.scores, other["scores"])
        torch.testing.assert_close(mine.boxes, other["boxes"])
        assert torch.equal(mine.labels, other["labels"])


def test_nothing_sure_is_nothing_found() -> None:
    logits, offsets, anchors = outputs_of(1, 1)
    [found] = detections_of((torch.full_like(logits, -9.0), offsets, anchors), _SHAPE)
    assert len(found.scores) == 0
    assert found.boxes.shape == (0, 4)


def test_what_is_no_number_is_nothing_found() -> None:
    """And does not take the place of what is found."""
    logits, offsets, anchors = outputs_of(1, 1)
    logits = torch.full_like(logits, -9.0)
    logits[0, 5, 2], logits[0, 900, 3] = math.nan, 2.0
    [found] = detections_of((logits, offsets, anchors), _SHAPE)
    assert found.labels.tolist() == [3]
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-2))])


def test_the_loss_has_finite_gradients_in_the_worst_cases() -> None:
    logits, offsets, anchors = outputs_of(2, 2)
    logits, offsets = (logits * 100).requires_grad_(), (offsets * 100).requires_grad_()
    detection_loss((logits, offsets, anchors), padded([boxes(3, 1), torch.zeros(0, 5)])).sum().backward()
    assert logits.grad is not None
    assert offsets.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert bool(offsets.grad.isfinite().all())
    assert math.isfinite(float(offsets.grad.sum()))
