"""COCO's instance annotations: the boxes of each image, classes numbered from 0.

Only what detection needs is taken: `images`, `categories` and of `annotations` image, category, box and the crowd
flag. A crowd's box marks a region that is not to be counted, and no object; such boxes are left out and counted.

Source: Lin et al. 2014, "Microsoft COCO"; format at cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from dataloaders.sources.class_folders import Stretch, check_class_names, read_stretch
from dataloaders.sources.files import table_of
from setformer_dist.core.errors import DataError

# Bytes of an annotation file; COCO's own has 0.45 GB. The user names it, and it takes some 8 times its size.
_LARGEST = 1 << 32


@dataclass(frozen=True)
class CocoBoxes:
    """What the annotations say.

    Attributes:
        classes: class names in the order of their category ids, or of the class map that was given.
        boxes: image file name -> JSON list of [x0, y0, x1, y1, class]; images without objects have "[]".
        notes: what was left out.
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
    try:
        table = json.loads(read_stretch(file, _LARGEST), object_pairs_hook=table_of)
        names = _by_id(table, "categories", "name")
        images = _by_id(table, "images", "file_name")
        rows: dict[str, list[list[float]]] = {name: [] for name in images.values()}
        classes = tuple(names.values())
        if class_map is not None:
            check_class_names(classes, *class_map)
            classes = class_map[0]
        label_of = {category: classes.index(name) for category, name in names.items()}
        crowds, known = 0, set[tuple[Any, ...]]()
        for row in _rows(table, "annotations"):
            if row.get("iscrowd"):
                crowds += 1
            else:
                _check_once(row, known)
                rows[images[row["image_id"]]].append(_corners(row, label_of))
    except RecursionError:
        raise DataError(f"COCO annotations {file.name} are nested too deeply: make the file again") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is of another format ({error})"
        raise DataError(f"COCO annotations {file.name}: one of the entries {what}: make the file again") from None
    if not images or not classes:
        raise DataError(f"COCO annotations {file.name} name no image or no category: make the file again")
    notes = [f"{crowds} boxes of crowds were left out"] if crowds else []
    return CocoBoxes(classes, {name: json.dumps(boxes) for name, boxes in rows.items()}, notes)


def _rows(table: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if not isinstance(table[key], list):
        raise ValueError(f"{key!r} is no list")
    found: list[dict[str, Any]] = table[key]
    return found


def _by_id(table: dict[str, Any], what: str, key: str) -> dict[Any, str]:
    """Return names by id, in the order of ids. Two of one id or name would become one in silence."""
    found: dict[Any, str] = {}
    for row in sorted(_rows(table, what), key=lambda row: row["id"]):
        if not isinstance(row[key], str):
            raise ValueError(f"of {what}, {row['id']} has the {key} {row[key]!r:.40}, which is no text")
        if row["id"] in found:
            raise ValueError(f"two {what} have the id {row['id']}: {found[row['id']]!r:.80} and {row[key]!r:.80}")
        found[row["id"]] = row[key]
    if len(set(found.values())) < len(found):
        twice = Counter(found.values()).most_common(1)[0][0]
        raise ValueError(f"two {what} have the {key} {twice!r:.80}")
    return found


def _check_once(row: dict[str, Any], known: set[tuple[Any, ...]]) -> None:
    """Refuse an annotation that is there a second time. Ids alone may repeat: some programs count them per image."""
    if "id" not in row:
        return
    mark = row["id"], row["image_id"], row["category_id"], *row["bbox"]
    if mark in known:
        raise ValueError(f"annotation {row['id']} of image {row['image_id']} is there twice")
    known.add(mark)


def _corners(row: dict[str, Any], label_of: dict[Any, int]) -> list[float]:
    if not isinstance(row["bbox"], list):
        raise ValueError(f"bbox {row['bbox']!r:.40} is no list")
    left, top, width, height = map(float, row["bbox"])
    return [left, top, left + width, top + height, label_of[row["category_id"]]]
