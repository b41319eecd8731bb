"""What a sample must be to be packed, and what is made of it: bytes kept as they are wherever that is possible.

    kept      the bytes of every image that all readers can show
    rewritten CMYK JPEG as RGB JPEG of quality 95, PNG of 16 bits a channel as PNG of 8, raw pixels as PNG: other
              readers refuse or clip them
    shrunk    with `max_side` or `quality`: RGB JPEG, antialiased; masks follow by nearest neighbour, boxes by scale
    tiles     with `tiles`: JPEG of quality 95 from JPEG, PNG from other RGB images, else the numbers as they are
    masks     one byte per pixel, its class, 255 where it does not count; palettes are taken by index, not by colour
    boxes     inside the image (up to one pixel of rounding is cut off), of positive area

A rewritten image is in sRGB as far as the loaders care (an ICC profile is dropped, as decoding ignores it), and its
EXIF orientation is neither applied nor kept: it looks to training as the original did.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import simplejpeg
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # as torchvision's own docs name it

from dataloaders.packing.mask_table import MaskTable
from dataloaders.pixels.decode import (
    UndecodableError,
    bands_of_rows,
    class_numbers,
    decode,
    decode_box,
    image_size,
    is_jpeg,
    natural,
    opened,
    refuse_large,
    stored_shape,
    unfit,
)
from dataloaders.pixels.depth import MAX_PIXELS, RGB, PixelFormat
from dataloaders.source import Boxes, Stored, Tiled, box_areas
from dataloaders.sources.boxes import inside, resized
from dataloaders.sources.slides import SlideImage
from dataloaders.sources.tiles import LARGEST_SIDE, RAW_SUFFIX, Grid
from setformer_dist.core.batch import VOID

_LOSSY = ("JPEG", "MPO", "WEBP")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_REWRITTEN_QUALITY = 95
_SHRUNK_QUALITY = 90

# A JPEG that is to be shrunk is decoded at no less than this many times its new side, for the resize to average.
_DECODE_MARGIN = 2

# Rows of an image in tiles that are looked at together, at most: as many as the largest tile has.
_ROWS_CHECKED = LARGEST_SIDE


@dataclass(frozen=True)
class Intake:
    """How samples are taken in.

    Attributes:
        strict: decode every image; else only headers are read where that is enough.
        max_side: longer side in pixels to which larger images are shrunk; 0 keeps all.
        quality: of JPEG files that are written (90 where not given); given without `max_side`, every JPEG is
            rewritten, and kept so where that made it smaller.
        classes: how many there are, for masks and boxes; 0 where that is not known yet.
        void: mask value that becomes 255, "does not count".
        form: what pixels are.
        tiles: side of the tiles that images are cut into, in pixels; 0 keeps them whole.
        mask_table: what values of masks stand for; None where they are the classes.
    """

    strict: bool = True
    max_side: int = 0
    quality: int | None = None
    classes: int = 0
    void: int | None = None
    form: PixelFormat = RGB
    tiles: int = 0
    mask_table: MaskTable | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """A sample to be written.

    Attributes:
        image: an image file.
        height: pixels.
        width: pixels.
        mask: a PNG file, one byte per pixel, or None.
        boxes: or None.
        rewritten: the image's bytes are not those of the source.
        top_class: largest class of the mask, -1 without.
        soft: as `Stored.soft`.
        grid: how the image is cut into tiles, in place of `image`; None where it is whole.
    """

    image: bytes
    height: int
    width: int
    mask: bytes | None
    boxes: Boxes | None
    rewritten: bool
    top_class: int
    soft: npt.NDArray[np.float32] | None = None
    grid: Grid | None = None


def take_in(stored: Stored, how: Intake) -> Taken:
    """Check a sample and return what is to be packed of it.

    Raises:
        UndecodableError: why it cannot be packed.
    """
    if how.tiles:
        return _tiled(stored, how)
    data = _without_tiles(stored.image, how.form)
    before = data.shape[:2] if isinstance(data, np.ndarray) else _checked_size(data, how.strict, how.form)
    image, height, width = _image(data, before[0], before[1], how)
    mask, top = (None, -1) if stored.mask is None else _mask(stored.mask, before, (height, width), how)
    boxes = None if stored.boxes is None else _boxes(stored.boxes, before, (height, width), how)
    return Taken(image, height, width, mask, boxes, image is not data, top, stored.soft)


def _tiled(stored: Stored, how: Intake) -> Taken:
    """Return a sample whose image is cut into tiles (`tiles_of`); its pixels are checked when it is."""
    height, width = stored_shape(stored.image, how.form)
    if (why := unfit(stored.image, how.form)) is not None:
        raise UndecodableError(f"it {why}")
    mask, top = (None, -1) if stored.mask is None else _mask(stored.mask, (height, width), (height, width), how)
    boxes = None if stored.boxes is None else _boxes(stored.boxes, (height, width), (height, width), how)
    grid = Grid(how.tiles, height, width, how.form.bands, how.form.numbers, is_raw=not how.form.is_rgb)
    return Taken(b"", height, width, mask, boxes, False, top, stored.soft, grid)


def tiles_of(stored: Stored, grid: Grid, how: Intake) -> Iterator[tuple[str, bytes]]:
    """Yield the tiles of an image row by row: what follows the key in the name of each, and its bytes.

    Tiles of a JPEG or of a slide are JPEG files, of other RGB images PNG files; all others are their numbers.

    Raises:
        UndecodableError: the image is not whole; also after the first tiles.
    """
    lossy = isinstance(stored.image, SlideImage) or (isinstance(stored.image, bytes) and is_jpeg(stored.image))
    suffix = RAW_SUFFIX if grid.is_raw else "jpg" if lossy else "png"
    for row, column, part in _cut(stored.image, grid, how.form):
        pixels = np.ascontiguousarray(part)
        if grid.is_raw:
            data = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
        else:
            data = _jpeg(pixels, how.quality or _REWRITTEN_QUALITY) if lossy else _png(pixels)
        yield f"{row:04d}-{column:04d}.{suffix}", data


def _cut(
    image: bytes | npt.NDArray[Any] | Tiled, grid: Grid, form: PixelFormat
) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
    """Yield (row, column, pixels) of an image's tiles."""
    if isinstance(image, SlideImage):  # a row of its tiles may be too much to hold
        for row, column in itertools.product(range(grid.rows), range(grid.columns)):
            height, width, _ = grid.shape(row, column)
            box = (row * grid.side, column * grid.side, height, width)
            yield row, column, decode_box(image, box, (grid.height, grid.width), form)
        return
    for row, rows in enumerate(bands_of_rows(image, grid.side, form)):
        for column in range(grid.columns):
            yield row, column, rows[:, column * grid.side : (column + 1) * grid.side]


