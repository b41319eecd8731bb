"""TIFF and GeoTIFF, also of 16 bits, floats and any number of bands: the header by ourselves, the pixels by tifffile.

    header        sizes, bands and numbers of the first page; needs nothing but the bytes, so folders are indexed and
                  wrong bands refused without the extra
    window        the pixels of a box; only the tiles or strips that it touches are decompressed

Strict: every tile or strip must lie within the file and decompress to all of its pixels, JPEG tiles go to libjpeg-turbo
in its strict mode, and compressions whose decoders show half a picture are refused. Numbers stay as stored; places on
the earth and values that stand for "no data" are not looked at, but what is no number (NaN) is refused. What bands mean
is asked for 8-bit RGB only: grey that counts from white is turned round, colours of other kinds are refused.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import simplejpeg

from dataloaders.pixels.depth import MAX_PIXELS, MOST_BANDS, TO_FLOAT, PixelFormat, UndecodableError, mismatch, said
from setformer_dist.core.errors import ConfigError

Box = tuple[int, int, int, int]


# Compressions whose decoders refuse what is cut short, by their numbers in the file.
_JPEG = 7
COMPRESSIONS = {
    1: "none", 5: "LZW", _JPEG: "JPEG", 8: "Deflate", 32773: "PackBits", 32946: "Deflate", 34925: "LZMA",
    50000: "Zstandard",
}  # fmt: skip

# What other numbers mean, for messages; from the registered tags and libtiff.
_OTHERS = {
    2: "CCITT", 3: "CCITT Group 3", 4: "CCITT Group 4", 6: "old JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000",
    34712: "JPEG 2000", 34887: "LERC", 34892: "lossy JPEG", 50001: "WebP", 50002: "JPEG XL",
}  # fmt: skip

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 256, 257, 258, 259, 262, 277
_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT = 284, 322, 323, 338, 339
_SUBFILE, _OLD_SUBFILE, _ORIENTATION = 254, 255, 274
_TAGS = {
    _SUBFILE, _OLD_SUBFILE,
    _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT,
}  # fmt: skip

# Type of a tag's values -> (struct code, bytes): BYTE, SHORT, LONG, LONG8.
_TYPES = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4), 16: ("Q", 8)}

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6

# What bands mean that are no RGB, for messages.
_COLOURS = {4: "a mask", 5: "CMYK", _YCBCR: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "a camera's raw"}

# (sample format, bits) -> numbers; formats: unsigned, signed, float.
_NUMBERS = {
    (1, 8): "uint8", (1, 16): "uint16", (1, 32): "uint32", (2, 8): "int8", (2, 16): "int16", (2, 32): "int32",
    (3, 16): "float16", (3, 32): "float32", (3, 64): "float64",
}  # fmt: skip


class Header(NamedTuple):
    """What the first page of a TIFF is.

    Attributes:
        height: pixels.
        width: pixels.
        bands: values of a pixel, transparency included.
        numbers: of each, as numpy names them; "12 bit" and the like where no dtype is that.
        compression: number in the file.
        photometric: what bands mean, likewise; 3 is a palette.
        extra: bands beside those colours, the last ones.
        alpha: how many of these are transparency.
        planar: whether each band is stored by itself.
        tile: (height, width) of a tile; (0, 0) in strips.
    """

    height: int
    width: int
    bands: int
    numbers: str
    compression: int
    photometric: int
    extra: int
    alpha: int
    planar: bool
    tile: tuple[int, int]


def is_tiff(data: bytes) -> bool:
    """Return whether bytes begin as a TIFF or BigTIFF does."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def header(data: bytes) -> Header:
    """Return what the first page of a TIFF says of itself.

    Raises:
        UndecodableError: it says nothing, or not within these bytes.
    """
    try:
        tags = _tags(data)
    except (struct.error, IndexError, KeyError, OverflowError):
        raise UndecodableError("it is not a whole image: the TIFF's table of tags is cut short") from None
    if not {_WIDTH, _HEIGHT} <= set(tags):
        raise UndecodableError("it is not a whole image: the TIFF does not say how large it is")
    if tags.get(_SUBFILE, (0,))[0] & 1 or tags.get(_OLD_SUBFILE, (1,))[0] == 2:
        raise UndecodableError(
            "it is a TIFF whose first page is a reduced copy of another one, and only first pages are read: convert it"
        )
    bands, bits = tags.get(_SAMPLES, (1,))[0], set(tags.get(_BITS, (1,)))
    formats = set(tags.get(_FORMAT, (1,)))
    if not 1 <= bands <= MOST_BANDS or len(bits) != 1 or len(formats) != 1:
        raise UndecodableError("it is a TIFF whose bands differ from each other in bits or kind: convert it")
    numbers = _NUMBERS.get((formats.pop(), min(bits)), f"{min(bits)} bit")
    tile = tags.get(_TILE_HEIGHT, (0,))[0], tags.get(_TILE_WIDTH, (0,))[0]
    extra = tags.get(_EXTRA, ())
    alpha = sum(kind in (1, 2) for kind in extra)
    found = Header(
        tags[_HEIGHT][0], tags[_WIDTH][0], bands, numbers, tags.get(_COMPRESSION, (1,))[0],
        tags.get(_PHOTOMETRIC, (1,))[0], len(extra), alpha, tags.get(_PLANAR, (1,))[0] == 2, tile,
    )  # fmt: skip
    if min(found.height, found.width) < 1:
        raise UndecodableError("it is not a whole image: it has no pixels")
    return found


