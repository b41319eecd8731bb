"""What the values or colours of mask files stand for: `setformer data pack --mask-values FILE`.

    7 road              the value 7 is class "road"
    8 road              so is 8
    0 -                 pixels of value 0 do not count
    128 64 128 road     or, all lines alike, colours

Classes are numbered by their first lines, so a table renumbers them as well: ADE20K's begin with 1, Cityscapes' have
gaps. A value that no line names is an error, as it would be lost otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from dataloaders.pixels.decode import class_numbers
from dataloaders.pixels.depth import UndecodableError
from dataloaders.sources.classes import LARGEST_CLASS_FILE
from dataloaders.sources.files import read_whole
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import DataError

_NOTHING = "-"  # in place of a class
_MOST = {1: 65_535, 3: 255}  # of a number, by how many a line begins with


@dataclass(frozen=True)
class MaskTable:
    """What values of masks stand for.

    Attributes:
        place: the file, for messages.
        classes: names, in the order of their numbers.
        colours: whether values are colours, as numbers 0xRRGGBB.
        values: rising.
        numbers: the class of each, or `VOID`.
    """

    place: str
    classes: tuple[str, ...]
    colours: bool
    values: tuple[int, ...]
    numbers: tuple[int, ...]

    def read(self, image: PIL.Image.Image) -> npt.NDArray[Any]:
        """Return the values of a mask file, (H, W) where it has one channel."""
        if not self.colours:
            return class_numbers(image)
        red, green, blue = np.moveaxis(np.array(image.convert("RGB")).astype(np.int32), 2, 0)
        packed: npt.NDArray[np.int32] = red << 16 | green << 8 | blue
        return packed

    def classes_of(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return the class of each value, `VOID` where it does not count.

        Raises:
            UndecodableError: the table does not name one.
        """
        known = np.array(self.values)
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        if (unknown := known[place] != values).any():
            value = int(values[unknown][0])
            shown = f"colour {value >> 16} {value >> 8 & 255} {value & 255}" if self.colours else f"value {value}"
            line = shown.partition(" ")[2]
            raise UndecodableError(
                f"its mask has {shown} in a pixel, which {self.place} does not name: add a line, such as "
                f"'{line} {_NOTHING}' if it does not count"
            )
        numbers: npt.NDArray[np.uint8] = np.array(self.numbers, np.uint8)[place]
        return numbers


def read_mask_table(path: Path) -> MaskTable:
    """Read what values stand for.

    Raises:
        DataError: the file cannot be read, or a line is none of a table.
    """
    try:
        text = read_whole(path, LARGEST_CLASS_FILE).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"table of mask values {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"table of mask values {path} is no UTF-8 text") from None
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"table of mask values {path} is empty: write lines such as '7 road'")
    width = 3 if len(lines[0][1]) > 3 and all(word.isdecimal() for word in lines[0][1][:3]) else 1
    classes: dict[str, int] = {}
    found: dict[int, int] = {}
    for number, words in lines:
        value, name = _parsed(words, width, f"{path}, line {number}")
        if value in found:
            raise DataError(f"{path}, line {number}: {' '.join(words[:width])} has a line already: remove one of them")
        found[value] = VOID if name == _NOTHING else classes.setdefault(name, len(classes))
    if not classes or len(classes) > VOID:
        raise DataError(f"table of mask values {path} names {len(classes)} classes: masks hold 1 to {VOID}")
    values = sorted(found)
    return MaskTable(str(path), tuple(classes), width == 3, tuple(values), tuple(found[value] for value in values))


def _parsed(words: Sequence[str], width: int, place: str) -> tuple[int, str]:
    """Return the value and the class of a line."""
    numbers, name = words[:width], " ".join(words[width:])
    good = all(word.isascii() and word.isdecimal() and int(word) <= _MOST[width] for word in numbers)
    if not (good and len(numbers) == width and name):
        form = "'R G B NAME', 0 to 255 each" if width == 3 else f"'VALUE NAME', a value from 0 to {_MOST[1]}"
        raise DataError(f"{place}: {' '.join(words)!r} is not of the form {form}, with '{_NOTHING}' for no class")
    value = 0
    for word in numbers:
        value = value << 8 | int(word)
    return value, name
