"""TIFF files of any depth and number of bands: pixel by pixel as tifffile and PIL read them, and refused in a sentence.

The files are made here; those of real cameras and satellites were compared once (docs/data.md).
"""

import io
import itertools

import numpy as np
import PIL.Image
import pydantic
import pytest
import torch

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.intake import _mask_values
from dataloaders.pixels import tiff
from dataloaders.pixels.decode import UndecodableError, decode, decode_box, image_size, natural, unfit
from dataloaders.pixels.depth import RGB, PixelFormat
from dataloaders.pixels.transforms import check_pixels, decode_for_eval
from dataloaders.reading.device import Prepare, pictures_of
from dataloaders.reading.loading import EvalLoading, Request, TrainLoading, answer
from launch.run.inputs import ImageInputs
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import ModelConfig

tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")

HEIGHT, WIDTH = 150, 210


def pixels_of(bands, numbers, height=HEIGHT, width=WIDTH, seed=0):
    """Smooth enough for JPEG, and different in every band and corner."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / (7 + band) + seed) + np.cos(x / (11 + band)) for band in range(bands)]
    values = (np.stack(waves, axis=-1) + 2) / 4
    if numbers.startswith("float"):
        return (values * 3000 - 500).astype(numbers)
    return (values * np.iinfo(numbers).max).astype(numbers)


def written(pixels, planar=False, **options):
    out = io.BytesIO()
    data = np.moveaxis(pixels, -1, 0) if planar else pixels
    layout = {"planarconfig": "separate" if planar else "contig"}
    if pixels.shape[2] == 1:
        data, layout = pixels[..., 0], {}
    tifffile.imwrite(out, data, **{"photometric": "minisblack", **layout, **options})
    return out.getvalue()


def one_and_all(data, form):
    """Decode all of an image, and check a part of it against that."""
    whole = decode(data, form=form)
    for box in ((0, 0, 1, 1), (37, 51, 64, 100), (HEIGHT - 9, WIDTH - 5, 9, 5), (0, 0, HEIGHT, WIDTH)):
        top, left, height, width = box
        part = decode_box(data, box, (HEIGHT, WIDTH), form)
        assert np.array_equal(part, whole[top : top + height, left : left + width])
    return whole


LAYOUTS = {
    "strips": {"rowsperstrip": 16},
    "one strip": {"rowsperstrip": 4096},
    "tiles": {"tile": (64, 32)},
    "large tile": {"tile": (256, 256)},
    "planes": {"planar": True, "tile": (32, 64)},
    "planes in strips": {"planar": True, "rowsperstrip": 50},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bands", "numbers"), [(2, "uint8"), (1, "uint16"), (12, "uint16"), (3, "float32")])
def test_every_layout_is_read_to_the_last_bit(layout, bands, numbers):
    pixels = pixels_of(bands, numbers)
    if LAYOUTS[layout].get("planar") and bands == 1:
        pytest.skip("one band has no planes")
    data = written(pixels, **LAYOUTS[layout])
    form = PixelFormat(bands, numbers)
    assert image_size(data) == (HEIGHT, WIDTH)
    found = one_and_all(data, form)
    assert found.dtype == numbers
    assert np.array_equal(found, pixels)


@pytest.mark.parametrize("compression", ["lzw", "deflate", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize("options", [{}, {"predictor": True}, {"byteorder": ">"}, {"bigtiff": True}])
@pytest.mark.parametrize("numbers", ["uint16", "float32"])
def test_every_compression_is_read_to_the_last_bit(compression, options, numbers):
    pixels = pixels_of(4, numbers)
    if compression == "packbits" and "predictor" in options:
        options = {}
    data = written(pixels, compression=compression, tile=(48, 80), **options)
    assert np.array_equal(one_and_all(data, PixelFormat(4, numbers)), pixels)


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_tiles_of_jpeg_are_those_of_tifffile(photometric):
    options = {"subsampling": (2, 2)} if photometric == "ycbcr" else {}
    data = written(pixels_of(3, "uint8"), compression="jpeg", tile=(64, 64), photometric=photometric, **options)
    found = one_and_all(data, RGB)
    assert np.array_equal(found, tifffile.imread(io.BytesIO(data)))


def test_rgb_in_jpeg_is_not_taken_for_ycbcr_where_the_tile_does_not_say_it():
    """What libtiff writes: no mark of Adobe's in the tiles, only the tag of the file says that they are RGB."""
    pixels = pixels_of(3, "uint8", 64, 64)
    options = {"compression": "jpeg", "tile": (64, 64), "photometric": "rgb"}
    data = bytearray(written(pixels, **options, compressionargs={"outcolorspace": "rgb", "level": 100}))
    assert tiff.header(bytes(data)).photometric == 2
    if (mark := data.find(b"\xff\xee\x00\x0eAdobe")) >= 0:
        data[mark + 1] = 0xFE  # a comment
    frame = data.index(b"\xff\xc0")
    scan = data.index(b"\xff\xda")
    for number in range(3):
        data[frame + 10 + 3 * number] = number + 1
        data[scan + 5 + 2 * number] = number + 1
    assert np.abs(decode(bytes(data)).astype(int) - pixels).max() < 8


