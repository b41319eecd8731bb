"""`data pack --mask-values`: values and colours become classes, and none is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.inspection import mask_values
from dataloaders.packing.mask_table import read_mask_table
from launch.testing.commands import Ended, setformer
from setformer_dist.core.errors import DataError

VALUES = np.array([[0, 7, 7, 21], [8, 21, 0, 7]], np.uint8).repeat(4, 0).repeat(4, 1)
COLOURS = {0: (0, 0, 0), 7: (128, 64, 128), 8: (70, 70, 70), 21: (0, 128, 255)}


def images_of(folder: Path) -> dict[str, Image.Image]:
    """Return the mask of VALUES in all the forms that people have."""
    palette = Image.fromarray(VALUES).convert("L")
    palette.putpalette([part for value in range(256) for part in COLOURS.get(value, (1, 2, 3))])
    colours = np.array([COLOURS.get(value, (1, 2, 3)) for value in range(22)], np.uint8)[VALUES]
    return {
        "grey": Image.fromarray(VALUES), "deep": Image.fromarray(VALUES.astype(np.uint16)), "palette": palette,
        "colours": Image.fromarray(colours), "alpha": Image.fromarray(colours).convert("RGBA"),
    }  # fmt: skip


def packed(folder: Path, mask: Image.Image, table: str, *more: str) -> Ended:
    for part in ("images", "masks"):
        (folder / "source" / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", VALUES.shape[::-1]).save(folder / "source" / "images" / "a.png")
    mask.save(folder / "source" / "masks" / "a.png")
    (folder / "values.txt").write_text(table)
    return setformer("data", "pack", str(folder / "source"), str(folder / "packed"), "--masks", "masks",
                     "--mask-values", str(folder / "values.txt"), *more)  # fmt: skip


BY_VALUE = "7 road\n8 building block\n\n21 road\n0 -\n"
BY_COLOUR = "128 64 128 road\n70 70 70 building block\n0 128 255 road\n0 0 0 -\n"


@pytest.mark.parametrize(
    ("kind", "table"),
    [("grey", BY_VALUE), ("deep", BY_VALUE), ("palette", BY_VALUE), ("palette", BY_COLOUR), ("colours", BY_COLOUR),
     ("alpha", BY_COLOUR)],
)  # fmt: skip
def test_values_become_classes(kind: str, table: str, tmp_path: Path) -> None:
    done = packed(tmp_path, images_of(tmp_path)[kind], table)
    assert done.code == 0, done.err
    split = open_source(str(tmp_path), "packed", DataConfig(root=str(tmp_path)))
    assert split.classes == ("road", "building block")
    mask = split.read(0).mask
    assert mask is not None
    expected = np.array([255] * 22, np.uint8)
    expected[[7, 21, 8]] = 0, 0, 1
    assert (mask_values(mask) == expected[VALUES]).all()


def test_a_value_without_a_line_is_an_error(tmp_path: Path) -> None:
    failed = packed(tmp_path, images_of(tmp_path)["grey"], "7 road\n8 house\n0 -\n")
    assert failed.code != 0
    assert "its mask has value 21 in a pixel" in failed.err
    assert "add a line, such as '21 -' if it does not count" in failed.err
    failed = packed(tmp_path, images_of(tmp_path)["colours"], "128 64 128 road\n0 0 0 -\n")
    assert "its mask has colour " in failed.err


def test_both_splits_have_one_table(tmp_path: Path) -> None:
    mask, first = images_of(tmp_path)["grey"], ("--classes-from", str(tmp_path / "a" / "packed"))
    assert packed(tmp_path / "a", mask, BY_VALUE).code == 0
    same = packed(tmp_path / "b", mask, BY_VALUE, *first)
    assert same.code == 0, same.err
    other = packed(tmp_path / "c", mask, "8 building block\n7 road\n21 road\n0 -\n", *first)
    assert other.code != 0
    assert "name other classes, or in another order: pack both splits with one file" in other.err
    void = packed(tmp_path / "d", images_of(tmp_path)["grey"], BY_VALUE, "--void", "0")
    assert void.code == 2
    assert "leave out --void" in void.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty: write lines such as"),
        ("7 road\n7 house\n", "line 2: 7 has a line already"),
        ("road 7\n", "line 1: 'road 7' is not of the form 'VALUE NAME'"),
        ("7\n", "is not of the form"),
        ("70000 road\n", "is not of the form"),
        ("1 2 300 road\n", "is not of the form 'R G B NAME'"),
        ("1 2 3 road\n7 house\n", "line 2: '7 house' is not of the form 'R G B NAME'"),
        ("7 -\n", "names 0 classes"),
        ("".join(f"{i} class {i}\n" for i in range(256)), "names 256 classes: masks hold 1 to 255"),
    ],
)
def test_a_table_that_is_none_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "values.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        read_mask_table(tmp_path / "values.txt")


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_mask_table(tmp_path / "values.txt")
    (tmp_path / "values.txt").write_bytes(b"7 \xff\xfe")
    with pytest.raises(DataError, match="is no UTF-8 text"):
        read_mask_table(tmp_path / "values.txt")
