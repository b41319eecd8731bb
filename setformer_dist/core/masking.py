"""Which parts of an image masked autoencoding hides: square units of pixels, drawn from keys alone.

Every image hides the same number of units, so that tensors have static shapes, and the rows of units differ by at most
one visible unit, so that no part of the image is left without any.

Letters: m = images, R, C = rows and columns of units, U = pixels of a unit's side, N = R C units, V visible ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.splitmix import counted, mix64
from setformer_dist.core.words import counted as counted_noun


def check_unit(unit: int, stride: int, shape: tuple[int, int], ratio: float) -> None:
    """Check that units can be hidden in images of a size.

    Args:
        unit: U.
        stride: image pixels per token of the last stage.
        shape: height and width of the images.
        ratio: share of the units that is hidden.

    Raises:
        ConfigError: naming what would work.
    """
    if unit % stride:
        near = sorted({max(1, unit // stride) * stride, (unit // stride + 1) * stride})
        raise ConfigError(
            f"task.args.unit = {unit} must be a multiple of the model's total stride of {stride} pixels, so that a "
            f"unit holds whole tokens in every stage: use {' or '.join(map(str, near))}"
        )
    for side in shape:
        if side % unit or not side:
            near = sorted({max(1, side // unit) * unit, (side // unit + 1) * unit})
            units = [u for u in range(stride, side // 2 + 1, stride) if not shape[0] % u and not shape[1] % u]
            instead = f", or a task.args.unit of {' or '.join(map(str, units))}" if units else ""
            raise ConfigError(
                f"images of {shape[0]} x {shape[1]} pixels are not made of whole units of {unit} x {unit}: use sides "
                f"such as {' or '.join(map(str, near))}{instead}"
            )
    count = (shape[0] // unit) * (shape[1] // unit)
    if not 0 < visible_units(count, ratio) < count:
        hidden = count - visible_units(count, ratio)
        raise ConfigError(
            f"images of {shape[0]} x {shape[1]} pixels have {counted_noun(count, 'unit')} of {unit} x {unit}, and "
            f"task.args.ratio = {ratio} hides {hidden} of them, which must leave some and hide some: use larger "
            "images, smaller units or another ratio"
        )


def visible_units(count: int, ratio: float) -> int:
    """Return V, how many of so many units stay visible."""
    return count - round(count * ratio)


def hidden_units(keys: npt.NDArray[np.int64], rows: int, columns: int, ratio: float) -> npt.NDArray[np.bool_]:
    """Draw which units are hidden: a function of each image's key, and nothing else.

    Args:
        keys: (m,), one per image.
        rows: R.
        columns: C.
        ratio: share of the units that is hidden.

    Returns:
        (m, R, C), True where hidden; `visible_units(R C, ratio)` of each image are not.
    """
    visible, units = visible_units(rows * columns, ratio), rows * columns
    words = mix64(counted(keys.view(np.uint64)[:, None], np.arange(units + 1, dtype=np.int64)))
    # V visible units over R rows as evenly as whole numbers allow, beginning at a row that the key draws.
    first = (words[:, :1] % np.uint64(rows)).astype(np.int64)
    turned = (np.arange(rows) + first) % rows
    shares = (turned + 1) * visible // rows - turned * visible // rows
    order = words[:, 1:].reshape(-1, rows, columns).argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
    hidden: npt.NDArray[np.bool_] = order >= shares[:, :, None]
    return hidden
