"""From image bytes to pixels, strictly: what is damaged is refused, never shown half.

JPEG goes to simplejpeg in its strict mode (libjpeg-turbo); measured, its pixels equal PIL's bit for bit, and
unlike PIL it refuses a zeroed or overwritten middle. Everything else goes to PIL. EXIF orientation is not
applied, as in torchvision's ImageFolder. The header is read first, and an image of absurd size refused before a
byte is allocated for it. Of PIL's formats only those in `dataloaders.pixels.formats` are opened: for some others it
starts programs (Ghostscript for EPS), which bytes from a data set must not be able to do.

What decoding may take, input and output together (docs/data.md):

    JPEG, baseline       3 bytes a pixel                                     at most `MAX_PIXELS`
    JPEG, progressive    9 bytes a pixel: all coefficients are held          at most `_MOST_PROGRESSIVE` bytes
    everything else      what PIL holds (4 bytes, 1 of grey) and 3 more      at most `_MOST_BYTES` bytes
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import PIL.ExifTags
import PIL.Image
import simplejpeg

from dataloaders.pixels import tiff
from dataloaders.pixels.depth import FULL_RANGE, MAX_PIXELS, RGB, Numbers, PixelFormat, mismatch
from dataloaders.pixels.depth import UndecodableError as UndecodableError  # as most of this package names it
from dataloaders.pixels.formats import FORMATS, looks_like
from dataloaders.source import Tiled
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import ConfigError, SetformerError

_JPEG_START = b"\xff\xd8"
_PNG_START = b"\x89PNG\r\n\x1a\n"

MASK_FORMATS = ("PNG",)

# What is large is refused here, in our own words and by its bytes, also below PIL's limit, where it only warns.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)

# Bytes that an image may take while PIL decodes it, and libjpeg a progressive one.
_MOST_BYTES = 1 << 29
_MOST_PROGRESSIVE = 1 << 30

# Bytes a pixel of PIL's own pictures, by mode; 4 of all others.
_BYTES_OF = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}

# Compressions of TIFF that are decoded strictly: JPEG within TIFF is not.
_TIFF_COMPRESSIONS = frozenset({"raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"})
_TIFF_BY_PIL = frozenset({1, 5, 8, 32773, 32946})  # their numbers in the file
_TIFF_TILE_SIDES = (322, 323)  # tags: width and height of a tile

# PIL's modes whose bands are bytes that mean what they say.
_BANDS_AS_THEY_ARE = frozenset({"L", "LA", "RGB", "RGBA"})

# What a header may say where only sizes are asked for: what is decoded is decided when it is.
ANY_SIZE = PixelFormat(max_pixels=1 << 36)

# Side of what a picture for people shows of an image in tiles.
_MOST_SHOWN = 2048

# PIL's limit is a setting of the process, raised while the header of an image is read that may be larger.
_PIL_LIMIT = threading.Lock()

# Pixels that are converted at a time, so that no second whole picture is held.
_STRIP = 1 << 22


def is_jpeg(data: bytes) -> bool:
    """Return whether bytes begin as a JPEG does."""
    return data[:2] == _JPEG_START


def decode(
    data: bytes | npt.NDArray[Any] | Tiled, min_height: int = 0, min_width: int = 0, form: PixelFormat = RGB
) -> npt.NDArray[Any]:
    """Decode an image.

    Args:
        data: the file's bytes; pixels are returned as they are, of tiles those of all of them.
        min_height: allow a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size if no lower than this; 0 forbids.
        min_width: likewise for the width.
        form: what pixels are.

    Returns:
        (H, W, C) of the format's numbers. For RGB of 8 bits grey becomes three equal channels, the 16 bits of a PNG
        their upper 8; CMYK and palettes are converted, transparency is left out. All other formats give the bands that
        the file has.

    Raises:
        UndecodableError: the bytes are not a whole image, of other bands or numbers, or of more pixels than the
            format allows.
        ConfigError: it is read by an extra that is not installed.
    """
    if not isinstance(data, bytes):
        height, width, bands = data.shape
        numbers = data.dtype.name if isinstance(data, np.ndarray) else data.numbers
        if not form.fits(bands, numbers):
            raise UndecodableError(f"it {mismatch(bands, numbers, form)}")
        if isinstance(data, np.ndarray):
            return data
        _refuse_absurd(height, width, form)
        return data.window((0, 0, height, width))
    try:
        if is_jpeg(data):
            return _decode_jpeg(data, min_height, min_width, form)
        if tiff.is_tiff(data) and not (form.is_rgb and _pil_reads(data, form)):
            return tiff.window(data, form)
        return _decode_by_pil(data, form)
    except SetformerError:
        raise
    # PIL's plugins raise nearly anything on damaged bytes (OSError, ValueError, SyntaxError, struct.error,
    # DecompressionBombError …): any error: this sample has no pixels.
    except Exception as error:  # noqa: BLE001
        raise UndecodableError(_why_not(data, error)) from None


def decode_box(
    data: bytes | npt.NDArray[Any] | Tiled, box: tuple[int, int, int, int], stored: tuple[int, int], form: PixelFormat
) -> npt.NDArray[Any]:
    """Decode a part of an image; of tiles, and of a TIFF's own, only those that it touches.

    Args:
        data: as in `decode`.
        box: (top, left, height, width).
        stored: (height, width) that the container says.
        form: as in `decode`.

    Raises:
        UndecodableError: as `decode`, or the image is of another size than its container says.
        DamagedSampleError: a tile is damaged.
    """
    top, left, height, width = box
    if not isinstance(data, bytes | np.ndarray):
        if not form.fits(data.shape[2], data.numbers):
            raise UndecodableError(f"it {mismatch(data.shape[2], data.numbers, form)}")
        check_shape(data.shape[:2], stored)
        _refuse_absurd(height, width, form)
        return data.window(box)
    if isinstance(data, bytes) and tiff.is_tiff(data) and not (form.is_rgb and _pil_reads(data, form)):
        found = tiff.header(data)
        check_shape((found.height, found.width), stored)
        return tiff.window(data, form, box)
    pixels = decode(data, form=form)
    check_shape(pixels.shape[:2], stored)
    return pixels[top : top + height, left : left + width]


def bands_of_rows(data: bytes | npt.NDArray[Any] | Tiled, rows: int, form: PixelFormat) -> Iterator[npt.NDArray[Any]]:
    """Yield an image from top to bottom, so many rows at a time, (rows, W, C).

    Of tiles and of a TIFF no more than these rows are held; other files are decoded whole.

    Raises:
        UndecodableError: as `decode`; also after the first rows.
        DamagedSampleError: a tile is damaged.
    """
    height, width = stored_shape(data, form)
    by_parts = not isinstance(data, bytes | np.ndarray) or (
        isinstance(data, bytes) and tiff.is_tiff(data) and not (form.is_rgb and _pil_reads(data, form))
    )
    whole = data if by_parts else decode(data, form=form)
    for top in range(0, height, rows):
        yield decode_box(whole, (top, 0, min(rows, height - top), width), (height, width), form)


def stored_shape(data: bytes | npt.NDArray[Any] | Tiled, form: PixelFormat) -> tuple[int, int]:
    """Return (height, width) of an image whose container does not say it.

    Raises:
        UndecodableError: there is no header to read, or it says more pixels than the format allows.
    """
    return image_size(data, form) if isinstance(data, bytes) else (data.shape[0], data.shape[1])


def unfit(data: bytes | npt.NDArray[Any] | Tiled, form: PixelFormat) -> str | None:
    """Return what is wrong with the bands or numbers of an image, following its name; None where its header fits."""
    if not isinstance(data, bytes):
        numbers = data.dtype.name if isinstance(data, np.ndarray) else data.numbers
        return None if form.fits(data.shape[2], numbers) else mismatch(data.shape[2], numbers, form)
    try:
        if tiff.is_tiff(data):
            found = tiff.header(data)
            if tiff.is_read(found, form) or (form.is_rgb and _pil_reads(data, form)):
                return None
            return mismatch(found.bands, found.numbers, form)
        if form.is_rgb:
            return None
        if is_jpeg(data):
            return _unfit(1 if simplejpeg.decode_jpeg_header(data)[2] == "Gray" else 3, "uint8", form)
        if data[:8] == _PNG_START:
            bands = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(data[25], 0)
            return _unfit(bands, "uint16" if data[24] == 16 else "uint8", form)
    except Exception:  # noqa: BLE001  (damaged: said when it is read)
        return None
    return None if form.numbers == "uint8" else mismatch(3, "uint8", form)


def natural(data: bytes | npt.NDArray[Any] | Tiled, max_pixels: int = MAX_PIXELS) -> PixelFormat:
    """Return the format by which an image is read as it is: what is not TIFF, pixels or tiles, as RGB of 8 bits.

    Raises:
        UndecodableError: it is a TIFF without a whole header.
    """
    if not isinstance(data, bytes):
        numbers = data.dtype.name if isinstance(data, np.ndarray) else data.numbers
        return PixelFormat(data.shape[2], cast("Numbers", numbers), max_pixels)
    rgb = PixelFormat(max_pixels=max_pixels)
    if tiff.is_tiff(data) and not _pil_reads(data, rgb) and not tiff.is_read(found := tiff.header(data), rgb):
        return PixelFormat(found.bands, found.numbers if found.numbers in FULL_RANGE else "float32", max_pixels)
    return rgb


def picture_of(data: bytes | npt.NDArray[Any] | Tiled) -> tuple[npt.NDArray[np.uint8], tuple[int, int, int, int]]:
    """Return (h, w, 3) uint8 for people, and the part of the image that it shows, (top, left, h, w).

    These are the first three bands, or the only one, stretched where they are no bytes. Of tiles it shows the middle,
    no more than `_MOST_SHOWN` pixels a side.

    Raises:
        UndecodableError: the bytes are not a whole image.
        DamagedSampleError: a tile is damaged.
    """
    form, top, left = natural(data), 0, 0
    if isinstance(data, bytes | np.ndarray):
        pixels = decode(data, form=form)
    else:
        sides = [min(side, _MOST_SHOWN) for side in data.shape[:2]]
        top, left = ((whole - side) // 2 for whole, side in zip(data.shape, sides, strict=False))
        pixels = data.window((top, left, sides[0], sides[1]))
    shown = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    if shown.dtype != np.uint8:
        shown = _stretched(shown)
    return np.ascontiguousarray(shown), (top, left, shown.shape[0], shown.shape[1])


def _stretched(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return numbers as bytes: black to white from the first percentile to the last, so that no glint darkens all."""
    values = pixels.astype(np.float32)
    low, high = np.percentile(values, (1, 99))
    if low == high:  # hardly anything differs: show what does
        low, high = float(values.min()), float(values.max())
    stretched: npt.NDArray[np.float32] = (values - low) * (255 / max(high - low, 1e-12))
    return stretched.round().clip(0, 255).astype(np.uint8)


