"""Figures of detections against pycocotools, COCO's own program."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from setformer_dist.tasks.average_precision import COLUMNS, average_precision

_CLASSES = ("cat", "dog", "bird", "cow")


def rows_of(seed: int, images: int = 30, ties: bool = False) -> torch.Tensor:
    """Return objects and detections near some of them; the last class is nowhere."""
    drawn = np.random.default_rng(seed)
    rows = []
    for sample in range(images):
        for _ in range(drawn.integers(0, 6)):
            x, y = drawn.uniform(0, 300, 2)
            w, h = np.exp(drawn.uniform(2, 5.3, 2))
            label, crowd = drawn.integers(0, 3), float(drawn.random() < 0.1)
            rows.append([sample, label, math.nan, x, y, x + w, y + h, w * h * drawn.uniform(0.4, 1), crowd])
            for _ in range(drawn.integers(0, 3)):
                a, b, c, d = drawn.normal(0, 0.12, 4)
                corners = [x + a * w, y + b * h, x + w + c * w, y + h + d * h]
                said = label if drawn.random() < 0.8 else drawn.integers(0, 4)
                score = round(drawn.random(), 1) if ties else drawn.random()
                rows.append([sample, said, score, *corners, w * h, 0.0])
    return torch.tensor(np.array(rows).reshape(-1, COLUMNS))


def figures_of_pycocotools(rows: torch.Tensor) -> dict[str, float]:
    table = rows.tolist()
    truth, found = COCO(), []
    truth.dataset = {
        "images": [{"id": sample} for sample in sorted({int(row[0]) for row in table})],
        "categories": [{"id": i} for i in range(len(_CLASSES))],
        "annotations": [],
    }
    for sample, label, score, x0, y0, x1, y1, area, crowd in table:
        box = [x0, y0, x1 - x0, y1 - y0]
        about = {"image_id": int(sample), "category_id": int(label), "bbox": box}
        if math.isnan(score):
            number = len(truth.dataset["annotations"]) + 1
            truth.dataset["annotations"].append({"id": number, "area": area, "iscrowd": int(crowd), **about})
        else:
            found.append({"score": score, **about})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        scoring = COCOeval(truth, truth.loadRes(found), "bbox")
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    return {**dict(zip(names, scoring.stats[:6].tolist(), strict=True)), "recall": float(scoring.stats[8])}


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_those_of_pycocotools(seed: int) -> None:
    rows = rows_of(seed)
    figures = average_precision(rows, _CLASSES)
    theirs = figures_of_pycocotools(rows)
    assert {name: figures[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)
    assert 0.05 < figures["ap"] < figures["ap50"] < 1


@pytest.mark.parametrize("ties", [False, True])
def test_the_order_of_rows_changes_nothing(ties: bool) -> None:
    rows = rows_of(5, ties=ties)
    figures = average_precision(rows, _CLASSES)
    for seed in range(3):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        assert average_precision(rows[order], _CLASSES) == figures


def test_classes_that_are_not_there_have_no_figure() -> None:
    figures = average_precision(rows_of(1), _CLASSES)
    assert {name for name in figures if name.startswith("ap_of_")} == {"ap_of_cat", "ap_of_dog", "ap_of_bird"}
    of_each = [figures[f"ap_of_{name}"] for name in _CLASSES[:3]]
    assert figures["ap"] == pytest.approx(sum(of_each) / 3)


def test_detections_that_are_the_objects_have_all_of_them() -> None:
    rows = rows_of(2)
    objects = rows[rows[:, 2].isnan() & (rows[:, 8] == 0)]
    found = objects.clone()
    found[:, 2] = torch.linspace(0.1, 0.9, len(found))
    figures = average_precision(torch.cat([objects, found]), _CLASSES)
    assert figures["ap"] == figures["recall"] == pytest.approx(1)


def test_nothing_found_is_nothing_right() -> None:
    rows = rows_of(3)
    figures = average_precision(rows[rows[:, 2].isnan()], _CLASSES)
    assert figures["ap"] == figures["recall"] == figures["ap_of_cat"] == 0


def test_no_objects_at_all_are_no_error() -> None:
    rows = rows_of(3)
    assert average_precision(rows[~rows[:, 2].isnan()], _CLASSES)["ap"] == 0
    assert average_precision(rows[:0], _CLASSES)["ap"] == 0


def test_a_crowd_that_is_found_is_not_wrong() -> None:
    object_ = [0, 0, math.nan, 0.0, 0, 50, 50, 2500, 0]
    crowd = [0, 0, math.nan, 100.0, 100, 300, 300, 40000, 1]
    right, inside = [0, 0, 0.5, 0.0, 0, 50, 50, 0, 0], [0, 0, 0.9, 110.0, 110, 180, 180, 0, 0]
    figures = average_precision(torch.tensor([object_, crowd, right, inside], dtype=torch.float64), _CLASSES)
    assert figures["ap"] == pytest.approx(1)
