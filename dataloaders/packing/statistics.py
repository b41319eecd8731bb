"""Mean and standard deviation of the bands of a data set: what `data.mean` and `data.std` want."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dataloaders.pixels.decode import decode_box, natural, stored_shape
from dataloaders.pixels.depth import FULL_RANGE, PixelFormat, UndecodableError
from dataloaders.source import DamagedSampleError, Source, Stored, Tiled, spread_evenly
from setformer_dist.core.errors import DataError

# Side of the windows that are read of an image in tiles, one in the middle of each quarter.
_WINDOW = 512


@dataclass(frozen=True)
class BandStatistics:
    """What images are made of.

    Attributes:
        pixels: data type of the bands, as `data.pixels` has it.
        mean: of each band, as a share of the full range; of float32 in its own unit.
        std: likewise.
        images: that were looked at.
        damaged: images that could not be read.
    """

    pixels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    damaged: int


def band_statistics(
    source: Source, look_at: int, max_pixels: int, advance: Callable[[int], None] = lambda done: None
) -> BandStatistics:
    """Return mean and standard deviation over all pixels of some images, spread evenly over a data set.

    Of images in tiles four windows are read. Sums are in fp64 and do not cancel (Chan et al. 1983).

    Args:
        source: opened data.
        look_at: images that are read, at most.
        max_pixels: height x width beyond which an image counts as damaged.
        advance: called for each image, with 1.

    Raises:
        DataError: images differ in bands or data type, or none can be read.
    """
    form: PixelFormat | None = None
    count, images, damaged = 0, 0, 0
    mean = squares = np.zeros(0)
    for sample in spread_evenly(source.num_samples, look_at):
        advance(1)
        try:
            stored = source.read(sample)
            found = natural(stored.image, max_pixels)
            parts = list(_parts(stored, found))
        except (DamagedSampleError, UndecodableError):
            damaged += 1
            continue
        if form is None:
            form, mean, squares = found, np.zeros(found.bands), np.zeros(found.bands)
        if (found.bands, found.numbers) != (form.bands, form.numbers):
            raise DataError(
                f"{source.place(sample)} has {found.bands} bands of {found.numbers}, and images before it "
                f"{form.bands} of {form.numbers}: a data set has one kind of images"
            )
        images += 1
        for pixels in parts:
            values = pixels.reshape(-1, form.bands).astype(np.float64) / FULL_RANGE[form.numbers]
            own, more = values.mean(0), len(values)
            squares = squares + ((values - own) ** 2).sum(0) + (own - mean) ** 2 * (count * more / (count + more))
            mean = mean + (own - mean) * (more / (count + more))
            count += more
    if form is None:
        raise DataError(f"{source.name} has no image that can be read among the {damaged} that were looked at")
    std = np.sqrt(squares / count)
    return BandStatistics(form.numbers, tuple(mean.tolist()), tuple(std.tolist()), images, damaged)


def _parts(stored: Stored, form: PixelFormat) -> Iterator[npt.NDArray[Any]]:
    height, width = stored_shape(stored.image, form)
    if not isinstance(stored.image, Tiled) or isinstance(stored.image, bytes | np.ndarray):
        yield decode_box(stored.image, (0, 0, height, width), (height, width), form)
        return
    h, w = min(_WINDOW, height // 2 or 1), min(_WINDOW, width // 2 or 1)
    for top in (max(0, height // 4 - h // 2), max(0, 3 * height // 4 - h // 2)):
        for left in (max(0, width // 4 - w // 2), max(0, 3 * width // 4 - w // 2)):
            yield decode_box(
                stored.image, (top, left, min(h, height - top), min(w, width - left)), (height, width), form
            )
