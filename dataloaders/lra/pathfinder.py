"""Pathfinder (Linsley et al. 2018) at the sizes of Long Range Arena: are two discs on the same dashed curve?

    two target snakes of `contour_length` paddles, begun `seed_distance` apart     each grows from its first paddle
    a few short distractor snakes in what room is left
    discs: on the begin of the first snake and on the end of the same (label 1) or of the other one (label 0)

Both target snakes are in every image, so only their continuity determines the label. Geometry is exact (ends of paddles
as real numbers, distances between them). An image is drawn from the distance of each pixel to each paddle instead of by
oversampling. Target snakes often run into a dead end: image i is the first of its attempts that does not. Many
attempts proceed in lockstep. Every draw is keyed by (seed, step, image, attempt), so an image depends on nothing else.
Every second image is a connected one.

Letters: b = images, p = paddles, k = proposals; points are (y, x) in pixels, pixel centres at whole numbers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dataloaders.lra.generating import Chunk, MakeChunk
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.seeding import Purpose, sample_keys

CLASSES = ("apart", "connected")

# Images of one chunk.
CHUNK = 128

# Attempts in lockstep: enough that numpy's overhead is small, few enough for the caches.
_LOCKSTEP = 512
# Attempts are numbered below this within an image.
_ATTEMPTS = 2**24

# Directions proposed for the next paddle, and places proposed for the first one of a distractor.
_PROPOSALS = 24
# Where a paddle is that has not been placed.
_FAR = 1e6

_Floats = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PathfinderConfig:
    """The published parameters of the 32 x 32 task at its hard level; lengths in pixels.

    Attributes:
        window: side of the image.
        padding: pixels along the border that paddles stay out of.
        paddle_length: length of a dash.
        thickness: width of a dash.
        margins: half the gaps between neighbouring dashes; each image draws one of these.
        marker_radius: of the two discs.
        contour_length: dashes of a target snake; 6, 9 and 14 are the easy, intermediate and hard levels.
        seed_distance: from the begin of one target snake to that of the other; both stay twice that from the border.
        continuity: the next dash turns by at most 90 degrees / continuity, weighted by cos^2(continuity * angle).
        distractor_length: dashes of a distractor.
        distractors: their number, where there is room for all.
        contrast: grey value of a fully covered pixel of a dash, 1 is white (paddle times snake contrast).
        levels: grey values, from 0 to 255 in equal steps. An encoder learns a vector for each of 256, most of them
            from a few pixels in a thousand; with 4 a short run leaves the plateau at 50 %.

    Raises:
        ConfigError: the image is too small for the parameters, or the levels do not part 255.
    """

    window: int = 32
    padding: int = 1
    paddle_length: float = 2.0
    thickness: float = 0.5
    margins: tuple[float, ...] = (1.0,)
    marker_radius: float = 1.5
    contour_length: int = 14
    seed_distance: float = 7.0
    continuity: float = 1.0
    distractor_length: int = 4
    distractors: int = 5
    contrast: float = 1.5
    levels: int = 256

    def __post_init__(self) -> None:
        if self.levels < 2 or 255 % (self.levels - 1):
            raise ConfigError(f"Pathfinder levels = {self.levels} do not part 255 in equal steps: use 256, 52, 16 or 4")
        if self.window - 1 < 4 * self.seed_distance:
            raise ConfigError(
                f"Pathfinder window {self.window} is too small for a seed distance of {self.seed_distance}, which "
                f"keeps twice that from every border: take a window of at least {math.ceil(4 * self.seed_distance) + 1}"
            )

    def as_json(self) -> dict[str, object]:
        """Return the parameters as a JSON-able table."""
        return {**asdict(self), "margins": list(self.margins)}


# Path-X: the 128 x 128 task at its hard level.
PATHX = PathfinderConfig(
    window=128,
    paddle_length=5.0,
    thickness=1.5,
    margins=(2.0, 3.0),
    marker_radius=3.0,
    seed_distance=20.0,
    continuity=1.8,
    distractors=8,
    contrast=0.9,
)


def chunk_maker(config: PathfinderConfig, seed: int) -> MakeChunk:
    """Return the function that makes chunks of candidates of this seed."""
    return functools.partial(_make, config, seed)


def _make(config: PathfinderConfig, seed: int, first: int, count: int) -> Chunk:
    images = np.arange(first, first + count, dtype=np.int64)
    scene, tips_b22 = _targets(config, seed, images)
    scene.place_distractors()
    labels = images % 2
    other_end = tips_b22[np.arange(count), 1 - labels, 1]
    pixels = draw(config, scene.tails_bp2, scene.heads_bp2, np.stack([tips_b22[:, 0, 0], other_end], 1))
    return Chunk(pixels.reshape(-1), np.full(count, config.window**2), labels, images)


def _targets(config: PathfinderConfig, seed: int, images: npt.NDArray[np.int64]) -> tuple[_Scene, _Floats]:
    """Return the first attempt of each image whose target snakes both found room, and their tips (b, snake, 2, 2)."""
    words = sample_keys(Purpose.PATHFINDER, seed, -1, images).view(np.uint64)
    margins = np.array(config.margins)[(words % np.uint64(len(config.margins))).astype(np.int64)]
    pending = np.arange(len(images))
    begun = 0
    done: list[tuple[_Scene, _Floats]] = []
    while len(pending):
        attempts = np.arange(begun, begun + max(1, _LOCKSTEP // len(pending)))
        begun = int(attempts[-1]) + 1
        ids = (images[pending, None] * _ATTEMPTS + attempts).reshape(-1)
        scene = _Scene(config, seed, ids, np.repeat(margins[pending], len(attempts)))
        tips = scene.place_targets()
        found, firsts = np.unique(scene.ids // _ATTEMPTS, return_index=True)
        scene.keep(firsts)
        done.append((scene, tips[firsts]))
        pending = pending[~np.isin(images[pending], found)]
    order = np.argsort(np.concatenate([scene.ids for scene, _ in done]))
    scene = done[0][0]
    scene.ids = np.concatenate([part.ids for part, _ in done])
    scene.margin_b = np.concatenate([part.margin_b for part, _ in done])
    scene.tails_bp2 = np.concatenate([part.tails_bp2 for part, _ in done])
    scene.heads_bp2 = np.concatenate([part.heads_bp2 for part, _ in done])
    scene.keep(order)
    return scene, np.concatenate([tips for _, tips in done])[order]


class _Scene:
    """The paddles of some attempts; unplaced paddles are far away."""

    def __init__(self, config: PathfinderConfig, seed: int, ids: npt.NDArray[np.int64], margin_b: _Floats) -> None:
        self.config = config
        self.ids = ids
        self.margin_b = margin_b
        self._seed = seed
        self._drawn = 0
        self.tails_bp2 = np.empty((len(ids), 0, 2))
        self.heads_bp2 = np.empty((len(ids), 0, 2))

    def uniform(self, count: int) -> _Floats:
        """Draw (b, count) numbers in [0, 1), count <= 128: a function of (seed, how many draws before, attempt)."""
        ids = self.ids[:, None] * 128 + np.arange(count)
        words = sample_keys(Purpose.PATHFINDER, self._seed, self._drawn, ids).view(np.uint64)
        self._drawn += 1
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def keep(self, rows: npt.NDArray[np.generic]) -> None:
        """Keep some of the attempts, given as a mask or as their places in the order wanted."""
        self.ids, self.margin_b = self.ids[rows], self.margin_b[rows]
        self.tails_bp2, self.heads_bp2 = self.tails_bp2[rows], self.heads_bp2[rows]

    def _add(self, tail_b2: _Floats, head_b2: _Floats) -> None:
        self.tails_bp2 = np.concatenate([self.tails_bp2, tail_b2[:, None]], 1)
        self.heads_bp2 = np.concatenate([self.heads_bp2, head_b2[:, None]], 1)

    def place_targets(self) -> _Floats:
        """Place both target snakes, drop the attempts where that fails; return (b, snake, begin or end, 2) tips."""
        c = self.config
        near, side = 2 * c.seed_distance, c.window - 1 - 4 * c.seed_distance
        first_b2 = near + side * self.uniform(2)
        second_b2 = first_b2 + c.seed_distance * _unit(2 * math.pi * self.uniform(1)[:, 0])
        for tail_b2 in (first_b2, second_b2):
            head_b2 = tail_b2 + c.paddle_length * _unit(2 * math.pi * self.uniform(1)[:, 0])
            self._add(tail_b2, head_b2)
        free = self._free(self.tails_bp2[:, 1:2], self.heads_bp2[:, 1:2], self.tails_bp2[:, :1], self.heads_bp2[:, :1])
        self.keep(free[:, 0] & self._inside(self.heads_bp2[:, :1])[:, 0])
        for paddle in range(2, 2 * c.contour_length):  # the snakes grow in turns, so one's last paddle is two back
            tail_b2, head_b2, found_b = self._next(self.tails_bp2, self.heads_bp2, paddle - 2)
            self._add(tail_b2, head_b2)
            self.keep(found_b)
        return np.stack([self.tails_bp2[:, :2], self.heads_bp2[:, -2:]], 2)

    def place_distractors(self) -> None:
        """Try twice as many distractors as wanted; those that do not find room are left out."""
        c = self.config
        wanted, length = c.distractors, c.distractor_length
        if not wanted:
            return
        b, targets = len(self.ids), self.tails_bp2.shape[1]
        far = np.full((b, wanted * length, 2), _FAR)
        self.tails_bp2 = np.concatenate([self.tails_bp2, far], 1)
        self.heads_bp2 = np.concatenate([self.heads_bp2, far], 1)
        placed_b = np.zeros(b, np.int64)
        for _ in range(2 * wanted):
            tails, heads, found_b = self._distractor()
            rows = np.nonzero(found_b & (placed_b < wanted))[0]
            slots = targets + placed_b[rows, None] * length + np.arange(length)
            self.tails_bp2[rows[:, None], slots] = tails[rows]
            self.heads_bp2[rows[:, None], slots] = heads[rows]
            placed_b[rows] += 1

    def _distractor(self) -> tuple[_Floats, _Floats, _Bools]:
        """Return tails and heads (b, distractor_length, 2) of one more snake, and where it found room."""
        c = self.config
        draws = self.uniform(3 * _PROPOSALS).reshape(-1, 3, _PROPOSALS)
        tail_bk2 = c.padding + (c.window - 1 - 2 * c.padding) * np.stack([draws[:, 0], draws[:, 1]], -1)
        head_bk2 = tail_bk2 + c.paddle_length * _unit(2 * math.pi * draws[:, 2])
        free_bk = self._free(tail_bk2, head_bk2, self.tails_bp2, self.heads_bp2)
        found_b: _Bools = np.asarray(free_bk.any(1))
        chosen = (np.arange(len(free_bk)), free_bk.argmax(1))
        tails, heads = tail_bk2[chosen][:, None], head_bk2[chosen][:, None]
        for _ in range(c.distractor_length - 1):
            all_tails = np.concatenate([self.tails_bp2, tails], 1)
            all_heads = np.concatenate([self.heads_bp2, heads], 1)
            tail_b2, head_b2, grown_b = self._next(all_tails, all_heads, all_tails.shape[1] - 1)
            tails, heads = np.concatenate([tails, tail_b2[:, None]], 1), np.concatenate([heads, head_b2[:, None]], 1)
            found_b &= grown_b
        return tails, heads, found_b

    def _next(self, tails_bp2: _Floats, heads_bp2: _Floats, last: int) -> tuple[_Floats, _Floats, _Bools]:
        """Draw the paddle that follows paddle `last`; return its tail, its head and whether there was room."""
        c = self.config
        along_b2 = (heads_bp2[:, last] - tails_bp2[:, last]) / c.paddle_length
        course_b = np.arctan2(along_b2[:, 0], along_b2[:, 1])
        draws = self.uniform(2)
        turn_bk = (2 * (np.arange(_PROPOSALS) + draws[:, :1]) / _PROPOSALS - 1) * (math.pi / 2 / c.continuity)
        direction_bk2 = _unit(course_b[:, None] + turn_bk)
        gap_b = self.margin_b[:, None]
        pivot_b2 = heads_bp2[:, last] + gap_b * along_b2
        tail_bk2 = pivot_b2[:, None] + gap_b[:, None] * direction_bk2
        head_bk2 = tail_bk2 + c.paddle_length * direction_bk2
        others = [p for p in range(tails_bp2.shape[1]) if p != last]  # the gap to the last one is made by the pivot
        free_bk = self._free(tail_bk2, head_bk2, tails_bp2[:, others], heads_bp2[:, others])
        weight_bk = np.cos(c.continuity * turn_bk) ** 2 * free_bk
        sums_bk: _Floats = weight_bk.cumsum(1)
        chosen = (np.arange(len(sums_bk)), (sums_bk > draws[:, 1:] * sums_bk[:, -1:]).argmax(1))
        room_b: _Bools = sums_bk[:, -1] > 0
        return tail_bk2[chosen], head_bk2[chosen], room_b

    def _inside(self, point_bk2: _Floats) -> _Bools:
        c = self.config
        low, high = c.padding, c.window - 1 - c.padding
        return np.asarray(((point_bk2 >= low) & (point_bk2 <= high)).all(-1))

    def _free(self, tail_bk2: _Floats, head_bk2: _Floats, tails_bp2: _Floats, heads_bp2: _Floats) -> _Bools:
        """Return where proposals stay in the window and a gap away from all given paddles."""
        free_bk = self._inside(tail_bk2) & self._inside(head_bk2)
        for share in (0.0, 0.5, 1.0):
            point_bk2 = tail_bk2 + share * (head_bk2 - tail_bk2)
            square = _distance_squared(point_bk2[:, :, None], tails_bp2[:, None], heads_bp2[:, None])
            free_bk &= (square >= (2 * self.margin_b[:, None, None]) ** 2).all(-1)
        return free_bk


def _unit(angle: _Floats) -> _Floats:
    """Return (..., 2) unit vectors (y, x)."""
    return np.stack([np.sin(angle), np.cos(angle)], -1)


def _distance_squared(point: _Floats, tail: _Floats, head: _Floats) -> _Floats:
    """Return the squared distance of points (..., 2) to the segments from tail to head (..., 2)."""
    ay, ax = head[..., 0] - tail[..., 0], head[..., 1] - tail[..., 1]
    py, px = point[..., 0] - tail[..., 0], point[..., 1] - tail[..., 1]
    share = np.clip((py * ay + px * ax) / np.maximum(ay * ay + ax * ax, 1e-12), 0.0, 1.0)
    y, x = py - share * ay, px - share * ax
    result: _Floats = y * y + x * x
    return result


def draw(
    config: PathfinderConfig, tails_bp2: _Floats, heads_bp2: _Floats, markers_b22: _Floats
) -> npt.NDArray[np.uint8]:
    """Draw images (b, window, window) uint8 of paddles and discs, antialiased by the distance to the pixel's centre.

    Args:
        config: thickness, contrast and radius.
        tails_bp2: begins of the paddles; far outside where there is none.
        heads_bp2: their ends.
        markers_b22: centres of the two discs.
    """
    half = math.ceil(config.paddle_length / 2 + config.thickness / 2) + 1
    canvas = np.zeros((len(tails_bp2), config.window, config.window))
    body = functools.partial(_paddle_grey, config)
    _stamp(canvas, (tails_bp2 + heads_bp2) / 2, half, lambda y, at: body(y, tails_bp2[at], heads_bp2[at]))
    radius = config.marker_radius
    _stamp(
        canvas,
        markers_b22,
        math.ceil(radius) + 1,
        lambda y, at: np.clip(radius + 0.5 - np.sqrt(_distance_squared(y, markers_b22[at], markers_b22[at])), 0, 1),
    )
    step = 255 // (config.levels - 1)
    return (np.round(np.minimum(canvas, 1.0) * (config.levels - 1)) * step).astype(np.uint8)


def _paddle_grey(config: PathfinderConfig, pixel: _Floats, tail: _Floats, head: _Floats) -> _Floats:
    """Return the grey value that a paddle gives to pixels: what share of each it covers, times the contrast."""
    distance = np.sqrt(_distance_squared(pixel, tail, head))
    covered: _Floats = np.clip(0.5 + config.thickness / 2 - distance, 0.0, min(1.0, config.thickness))
    return config.contrast * covered


def _stamp(canvas: _Floats, centres_bp2: _Floats, half: int, grey: Any) -> None:
    """Lay shapes on the canvas (b, S, S), the lighter one on top; each within `half` pixels of its centre."""
    side = canvas.shape[-1]
    offset = np.arange(-half, half + 1)
    corner = np.round(centres_bp2).astype(np.int64)
    y = corner[..., 0, None, None] + offset[:, None]
    x = corner[..., 1, None, None] + offset[None, :]
    image, paddle, *_ = at = np.nonzero(np.broadcast_to((y >= 0) & (y < side) & (x >= 0) & (x < side), _shape(y, x)))
    y, x = np.broadcast_to(y, _shape(y, x))[at], np.broadcast_to(x, _shape(y, x))[at]
    pixels = np.stack([y, x], -1).astype(np.float64)
    np.maximum.at(canvas, (image, y, x), grey(pixels, (image, paddle)))


def _shape(y: npt.NDArray[np.int64], x: npt.NDArray[np.int64]) -> tuple[int, ...]:
    return np.broadcast_shapes(y.shape, x.shape)
