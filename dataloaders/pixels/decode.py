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

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import PIL.Image
import simplejpeg

from dataloaders.pixels.formats import FORMATS, looks_like
from setformer_dist.core.errors import DataError

_JPEG_START = b"\xff\xd8"
_PNG_START = b"\x89PNG\r\n\x1a\n"

MASK_FORMATS = ("PNG",)

# PIL's own limit, beyond which it warns of a decompression bomb: half a gigabyte of pixels.
MAX_PIXELS = 178_956_970

# What is large is refused here, in our own words and by its bytes, also below PIL's limit, where it only warns.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)

# Bytes that an image may take while PIL decodes it, and libjpeg a progressive one.
_MOST_BYTES = 1 << 29
_MOST_PROGRESSIVE = 1 << 30

# Bytes a pixel of PIL's own pictures, by mode; 4 of all others.
_BYTES_OF = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}

# Compressions of TIFF that are decoded strictly: JPEG within TIFF is not.
_TIFF_COMPRESSIONS = frozenset({"raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"})
_TIFF_TILE_SIDES = (322, 323)  # tags: width and height of a tile

# Pixels that are converted at a time, so that no second whole picture is held.
_STRIP = 1 << 22


class UndecodableError(DataError):
    """Bytes that are not a whole image; the message says why, and the reader adds which image it is."""


def is_jpeg(data: bytes) -> bool:
    """Return whether bytes begin as a JPEG does."""
    return data[:2] == _JPEG_START


def decode(data: bytes | npt.NDArray[np.uint8], min_height: int = 0, min_width: int = 0) -> npt.NDArray[np.uint8]:
    """Decode an image.

    Args:
        data: the file's bytes; pixels are returned as they are.
        min_height: allow a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size if no lower than this; 0 forbids.
        min_width: likewise for the width.

    Returns:
        (H, W, 3) uint8, RGB. Grey becomes three equal channels, 16 bits their upper 8; CMYK and palettes are
        converted, transparency is left out.

    Raises:
        UndecodableError: the bytes are not a whole image, or of more than `MAX_PIXELS`.
    """
    if isinstance(data, np.ndarray):
        return data
    try:
        if not is_jpeg(data):
            return _decode_by_pil(data)
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        _refuse_absurd(height, width)
        if height * width > _MOST_PROGRESSIVE // 9 and _is_progressive(data):
            _refuse_bytes(height, width, 9, _MOST_PROGRESSIVE)
        if not (min_height and min_width):
            # Asking for no scaling at all also spares libjpeg-turbo's own choice of a factor.
            return np.asarray(simplejpeg.decode_jpeg(data))
        return np.asarray(simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width))
    except UndecodableError:
        raise
    # PIL's plugins raise nearly anything on damaged bytes (OSError, ValueError, SyntaxError, struct.error,
    # DecompressionBombError …): any error: this sample has no pixels.
    except Exception as error:  # noqa: BLE001
        raise UndecodableError(_why_not(data, error)) from None


def decode_mask(data: bytes, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Decode a mask: a PNG of one byte per pixel, which is its class (or the place in its palette).

    Args:
        data: the file's bytes.
        shape: (height, width) of the image that it belongs to.

    Returns:
        (H, W) uint8.

    Raises:
        UndecodableError: the bytes are not a whole mask of this shape.
    """
    try:
        _check_png(data)
        with PIL.Image.open(io.BytesIO(data), formats=MASK_FORMATS) as image:
            refuse_large(image)
            mask = np.array(image)
            mode = image.mode
    except UndecodableError:
        raise
    except Exception as error:  # noqa: BLE001  (as in `decode`)
        raise UndecodableError(f"its mask is not a whole image: {error}") from None
    if mode not in ("L", "P") or mask.shape != shape:
        raise UndecodableError(
            f"its mask is {mask.shape[0]} x {mask.shape[1]} of mode {mode}, not {shape[0]} x {shape[1]} of one byte "
            "per pixel"
        )
    return mask


def _refuse_absurd(height: int, width: int) -> None:
    """Refuse, before anything is allocated, what claims to be larger than any picture that is trained on.

    Raises:
        UndecodableError: it does.
    """
    if height * width > MAX_PIXELS:
        raise UndecodableError(f"it claims {height} x {width} pixels, more than the {MAX_PIXELS} that are decoded")


def _refuse_bytes(height: int, width: int, each: int, limit: int) -> None:
    if height * width * each > limit:
        raise UndecodableError(
            f"it claims {height} x {width} pixels of {each} bytes, over the {limit >> 20} MiB that decoding may take"
        )


def refuse_large(image: PIL.Image.Image) -> None:
    """Refuse, before PIL makes room for its pixels, an image that would take more than `_MOST_BYTES`.

    Raises:
        UndecodableError: it would.
    """
    _refuse_absurd(image.height, image.width)
    _refuse_bytes(image.height, image.width, 3 + _BYTES_OF.get(image.mode, 4), _MOST_BYTES)
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


def _decode_by_pil(data: bytes) -> npt.NDArray[np.uint8]:
    if data[:8] == _PNG_START:
        _check_png(data)
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        refuse_large(image)
        if image.mode.startswith("I"):  # 16 bits a channel; PIL's own conversion would clip at 255
            return _in_strips(image, _grey16)
        return _in_strips(image, lambda strip: np.asarray(strip.convert("RGB")))


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
        return f"it has more than {MAX_PIXELS:,} pixels"
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


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) from an image's header.

    Raises:
        UndecodableError: there is no header to read, or it says more than `MAX_PIXELS`.
    """
    try:
        if is_jpeg(data):
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        else:
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                height, width = image.height, image.width
    except Exception as error:  # noqa: BLE001  (as above)
        raise UndecodableError(_why_not(data, error)) from None
    _refuse_absurd(height, width)
    return int(height), int(width)


def suffix_for(data: bytes, named: str) -> str:
    """Return the suffix an image's content calls for, without the dot; `named` where the content does not say."""
    if is_jpeg(data):
        return "jpg"
    if data[:8] == _PNG_START:
        return "png"
    return named.lower().lstrip(".")
