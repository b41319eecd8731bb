"""The colours in which classes are drawn, in pictures and in files of masks."""

from __future__ import annotations

import colorsys

# The golden ratio's share of a turn: hues of neighbouring classes lie far apart, for any number of them.
_HUE_STEP = 0.61803398875


def colour(label: int) -> tuple[int, int, int]:
    """Return the colour in which a class is drawn: bright, and far from its neighbours'."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * _HUE_STEP) % 1, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
