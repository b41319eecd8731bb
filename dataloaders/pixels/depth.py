"""What a pixel is: how many bands it has, of what numbers, and how many pixels an image may have.

The config says it (`data.mean`, `data.pixels`, `data.max_pixels`), so a run's input never depends on what the first
file happens to hold. Images that are something else are refused, never squashed: 16 bits do not become 8.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from setformer_dist.core.errors import DataError

Numbers = Literal["uint8", "uint16", "float32"]

# PIL's own limit, beyond which it warns of a decompression bomb: half a gigabyte of pixels.
MAX_PIXELS = 178_956_970

MOST_BANDS = 4096

# What stands for 1.0 in `data.mean` and `data.std`; float images are in units of their own.
FULL_RANGE: dict[Numbers, int] = {"uint8": 255, "uint16": 65535, "float32": 1}

# What float32 holds exactly, or (float64) is rounded to it.
TO_FLOAT = frozenset({"uint8", "int8", "uint16", "int16", "float16", "float32", "float64"})


class UndecodableError(DataError):
    """Bytes that are not a whole image; the message says why, and the reader adds which image it is."""


class PixelFormat(NamedTuple):
    """What images are decoded to.

    Attributes:
        bands: C.
        numbers: of each band; the name of its dtype in numpy and torch.
        max_pixels: height x width beyond which an image is refused before room is made for it.
    """

    bands: int = 3
    numbers: Numbers = "uint8"
    max_pixels: int = MAX_PIXELS

    @property
    def is_rgb(self) -> bool:
        """Whether images are RGB of 8 bits, to which grey, palettes and CMYK are converted."""
        return self.bands == 3 and self.numbers == "uint8"

    @property
    def room(self) -> float:
        """How many times the usual memory decoding may take: as many as it has pixels."""
        return max(1.0, self.max_pixels / MAX_PIXELS)

    def fits(self, bands: int, numbers: str) -> bool:
        """Return whether an image of such pixels is read by this format as it is."""
        return bands == self.bands and numbers == self.numbers

    def __str__(self) -> str:
        return said(self.bands, self.numbers)


RGB = PixelFormat()


def said(bands: int, numbers: str) -> str:
    """Return in words what pixels are, such as "12 bands of uint16"."""
    return f"{bands} band{'s' * (bands != 1)} of {numbers}"


def mismatch(bands: int, numbers: str, wanted: PixelFormat) -> str:
    """Return what is wrong with an image of such pixels and how to read it; follows "it"."""
    if numbers == wanted.numbers:
        repair = f"give data.mean and data.std {bands} numbers each, and the model follows"
    elif numbers in FULL_RANGE:
        repair = f'set data.pixels = "{numbers}" and give data.mean and data.std {bands} numbers each'
    elif numbers in TO_FLOAT and wanted.numbers != "float32":
        repair = f'convert it, or set data.pixels = "float32" and give data.mean and data.std {bands} numbers each'
    elif numbers in TO_FLOAT:
        repair = f"give data.mean and data.std {bands} numbers each, and the model follows"
    else:
        repair = "convert it"
    return (
        f'has {said(bands, numbers)}, and {wanted} are read (data.pixels = "{wanted.numbers}", data.mean of '
        f"{wanted.bands}): {repair} (setformer data: --pixels and --bands)"
    )
