"""From image bytes to pixels, strictly: what is damaged is refused, never shown half.

JPEG goes to simplejpeg in its strict mode (libjpeg-turbo); measured, its pixels equal PIL's bit for bit, and
unlike PIL it refuses a zeroed or overwritten middle. Everything else goes to PIL. EXIF orientation is not
applied, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import PIL.Image
import simplejpeg

from setformer_dist.core.errors import DataError

_JPEG_START = b"\xff\xd8"


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
        (H, W, 3) uint8, RGB.

    Raises:
        UndecodableError: the bytes are not a whole image.
    """
    if isinstance(data, np.ndarray):
        return data
    try:
        if not is_jpeg(data):
            return _decode_by_pil(data)
        if not (min_height and min_width):
            # Asking for no scaling at all also spares libjpeg-turbo's own choice of a factor.
            return np.asarray(simplejpeg.decode_jpeg(data))
        return np.asarray(simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width))
    # PIL's plugins raise nearly anything on damaged bytes (OSError, ValueError, SyntaxError, struct.error,
    # DecompressionBombError …): whatever it is, this sample has no pixels.
    except Exception as error:  # noqa: BLE001
        raise UndecodableError(f"it is not a whole image: {error}") from None


def _decode_by_pil(data: bytes) -> npt.NDArray[np.uint8]:
    with PIL.Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):  # 16 bits a channel; PIL's own conversion would clip at 255
            grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) from an image's header.

    Raises:
        UndecodableError: there is no header to read.
    """
    try:
        if is_jpeg(data):
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return int(height), int(width)
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception as error:  # noqa: BLE001  (as above)
        raise UndecodableError(f"it is not a whole image: {error}") from None


def suffix_for(data: bytes, named: str) -> str:
    """Return the suffix an image's content calls for, without the dot; `named` where the content does not say."""
    if is_jpeg(data):
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return named.lower().lstrip(".")