def upright(data: bytes) -> bytes:
    """Return a TIFF that does not ask to be turned when shown: pixels are read as they are stored, in every format.

    Raises:
        UndecodableError: its table of tags is cut short.
    """
    try:
        for tag, kind, _, start, order in _entries(data, {_ORIENTATION}):
            if tag == _ORIENTATION and kind in _TYPES:
                code, size = _TYPES[kind]
                return data[:start] + struct.pack(order + code, 1) + data[start + size :]
    except (struct.error, IndexError, KeyError, OverflowError):
        raise UndecodableError("it is not a whole image: the TIFF's table of tags is cut short") from None
    return data


def _tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Return the values of the tags that are wanted here, of the first page."""
    found: dict[int, tuple[int, ...]] = {}
    for tag, kind, number, start, order in _entries(data, _TAGS):
        found[tag] = struct.unpack_from(f"{order}{number}{_TYPES[kind][0]}", data, start)
    return found


def _entries(data: bytes, wanted: set[int]) -> Iterator[tuple[int, int, int, int, str]]:
    """Yield (tag, type, number of values, where they begin, byte order) of those tags of the first page."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    word, count_code, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    (place,) = struct.unpack_from(order + word, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + count_code, data, place)
    place += struct.calcsize(order + count_code)
    inside = struct.calcsize(order + word)
    for at in range(place, place + entry * min(count, 4096), entry):
        tag, kind, number = struct.unpack_from(f"{order}HH{word}", data, at)
        if tag not in wanted:
            continue
        size = _TYPES[kind][1]
        if not 1 <= number <= MOST_BANDS:
            raise IndexError
        start = at + 4 + inside
        if size * number > inside:
            (start,) = struct.unpack_from(order + word, data, start)
        yield tag, kind, number, start, order


def refuse(found: Header, form: PixelFormat) -> None:
    """Refuse a TIFF that the format does not read, before anything is allocated.

    Raises:
        UndecodableError: naming its compression, bands or size.
    """
    if found.compression not in COMPRESSIONS:
        name = _OTHERS.get(found.compression, f"compression {found.compression}")
        known = ", ".join(dict.fromkeys(list(COMPRESSIONS.values())[1:]))
        raise UndecodableError(
            f"it is a TIFF compressed by {name}, which is not read strictly: convert it ({known} are read)"
        )
    _refuse_colours(found, form)
    if not is_read(found, form):
        raise UndecodableError(f"it {mismatch(found.bands, found.numbers, form)}")
    if found.height * found.width > form.max_pixels:
        raise UndecodableError(
            f"it claims {found.height} x {found.width} pixels, more than the {form.max_pixels} that are decoded "
            "(data.max_pixels)"
        )
    for side, whole in zip(found.tile, (found.height, found.width), strict=True):
        if side > 2 * whole + 4096:
            raise UndecodableError(f"it is a TIFF of {found.height} x {found.width} with larger tiles: convert it")


def _refuse_colours(found: Header, form: PixelFormat) -> None:
    """Refuse numbers that are no bands, bands that are not the colours they would be taken for, and other JPEGs."""
    if found.photometric == _PALETTE:
        raise UndecodableError("it is a TIFF with a palette, whose numbers are no bands: convert it")
    in_jpeg = found.compression == _JPEG
    known = {_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB} | ({_YCBCR} if in_jpeg else set())
    if (form.is_rgb or found.photometric == _YCBCR) and found.photometric not in known:
        name = _COLOURS.get(found.photometric, f"photometric {found.photometric}")
        raise UndecodableError(f"it is a TIFF of {COMPRESSIONS[found.compression]} whose bands are {name}: convert it")
    if in_jpeg and (found.numbers != "uint8" or not (found.planar or found.bands in (1, 3))):
        raise UndecodableError(
            f"it is a TIFF of JPEG of {said(found.bands, found.numbers)}: convert it (1 or 3 bands of uint8 are read)"
        )


def is_read(found: Header, form: PixelFormat) -> bool:
    """Return whether the bands and numbers of a TIFF are those of a format."""
    if form.is_rgb:  # grey becomes three equal bands from black to white, transparency is left out
        return found.numbers == "uint8" and found.bands - found.alpha in (1, 3)
    if form.numbers == "float32":
        return found.bands == form.bands and found.numbers in TO_FLOAT
    return form.fits(found.bands, found.numbers)


