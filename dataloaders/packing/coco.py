"""COCO's instance annotations: the boxes of each image, classes numbered from 0.

Only what detection needs is taken: `images`, `categories` and of `annotations` image, category, box and the crowd
flag. A crowd's box marks a region that is not to be counted, and no object; such boxes are left out and counted.

Source: Lin et al. 2014, "Microsoft COCO"; format at cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
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
        names = {row["id"]: str(row["name"]) for row in sorted(table["categories"], key=lambda row: row["id"])}
        images = {row["id"]: str(row["file_name"]) for row in table["images"]}
        rows: dict[str, list[list[float]]] = {name: [] for name in images.values()}
        classes = tuple(names.values())
        if class_map is not None:
            check_class_names(classes, *class_map)
            classes = class_map[0]
        label_of = {category: classes.index(name) for category, name in names.items()}
        crowds = 0
        for row in table["annotations"]:
            if row.get("iscrowd"):
                crowds += 1
            else:
                rows[images[row["image_id"]]].append(_corners(row, label_of))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is of another format ({error})"
        raise DataError(f"COCO annotations {file.name}: one of the entries {what}: make the file again") from None
    if not images or not classes:
        raise DataError(f"COCO annotations {file.name} name no image or no category: make the file again")
    notes = [f"{crowds} boxes of crowds were left out"] if crowds else []
    return CocoBoxes(classes, {name: json.dumps(boxes) for name, boxes in rows.items()}, notes)


def _corners(row: dict[str, Any], label_of: dict[Any, int]) -> list[float]:
    left, top, width, height = map(float, row["bbox"])
    return [left, top, left + width, top + height, label_of[row["category_id"]]]
