"""From image bytes to pixels, strictly: what is damaged is refused, never shown half.

JPEG goes to simplejpeg in its strict mode (libjpeg-turbo); measured, its pixels equal PIL's bit for bit, and
unlike PIL it refuses a zeroed or overwritten middle. Everything else goes to PIL. EXIF orientation is not
applied, as in torchvision's ImageFolder. The header is read first, and an image of absurd size refused before a
byte is allocated for it. Of PIL's formats only those of photographs are opened: for some others it starts programs
(Ghostscript for EPS), which bytes from a data set must not be able to do.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import PIL.Image
import simplejpeg

from setformer_dist.core.errors import DataError

_JPEG_START = b"\xff\xd8"
_PNG_START = b"\x89PNG\r\n\x1a\n"

# The formats that PIL may try, in its own names.
FORMATS = ("PNG", "WEBP", "BMP", "PPM", "JPEG")
MASK_FORMATS = ("PNG",)

# PIL's own limit, beyond which it speaks of a decompression bomb: half a gigabyte of pixels.
MAX_PIXELS = 178_956_970


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
        _refuse_absurd(*simplejpeg.decode_jpeg_header(data)[:2])
        if not (min_height and min_width):
            # Asking for no scaling at all also spares libjpeg-turbo's own choice of a factor.
            return np.asarray(simplejpeg.decode_jpeg(data))
        return np.asarray(simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width))
    except UndecodableError:
        raise
    # PIL's plugins raise nearly anything on damaged bytes (OSError, ValueError, SyntaxError, struct.error,
    # DecompressionBombError …): whatever it is, this sample has no pixels.
    except Exception as error:  # noqa: BLE001
        raise UndecodableError(f"it is not a whole image: {error}") from None


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
            _refuse_absurd(image.height, image.width)
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


def _decode_by_pil(data: bytes) -> npt.NDArray[np.uint8]:
    if data[:8] == _PNG_START:
        _check_png(data)
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _refuse_absurd(image.height, image.width)
        if image.mode.startswith("I"):  # 16 bits a channel; PIL's own conversion would clip at 255
            grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _check_png(data: bytes) -> None:
    """Check every chunk's checksum: PIL passes over those of the pixels.

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
        raise UndecodableError(f"it is not a whole image: {error}") from None
    _refuse_absurd(height, width)
    return int(height), int(width)


def suffix_for(data: bytes, named: str) -> str:
    """Return the suffix an image's content calls for, without the dot; `named` where the content does not say."""
    if is_jpeg(data):
        return "jpg"
    if data[:8] == _PNG_START:
        return "png"
    return named.lower().lstrip(".")
