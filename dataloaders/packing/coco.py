"""COCO's instance annotations: the boxes of each image, classes numbered from 0.

Only what detection needs is taken: `images`, `categories` and of `annotations` image, category, box, area and the
crowd flag. The sizes of images are taken to tell whether the boxes are of the images that are there. A crowd's box
marks a region that is not to be counted, and no object; such boxes keep the flag.

Source: Lin et al. 2014, "Microsoft COCO"; format at cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dataloaders.sources.class_folders import Stretch, check_class_names, read_stretch
from dataloaders.sources.files import table_of
from setformer_dist.core.errors import DataError
from setformer_dist.core.words import counted

Value = TypeVar("Value")

# Bytes of an annotation file; COCO's own has 0.45 GB. The user names it, and it takes some 8 times its size.
_LARGEST = 1 << 32

# What float32 holds.
_LARGEST_AREA = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class CocoBoxes:
    """What the annotations say.

    Attributes:
        classes: class names in the order of their category ids, or of the class map that was given.
        boxes: image file name -> JSON list: the image's [height, width], null where the file does not say, and its
            boxes [x0, y0, x1, y1, class, crowd, area]: crowd is 0 or 1, area null where the file has none.
        notes: what there is to say.
    """

    classes: tuple[str, ...]
    boxes: dict[str, str]
    notes: list[str]


def read_coco(file: Stretch, class_map: tuple[tuple[str, ...], object] | None) -> CocoBoxes:
    """Read an annotation file. It is held in memory whole, some 8 times its size.

    Args:
        file: where it is.
        class_map: class names to number by, and where they are from.

    Raises:
        DataError: it cannot be read, is of another format, or names a class that the class map lacks.
    """
    number = 0  # of the annotation that is read
    try:
        table = json.loads(read_stretch(file, _LARGEST), object_pairs_hook=table_of)
        if not isinstance(table, dict):
            raise TypeError("it is no JSON object")
        names = _by_id(table, "categories", "name")
        images = _by_id(table, "images", "file_name")
        if not images or not names:
            raise DataError(f"COCO annotations {file.name} name no image or no category: make the file again")
        rows: dict[str, list[list[float | None]]] = {name: [] for name in images.values()}
        shapes = {images[row["id"]]: _shape(row) for row in _rows(table, "images")}
        classes = tuple(names.values())
        if class_map is not None:
            check_class_names(classes, *class_map)
            classes = class_map[0]
        label_of = {category: classes.index(name) for category, name in names.items()}
        crowds, known = 0, set[tuple[Any, ...]]()
        for row in _rows(table, "annotations"):
            number += 1  # the message names it
            image, label = _known(row, "image_id", images, "images"), _known(row, "category_id", label_of, "categories")
            corners, is_crowd = _corners(row), _is_crowd(row)
            crowds += is_crowd
            _check_once(row, known)
            rows[image].append([*corners, label, int(is_crowd), _area(row)])
    except RecursionError:
        raise DataError(f"COCO annotations {file.name} are nested too deeply: make the file again") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        which = f"annotation {number:,} (counted from 1)" if number else "one of the entries"
        what = f"has no {error}" if isinstance(error, KeyError) else f"is of another format ({error})"
        raise DataError(f"COCO annotations {file.name}: {which} {what}: make the file again") from None
    notes = [f"{counted(crowds, 'box is of a crowd', 'boxes are of crowds')}: kept, not learnt from"] if crowds else []
    return CocoBoxes(classes, {name: json.dumps([shapes[name], boxes]) for name, boxes in rows.items()}, notes)


def _rows(table: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if not isinstance(table[key], list):
        raise ValueError(f"{key!r} is no list")
    if not all(isinstance(row, dict) for row in table[key]):
        raise TypeError(f"{key!r} holds something that is no JSON object")
    found: list[dict[str, Any]] = table[key]
    return found


def _by_id(table: dict[str, Any], what: str, key: str) -> dict[Any, str]:
    """Return names by id, in the order of ids. Two of one id or name would become one in silence."""
    found: dict[Any, str] = {}
    for row in sorted(_rows(table, what), key=lambda row: row["id"]):
        name = row[key]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"of {what}, {row['id']} has the {key} {name!r:.40}, which is no text")
        if row["id"] in found:
            raise ValueError(f"two {what} have the id {row['id']}: {found[row['id']]!r:.80} and {name!r:.80}")
        found[row["id"]] = name.removeprefix("./") if key == "file_name" else name
    if len(set(found.values())) < len(found):
        twice = Counter(found.values()).most_common(1)[0][0]
        raise ValueError(f"two {what} have the {key} {twice!r:.80}")
    return found


def _shape(row: dict[str, Any]) -> list[int] | None:
    """Return an image's [height, width]; None where the file has none, or zeros in their place."""
    sides = [side for side in (row.get("height"), row.get("width")) if isinstance(side, int) and side > 0]
    return sides if len(sides) == 2 else None


def _check_once(row: dict[str, Any], known: set[tuple[Any, ...]]) -> None:
    """Refuse an annotation that is there a second time. Ids alone may repeat: some programs count them per image."""
    if "id" not in row:
        return
    mark = row["id"], row["image_id"], row["category_id"], *row["bbox"]
    if mark in known:
        raise ValueError(f"annotation {row['id']} of image {row['image_id']} is there twice")
    known.add(mark)


def _known(row: dict[str, Any], key: str, known: dict[Any, Value], where: str) -> Value:
    """Return what an annotation names by its id."""
    if row[key] not in known:
        raise ValueError(f"{key} {row[key]!r:.40} is not among the {where}")
    return known[row[key]]


def _corners(row: dict[str, Any]) -> list[float]:
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"bbox {box!r:.60} is no list of four numbers: x, y, width and height")
    left, top, width, height = map(float, box)
    return [left, top, left + width, top + height]


def _is_crowd(row: dict[str, Any]) -> bool:
    crowd = row.get("iscrowd")
    if crowd is not None and (isinstance(crowd, str) or crowd not in (0, 1)):
        raise ValueError(f"iscrowd {crowd!r:.40} is neither 0 nor 1")
    return bool(crowd)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _area(row: dict[str, Any]) -> float | None:
    """Return an object's area in pixels; None where the annotation says nothing."""
    area = row.get("area")
    if area is None:
        return None
    if not _is_number(area) or not 0 <= area <= _LARGEST_AREA:
        raise ValueError(f"area {area!r:.40} is no finite number from 0 on")
    return float(area)