def _unfit(bands: int, numbers: str, form: PixelFormat) -> str | None:
    return None if form.fits(bands, numbers) else mismatch(bands, numbers, form)


def check_shape(decoded: tuple[int, ...], stored: tuple[int, int], shrink: int = 1) -> None:
    """Refuse an image of another size than its container says: the crop was chosen for that size.

    Raises:
        UndecodableError: it is.
    """
    if decoded != stored and (shrink == 1 or decoded != tuple(-(-side // shrink) for side in stored)):
        raise UndecodableError(
            f"it is {decoded[0]} x {decoded[1]} pixels, its container says {stored[0]} x {stored[1]}"
        )


def _decode_jpeg(data: bytes, min_height: int, min_width: int, form: PixelFormat) -> npt.NDArray[np.uint8]:
    height, width, colours = simplejpeg.decode_jpeg_header(data)[:3]
    _refuse_absurd(height, width, form)
    if height * width > form.room * _MOST_PROGRESSIVE // 9 and _is_progressive(data):
        _refuse_bytes(height, width, 9, int(form.room * _MOST_PROGRESSIVE))
    bands = 1 if colours == "Gray" else 3
    if not form.is_rgb and not form.fits(bands, "uint8"):
        raise UndecodableError(f"it {mismatch(bands, 'uint8', form)}")
    space = "RGB" if form.is_rgb else "GRAY"
    if not (min_height and min_width):
        # Asking for no scaling at all also spares libjpeg-turbo's own choice of a factor.
        return np.asarray(simplejpeg.decode_jpeg(data, space))
    return np.asarray(simplejpeg.decode_jpeg(data, space, min_height=min_height, min_width=min_width))


def class_numbers(image: PIL.Image.Image) -> npt.NDArray[Any]:
    """Return the values of a mask as its file has them, (H, W) where it has one channel.

    PIL stretches grey values of 2 and 4 bits to the range of 8, as of colours: class 1 would be class 85 or 17.
    """
    tiles = getattr(image, "tile", [])  # gone once the pixels are read
    args = tiles[0].args if tiles else ""
    stored = args if isinstance(args, str) else str(args[0]) if args else ""  # such as "L;2"
    values = np.array(image)
    steps = {"L;2": 85, "L;4": 17}.get(stored[:3])
    return values if steps is None else values // np.uint8(steps)


def decode_mask(
    data: bytes, shape: tuple[int, int], classes: int = VOID, form: PixelFormat = RGB
) -> npt.NDArray[np.uint8]:
    """Decode a mask: a PNG of one byte per pixel, which is its class (or the place in its palette).

    Args:
        data: the file's bytes.
        shape: (height, width) of the image that it belongs to.
        classes: of the data.
        form: of the image; says how many pixels are allowed.

    Returns:
        (H, W) uint8.

    Raises:
        UndecodableError: the bytes are not a whole mask of this shape, or a pixel has another class.
    """
    try:
        _check_png(data)
        with opened(data, form, MASK_FORMATS) as image:
            refuse_large(image, form)
            mode, mask = image.mode, class_numbers(image)
    except UndecodableError as error:
        raise UndecodableError(f"its mask is damaged: {error}") from None
    except Exception as error:  # noqa: BLE001  (as in `decode`)
        raise UndecodableError(f"its mask is not a whole image: {error}") from None
    if mode not in ("L", "P") or mask.shape != shape:
        raise UndecodableError(
            f"its mask is {mask.shape[0]} x {mask.shape[1]} of mode {mode}, not {shape[0]} x {shape[1]} of one byte "
            "per pixel"
        )
    if (beyond := int((mask + np.uint8(1)).max(initial=0))) > classes:  # VOID is 0 so
        raise UndecodableError(
            f"its mask has class {beyond - 1}, but there are {classes} classes (and {VOID} for none)"
        )
    return mask


def _refuse_absurd(height: int, width: int, form: PixelFormat = RGB) -> None:
    """Refuse, before anything is allocated, what claims to be larger than any picture that is trained on.

    Raises:
        UndecodableError: it does.
    """
    if height * width > form.max_pixels:
        raise UndecodableError(
            f"it claims {height} x {width} pixels, more than the {form.max_pixels} that are decoded (data.max_pixels; "
            "when packing, --max-pixels; of an image packed with --tiles, training decodes only the window)"
        )


def _refuse_bytes(height: int, width: int, each: int, limit: int) -> None:
    if height * width * each > limit:
        raise UndecodableError(
            f"it claims {height} x {width} pixels of {each} bytes, over the {limit >> 20} MiB that decoding may take "
            "(as data.max_pixels, or --max-pixels when packing, grows, so does this)"
        )


def refuse_large(image: PIL.Image.Image, form: PixelFormat = RGB) -> None:
    """Refuse, before PIL makes room for its pixels, an image that would take more than `_MOST_BYTES`.

    Raises:
        UndecodableError: it would.
    """
    _refuse_absurd(image.height, image.width, form)
    each = 3 + _BYTES_OF.get(image.mode, 4)
    _refuse_bytes(image.height, image.width, each, int(form.room * _MOST_BYTES))
    if image.format != "TIFF":
        return
    if image.mode in ("F", "I"):
        raise UndecodableError("it is a TIFF of 32-bit numbers, which are no colours: convert it")
    if (compression := image.info.get("compression")) not in _TIFF_COMPRESSIONS:
        raise UndecodableError(f"it is a TIFF compressed by {compression}, which is not read strictly: convert it")
    tags = getattr(image, "tag_v2", {})
    for side, whole in zip(_TIFF_TILE_SIDES, (image.width, image.height), strict=True):
        if int(tags.get(side, 0)) > 2 * whole + 4096:
            raise UndecodableError(f"it is a TIFF of {image.height} x {image.width} with larger tiles: convert it")


@contextlib.contextmanager
def opened(data: bytes, form: PixelFormat = RGB, formats: tuple[str, ...] = FORMATS) -> Iterator[PIL.Image.Image]:
    """Open an image by PIL, whose own limit gives way to a larger one that the config names.

    PIL alone of all readers turns a TIFF as it asks to be shown, by its tag or by words within it, and no other format.
    """
    if tiff.is_tiff(data):
        data = tiff.upright(data)
    if form.max_pixels <= MAX_PIXELS:
        with PIL.Image.open(io.BytesIO(data), formats=formats) as image:
            _keep_upright(image)
            yield image
        return
    with _PIL_LIMIT:  # a setting of the process, needed while the header is read
        before, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, form.max_pixels
        try:
            image = PIL.Image.open(io.BytesIO(data), formats=formats)
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = before
    with image:
        _keep_upright(image)
        yield image


def _keep_upright(image: PIL.Image.Image) -> None:
    if image.format == "TIFF":
        image.getexif()[PIL.ExifTags.Base.Orientation] = 1


def _pil_reads(data: bytes, form: PixelFormat) -> bool:
    """Return whether a TIFF is one that PIL converts to RGB of 8 bits, strictly and without the extra."""
    found = tiff.header(data)
    if found.compression not in _TIFF_BY_PIL or found.numbers not in ("uint8", "1 bit", "2 bit", "4 bit"):
        return False
    if found.extra > found.alpha:  # more than colours: PIL would leave a band out
        return False
    try:
        with opened(data, form):
            return True
    except PIL.UnidentifiedImageError:
        return False


def _decode_by_pil(data: bytes, form: PixelFormat) -> npt.NDArray[Any]:
    if data[:8] == _PNG_START:
        _check_png(data)
        if not form.is_rgb and data[24] == 16:  # IHDR's bit depth
            return _png16(data, form)
    with opened(data, form) as image:
        refuse_large(image, form)
        if form.is_rgb:
            if image.mode.startswith("I"):  # 16 bits a channel; PIL's own conversion would clip at 255
                return _in_strips(image, _grey16)
            return _in_strips(image, lambda strip: np.asarray(strip.convert("RGB")))
        bands, numbers = len(image.getbands()), "uint8" if image.mode in _BANDS_AS_THEY_ARE else image.mode
        if not form.fits(bands, numbers):
            raise UndecodableError(f"it {mismatch(bands, numbers, form)}")
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], bands)


def _png16(data: bytes, form: PixelFormat) -> npt.NDArray[Any]:
    """Decode a PNG of 16 bits a channel, which PIL would make 8 of."""
    bands = {0: 1, 2: 3, 4: 2, 6: 4}.get(data[25], 0)
    if not form.fits(bands, "uint16"):
        raise UndecodableError(f"it {mismatch(bands, 'uint16', form)}")
    width, height = struct.unpack_from(">II", data, 16)
    _refuse_absurd(height, width, form)
    _refuse_bytes(height, width, 2 * bands, int(form.room * _MOST_BYTES))
    try:
        codecs = importlib.import_module("imagecodecs")
    except ImportError:
        raise ConfigError(
            'PNG files of 16 bits are read by imagecodecs, which is not installed: pip install "setformer_dist[tiff]"'
        ) from None
    pixels: npt.NDArray[Any] = codecs.png_decode(data)
    return pixels.reshape(height, width, bands)


def _grey16(strip: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    return (np.asarray(strip).astype(np.uint32) >> 8).astype(np.uint8)[:, :, None]


def _in_strips(
    image: PIL.Image.Image, converted: Callable[[PIL.Image.Image], npt.NDArray[np.uint8]]
) -> npt.NDArray[np.uint8]:
    """Return (H, W, 3), converted some rows at a time (some columns of rows that are long)."""
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    columns = min(image.width, _STRIP)
    rows = max(1, _STRIP // columns)
    for top in range(0, image.height, rows):
        for left in range(0, image.width, columns):
            bottom, right = min(top + rows, image.height), min(left + columns, image.width)
            pixels[top:bottom, left:right] = converted(image.crop((left, top, right, bottom)))
    return pixels


def _is_progressive(data: bytes) -> bool:
    """Return whether a JPEG's frame is one whose coefficients are all held until the end."""
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return True  # not as it should be: taken for the dearer kind
        kind = data[place + 1]
        if kind == 0xFF:
            place += 1
            continue
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return kind not in (0xC0, 0xC1)
        place += 2 if kind == 0x01 or 0xD0 <= kind <= 0xD8 else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True


def _why_not(data: bytes, error: Exception) -> str:
    """Say what bytes that do not decode are, without the decoder's words where these name but an object in memory."""
    if what := looks_like(data):
        return f"it is no image but {what}"
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"it is no image of a format that is read ({', '.join(FORMATS)})"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS:,} pixels (data.max_pixels)"
    return f"it is not a whole image: {re.sub(r' ?<[^<>]* object at 0x[0-9a-f]+>', '', str(error))}"


def _check_png(data: bytes) -> None:
    """Check every chunk's checksum: PIL skips those of the pixels.

    Raises:
        UndecodableError: one is wrong, or the end is missing.
    """
    place = len(_PNG_START)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if end > len(data) or zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            break
        if kind == b"IEND":
            return
        place = end
    raise UndecodableError("it is not a whole image: a chunk of the PNG is cut short or does not have its checksum")


def image_size(data: bytes, form: PixelFormat = RGB) -> tuple[int, int]:
    """Return (height, width) from an image's header.

    Args:
        data: the file's bytes, or enough of them.
        form: says how many pixels are allowed.

    Raises:
        UndecodableError: there is no header to read, or it says more than that.
    """
    try:
        if is_jpeg(data):
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        elif tiff.is_tiff(data):
            height, width = tiff.header(data)[:2]
        else:
            with opened(data, form) as image:
                height, width = image.height, image.width
    except UndecodableError:
        raise
    except Exception as error:  # noqa: BLE001  (as above)
        raise UndecodableError(_why_not(data, error)) from None
    _refuse_absurd(height, width, form)
    return int(height), int(width)


def suffix_for(data: bytes, named: str) -> str:
    """Return the suffix an image's content calls for, without the dot; `named` where the content does not say."""
    if is_jpeg(data):
        return "jpg"
    if data[:8] == _PNG_START:
        return "png"
    return named.lower().lstrip(".")
