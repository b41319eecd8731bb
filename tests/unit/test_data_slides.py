"""Whole-slide images: packed as tiles by OpenSlide, compared with what tifffile reads of the same files."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.pixels.decode import decode_box
from dataloaders.pixels.depth import RGB
from dataloaders.source import DamagedSampleError
from dataloaders.sources.slides import SlideFolder, SlideImage
from setformer_dist.core.errors import ConfigError, DataError, SetformerError

APERIO = "Aperio Image Library v12.0\n700x500 [0,0 700x500] (256x256) JPEG/RGB Q=95|AppMag = 20|MPP = 0.5"


def picture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, (rows + columns) // 4 % 256], 2).astype(np.uint8)


def write_slide(path: Path, height: int = 500, width: int = 700, aperio: bool = False) -> np.ndarray:
    """Write a slide of two levels, the second half as large; return the pixels of the first as they decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture(height, width)
    how = {"tile": (256, 256), "compression": "jpeg", "compressionargs": {"level": 95}, "photometric": "rgb"}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, description=APERIO if aperio else "", metadata=None, **how)
        if aperio:  # Aperio's second page is a thumbnail
            file.write(np.ascontiguousarray(pixels[::4, ::4]), description=APERIO, metadata=None)
        small = np.ascontiguousarray(pixels[::2, ::2])
        file.write(small, description=APERIO if aperio else "", subfiletype=0 if aperio else 1, metadata=None, **how)
    return tifffile.imread(path, key=0)


@pytest.mark.parametrize("aperio", [True, False])
def test_slides_are_packed_as_tiles_that_hold_their_pixels(tmp_path: Path, aperio: bool) -> None:
    suffix = "svs" if aperio else "tif"
    wanted = write_slide(tmp_path / "slides" / "tumour" / f"a.{suffix}", aperio=aperio)
    write_slide(tmp_path / "slides" / "normal" / "deep" / f"b.{suffix}", 300, 260, aperio)
    pack_image_folder(tmp_path / "slides", tmp_path / "packed" / "train", PackOptions(tiles=128, slides=0))
    source = open_source(str(tmp_path / "packed"), "train", DataConfig(root=str(tmp_path / "packed")))
    assert source.classes == ("normal", "tumour")
    assert [source.size(i) for i in range(2)] == [(300, 260), (500, 700)]
    box = (90, 200, 300, 333)
    found = decode_box(source.read(1).image, box, (500, 700), RGB)
    part = wanted[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    assert np.abs(found.astype(int) - part).mean() < 1.5  # JPEG of quality 95 once more

    slide = SlideImage(str(tmp_path / "slides" / "tumour" / f"a.{suffix}"), 0)
    assert np.abs(slide.window(box).astype(int) - part).max() <= 3  # two decoders of the same JPEG tiles


def test_a_level_is_chosen_and_its_windows_are_of_that_level(tmp_path: Path) -> None:
    write_slide(tmp_path / "c" / "a.tif")
    small = tifffile.imread(tmp_path / "c" / "a.tif", key=1)
    slide = SlideImage(str(tmp_path / "c" / "a.tif"), 1)
    assert slide.content != SlideImage(str(tmp_path / "c" / "a.tif"), 0).content
    assert slide.shape == (250, 350, 3)
    found = slide.window((100, 200, 64, 64))
    assert np.abs(found.astype(int) - small[100:164, 200:264]).max() <= 3
    pack_image_folder(tmp_path, tmp_path / "packed", PackOptions(tiles=128, slides=1, split=None))
    source = open_source(str(tmp_path), "packed", DataConfig(root=str(tmp_path)))
    assert source.size(0) == (250, 350)
    with pytest.raises(DamagedSampleError, match=r"has no level 2: its 2 are 0 to 1"):
        SlideImage(str(tmp_path / "c" / "a.tif"), 2)


def test_slides_without_class_folders_are_of_one_class(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tif")
    assert SlideFolder(tmp_path, 0).classes == ("unlabelled",)
    write_slide(tmp_path / "c" / "b.tif")
    with pytest.raises(DataError, match=r"a\.tif in .* is in no class folder, and other slides are"):
        SlideFolder(tmp_path, 0)


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("a.tif", lambda data: data[: len(data) * 2 // 3], r"a\.tif is not a whole slide|is damaged"),
        ("a.svs", lambda data: b"\0" * 100, r"a\.svs does not begin as a slide of one file does"),
        ("a.svs", lambda data: b"II*\0" + b"\xff" * 100, r"a\.svs is not a whole slide"),
        ("a.tif", lambda data: data.replace(data[2000:6000], bytes(4000)), r"is damaged|not a whole slide"),
    ],
)
def test_damaged_slides_are_refused_by_name(tmp_path: Path, name: str, harm, says: str) -> None:
    path = tmp_path / "c" / name
    write_slide(path)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(SetformerError, match=says):
        pack_image_folder(tmp_path / "c", tmp_path / "packed", PackOptions(tiles=128, slides=0))
    assert not (tmp_path / "packed" / "index.json").exists()


def test_slides_that_name_other_files_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.mrxs").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.mrxs is MIRAX, whose files name others, which are not opened"):
        SlideFolder(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"--slides reads images .* give --tiles"):
        PackOptions(slides=0)


def test_what_a_scanner_left_out_is_background(tmp_path: Path) -> None:
    path = tmp_path / "c" / "a.svs"
    write_slide(path, aperio=True)
    with tifffile.TiffFile(path, mode="r+b") as file:  # Aperio leaves tiles out by a size of 0
        counts = list(file.pages[0].dataoffsets), list(file.pages[0].databytecounts)
        tag = file.pages[0].tags["TileByteCounts"]
        tag.overwrite([0, *counts[1][1:]])
    seen = SlideImage(str(path), 0).window((0, 0, 256, 300))
    assert (seen[:250, :250] == 255).all()
    assert not (seen[:, 270:] == 255).all()


def test_tiles_of_a_slide_are_jpeg_files(tmp_path: Path) -> None:
    write_slide(tmp_path / "c" / "a.tif")
    pack_image_folder(tmp_path / "c", tmp_path / "packed", PackOptions(tiles=256, slides=0, quality=80))
    with tarfile.open(next((tmp_path / "packed").glob("*.tar"))) as tar:
        tiles = [member for member in tar.getmembers() if member.name.endswith(".jpg")]
        assert len(tiles) == 6
        assert simplejpeg.decode_jpeg(tar.extractfile(tiles[-1]).read()).shape == (244, 188, 3)
