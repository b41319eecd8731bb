"""Boxes as people and programs write them: a table, checked by itself and against the image that it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dataloaders.pixels.depth import UndecodableError
from dataloaders.source import Boxes, box_areas

# Pixels by which a box may stand out of its image: annotations are rounded.
_SLACK = 1.0


def boxes_of(table: Mapping[str, Any]) -> Boxes:
    """Return the boxes of a table: "boxes" and "labels"; "crowds" and "areas" may be missing.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: it is none.
    """
    corners = np.array(table["boxes"], np.float32).reshape(-1, 4)
    labels = np.array(table["labels"], np.int64).reshape(-1)
    crowds = np.array(table.get("crowds", [0] * len(corners)), np.int64).reshape(-1)
    areas = np.array(table["areas"], np.float32).reshape(-1) if "areas" in table else box_areas(corners)
    for name, column in (("labels", labels), ("crowds", crowds), ("areas", areas)):
        if len(corners) != len(column):
            raise ValueError(f"{len(corners)} boxes have {len(column)} {name}")
    if not np.isfinite(corners).all():
        raise ValueError("a corner is no number")
    if not np.isin(crowds, (0, 1)).all():
        raise ValueError("a crowd is neither true nor false")
    if "areas" in table and not (np.isfinite(areas) & (areas >= 0)).all():
        raise ValueError("an area is no number from 0 on")
    return Boxes(corners, labels, crowds.astype(np.bool_), areas)


def inside(boxes: Boxes, shape: tuple[int, int], classes: int) -> Boxes:
    """Return boxes cut to their image.

    Args:
        boxes: of the image.
        shape: its (height, width).
        classes: how many there are; 0 where that is not known yet.

    Raises:
        UndecodableError: a box stands out by more than rounding, has no area, or is of a class that there is not.
    """
    corners = np.clip(boxes.corners, 0, np.array([shape[1], shape[0]] * 2, np.float32))
    for given, cut, label in zip(boxes.corners, corners, boxes.labels.tolist(), strict=True):
        place = ", ".join(f"{value:g}" for value in given.tolist())
        if not np.isfinite(given).all() or np.abs(cut - given).max() > _SLACK:
            raise UndecodableError(f"box ({place}) extends beyond its image of {shape[1]}x{shape[0]} pixels")
        if cut[2] <= cut[0] or cut[3] <= cut[1]:
            raise UndecodableError(f"box ({place}) has no area")
        if classes and not 0 <= label < classes:
            raise UndecodableError(f"box ({place}) has class {label}, but there are {classes} classes")
    return _with_corners(boxes, corners)


def resized(boxes: Boxes, before: tuple[int, int], after: tuple[int, int]) -> Boxes:
    """Return the boxes of an image that was resized, from (height, width) to (height, width)."""
    scale = np.array([after[1] / before[1], after[0] / before[0]] * 2, np.float32)
    return _with_corners(boxes, boxes.corners * scale, scale[:2].prod())


def _with_corners(boxes: Boxes, corners: npt.NDArray[np.float32], growth: np.float32 | float = 1.0) -> Boxes:
    """Return boxes with other corners; areas grow, but those that are of the boxes stay so."""
    own = boxes.areas == box_areas(boxes.corners)
    return Boxes(corners, boxes.labels, boxes.crowds, np.where(own, box_areas(corners), boxes.areas * growth))