@pytest.mark.parametrize("numbers", ["int16", "uint8", "float16", "float64"])
def test_other_numbers_are_read_as_floats(numbers):
    pixels = pixels_of(2, numbers)
    found = decode(written(pixels, tile=(64, 64)), form=PixelFormat(2, "float32"))
    assert found.dtype == np.float32
    assert np.array_equal(found, pixels.astype(np.float32))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate"])
def test_what_pillow_converts_is_as_it_was(mode, compression):
    image = PIL.Image.fromarray(pixels_of(3, "uint8")).convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF", compression=compression)
    found = decode(out.getvalue())
    assert np.array_equal(found, np.asarray(image.convert("RGB")))
    assert unfit(out.getvalue(), RGB) is None


def test_grey_jpeg_in_tiff_becomes_three_equal_bands():
    data = written(pixels_of(1, "uint8"), compression="jpeg", tile=(64, 64))
    found = decode(data)
    assert found.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(found[..., 0], tifffile.imread(io.BytesIO(data)))
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize("compression", [None, "lzw", "zstd", "jpeg"])
def test_grey_that_counts_from_white_is_turned_round_whoever_reads_it(compression):
    """One photograph, saved in four ways, is one photograph: PIL reads the first two, tifffile the others."""
    grey = pixels_of(1, "uint8")
    data = written(grey, compression=compression, tile=(64, 64), photometric="miniswhite")
    assert np.array_equal(one_and_all(data, RGB), np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")))
    if compression != "jpeg":
        assert np.array_equal(decode(data, form=PixelFormat(1, "uint8")), grey)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "lzw", "zstd"])
def test_pixels_are_read_as_stored_however_they_ask_to_be_shown(compression, orientation):
    pixels = pixels_of(3, "uint8")
    options = {"photometric": "rgb", "compression": compression, "extratags": [(274, 3, 1, orientation, True)]}
    data = written(pixels, **options)
    assert np.array_equal(one_and_all(data, RGB), pixels)
    assert image_size(data) == (HEIGHT, WIDTH)


def test_words_in_a_tiff_do_not_turn_it():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    pixels = pixels_of(3, "uint8")
    data = written(pixels, photometric="rgb", extratags=[(700, 1, len(xmp), xmp, True)])
    assert np.asarray(PIL.Image.open(io.BytesIO(data))).shape == (WIDTH, HEIGHT, 3)  # PIL alone does
    assert np.array_equal(one_and_all(data, RGB), pixels)


def test_masks_are_not_turned():
    classes = np.arange(HEIGHT * WIDTH, dtype=np.uint32).reshape(HEIGHT, WIDTH) % 7
    data = written(classes[..., None].astype(np.uint8), extratags=[(274, 3, 1, 6, True)])
    _, values = _mask_values(data)
    assert np.array_equal(values, classes)


@pytest.mark.parametrize("tag", [(254, 4, 1, 1, True), (255, 3, 1, 2, True)])
def test_a_reduced_copy_is_not_taken_for_the_image(tag):
    kind, value = tag[0], tag[3]
    options = {"subfiletype": value} if kind == 254 else {"extratags": [tag]}
    data = written(pixels_of(3, "uint8"), photometric="rgb", **options)
    with pytest.raises(UndecodableError, match="first page is a reduced copy"):
        decode(data, form=RGB)
    with pytest.raises(UndecodableError, match="first page is a reduced copy"):
        image_size(data)


