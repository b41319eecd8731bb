"""Masks keep their class numbers, or are refused."""

from __future__ import annotations

import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.inspection import mask_values
from dataloaders.packing.intake import _mask_values
from dataloaders.pixels.decode import decode_mask
from dataloaders.pixels.depth import MAX_PIXELS, RGB, PixelFormat, UndecodableError
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from launch.run.objective import check_parts
from launch.testing.commands import Ended, setformer
from setformer_dist.core.ranks import RankInfo
from setformer_dist.tasks.segmentation import Segmentation

SHAPE = (40, 60)
CLASSES = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)


def grey_png(classes: npt.NDArray[np.uint8], bits: int) -> bytes:
    """Return a PNG of grey pixels with fewer than 8 bits, which PIL cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = classes.shape
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    packed = (classes.reshape(height, -1, 8 // bits) << shifts).sum(-1, dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def packed(folder: Path, name: str, mask: bytes | Image.Image, *more: str) -> Ended:
    for part in ("images", "annotations"):
        (folder / "source" / part).mkdir(parents=True)
    Image.new("RGB", SHAPE[::-1]).save(folder / "source" / "images" / "a.png")
    for path in (folder / "source" / "annotations" / each for each in (name, *more)):
        path.write_bytes(mask) if isinstance(mask, bytes) else mask.save(path)
    return setformer("data", "pack", str(folder / "source"), str(folder / "packed"), "--masks", "annotations")


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_keep_their_classes(tmp_path: Path, bits: int) -> None:
    data = grey_png(CLASSES, bits)
    assert (decode_mask(data, SHAPE) == CLASSES).all()
    assert (mask_values(data) == CLASSES).all()
    done = packed(tmp_path, "a.png", data)
    assert done.code == 0, done.err
    assert "of 3 classes" in done.err + done.out


def test_masks_of_large_images_are_read_where_the_limit_of_images_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataloaders.pixels.decode._MOST_BYTES", 4 * CLASSES.size - 1)
    data = grey_png(CLASSES, 8)
    raised = PixelFormat(max_pixels=2 * MAX_PIXELS)
    for read in (lambda form: decode_mask(data, SHAPE, form=form), lambda form: _mask_values(data, None, form)[1]):
        with pytest.raises(UndecodableError, match=r"data\.max_pixels, or --max-pixels when packing, grows"):
            read(RGB)
        assert (read(raised) == CLASSES).all()


def test_a_palette_is_no_class(tmp_path: Path) -> None:
    image = Image.fromarray(CLASSES).convert("P")
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    image.save(tmp_path / "a.png")
    assert (mask_values((tmp_path / "a.png").read_bytes()) == CLASSES).all()


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("a.jpg", (), "its mask is a JPEG file, which changes class numbers"),
        ("a.png", ("a.tif",), "are masks of the same image: remove one of them"),
    ],
)
def test_masks_whose_classes_are_not_certain_are_refused(
    tmp_path: Path, name: str, more: tuple[str, ...], said: str
) -> None:
    done = packed(tmp_path, name, Image.fromarray(CLASSES), *more)
    assert done.code == 3
    assert said in done.err
    assert not (tmp_path / "packed").exists()


def test_a_mask_of_a_class_that_the_data_do_not_name_is_damaged(tmp_path: Path) -> None:
    for sample, (top, value) in enumerate(((0, 1), (0, 9), (255, 1), (255, 0))):
        mask = np.full((16, 16), value, np.uint8)
        mask[0, 0] = top
        Image.fromarray(mask).save(tmp_path / f"{sample}.mask.png")
        Image.fromarray(mask).convert("RGB").save(tmp_path / f"{sample}.png")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "classes.txt").write_text("road\nsky\n")
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        for path in sorted(tmp_path.glob("*.png")):
            tar.add(path, path.name)
    config = DataConfig(
        root=str(tmp_path), train="shards", val="shards", image_size=16, cache=str(tmp_path / "cache"),
        eval_view="whole", bad_validation="zero_weight", augment=AugmentConfig(crop="resized"),
    )  # fmt: skip
    shown = list(ShardEvalStream(open_source(str(tmp_path), "shards", config), config, RankInfo(), 4).micro_batches())
    assert shown[0].weights.tolist() == [1, 0, 1, 1]
    assert "its mask has class 9, but there are 2 classes (and 255 for none)" in shown[0].substitutions[0]
    stream = ShardTrainStream(open_source(str(tmp_path), "shards", config), config, 0, RankInfo(), 4, 4)
    batch = next(iter(stream.micro_batches(0)))
    assert len(batch.substitutions) == 1
    assert "its mask has class 9" in batch.substitutions[0]


def test_samples_without_a_mask_among_others_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "0.mask.png")
    for sample in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{sample}.png")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "classes.txt").write_text("road\nsky\n")
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        for path in sorted(tmp_path.glob("*.png")):
            tar.add(path, path.name)
    config = DataConfig(root=str(tmp_path), cache=str(tmp_path / "cache"))
    source = open_source(str(tmp_path), "shards", config)
    check_parts(Segmentation({}, source.classes), [source])
    assert "2 of 3 samples of" in caplog.text
    assert "have no masks: they are read, and nothing is learnt" in caplog.text


def test_masks_without_a_class_are_no_data(tmp_path: Path) -> None:
    done = packed(tmp_path, "a.png", Image.new("L", SHAPE[::-1], 255))
    assert done.code == 3
    assert "no pixel of the masks has a class" in done.err
    assert not (tmp_path / "packed").exists()
