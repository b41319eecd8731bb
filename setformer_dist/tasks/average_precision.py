"""Average precision of detections, as COCO defines it, from a table with a row for each object and each detection.

Columns: sample, class, score (NaN: an object that is there), x0, y0, x1, y1 in stored pixels, area, and whether it is a
crowd. Detections of equal score rank by their place in the table, so the rows are sorted: in whatever order ranks
found them, the figures are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import COCO, COCOeval_faster

from setformer_dist.core.metric import PRECISION_OF

COLUMNS = 9

_SIZES = {1: "small", 2: "medium", 3: "large"}  # of objects, by areas of 32 and 96 pixels square; 0 are all
_MOST = 2  # place of 100 detections per image among COCO's limits


def average_precision(rows: torch.Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Return COCO's figures of bounding boxes, and the average precision of each class that is there.

    Args:
        rows: (r, COLUMNS) fp64, of a whole split.
        classes: names.

    Returns:
        "ap", "ap50", "ap75" and "recall" (of 100 detections per image); "ap_small", "ap_medium" and "ap_large" where
        there are such objects; and `PRECISION_OF` each class.
    """
    table = rows.numpy()
    table = table[np.lexsort((*table.T[:0:-1], table[:, 0]))]  # by sample, then by the other columns from the left
    there = np.isnan(table[:, 2])
    objects, found = table[there], table[~there]
    present = sorted({int(label) for label in objects[objects[:, 8] == 0, 1]})
    if not present or not len(found):  # which the library does not evaluate
        nothing = dict.fromkeys(("ap", "ap50", "ap75", "recall"), 0.0)
        return nothing | {f"{PRECISION_OF}{classes[label]}": 0.0 for label in present}
    truth = COCO(_annotated(objects, np.unique(table[:, 0]), len(classes)))
    corners, sides = found[:, 3:5], found[:, 5:7] - found[:, 3:5]
    detections = truth.loadRes(np.column_stack([found[:, 0], corners, sides, found[:, 2], found[:, 1]]))
    scoring = COCOeval_faster(truth, detections, "bbox")
    scoring.evaluate()
    scoring.accumulate()
    return _figures(scoring.eval["precision"], scoring.eval["recall"], scoring.params.iouThrs, classes)


def _annotated(objects: npt.NDArray[np.float64], samples: npt.NDArray[np.float64], classes: int) -> dict[str, object]:
    """Return objects as COCO's annotation files have them."""
    return {
        "images": [{"id": int(sample)} for sample in samples],
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": int(sample),
                "category_id": int(label),
                "iscrowd": int(crowd),
                "area": area,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
            for i, (sample, label, _, x0, y0, x1, y1, area, crowd) in enumerate(objects.tolist())
        ],
    }


def _figures(
    precision: npt.NDArray[np.float64],
    recall: npt.NDArray[np.float64],
    overlaps: npt.NDArray[np.float64],
    classes: Sequence[str],
) -> dict[str, float]:
    """Return the figures of COCO's arrays, in which -1 stands for what no object is there for.

    Args:
        precision: (IoUs, recalls, classes, sizes, limits).
        recall: (IoUs, classes, sizes, limits).
        overlaps: the IoUs from which on an object is found.
        classes: names.
    """
    precision, recall = precision[..., _MOST], recall[..., _MOST]

    def mean(values: npt.NDArray[np.float64]) -> float | None:
        counted = values[values > -1]
        return float(counted.mean()) if len(counted) else None

    figures = {
        "ap": mean(precision[..., 0]),
        "ap50": mean(precision[np.isclose(overlaps, 0.5)][..., 0]),
        "ap75": mean(precision[np.isclose(overlaps, 0.75)][..., 0]),
        "recall": mean(recall[..., 0]),
        **{f"ap_{size}": mean(precision[..., place]) for place, size in _SIZES.items()},
        **{f"{PRECISION_OF}{name}": mean(precision[:, :, label, 0]) for label, name in enumerate(classes)},
    }
    return {name: value for name, value in figures.items() if value is not None}
