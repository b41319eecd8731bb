"""Boxes around objects: anchors, the loss of what a model says of them, and the detections that it means.

The loss is RetinaNet's (T.-Y. Lin et al. 2017), with the generalised IoU of boxes in place of their L1 distance, as in
torchvision's `retinanet_resnet50_fpn_v2`. That of an image depends on this image alone: no sums over a micro batch.

B = images, A = anchors of all levels, K = classes, k = boxes of an image. Boxes are x0, y0, x1, y1 in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss

# Outputs of a detector: logits (B, A, K), offsets (B, A, 4), and anchors (A, 5), fp32: corners, and the level.
Detected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

NO_BOX = -1  # the class of filling, where images of a micro batch have different numbers of boxes

# Anchors of a place, as RetinaNet has them: sides in strides of the level, and heights by widths.
_SIDES = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
_RATIOS = (0.5, 1.0, 2.0)
ANCHORS_PER_PLACE = len(_SIDES) * len(_RATIOS)

_FOREGROUND, _BACKGROUND = 0.5, 0.4  # least IoU of an anchor with its object; most of one that has none
_LARGEST_LOG = math.log(1000 / 16)  # of a box's side in those of its anchor
_NEARLY_NOTHING = 1e-7  # in place of an area of 0, as in torchvision
_MATCHED_AT_ONCE = 64  # boxes of an image: thousands, each with 200,000 anchors, would take gigabytes
_CANDIDATES = 1000  # of a level, before overlapping ones are left out
_LEAST_SCORE = 0.05
_LARGEST_OVERLAP = 0.5
MOST_DETECTIONS = 100  # of an image, as COCO counts


def anchors_of(sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the anchors of all levels, (A, 5) fp32: corners, and the level; those of a place lie side by side.

    Args:
        sizes: (rows, columns) of each level.
        strides: image pixels per place of each level.
        device: where to.
    """
    found = []
    for level, ((rows, columns), stride) in enumerate(zip(sizes, strides, strict=True)):
        heights = torch.tensor([side * math.sqrt(r) * stride for r in _RATIOS for side in _SIDES], device=device)
        widths = torch.tensor([side / math.sqrt(r) * stride for r in _RATIOS for side in _SIDES], device=device)
        ys = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * stride
        xs = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * stride
        y, x = (centre.reshape(-1, 1) for centre in torch.meshgrid(ys, xs, indexing="ij"))
        corners = torch.stack([x - widths / 2, y - heights / 2, x + widths / 2, y + heights / 2], dim=2).view(-1, 4)
        found.append(torch.cat([corners, torch.full_like(corners[:, :1], level)], dim=1))
    return torch.cat(found)


