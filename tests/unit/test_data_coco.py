"""COCO annotations that say something twice or nothing at all: refused, as boxes would change or vanish in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch.testing.commands import setformer


def coco_table() -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 10]},
            {"id": 1, "image_id": 2, "category_id": 7, "bbox": [5, 5, 10, 20]},
        ],
    }


def same_image(table: dict[str, Any]) -> None:
    table["images"][1]["id"] = table["annotations"][1]["image_id"] = 1


def same_file(table: dict[str, Any]) -> None:
    table["images"][1]["file_name"] = "a.png"


def same_category(table: dict[str, Any]) -> None:
    table["categories"].append({"id": 3, "name": "bird"})


def same_class(table: dict[str, Any]) -> None:
    table["categories"].append({"id": 9, "name": "cat"})


def no_class(table: dict[str, Any]) -> None:
    table["categories"][0]["name"] = None


def same_box(table: dict[str, Any]) -> None:
    table["annotations"].append(table["annotations"][0])


def no_list(table: dict[str, Any]) -> None:
    table["annotations"] = {}


def text_box(table: dict[str, Any]) -> None:
    table["annotations"][0]["bbox"] = "1234"


def too_large(table: dict[str, Any]) -> None:
    table["annotations"][0]["bbox"] = [10**400, 2, 3, 4]


def area_of(area: object) -> Any:
    def change(table: dict[str, Any]) -> None:
        table["annotations"][0]["area"] = area

    return change


def value_of(of: str, number: int, key: str, value: object) -> Any:
    def change(table: dict[str, Any]) -> None:
        table[of][number][key] = value

    return change


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (same_image, "two images have the id 1: 'a.png' and 'b.png'"),
        (same_file, "two images have the file_name 'a.png'"),
        (same_category, "two categories have the id 3: 'cat' and 'bird'"),
        (same_class, "two categories have the name 'cat'"),
        (no_class, "of categories, 3 has the name None, which is no text"),
        (same_box, "annotation 1 of image 1 is there twice"),
        (no_list, "'annotations' is no list"),
        (text_box, "annotation 1 (counted from 1) is of another format (bbox '1234' is no list of four numbers"),
        (too_large, "too large"),
        (value_of("annotations", 1, "bbox", [1, 2, 3]), "bbox [1, 2, 3] is no list of four numbers"),
        (value_of("annotations", 1, "bbox", ["1", 2, 3, 4]), "bbox ['1', 2, 3, 4] is no list of four numbers"),
        (value_of("annotations", 1, "bbox", [True, 2, 3, 4]), "is no list of four numbers"),
        (value_of("annotations", 1, "image_id", 99), "annotation 2 (counted from 1) is of another format (image_id 99"),
        (value_of("annotations", 1, "category_id", 5), "category_id 5 is not among the categories"),
        (value_of("annotations", 1, "category_id", [5]), "unhashable"),
        (value_of("annotations", 1, "iscrowd", "0"), "iscrowd '0' is neither 0 nor 1"),
        (value_of("annotations", 1, "iscrowd", 2), "iscrowd 2 is neither 0 nor 1"),
        (value_of("categories", 1, "name", " "), "of categories, 7 has the name ' ', which is no text"),
        (area_of(-1), "area -1 is no finite number from 0 on"),
        (area_of(float("nan")), "area nan is no finite number from 0 on"),
        (area_of(1e300), "area 1e+300 is no finite number from 0 on"),
        (area_of("12"), "area '12' is no finite number from 0 on"),
        (area_of(True), "area True is no finite number from 0 on"),
        (None, "are nested too deeply"),
    ],
)
def test_annotations_that_cannot_be_meant_are_refused(images: Path, tmp_path: Path, change: Any, said: str) -> None:
    table = coco_table()
    if change is not None:
        change(table)
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(table) if change is not None else "[" * 200_000)
    done = setformer("data", "pack", str(images), str(tmp_path / "packed"), "--coco", str(file))
    assert done.code == 3
    (line,) = done.error_lines
    assert said in line
    assert "Traceback" not in done.err
    assert not (tmp_path / "packed").exists()


def test_ids_of_annotations_may_begin_anew_in_each_image(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(coco_table()))
    done = setformer("data", "pack", str(images), str(tmp_path / "packed"), "--coco", str(file))
    assert done.code == 0, done.err


@pytest.mark.parametrize("text", ["null", "[]", "[1]", '{"images": [1], "categories": [], "annotations": []}'])
def test_files_of_another_shape_are_refused_in_words(images: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(text)
    done = setformer("data", "pack", str(images), str(tmp_path / "packed"), "--coco", str(file))
    assert done.code == 3
    assert "no JSON object" in done.error_lines[0]
    file.write_text(json.dumps(coco_table() | {"categories": []}))
    done = setformer("data", "pack", str(images), str(tmp_path / "packed"), "--coco", str(file))
    assert "name no image or no category" in done.error_lines[0]


def test_names_of_files_may_begin_with_the_folder_that_they_are_in(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    table = coco_table()
    table["images"][0]["file_name"] = "./a.png"
    table["annotations"][0]["iscrowd"] = None
    file.write_text(json.dumps(table))
    done = setformer("data", "pack", str(images), str(tmp_path / "packed"), "--coco", str(file))
    assert done.code == 0
    assert "packed 2 images" in done.out + done.err
    assert "crowd" not in done.out + done.err


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((60, 40), None),
        ((0, 0), None),
        ((40, 60), "b.png: it is of 60x40 pixels, but its annotations are of 40x60 (they are of the image as EXIF"),
        ((120, 80), "b.png: it is of 60x40 pixels, but its annotations are of 120x80"),
    ],
)
def test_boxes_of_images_of_another_size_are_refused(
    images: Path, tmp_path: Path, size: tuple[int, int], said: str | None
) -> None:
    table = coco_table()
    table["images"][1] |= {"width": size[0], "height": size[1]}
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(table))
    done = setformer("data", "pack", str(images), str(tmp_path / "packed"), "--coco", str(file))
    assert (done.code == 0) is (said is None), done.err
    assert said is None or said in done.err
