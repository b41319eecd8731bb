"""crop = "scale_jitter": image, mask and boxes stay together, at any factor."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.pixels.transforms import TrainTransform, draw_choices
from dataloaders.pixels.view import jittered_view
from dataloaders.source import Boxes, Stored
from setformer_dist.core.batch import VOID
from setformer_dist.core.errors import ConfigError

SHAPE = (64, 96)


class Marked:
    """A source of which transforms only ask what parts its samples have."""

    name, classes = "marked", ("none", "object")
    parts = frozenset({"mask", "boxes"})


def sample_of(height: int, width: int, box: tuple[int, int, int, int]) -> Stored:
    """Return a red image with a green box, as image, mask and box (x0, y0, x1, y1)."""
    pixels, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    pixels[..., 0] = 200
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = (0, 200, 0)
    mask[y0:y1, x0:x1] = 1
    files = []
    for array in (pixels, mask):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        files.append(buffer.getvalue())
    boxes = Boxes(np.array([box], np.float32), np.array([1]), np.array([False]), np.array([1.0], np.float32))
    return Stored(files[0], files[1], boxes)


def config_of(limits: tuple[float, float], flip: bool = True, **rest: object) -> DataConfig:
    augment = AugmentConfig(crop="scale_jitter", scale_jitter=limits, flip=flip)
    return DataConfig(root="x", image_size=SHAPE[0], image_width=SHAPE[1], augment=augment, **rest)


@pytest.mark.parametrize("limits", [(0.25, 0.5), (0.8, 1.2), (1.0, 3.0)])
@pytest.mark.parametrize("stored", [(80, 200), (300, 90), (64, 96)])
def test_image_mask_and_box_stay_together(limits: tuple[float, float], stored: tuple[int, int]) -> None:
    height, width = stored
    box = (width // 4, height // 3, width // 4 + width // 2, height // 3 + height // 2)
    config = config_of(limits)
    show = TrainTransform(config, Marked())  # type: ignore[arg-type]
    choices = draw_choices(config.augment, 5, np.zeros(40, np.int64), np.arange(40))
    seen = 0
    for choice in choices:
        shown = show(sample_of(height, width, box), stored, SHAPE, choice)
        assert shown.image.shape == (3, *SHAPE)
        assert shown.mask is not None
        assert shown.boxes is not None
        green = (shown.image[1] > 100) & (shown.image[0] < 100)
        differing = (green != (shown.mask == 1)).float().mean()
        assert differing < 0.06  # edges alone
        outside = shown.mask == VOID
        mean = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)
        assert bool((shown.image == mean).all(dim=0)[outside].all())
        if len(shown.boxes.labels):
            x0, y0, x1, y1 = shown.boxes.corners[0].tolist()
            rows, columns = (shown.mask == 1).nonzero().unbind(1)
            there = [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]
            assert [x0, y0, x1, y1] == pytest.approx(there, abs=1.6)
            seen += 1
    assert seen > 10


def test_factors_are_even_between_the_limits_and_keep_proportions() -> None:
    rng = np.random.default_rng(0)
    found = []
    for draws in rng.random((500, 3)):
        view = jittered_view((300, 500), (1000, 1000), (0.1, 0.9), list(draws))
        assert view.box[:2] == (0, 0) or view.resized[1] == 1000  # cut only where it is larger than the window
        rows = view.resized[0] / view.box[2]
        found.append(rows * 300 / 1000)
        assert rows == pytest.approx(view.resized[1] / view.box[3], rel=0.02)
        assert all(-1000 <= o <= 0 for o in view.offset)
    assert min(found) == pytest.approx(0.1, abs=0.01)
    assert max(found) == pytest.approx(0.9, abs=0.01)
    assert float(np.mean(found)) == pytest.approx(0.5, abs=0.03)


def test_a_smaller_image_lies_anywhere_in_the_window() -> None:
    corners = {
        jittered_view((10, 10), (20, 20), (0.5, 0.5), (0.0, a, b)).offset for a in (0.0, 0.999) for b in (0, 0.999)
    }
    assert corners == {(0, 0), (-10, 0), (0, -10), (-10, -10)}


def test_sixteen_bits_are_padded_with_their_mean() -> None:
    pixels = np.full((40, 40, 1), 9000, np.uint16)
    config = config_of((0.3, 0.3), pixels="uint16", mean=(0.5,), std=(0.2,))
    source = Marked()
    show = TrainTransform(config, source)  # type: ignore[arg-type]
    [choice] = draw_choices(config.augment, 1, np.zeros(1, np.int64), np.zeros(1, np.int64))
    shown = show(Stored(pixels), (40, 40), SHAPE, choice)
    assert shown.image.dtype == torch.uint16
    assert set(np.unique(shown.image.numpy())) == {9000, 32768}


def test_impossible_limits_are_refused() -> None:
    for limits in ((0.0, 1.0), (2.0, 1.0), (1.0, 17.0)):
        with pytest.raises((ConfigError, ValueError), match="must satisfy"):
            AugmentConfig(crop="scale_jitter", scale_jitter=limits)