def boxes_of(offsets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the boxes (..., 4) that offsets (..., 4) from anchors mean: centres in sides, sides as logarithms."""
    sides = anchors[..., 2:4] - anchors[..., :2]
    centres = (anchors[..., :2] + anchors[..., 2:4]) / 2 + offsets[..., :2] * sides
    half = offsets[..., 2:].clamp(max=_LARGEST_LOG).exp() * sides / 2
    return torch.cat([centres - half, centres + half], dim=-1)


def matched(anchors: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return which box of an image each anchor is to find, (A,); whether it has one, (A,); and whether it counts, (A,).

    An anchor has the box that it overlaps most, if by half of their union. The anchor that overlaps a box most has
    one however little it is, so that no box is without. Those between object and background do not count.

    Args:
        anchors: (A, 4 or 5).
        targets: (k, 5), k >= 1: boxes and classes, `NO_BOX` for filling.
    """
    largest = torch.full_like(anchors[:, 0], -1.0)
    which = torch.zeros_like(largest, dtype=torch.long)
    closest = torch.zeros_like(which, dtype=torch.bool)
    for start in range(0, len(targets), _MATCHED_AT_ONCE):
        some = targets[start : start + _MATCHED_AT_ONCE]
        real = (some[:, 4] != NO_BOX).unsqueeze(1)
        overlaps = torch.where(real, box_iou(some[:, :4], anchors[:, :4]), -1.0)
        most, place = overlaps.max(dim=0)
        which = torch.where(most > largest, place + start, which)
        largest = torch.maximum(most, largest)
        closest |= ((overlaps == overlaps.amax(dim=1, keepdim=True)) & (overlaps > 0)).any(dim=0)
    found = (largest >= _FOREGROUND) | closest
    return which, found, found | (largest < _BACKGROUND)


def generalised_distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return 1 - generalised IoU of boxes (..., 4) with others (H. Rezatofighi et al. 2019), (...).

    torchvision's selects overlapping boxes by a mask, for which a GPU must wait, and whose memory nobody can predict.
    """

    def area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (high - low).clamp(min=0).prod(dim=-1)

    common = area(torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:]))
    union = area(one[..., :2], one[..., 2:]) + area(other[..., :2], other[..., 2:]) - common
    around = area(torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:]))
    return 1 - common / (union + _NEARLY_NOTHING) + (around - union) / (around + _NEARLY_NOTHING)


def detection_loss(outputs: Detected, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each image, (B,) fp32: focal loss of classes and generalised IoU of boxes, by its anchors.

    Args:
        outputs: of a detector.
        targets: (B, k, 5), k >= 1: boxes and classes, `NO_BOX` for filling.
    """
    logits, offsets, anchors = outputs
    losses = []
    for said, offset, boxes in zip(logits.float(), offsets.float(), targets.float(), strict=True):
        which, found, counts = matched(anchors, boxes)
        classes = torch.where(found, boxes[which, 4], NO_BOX).long()
        truth = F.one_hot(classes + 1, said.shape[1] + 1)[:, 1:].to(said.dtype)
        focal = sigmoid_focal_loss(said, truth).sum(dim=1)
        # Of other anchors it is their own box that is compared: all shapes are known before, and nothing is infinite.
        wanted = torch.where(found.unsqueeze(1), boxes[which, :4], anchors[:, :4])
        apart = generalised_distance(boxes_of(offset, anchors), wanted)
        total = torch.where(counts, focal, 0.0).sum() + torch.where(found, apart, 0.0).sum()
        losses.append(total / found.sum().clamp(min=1))
    return torch.stack(losses)


@dataclass(frozen=True)
class Detections:
    """What was found in an image, best first.

    Attributes:
        boxes: (d, 4) fp32.
        scores: (d,) fp32, 0 to 1.
        labels: (d,) int64.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


def detections_of(outputs: Detected, shape: tuple[int, int]) -> list[Detections]:
    """Return what outputs mean, image by image: of overlapping boxes of a class the best, as RetinaNet chooses.

    Args:
        outputs: of a detector.
        shape: (height, width) of the images.
    """
    logits, offsets, anchors = outputs
    places = [(anchors[:, 4] == level).nonzero().flatten() for level in range(int(anchors[-1, 4]) + 1)]
    return [
        _detected(said, offset, anchors, places, shape)
        for said, offset in zip(logits.float().sigmoid(), offsets.float(), strict=True)
    ]


def _detected(
    scores: torch.Tensor,
    offsets: torch.Tensor,
    anchors: torch.Tensor,
    places: Sequence[torch.Tensor],
    shape: tuple[int, int],
) -> Detections:
    """Return what was found in one image: scores (A, K), offsets (A, 4), places of each level among the anchors."""
    found = []
    for level in places:
        flat = scores[level].flatten()
        best, index = flat.topk(min(_CANDIDATES, len(flat)))
        sure = best > _LEAST_SCORE  # which no NaN is
        best, index = best[sure], index[sure]
        where = level[index // scores.shape[1]]
        boxes = clip_boxes_to_image(boxes_of(offsets[where], anchors[where]), shape)
        found.append((boxes, best, index % scores.shape[1]))
    boxes, best, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    kept = batched_nms(boxes, best, labels, _LARGEST_OVERLAP)[:MOST_DETECTIONS]
    return Detections(boxes[kept], best[kept], labels[kept])