def window(data: bytes, form: PixelFormat, box: Box | None = None) -> npt.NDArray[Any]:
    """Return the pixels of a box, (h, w, C) of the format's numbers; None means the whole image.

    Args:
        data: the file's bytes.
        form: what is to be read.
        box: (top, left, height, width), inside the image.

    Raises:
        UndecodableError: the TIFF is not of this format, or a tile or strip that the box touches is not whole.
        ConfigError: the extra that reads it is not installed.
    """
    found = header(data)
    refuse(found, form)
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            pixels = _assembled(file.pages[0], data, found, box or (0, 0, found.height, found.width))
    except UndecodableError:
        raise
    except Exception as error:  # noqa: BLE001 - tifffile and the codecs raise nearly anything on damaged bytes
        raise UndecodableError(f"it is not a whole image: {_first_line(error)}") from None
    if form.is_rgb:
        colours = pixels[..., : found.bands - found.alpha]
        if found.photometric == _WHITE_IS_ZERO:
            colours = 255 - colours
        return np.ascontiguousarray(np.broadcast_to(colours, (*pixels.shape[:2], 3)))
    if form.numbers == "float32":
        pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise UndecodableError("it has values that are no numbers (NaN or infinite): fill them before training")
    return pixels


def _tifffile() -> Any:
    try:
        importlib.import_module("imagecodecs")
        return importlib.import_module("tifffile")
    except ImportError:
        raise ConfigError(
            'this TIFF is read by tifffile and imagecodecs, which are not installed: pip install "setformer_dist[tiff]"'
        ) from None


def _assembled(page: Any, data: bytes, found: Header, box: Box) -> npt.NDArray[Any]:
    """Decode the tiles or strips that a box touches, and put them together."""
    if (page.imagelength, page.imagewidth, page.samplesperpixel) != (found.height, found.width, found.bands):
        raise UndecodableError("it is not a whole image: its tags contradict each other")
    top, left, height, width = box
    pixels = np.empty((height, width, found.bands), np.dtype(found.numbers))
    strip = min(page.rowsperstrip or found.height, found.height), found.width
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else strip
    if rows * columns * found.bands > 4 * max(found.height * found.width * found.bands, MAX_PIXELS):
        raise UndecodableError(f"it is a TIFF of {found.height} x {found.width} with larger tiles: convert it")
    down, across = -(-found.height // rows), -(-found.width // columns)
    planes = found.bands if found.planar else 1
    if len(page.dataoffsets) != planes * down * across or len(page.databytecounts) != len(page.dataoffsets):
        raise UndecodableError("it is not a whole image: tiles or strips are missing")
    for plane in range(planes):
        for row in range(top // rows, -(-(top + height) // rows)):
            for column in range(left // columns, -(-(left + width) // columns)):
                number = (plane * down + row) * across + column
                y, x = row * rows, column * columns
                y0, y1 = max(y, top), min(y + rows, top + height)
                x0, x1 = max(x, left), min(x + columns, left + width)
                part = _segment(page, data, number, found, (y1 - y, x1 - x))
                bands = slice(plane, plane + 1) if planes > 1 else slice(None)
                pixels[y0 - top : y1 - top, x0 - left : x1 - left, bands] = part[y0 - y : y1 - y, x0 - x : x1 - x]
    return pixels


def _segment(page: Any, data: bytes, number: int, found: Header, least: tuple[int, int]) -> npt.NDArray[Any]:
    """Return the pixels of a tile or strip, (h, w, C), of which `least` rows and columns are needed."""
    what = f"{'tile' if page.is_tiled else 'strip'} {number} of {len(page.dataoffsets)}"
    start, size = page.dataoffsets[number], page.databytecounts[number]
    if start < 1 or size < 1 or start + size > len(data):
        raise UndecodableError(f"it is not a whole image: {what} of the TIFF is cut short or missing")
    packed = data[start : start + size]
    try:
        part = _jpeg(packed, page, number, found) if found.compression == _JPEG else page.decode(packed, number)[0][0]
        if part.shape[0] < least[0] or part.shape[1] < least[1]:
            raise ValueError(f"it has {part.shape[0]} x {part.shape[1]} pixels")
    except Exception as error:  # noqa: BLE001 - as above
        raise UndecodableError(
            f"it is not a whole image: {what} of the TIFF is cut short or damaged ({_first_line(error)})"
        ) from None
    return cast("npt.NDArray[Any]", part)


def _jpeg(packed: bytes, page: Any, number: int, found: Header) -> npt.NDArray[np.uint8]:
    """Decode a tile or strip that is a JPEG without its tables, strictly."""
    tables = page.jpegtables or b"\xff\xd8\xff\xd9"
    # Without this mark libjpeg guesses that three bands are YCbCr.
    mark = b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0\0" if found.photometric == _RGB else b""
    whole = packed[:2] + mark + tables[2:-2] + packed[2:]
    bands = 1 if found.planar else found.bands
    _, _, shape = page.decode(None, number)
    height, width = simplejpeg.decode_jpeg_header(whole)[:2]
    if height > shape[1] or width > shape[2]:
        raise ValueError(f"it is {height} x {width} where {shape[1]} x {shape[2]} belong")
    part = simplejpeg.decode_jpeg(whole, "GRAY" if bands == 1 else "RGB")
    return cast("npt.NDArray[np.uint8]", np.asarray(part))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