def test_png_of_16_bits_keeps_them_where_the_config_says_so(tmp_path):
    colour = pixels_of(3, "uint16")
    data = imagecodecs.png_encode(colour)
    assert np.array_equal(decode(data, form=PixelFormat(3, "uint16")), colour)
    assert np.array_equal(decode(data), colour >> 8)
    grey = imagecodecs.png_encode(np.ascontiguousarray(colour[..., 0]))
    assert np.array_equal(decode(grey, form=PixelFormat(1, "uint16")), colour[..., :1])


# ------------------------------------------------------------------------------------------------ refused in a sentence


@pytest.mark.parametrize(("photometric", "bands", "name"), [("cielab", 3, "CIELab"), ("separated", 4, "CMYK")])
def test_bands_that_are_no_rgb_are_refused_and_not_taken_for_it(photometric, bands, name):
    data = written(pixels_of(bands, "uint8"), compression="zstd", photometric=photometric)
    with pytest.raises(UndecodableError, match=f"whose bands are {name}: convert it"):
        decode(data)
    assert decode(written(pixels_of(bands, "uint8"), compression="lzw", photometric=photometric)).shape[2] == 3


def test_ycbcr_outside_jpeg_is_refused_in_every_format():
    data = written(pixels_of(3, "uint8"), compression="zstd", photometric="ycbcr", subsampling=(1, 1))
    for form in (RGB, PixelFormat(3, "float32")):
        with pytest.raises(UndecodableError, match="whose bands are YCbCr: convert it"):
            decode(data, form=form)


@pytest.mark.parametrize("compression", ["lzw", "zstd"])
def test_a_fourth_band_that_is_no_transparency_is_not_left_out_in_silence(compression):
    """Red, green, blue and near infrared: whoever takes the first three should say so."""
    pixels = pixels_of(4, "uint8")
    data = written(pixels, compression=compression, photometric="rgb", extrasamples=[0])
    words = "4 bands of uint8, and 3 bands of uint8 are read .*give data.mean and data.std 4 numbers"
    with pytest.raises(UndecodableError, match=words):
        decode(data)
    assert "4 bands" in str(unfit(data, RGB))
    assert np.array_equal(decode(data, form=PixelFormat(4, "uint8")), pixels)


@pytest.mark.parametrize("compression", ["jpeg2000", "webp", "lerc", "jpegxl"])
def test_a_compression_that_hides_damage_is_named(compression):
    data = written(pixels_of(3, "uint8"), compression=compression, tile=(64, 64), photometric="rgb")
    with pytest.raises(UndecodableError, match=r"TIFF compressed by (JPEG 2000|WebP|LERC|JPEG XL), which is not read"):
        decode(data)