def check(stored: Stored, classes: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Check a sample as packed, and return its (height, width) in pixels.

    Args:
        stored: the sample; its image is decoded, strictly.
        classes: how many there are, for masks and boxes.
        max_pixels: height x width beyond which an image is refused.

    Raises:
        UndecodableError: what is wrong with it.
    """
    form = natural(stored.image, max_pixels)
    if isinstance(stored.image, bytes | np.ndarray):
        height, width = _checked_size(stored.image, True, form)
    else:
        height, width = stored.image.shape[:2]
        # A power of two, so that most tiles are read once; fewer rows where these would exceed the limit.
        rows = min(_ROWS_CHECKED, 1 << max(0, (form.max_pixels // width).bit_length() - 1))
        for _ in bands_of_rows(stored.image, rows, form):
            pass
    how = Intake(classes=classes, form=form)
    if stored.mask is not None:
        _mask(stored.mask, (height, width), (height, width), how)
    if stored.boxes is not None:
        _boxes(stored.boxes, (height, width), (height, width), how)
    return height, width


def _without_tiles(data: bytes | npt.NDArray[Any] | Tiled, form: PixelFormat) -> bytes | npt.NDArray[Any]:
    """Return an image that is not in tiles: of those the pixels of all."""
    return data if isinstance(data, bytes | np.ndarray) else decode(data, form=form)


def _checked_size(data: bytes | npt.NDArray[Any], strict: bool, form: PixelFormat) -> tuple[int, int]:
    if not strict and isinstance(data, bytes):
        return image_size(data, form)
    height, width = decode(data, form=form).shape[:2]
    return height, width


def _image(data: bytes | npt.NDArray[Any], height: int, width: int, how: Intake) -> tuple[bytes, int, int]:
    """Return an image file with its height and width; `data` itself wherever it may stay."""
    if not how.form.is_rgb:
        if how.max_side or how.quality:
            raise UndecodableError(
                f"it has {how.form}, which --max-side and --quality, being of JPEG files, do not keep"
            )
        if isinstance(data, np.ndarray):
            raise UndecodableError(f"its pixels have {how.form}, which no image file of ours holds: give --tiles")
        return data, height, width
    if how.max_side and max(height, width) > how.max_side:
        smaller = _smaller(height, width, how.max_side)
        return _jpeg(_resized(data, smaller), how.quality or _SHRUNK_QUALITY), *smaller
    if isinstance(data, np.ndarray):
        return _png(data), height, width
    if is_jpeg(data):
        if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
            return _jpeg(decode(data), how.quality or _REWRITTEN_QUALITY), height, width
        if how.quality and not how.max_side:
            again = _jpeg(decode(data), how.quality)
            return (again if len(again) < len(data) else data), height, width
    elif data[:8] == _PNG_START and data[24] == 16:  # IHDR's bit depth
        return _png(decode(data)), height, width
    return data, height, width


def shrunk_pixels(data: bytes | npt.NDArray[Any] | Tiled, max_side: int) -> npt.NDArray[np.uint8]:
    """Return (H, W, 3) pixels whose longer side is at most `max_side`; 0 shrinks nothing.

    Raises:
        UndecodableError: the bytes are not a whole image.
    """
    data = _without_tiles(data, RGB)
    height, width = data.shape[:2] if isinstance(data, np.ndarray) else image_size(data)
    if not max_side or max(height, width) <= max_side:
        return decode(data)
    return _resized(data, _smaller(height, width, max_side))


def _smaller(height: int, width: int, max_side: int) -> tuple[int, int]:
    scale = max_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(data: bytes | npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    pixels = decode(data, _DECODE_MARGIN * size[0], _DECODE_MARGIN * size[1])
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    small = F.resize(image, list(size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    array: npt.NDArray[np.uint8] = small.permute(1, 2, 0).contiguous().numpy()
    return array


def _jpeg(pixels: npt.NDArray[np.uint8], quality: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420"))


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _mask(data: bytes, stored: tuple[int, int], packed: tuple[int, int], how: Intake) -> tuple[bytes, int]:
    """Return a mask as a PNG of one byte per pixel, and its largest class."""
    mode, classes = _mask_values(data, how.mask_table, how.form)
    if classes.shape != stored:
        raise UndecodableError(
            f"its mask is {classes.shape[1]}x{classes.shape[0]} pixels, the image {stored[1]}x{stored[0]}"
        )
    changed = how.mask_table is not None or mode != "L" or data[:8] != _PNG_START or data[24] != 8
    if how.void is not None:
        changed |= bool((void := classes == how.void).any())
        classes = np.where(void, np.uint8(VOID), classes)
    top = int(classes.max(initial=0, where=classes != VOID)) if (classes != VOID).any() else -1
    if how.classes and top >= how.classes:
        raise UndecodableError(f"its mask has class {top}, but there are {how.classes} classes (and {VOID} for none)")
    if packed != stored:
        classes, changed = (
            np.asarray(PIL.Image.fromarray(classes).resize(packed[::-1], PIL.Image.Resampling.NEAREST)),
            True,
        )
    return (_png(classes) if changed else data), top


def _mask_values(
    data: bytes, table: MaskTable | None = None, form: PixelFormat = RGB
) -> tuple[str, npt.NDArray[np.uint8]]:
    """Return a mask file's mode and its (H, W) classes."""
    try:
        with opened(data, form) as image:
            refuse_large(image, form)
            if image.format in _LOSSY:
                raise UndecodableError(f"its mask is a {image.format} file, which changes class numbers: make it a PNG")
            mode, values = image.mode, class_numbers(image) if table is None else table.read(image)
    except UndecodableError:
        raise
    except Exception as error:  # noqa: BLE001  (PIL's plugins raise nearly anything on damaged bytes)
        raise UndecodableError(f"its mask is not a whole image: {error}") from None
    if values.ndim != 2:
        raise UndecodableError(
            f"its mask has {values.shape[2]} channels: a mask has one, with a class number per pixel (or name its "
            "colours in a file for --mask-values)"
        )
    if table is not None:
        return mode, table.classes_of(values)
    if values.dtype.kind == "f" and (values != np.floor(values)).any():
        raise UndecodableError("its mask has fractions: a mask has a class number per pixel")
    if values.dtype != np.uint8 and values.size and not 0 <= values.min() <= values.max() <= VOID:
        raise UndecodableError(f"its mask has values up to {values.max()}: classes are 0 to 254, 255 does not count")
    return mode, values.astype(np.uint8)


def _boxes(boxes: Boxes, stored: tuple[int, int], packed: tuple[int, int], how: Intake) -> Boxes:
    """Return boxes cut to the image and scaled as it was."""
    return resized(inside(boxes, stored, how.classes), stored, packed)


def encode_soft(soft: npt.NDArray[np.float32]) -> bytes:
    """Return a soft label as the JSON file that a shard holds, each number to its last bit."""
    return json.dumps(soft.tolist()).encode()


def encode_boxes(boxes: Boxes) -> bytes:
    """Return boxes as the JSON file that a shard holds; what the boxes alone say is left out of it."""
    corners = [[round(float(value), 3) for value in row] for row in boxes.corners]
    table = {"boxes": corners, "labels": boxes.labels.tolist()}
    if boxes.crowds.any():
        table["crowds"] = boxes.crowds.tolist()
    if (boxes.areas != box_areas(boxes.corners)).any():
        table["areas"] = [round(float(area), 3) for area in boxes.areas]
    return json.dumps(table).encode()
