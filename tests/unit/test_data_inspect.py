"""`inspect` and `bench`: figures that were counted, pictures that show what is there."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.packing.finding import open_container
from dataloaders.packing.inspection import inspect, pictures
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.packing.throughput import measure
from dataloaders.pixels import decode
from dataloaders.pixels.colours import colour
from dataloaders.source import spread_evenly
from dataloaders.sources.shards import open_split
from launch.data.sheet import describe
from setformer_dist.core.words import counted
from setformer_dist.report.sheet import Cell, ClassBar, Sheet, write_html, write_png
from tests.unit.test_data_foreign import sample, write_tar


def saved(pixels, form="JPEG"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, quality=95)
    return out.getvalue()


def plain(colour, size=(40, 30)):
    return np.full((size[1], size[0], 3), colour, np.uint8)


@pytest.fixture
def packed(tmp_path):
    """6 images: 4 of class a (two of them equal), 2 of class b, one a PNG, sizes 40x30 but one 80x20."""
    images = {
        "a/0.jpg": saved(plain((255, 0, 0))),
        "a/1.jpg": saved(plain((0, 255, 0))),
        "a/2.jpg": saved(plain((0, 255, 0))),
        "a/3.png": saved(plain((0, 0, 255)), "PNG"),
        "b/4.jpg": saved(plain((9, 9, 9), (80, 20))),
        "b/5.jpg": saved(plain((200, 200, 200))),
    }
    for name, data in images.items():
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(data)
    pack_image_folder(tmp_path / "s", tmp_path / "out", PackOptions(samples_per_shard=4))
    return tmp_path / "out", sum(map(len, images.values()))


def test_figures_are_those_of_the_data(packed):
    folder, total = packed
    found = inspect(open_split(folder))
    assert (found.samples, found.shards, found.classes) == (6, 2, ("a", "b"))
    assert (found.counts.tolist(), found.counted) == ([4, 2], "images")
    assert (found.image_bytes, found.image_bytes_exact) == (total, True)
    assert (found.height.smallest, found.height.median, found.height.largest) == (20, 30, 30)
    assert (found.width.smallest, found.width.median, found.width.largest) == (40, 40, 80)
    assert found.formats == {"JPEG": 5, "PNG": 1}
    assert (found.duplicate_samples, found.duplicates) == (1, [["000000001-1", "000000002-2"]])
    assert (found.damaged, found.shared_keys) == (0, 0)


def test_small_images_folders_and_single_things_are_said_as_they_are(tmp_path):
    for name in ("a/0", "b/1"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / f"{name}.png").write_bytes(saved(plain((1, 2, len(name)), (64, 64)), "PNG"))
    shown = io.StringIO()
    describe(str(tmp_path / "s"), 10, None, 1, 1, Console(file=shown, width=200))
    facts = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.getvalue().splitlines()}
    assert facts["megapixels"] == "all 0.0041"
    assert facts["samples"] == "2 in 2 folders"
    assert facts["duplicates"].startswith("1 sample equals an earlier one")


@pytest.mark.parametrize(("number", "text"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (1200, "1,200 shards")])
def test_numbers_have_their_nouns(number, text):
    assert counted(number, "shard") == text
    assert counted(number, "class", "classes").endswith("class" if number == 1 else "classes")


def test_keys_that_several_shards_have_are_counted(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample(1, 0), *sample(2, 0), *sample(3, 0)])
    write_tar(tmp_path / "b.tar", [*sample(2, 1), *sample(3, 1)])
    for _ in range(2):  # also where the index, of which the log said so, is there already
        found = inspect(open_container(tmp_path / "*.tar"))
        assert (found.shared_keys, found.samples) == (2, 5)
        assert found.first_shared_key.endswith("in a.tar and b.tar")


def test_damaged_samples_are_counted_and_shown(packed):
    folder, _ = packed
    split = open_split(folder)
    offset = int(split.index.columns["offset"][0])
    data = bytearray((folder / "shard-000000.tar").read_bytes())
    data[offset + 30] ^= 1
    (folder / "shard-000000.tar").write_bytes(data)
    assert inspect(split).damaged == 1
    shown = pictures(split, 6, 64)
    assert [bool(picture.damage) for picture in shown] == [True] + [False] * 5


def test_pictures_show_the_samples(packed):
    folder, _ = packed
    shown = pictures(open_split(folder), 6, 20)
    assert [picture.caption for picture in shown] == ["a", "a", "a", "a", "b", "b"]
    assert shown[4].pixels.shape == (5, 20, 3)
    assert shown[0].pixels.reshape(-1, 3).mean(0) == pytest.approx([254, 0, 0], abs=2)
    assert [picture.key for picture in pictures(open_split(folder), 2, 20)] == ["000000000-0", "000000003-3"]


def test_masks_and_boxes_are_drawn(tmp_path):
    mask = np.full((30, 40), 255, np.uint8)
    mask[:, :20] = 1
    for name, data in {"images/a.jpg": saved(plain((0, 0, 0))), "masks/a.png": saved(mask, "PNG")}.items():
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(data)
    pack_image_folder(tmp_path / "s", tmp_path / "m", PackOptions(masks="masks"))
    split = open_split(tmp_path / "m")
    (picture,) = pictures(split, 1, 40)
    assert picture.pixels[15, 5] == pytest.approx(np.array(colour(1)) * 0.55, abs=3)
    assert picture.pixels[15, 35].max() <= 3
    assert picture.caption == "1 of 2 classes"
    assert (inspect(split).counts.tolist(), inspect(split).counted) == ([0, 600], "pixels")


def test_masks_and_boxes_lie_on_the_part_of_tiles_that_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_MOST_SHOWN", 64)
    pixels, mask = plain((0, 0, 0), (128, 96)), np.full((96, 128), 255, np.uint8)
    pixels[40:56, 40:72], mask[40:56, 40:72] = 200, 1
    for name, data in {"images/a.png": saved(pixels, "PNG"), "masks/a.png": saved(mask, "PNG")}.items():
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(data)
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [40, 40, 32, 16]}
    table = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "a"}], "annotations": [box]}
    (tmp_path / "s" / "coco.json").write_text(json.dumps(table))
    pack_image_folder(tmp_path / "s", tmp_path / "m", PackOptions(masks="masks", tiles=32))
    pack_image_folder(
        tmp_path / "s" / "images", tmp_path / "b", PackOptions(coco=str(tmp_path / "s" / "coco.json"), tiles=32)
    )
    (masked,) = pictures(open_split(tmp_path / "m"), 1, 64)
    there = np.zeros((64, 64), bool)  # which begins 16 rows and 32 columns into the image
    there[24:40, 8:40] = True
    assert (masked.pixels.max(2) > 50).tolist() == there.tolist()
    assert masked.pixels[30, 20] == pytest.approx(np.array(colour(1)) * 0.55 + 200 * 0.45, abs=2)
    (boxed,) = pictures(open_split(tmp_path / "b"), 1, 64)
    assert boxed.pixels[25, 9].tolist() == list(colour(0))
    assert boxed.pixels[24, 20].tolist() == [0, 0, 0]
    assert boxed.pixels[32, 20].tolist() == [200, 200, 200]


def test_a_saturated_pixel_does_not_darken_a_picture_of_16_bits():
    pixels = np.linspace(1000, 2000, 30 * 40 * 4).reshape(30, 40, 4).astype(np.uint16)
    pixels[0, 0] = 65535
    shown, part = decode.picture_of(pixels)
    assert (part, shown.shape) == ((0, 0, 30, 40), (30, 40, 3))
    assert np.diff(np.percentile(shown, (5, 95)))[0] > 200
    flat = np.full((30, 40, 1), 0.5, np.float32)
    flat[3, 4] = 1.0
    assert np.unique(decode.picture_of(flat)[0]).tolist() == [0, 255]


def test_spread_evenly():
    assert spread_evenly(3, 10) == [0, 1, 2]
    assert spread_evenly(10, 3) == [0, 3, 6]
    assert len(set(spread_evenly(1_000_003, 997))) == 997


def test_colours_of_neighbours_differ():
    for label in range(40):
        distance = np.abs(np.array(colour(label)) - np.array(colour(label + 1))).sum()
        assert distance > 120


def sheet(cells):
    bars = [ClassBar("ant <i>", "3", 1.0, "#ff0000"), ClassBar("bee", "1", 0.3, "#00ff00")]
    tiles = [("4", "images"), ("2", "classes")]
    return Sheet("data & more", "4 images.", tiles, bars, "Classes", "", [("height", "all 3")], cells, 48)


def test_sheets_are_whole_and_escaped(tmp_path):
    cells = [Cell(plain((10 * i, 0, 0), (48, 36)), f"class {i}", f"key-{i}", f"no. {i}") for i in range(5)]
    cells[3] = replace(cells[3], damage="its bytes <are> wrong")
    write_html(sheet(cells), tmp_path / "x" / "s.html")
    page = (tmp_path / "x" / "s.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5
    assert "ant &lt;i&gt;" in page
    assert "its bytes &lt;are&gt; wrong" in page
    assert "http" not in page
    write_png(sheet(cells), tmp_path / "s.png", columns=2)
    with Image.open(tmp_path / "s.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape[2] == 3
    for i in range(1, 5):
        assert (np.abs(pixels.astype(int) - (10 * i, 0, 0)).max(2) == 0).sum() >= 30 * 36, "picture not found"
    assert (pixels == (255, 0, 0)).all(2).sum() > 50, "legend not found"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_bench_measures_parts_that_add_up(packed):
    folder, total = packed
    config = DataConfig(root="x", image_size=16, augment=AugmentConfig(randaugment_ops=1))
    said = []
    found = measure(open_split(folder), config, (1, 2), 0.05, said.append)
    assert [part.name for part in found.parts] == ["read", "decode", "crop, resize", "augment", "hand over"]
    assert all(part.seconds >= 0 for part in found.parts)
    assert found.rate * sum(part.seconds for part in found.parts) == pytest.approx(1)
    assert found.image_bytes == pytest.approx(total / 6)
    assert [count for count, _ in found.threads] == [1, 2]
    assert all(rate > 0 for _, rate in found.threads)
    assert found.bare_rate > 0
    assert found.advice[0].split(" ")[0] in {"read", "decode", "crop,", "augment", "hand"}
    assert said[0] == "read"
    assert [option.name for option in found.options] == ["raw .beton of 64 pixels"]


def test_bench_tries_what_would_help(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    for i in range(3):
        (tmp_path / "s" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / "a" / f"{i}.jpg").write_bytes(saved(noise))
    pack_image_folder(tmp_path / "s", tmp_path / "out")
    found = measure(open_split(tmp_path / "out"), DataConfig(root="x", image_size=32), (1,), 0.1)
    names = [option.name for option in found.options]
    assert names == ["--max-side 128", "raw .beton of 128 pixels"]
    assert found.options[0].bytes_ratio < 0.1
    assert found.options[0].rate > 2 * found.rate
    assert "--max-side 128" in found.advice[1]