def test_an_unknown_compression_is_named():
    data = bytearray(written(pixels_of(4, "uint16")))
    at = data.index(b"\x03\x01\x03\x00\x01\x00\x00\x00")  # the tag: 259, SHORT, 1
    data[at + 8 : at + 10] = (65535).to_bytes(2, "little")
    with pytest.raises(UndecodableError, match="TIFF compressed by compression 65535, which is not read"):
        decode(bytes(data), form=PixelFormat(4, "uint16"))


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd", "lzma", "jpeg"])
@pytest.mark.parametrize("layout", ["strips", "tiles"])
def test_a_tile_or_strip_cut_short_is_refused(compression, layout):
    numbers, bands = ("uint8", 3) if compression == "jpeg" else ("uint16", 4)
    options = {"photometric": "rgb"} if compression == "jpeg" else {}
    data = written(pixels_of(bands, numbers), compression=compression, **LAYOUTS[layout], **options)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        number = len(page.dataoffsets) // 2
        start, size = page.dataoffsets[number], page.databytecounts[number]
        where = page.tags[325 if page.is_tiled else 279]
        each, place = where.valuebytecount // where.count, where.valueoffset
    form = PixelFormat(bands, numbers)
    decode(data, form=form)
    short = bytearray(data)  # its own count says that it ends early
    short[place + each * number : place + each * (number + 1)] = (size // 2).to_bytes(each, "little")
    with pytest.raises(UndecodableError, match=rf"(tile|strip) {number} of \d+ of the TIFF is cut short"):
        decode(bytes(short), form=form)
    ended = data[: max(start + size // 2, 0)]  # the file ends within it; its tags, at the front, say otherwise
    with pytest.raises(UndecodableError, match=r"cut short|not a whole image"):
        decode(ended, form=form)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_anywhere_is_never_shown_half(layout):
    data = written(pixels_of(3, "uint16", 40, 50), compression="deflate", **LAYOUTS[layout])
    form = PixelFormat(3, "uint16")
    whole = decode(data, form=form)
    for end in itertools.chain(range(0, 600, 7), range(600, len(data) - 1, max(1, len(data) // 60))):
        try:
            found = decode(data[:end], form=form)
        except UndecodableError:
            continue
        assert np.array_equal(found, whole)  # what is cut off was no pixel


def test_a_missing_tile_is_refused():
    data = bytearray(written(pixels_of(4, "uint16"), tile=(64, 64)))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages[0].tags[325]
    data[tag.valueoffset : tag.valueoffset + tag.valuebytecount // tag.count] = bytes(tag.valuebytecount // tag.count)
    with pytest.raises(UndecodableError, match=r"tile 0 of \d+ of the TIFF is cut short or missing"):
        decode(bytes(data), form=PixelFormat(4, "uint16"))


def test_numbers_that_are_none_are_refused():
    pixels = pixels_of(2, "float32")
    pixels[70, 100, 1] = np.nan
    with pytest.raises(UndecodableError, match="values that are no numbers"):
        decode(written(pixels), form=PixelFormat(2, "float32"))


@pytest.mark.parametrize("claim", [(40000, 40000), (1 << 31, 1 << 31)])
def test_a_bomb_is_refused_before_room_is_made(claim):
    data = bytearray(written(pixels_of(4, "uint16"), tile=(64, 64)))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        places = [page.tags[256].valueoffset, page.tags[257].valueoffset]
    for place, side in zip(places, claim, strict=True):
        kind = int.from_bytes(data[place - 6 : place - 4], "little")
        data[place : place + (2 if kind == 3 else 4)] = min(side, 65535 if kind == 3 else side).to_bytes(
            2 if kind == 3 else 4, "little"
        )
    with pytest.raises(UndecodableError, match=r"more than the 178956970 that are decoded \(data.max_pixels\)"):
        decode(bytes(data), form=PixelFormat(4, "uint16"))


def test_bands_and_depth_that_differ_are_named_with_the_repair():
    data = written(pixels_of(12, "uint16"))
    with pytest.raises(UndecodableError, match=r"12 bands of uint16, and 3 bands of uint8 are read .*set data.pixels"):
        decode(data)
    with pytest.raises(UndecodableError, match=r"12 bands of uint16, and 4 bands of uint16 are read .*12 numbers"):
        decode(data, form=PixelFormat(4, "uint16"))
    with pytest.raises(UndecodableError, match=r"has 1 band of int32, .*: convert it \(setformer data"):
        decode(written(pixels_of(1, "int32")), form=PixelFormat(1, "float32"))
    with pytest.raises(UndecodableError, match=r'2 bands of int16, .* or set data.pixels = "float32" and .* 2 numbers'):
        decode(written(pixels_of(2, "int16")), form=PixelFormat(2, "uint16"))
    with pytest.raises(UndecodableError, match=r"2 bands of int16, .*: give data.mean and data.std 2 numbers"):
        decode(written(pixels_of(2, "int16")), form=PixelFormat(3, "float32"))


def test_without_the_extra_a_sentence_names_it(monkeypatch):
    data = written(pixels_of(4, "uint16"))
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ConfigError, match=r'pip install "setformer_dist\[tiff\]"'):
        decode(data, form=PixelFormat(4, "uint16"))
    assert image_size(data) == (HEIGHT, WIDTH)
    assert natural(data) == PixelFormat(4, "uint16")


# ------------------------------------------------------------------------------------------------------ in the pipeline


def folder_of(tmp_path, bands=4, numbers="uint16", count=6):
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
    for number in range(count):
        data = written(pixels_of(bands, numbers, 60, 80, number), compression="deflate", tile=(32, 32))
        (tmp_path / "train" / "ab"[number % 2] / f"{number}.tif").write_bytes(data)
    return tmp_path


def config_of(root, bands=4, numbers="uint16", **kwargs):
    values = {"mean": [0.5] * bands, "std": [0.25] * bands}
    return DataConfig(root=str(root), train="train", val="train", cache=str(root / "cache"), image_size=32,
                      pixels=numbers, **{**values, **kwargs})  # fmt: skip


def test_16_bits_reach_the_device_and_are_normalised_there(tmp_path):
    config = config_of(folder_of(tmp_path), augment={"crop": "window"})
    source = open_source(config.root, "train", config)
    check_pixels(source, config.form)
    request = Request(np.arange(4), np.zeros(4, np.int64), shape=(32, 32))
    loaded = answer(TrainLoading(source, config, seed=1), request)
    assert loaded.error is None
    assert loaded.images.dtype == torch.uint16
    assert loaded.images.shape == (4, 4, 32, 32)
    assert len(np.unique(loaded.images.numpy())) > 2000  # not 256
    batch = MicroBatch(loaded.images, torch.zeros(4, dtype=torch.int64), torch.ones(4), torch.arange(4))
    images, _ = Prepare(config, 2, "cpu")(batch, train=True)
    wanted = (loaded.images.numpy().astype(np.float64) / 65535 - 0.5) / 0.25
    np.testing.assert_allclose(images.numpy(), wanted, atol=1e-6)
    assert pictures_of(loaded.images, config).shape == (4, 3, 32, 32)


@pytest.mark.parametrize("crop", ["resized", "window", "none"])
@pytest.mark.parametrize("numbers", ["uint16", "float32"])
def test_every_crop_takes_bands_of_any_depth(tmp_path, crop, numbers):
    config = config_of(folder_of(tmp_path, 5, numbers), 5, numbers, augment={"crop": crop, "erasing": 1.0})
    source = open_source(config.root, "train", config)
    request = Request(np.arange(3), np.zeros(3, np.int64), shape=(32, 32))
    loaded = answer(TrainLoading(source, config, seed=1), request)
    assert loaded.error is None
    assert loaded.bad == []
    again = answer(TrainLoading(source, config, seed=1), request)
    assert torch.equal(loaded.images, again.images)
    shown = answer(EvalLoading(source, config, 3), Request(np.arange(3)))
    assert shown.error is None
    assert shown.images.shape == (3, 5, 32, 32)


def test_a_resized_image_of_16_bits_is_the_float_one_rounded(tmp_path):
    pixels = pixels_of(3, "uint16", 60, 80)
    config = config_of(tmp_path, 3, augment={"crop": "none"})
    floats = config_of(tmp_path, 3, "float32", augment={"crop": "none"})
    found = decode_for_eval(pixels, config).numpy().astype(np.float64)
    wanted = decode_for_eval(pixels.astype(np.float32), floats).numpy()
    assert np.abs(found - wanted.clip(0, 65535)).max() <= 0.5
    assert found.max() > 255


def test_wrong_bands_are_refused_before_training(tmp_path):
    root = folder_of(tmp_path)
    with pytest.raises(ConfigError, match=r"sample 0 .* has 4 bands of uint16, and 3 bands of uint8 are read"):
        ImageInputs(config_of(root, 3, "uint8")).open(str(root), "train")


def test_the_model_follows_the_bands_and_contradictions_are_refused(tmp_path):
    inputs = ImageInputs(config_of(tmp_path, 4))
    model = inputs.build_model(ModelConfig(name="setformer_nano"), 2, {}, 0)
    assert model(torch.zeros(1, 4, 32, 32)).shape == (1, 2)
    with pytest.raises(ConfigError, match=r"model.args.in_chans = 3, and images are read with 4 bands"):
        inputs.build_model(ModelConfig(name="setformer_nano", args={"in_chans": 3}), 2, {}, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"std": [1.0]}, "mean names 4 bands and std names 1"),
        ({"augment": {"randaugment_ops": 2}}, "augment.randaugment_ops = 2 changes colours of RGB images of 8 bits"),
        ({"augment": {"color_jitter": 0.4}}, "augment.color_jitter = 0.4 changes colours of RGB images of 8 bits"),
        ({"engine": "ffcv"}, 'engine = "ffcv" reads RGB images of 8 bits'),
        ({"mean": [1500.0] * 4}, "in units of the full range: divide by 65535"),
    ],
)
def test_configs_that_contradict_the_pixels_are_refused(tmp_path, change, words):
    with pytest.raises(pydantic.ValidationError, match=words):
        config_of(tmp_path, **change)


def test_the_header_is_read_without_more_of_the_file():
    data = written(pixels_of(12, "uint16"), tile=(64, 64))
    found = tiff.header(data[:4096])
    assert (found.bands, found.numbers, found.tile) == (12, "uint16", (64, 64))
