"""Pathfinder: what an image shows is what its label says, and the parameters are kept."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from dataloaders.lra import pathfinder
from dataloaders.lra.pathfinder import PATHX, PathfinderConfig, chunk_maker, draw
from setformer_dist.core.errors import ConfigError

SMALL = PathfinderConfig(window=16, contour_length=4, seed_distance=3.5, distractor_length=2, distractors=2)


def images(config: PathfinderConfig, count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    chunk = chunk_maker(config, seed)(0, count)
    assert len(chunk.labels) == count
    return chunk.tokens.reshape(count, config.window, config.window)


@pytest.mark.parametrize(("config", "count"), [(SMALL, 40), (PathfinderConfig(), 20), (PATHX, 4)])
def test_an_image_is_a_function_of_seed_and_number(config: PathfinderConfig, count: int) -> None:
    whole = images(config, count)
    part = chunk_maker(config, 0)(count // 2, 2).tokens.reshape(2, config.window, config.window)
    assert np.array_equal(whole[count // 2 : count // 2 + 2], part)
    assert not np.array_equal(whole, images(config, count, seed=1))
    assert whole.dtype == np.uint8
    assert all(len(np.unique(image)) > 2 for image in whole)
    assert len({image.tobytes() for image in whole}) == count


def test_labels_are_balanced() -> None:
    labels = chunk_maker(SMALL, 0)(0, 40).labels
    assert labels.tolist() == [0, 1] * 20


@pytest.mark.parametrize("config", [SMALL, PathfinderConfig(), replace(PATHX, margins=(2.0,))])
def test_geometry(config: PathfinderConfig) -> None:
    """Dashes of the length asked for, in the window, nowhere nearer than a gap; snakes begun at their distance."""
    scene, tips = pathfinder._targets(config, 5, np.arange(6))
    scene.place_distractors()
    tails, heads = scene.tails_bp2, scene.heads_bp2
    count = 2 * config.contour_length
    assert np.linalg.norm(tails[:, 0] - tails[:, 1], axis=1) == pytest.approx(np.full(6, config.seed_distance))
    assert np.array_equal(tips[:, :, 0], tails[:, :2])
    assert np.array_equal(tips[:, :, 1], heads[:, count - 2 : count])
    for b in range(6):
        placed = np.nonzero(tails[b, :, 0] < 1e5)[0]
        assert len(placed) >= count
        ends = np.stack([tails[b, placed], heads[b, placed]], 1)
        assert np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1) == pytest.approx(config.paddle_length)
        assert ends.min() >= config.padding
        assert ends.max() <= config.window - 1 - config.padding
        for p, tail, head in zip(placed, ends[:, 0], ends[:, 1], strict=True):
            follows = np.isin(placed, [p - 2, p + 2] if p < count else [p - 1, p + 1]) | (placed == p)
            others = ~follows
            for share in (0.0, 0.5, 1.0):
                point = tail + share * (head - tail)
                square = pathfinder._distance_squared(point, ends[others, 0], ends[others, 1])
                assert square.min() >= (2 * scene.margin_b[b] - config.paddle_length / 4) ** 2


@pytest.mark.parametrize("config", [SMALL, PathfinderConfig(), replace(PATHX, margins=(2.0,))])
def test_target_snakes_are_continuous(config: PathfinderConfig) -> None:
    """Each dash of a snake begins within two margins of the last one's end, the turn within its bound."""
    scene, _ = pathfinder._targets(config, 1, np.arange(4))
    for snake in (0, 1):
        tails, heads = scene.tails_bp2[:, snake::2], scene.heads_bp2[:, snake::2]
        gaps = np.linalg.norm(tails[:, 1:] - heads[:, :-1], axis=2)
        assert gaps.max() <= 2 * max(config.margins) + 1e-9
        along = (heads - tails) / config.paddle_length
        cosine = (along[:, 1:] * along[:, :-1]).sum(2)
        assert cosine.min() >= np.cos(np.pi / 2 / config.continuity) - 1e-9


def test_the_discs_are_at_the_ends_that_the_label_names() -> None:
    config = replace(PATHX, distractors=0, margins=(2.0,))
    scene, tips = pathfinder._targets(config, 0, np.arange(4))
    shown = images(config, 4)
    side = np.arange(config.window)
    y, x = np.meshgrid(side, side, indexing="ij")
    for b, image in enumerate(shown):
        same = b % 2 == 1
        for place in (tips[b, 0, 0], tips[b, 0 if same else 1, 1]):
            inside = (y - place[0]) ** 2 + (x - place[1]) ** 2 <= (config.marker_radius - 0.5) ** 2
            assert image[inside].min() == 255
    assert len(scene.ids) == 4


def test_drawing_is_antialiased() -> None:
    config = replace(SMALL, thickness=1.0, contrast=1.0, marker_radius=0.0)
    tail, head = np.array([[[5.0, 3.0]]]), np.array([[[5.0, 9.0]]])
    off = np.full((1, 2, 2), -1e6)
    on_line = draw(config, tail, head, off)[0]
    assert on_line[5, 4:9].tolist() == [255] * 5
    assert on_line[[3, 7]].max() == 0
    down = np.array([0.5, 0.0])
    between = draw(config, tail + down, head + down, off)[0]
    assert between[5, 4:9].tolist() == between[6, 4:9].tolist() == [128] * 5


def test_fewer_greys_are_the_same_picture_rounded() -> None:
    full, few = (images(replace(SMALL, levels=levels), 20) for levels in (256, 4))
    assert np.unique(few).tolist() == [0, 85, 170, 255]
    assert np.abs(full.astype(int) - few).max() <= 43
    with pytest.raises(ConfigError, match="levels = 5 do not part 255"):
        PathfinderConfig(levels=5)


def test_a_window_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 29"):
        PathfinderConfig(window=20)
