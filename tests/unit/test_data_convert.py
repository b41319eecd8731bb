"""Conversion between containers: same order, labels, classes and bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from dataloaders.beton.reader import open_beton
from dataloaders.packing.convert import convert, pack_beton
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.pixels.decode import decode
from dataloaders.sources.shards import open_split
from setformer_dist.core.errors import ConfigError, DataError


def image(number, size=(32, 24), form="JPEG"):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


@pytest.fixture
def source(tmp_path):
    for i in range(9):
        folder = tmp_path / "s" / ("ant", "bee", "cow.boy")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(image(i, (32 + i, 24)))
    return tmp_path / "s"


@pytest.fixture
def packed(source, tmp_path):
    pack_image_folder(source, tmp_path / "packed", PackOptions(shuffle_seed=5))
    return tmp_path / "packed"


def contents(split):
    return [(split.read(i).image, int(split.labels(np.array([i]))), split.size(i)) for i in range(split.num_samples)]


@pytest.mark.parametrize("workers", [0, 3])
def test_round_trip_is_byte_for_byte(packed, tmp_path, workers):
    convert(packed, tmp_path / "x.beton", workers=workers)
    beton = open_beton(tmp_path / "x.beton")
    split = open_split(packed)
    assert beton.classes == split.classes == ("ant", "bee", "cow.boy")
    assert contents(beton) == contents(split)
    convert(tmp_path / "x.beton", tmp_path / "back")
    assert (tmp_path / "back" / "shard-000000.tar").read_bytes() == (packed / "shard-000000.tar").read_bytes()
    assert open_split(tmp_path / "back").classes == split.classes


def test_raw_mode_keeps_pixels(packed, tmp_path):
    seen = []
    convert(packed, tmp_path / "raw.beton", raw=0, workers=2, on_start=seen.append)
    split, raw = open_split(packed), open_beton(tmp_path / "raw.beton")
    assert seen == [9]
    for i in range(9):
        assert np.array_equal(raw.read(i).image, decode(split.read(i).image))
    convert(tmp_path / "raw.beton", tmp_path / "png")
    png = open_split(tmp_path / "png")
    for i in range(9):
        assert np.array_equal(decode(png.read(i).image), raw.read(i).image)
    convert(packed, tmp_path / "small.beton", raw=16)
    small = open_beton(tmp_path / "small.beton")
    assert all(max(small.size(i)) == 16 for i in range(9))


def test_folders_are_packed_straight_to_beton(source, tmp_path):
    result = pack_beton(source, tmp_path / "x.beton", PackOptions(workers=2))
    assert (result.samples, result.classes, result.rejected) == (9, ("ant", "bee", "cow.boy"), [])
    pack_image_folder(source, tmp_path / "shards")
    assert contents(open_beton(tmp_path / "x.beton")) == contents(open_split(tmp_path / "shards"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "shards", "x.beton", "x.beton.index.safetensors"]


def test_damaged_images_fail_or_are_left_out(source, tmp_path):
    (source / "ant" / "3.jpg").write_bytes(image(3)[:300])
    with pytest.raises(DataError, match=r"1 of 9 images cannot be packed(.|\n)*ant/3.jpg"):
        pack_beton(source, tmp_path / "x.beton", PackOptions())
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    result = pack_beton(source, tmp_path / "x.beton", PackOptions(skip_bad=True))
    assert (result.samples, [name for name, _ in result.rejected]) == (8, ["ant/3.jpg"])


def test_what_cannot_be_is_refused(packed, source, tmp_path):
    with pytest.raises(ConfigError, match="--raw stores pixels"):
        convert(packed, tmp_path / "folder", raw=64)
    with pytest.raises(DataError, match="does not exist"):
        convert(tmp_path / "none", tmp_path / "x.beton")
    convert(packed, tmp_path / "x.beton")
    before = (tmp_path / "x.beton").read_bytes()
    with pytest.raises(DataError, match="exists: name another file, or replace it with --force"):
        convert(packed, tmp_path / "x.beton")
    convert(packed, tmp_path / "x.beton", force=True)
    assert (tmp_path / "x.beton").read_bytes() == before
    (tmp_path / "d.beton").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        convert(packed, tmp_path / "d.beton")


def test_masks_do_not_go_into_beton(tmp_path):
    for folder, form in (("images", "JPEG"), ("masks", "PNG")):
        (tmp_path / "m" / folder).mkdir(parents=True)
        mask = Image.fromarray(np.ones((24, 32), np.uint8))
        data = io.BytesIO()
        mask.save(data, "PNG")
        (tmp_path / "m" / folder / f"a.{form.lower()}").write_bytes(
            image(0, form=form) if folder == "images" else data.getvalue()
        )
    pack_image_folder(tmp_path / "m", tmp_path / "p", PackOptions(masks="masks"))
    with pytest.raises(ConfigError, match=r"a \.beton file holds no mask"):
        convert(tmp_path / "p", tmp_path / "x.beton")
