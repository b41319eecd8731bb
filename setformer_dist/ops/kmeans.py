"""K-means of many groups at once (all heads of all blocks), whose result is the same bit by bit on any machine.

Coordinates are rounded to integers of 23 bits or so, relative to the largest of their group, and kept in fp64. Then
every product, distance and sum is an integer below 2^53, which fp64 holds exactly: the order of additions, the size of
a tile, the device and the number of ranks cannot change a single bit. The rounding moves a coordinate by 1e-7 of the
largest one, as fp32 does.

    kmeans               all points are here
    distributed_kmeans   each rank has some of the points; only sums and maxima travel

Lloyd's rounds from k-means++ (Arthur and Vassilvitskii, SODA 2007) or from given centroids. The random draws belong
to (seed, group, centre, id of the point), so they do not depend on who holds a point. A cluster that loses its last
point takes over the point that is farthest from its own centroid. Memory beyond the points: a tile of distances, a
few numbers for each point, and up to 256 MiB of points as integers.

Letters: g = groups, n = points here, k = clusters, d = coordinates, t = points of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.seeding import Purpose, torch_seed
from setformer_dist.ops.kernels import at_least_fp32
from setformer_dist.ops.splitmix import GOLDEN, mix64

# Numbers in one tile of distances: 32 MiB of fp64.
TILE = 1 << 22
# Numbers of a rank's points that are kept as integers; those of more are made again from tile to tile.
KEPT = 1 << 24
# Points over all ranks for which sums of squares, split into halves of 26 bits, stay below 2^53.
MAX_POINTS = 1 << 26
HALF = float(1 << 26)

Metric = Literal["euclidean", "spherical"]


class Across(Protocol):
    """Sums and maxima over all ranks, element by element; every rank calls them in the same order."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of int64 or fp64 values."""
        ...

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Return the largest int64 or fp64 values."""
        ...


class Here:
    """One rank alone."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values."""
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values."""
        return values


@dataclass(frozen=True)
class KMeansResult:
    """What was found.

    Attributes:
        centroids_gkd: at least fp32; of unit length for the spherical metric.
        assignment_gn: nearest centroid of each point here, the first of equally near ones; -1 for masked points.
        inertia_g: sum over all points of the squared distance to their centroid (spherical: of unit vectors, so
            2 (1 - cosine)), fp64.
        rounds_g: how often the centroids of a group were moved.
    """

    centroids_gkd: torch.Tensor
    assignment_gn: torch.Tensor
    inertia_g: torch.Tensor
    rounds_g: torch.Tensor


def kmeans(
    points_gnd: torch.Tensor,
    k: int,
    *,
    metric: Metric = "euclidean",
    init: torch.Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    mask_gn: torch.Tensor | None = None,
) -> KMeansResult:
    """Cluster the points of each group; groups do not feel each other.

    Args:
        points_gnd: (g, n, d), any float dtype.
        k: clusters of a group.
        metric: squared Euclidean distance, or that of the points brought to unit length (zero stays zero).
        init: centroids to start from, (g, k, d); None takes k-means++.
        iterations: rounds at most; 0 only assigns.
        tolerance: a group stops when a round takes off less than this share of its inertia; 0 waits until nothing
            improves.
        seed: of k-means++.
        mask_gn: True for points that count, (g, n); None means all.

    Raises:
        ConfigError: an argument has an impossible value or shape.
        DataError: points are not finite, or a group has fewer than k.
    """
    ids = torch.arange(points_gnd.shape[1] if points_gnd.ndim == 3 else 0, device=points_gnd.device)
    return distributed_kmeans(
        points_gnd, ids, k, across=Here(), metric=metric, init=init, iterations=iterations, tolerance=tolerance,
        seed=seed, mask_gn=mask_gn,
    )  # fmt: skip


def distributed_kmeans(
    points_gnd: torch.Tensor,
    ids_n: torch.Tensor,
    k: int,
    *,
    across: Across,
    metric: Metric = "euclidean",
    init: torch.Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    mask_gn: torch.Tensor | None = None,
) -> KMeansResult:
    """Cluster points that are spread over ranks; who holds which point changes nothing.

    Args:
        points_gnd: the points of this rank, (g, n, d); n may differ between ranks and be 0.
        ids_n: their numbers in the whole, (n,) int64, each on one rank only; `kmeans` counts from 0.
        k: see `kmeans`, as all that follows; must be the same on every rank.
        across: sums and maxima over all ranks.
        metric: see `kmeans`.
        init: see `kmeans`.
        iterations: see `kmeans`.
        tolerance: see `kmeans`.
        seed: see `kmeans`.
        mask_gn: see `kmeans`.

    Returns:
        Centroids, inertia and rounds of the whole, equal on every rank; the assignment of the points here.

    Raises:
        ConfigError: an argument has an impossible value or shape.
        DataError: points are not finite, or a group has fewer than k on all ranks together.
    """
    _check(points_gnd, ids_n, k, metric, init, iterations, tolerance, mask_gn)
    with torch.no_grad():
        points = _Points(points_gnd, ids_n, mask_gn, metric, init, across)
        points.check_count(k)
        centroids = _plus_plus(points, k, seed) if init is None else points.rounded(init)
        return _lloyd(points, centroids, iterations, tolerance)


class _Points:
    """The points of this rank as integers in fp64, tile by tile, and the reductions over all ranks."""

    def __init__(
        self,
        points_gnd: torch.Tensor,
        ids_n: torch.Tensor,
        mask_gn: torch.Tensor | None,
        metric: Metric,
        init: torch.Tensor | None,
        across: Across,
    ) -> None:
        self.raw, self.ids, self.metric, self.across = points_gnd, ids_n, metric, across
        d = points_gnd.shape[-1]
        self.valid = points_gnd.new_ones(points_gnd.shape[:2], dtype=torch.bool) if mask_gn is None else mask_gn
        # A squared distance is at most 4 d 4^bits; fp64 is exact up to 2^53.
        self.bits = (51 - math.ceil(math.log2(d))) // 2
        self.unit_g11 = self._unit(init)
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def _unit(self, init: torch.Tensor | None) -> torch.Tensor:
        """Return what the integer 1 stands for in each group, a power of two; (g, 1, 1)."""
        found = self.raw.new_zeros(self.raw.shape[0], dtype=torch.float64)
        for part in self.parts(1):
            found = torch.maximum(found, self._visible(part).abs().amax((1, 2)).double())
        if init is not None:
            found = torch.maximum(found, init.double().abs().amax((1, 2)))
        # NaN would lose every comparison of a maximum over ranks.
        largest = self.across.max(torch.where(found.isnan(), torch.inf, found)).tolist()
        if not all(map(math.isfinite, largest)):
            raise DataError("points or init hold numbers that are not finite: leave them out, or mask them")
        if self.metric == "spherical":
            largest = [0.5] * len(largest)  # a unit vector is 2^bits long
        # Below 2^-900 fp64 has no room for the scale.
        units = [2.0 ** (max(math.frexp(one)[1], -900) - self.bits) for one in largest]
        return torch.tensor(units, dtype=torch.float64, device=self.raw.device).view(-1, 1, 1)

    def _visible(self, part: slice) -> torch.Tensor:
        """Return points as they were given, zeros for masked ones; (g, t, d)."""
        return torch.where(self.valid[:, part].unsqueeze(-1), self.raw[:, part], 0.0)

    def parts(self, k: int) -> Iterator[slice]:
        """Yield slices of the points whose distances to k centroids make a tile."""
        g, n, d = self.raw.shape
        size = max(1, TILE // (g * max(k, d)))
        yield from (slice(start, min(start + size, n)) for start in range(0, n, size))

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Return points or centroids as integers in fp64."""
        if self.metric == "spherical":
            return on_sphere(values.double(), self.bits)
        return (values * self.unit_g11.reciprocal()).round_()  # a power of two: exact, and fp64 whatever the values are

    def tile(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return points as integers, (g, t, d), and their squared lengths, (g, t, 1); masked ones are 0."""
        kept = self._kept.get((part.start, part.stop))
        if kept is None:
            points_gtd = self.rounded(self._visible(part))
            kept = points_gtd, points_gtd.square().sum(-1, keepdim=True)
            if self.raw.numel() <= KEPT:
                self._kept[part.start, part.stop] = kept
        return kept

    def check_count(self, k: int) -> None:
        """Refuse groups with fewer than k points, and more points than sums can hold."""
        counts = self.across.sum(self.valid.sum(1))
        if int(counts.min()) < k:
            raise DataError(f"k = {k} clusters need as many points in every group: a group has {int(counts.min())}")
        if int(counts.max()) > MAX_POINTS:
            raise DataError(f"{int(counts.max())} points are more than the {MAX_POINTS} whose sums are exact: sample")

    def best(self, key_gn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return where the largest key of each group is: (here (g, n), integers (g, d), key (g,)).

        Of equal keys the point with the least id wins. A group without a key above minus infinity has no winner: its
        `here` is False everywhere and its integers are 0.
        """
        g, n, d = self.raw.shape
        lowest = key_gn.new_full((g, 1), -math.inf)
        top = self.across.max(torch.cat([lowest, key_gn], 1).amax(1))
        first = torch.where(
            (key_gn == top.unsqueeze(1)) & (key_gn > -math.inf), -self.ids, torch.iinfo(torch.int64).min
        )
        winner = self.across.max(torch.cat([first.new_full((g, 1), torch.iinfo(torch.int64).min), first], 1).amax(1))
        here = (first == winner.unsqueeze(1)) & (top > -math.inf).unsqueeze(1)
        place = here.to(torch.int64).argmax(1) if n else None
        mine = torch.zeros((g, d), dtype=torch.float64, device=key_gn.device)
        if place is not None:
            groups = torch.arange(g, device=key_gn.device)
            own = self.rounded(self.raw[groups, place].unsqueeze(1)).squeeze(1)
            mine = torch.where(here.any(1, keepdim=True), own, mine)
        return here, self.across.sum(mine), top


def on_sphere(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Bring vectors to length 2^bits and round them to integers; zero stays zero.

    Before squares are summed a vector is brought to integers, too, so that the sum is exact and the length depends on
    nothing but the vector.

    Args:
        values: (..., d), fp64.
        bits: as many as `d` allows, see `_Points`.
    """
    largest = values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    whole = torch.round(values / largest * 2.0**bits)
    length = whole.square().sum(-1, keepdim=True).sqrt()
    return torch.round(whole / length.clamp_min(1.0) * 2.0**bits)


def _offsets(points_gtd: torch.Tensor, centroids_gkd: torch.Tensor) -> torch.Tensor:
    """Return |x - c|^2 - |x|^2 of integers, (g, t, k), exactly; the least one is the nearest centroid's."""
    squares = centroids_gkd.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(squares, points_gtd, centroids_gkd.mT, alpha=-2.0)


# ------------------------------------------------------------------------------------------------------ k-means++


def _plus_plus(points: _Points, k: int, seed: int) -> torch.Tensor:
    """Choose k points of each group, the first at random, each next one with chances like its squared distance.

    A draw with chances w_i is a race: the largest log(u_i) / w_i wins, u_i being uniform in (0, 1).
    """
    g = points.raw.shape[0]
    nearest = torch.where(points.valid, 1.0, 0.0).double()
    chosen = []
    for centre in range(k):
        key = _log(_uniform(points.ids, g, seed, centre)) / nearest
        # Where all points lie on a centre already, any valid point will do.
        rest = points.across.max(torch.cat([nearest.new_zeros(g, 1), nearest], 1).amax(1)) == 0
        key = torch.where(rest.unsqueeze(1), -points.ids.double(), key).masked_fill(~points.valid, -math.inf)
        _, coordinates, _ = points.best(key)
        chosen.append(coordinates)
        for part in points.parts(1):
            tile, squares = points.tile(part)
            apart = (_offsets(tile, coordinates.unsqueeze(1)) + squares).squeeze(-1)
            closer = apart if centre == 0 else torch.minimum(nearest[:, part], apart)
            nearest[:, part] = torch.where(points.valid[:, part], closer, 0.0)
    return torch.stack(chosen, 1)


def _uniform(ids_n: torch.Tensor, g: int, seed: int, centre: int) -> torch.Tensor:
    """Return numbers in (0, 1), (g, n), fp64, each a function of (seed, group, centre, id) alone.

    The numbers are SplitMix64's.
    """
    keys = [torch_seed(Purpose.KMEANS, seed, group, centre) for group in range(g)]
    x = torch.tensor(keys, device=ids_n.device).unsqueeze(1) + ids_n * GOLDEN
    x = mix64(x)
    return ((x >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53


def _log(x: torch.Tensor) -> torch.Tensor:
    """Return the natural logarithm to 1e-9, by operations that every device rounds alike.

    A library's logarithm may differ in the last digit between devices, even between the elements of a tensor.
    """
    mantissa, exponent = torch.frexp(x)
    # log m = 2 atanh s with s = (m - 1) / (m + 1), |s| < 0.18 for m in [0.7, 1.4).
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square, series = s * s, torch.zeros_like(s)
    for power in (11, 9, 7, 5, 3, 1):
        series = series * square + 1.0 / power
    return (exponent - small.to(exponent.dtype)).double() * math.log(2.0) + 2.0 * s * series


# ---------------------------------------------------------------------------------------------------------- Lloyd


@dataclass
class _Fit:
    """How the points fit the centroids; sums and counts are of all ranks.

    Attributes:
        assignment_gn: of the points here; -1 for masked ones.
        distance_gn: squared, exact; 0 for masked points.
        sums_gkd: of the points of each cluster.
        counts_gk: points of each cluster.
        inertia_g: fp64, rounded once.
    """

    assignment_gn: torch.Tensor
    distance_gn: torch.Tensor
    sums_gkd: torch.Tensor
    counts_gk: torch.Tensor
    inertia_g: torch.Tensor


def _lloyd(points: _Points, centroids: torch.Tensor, iterations: int, tolerance: float) -> KMeansResult:
    """Move centroids to the means of their points until nothing improves; a group that is done stays as it is."""
    g = centroids.shape[0]
    done = torch.zeros(g, dtype=torch.bool, device=centroids.device)
    rounds = torch.zeros(g, dtype=torch.int64, device=centroids.device)
    before = torch.full((g,), math.inf, dtype=torch.float64, device=centroids.device)
    for step in range(iterations + 1):
        fit = _fit(points, centroids)
        # Before the first move this is infinite, so nothing is done; nor is it while a cluster can still be filled.
        filled = (fit.counts_gk > 0).all(1) | (fit.inertia_g == 0)
        done |= filled & (before - fit.inertia_g <= tolerance * fit.inertia_g)
        if step == iterations or bool(done.all()):
            break
        before = fit.inertia_g
        _repair(points, fit)
        centroids = torch.where(done.view(-1, 1, 1), centroids, _means(points, fit, centroids))
        rounds += ~done
    unit = points.unit_g11
    dtype = at_least_fp32(points.raw[:, :0]).dtype
    inertia = fit.inertia_g * unit.view(-1).square()
    return KMeansResult((centroids * unit).to(dtype), fit.assignment_gn, inertia, rounds)


def _fit(points: _Points, centroids: torch.Tensor) -> _Fit:
    """Assign every point to its nearest centroid and add up."""
    g, n, d = points.raw.shape
    k = centroids.shape[1]
    assignment = torch.empty((g, n), dtype=torch.int64, device=centroids.device)
    distance = torch.empty((g, n), dtype=torch.float64, device=centroids.device)
    sums, counts = torch.zeros_like(centroids), torch.zeros_like(centroids[..., 0])
    for part in points.parts(k):
        (tile, squares), valid = points.tile(part), points.valid[:, part]
        offsets = _offsets(tile, centroids)
        nearest = offsets.argmin(-1, keepdim=True)
        distance[:, part] = torch.where(valid, (offsets.gather(-1, nearest) + squares).squeeze(-1), 0.0)
        assignment[:, part] = torch.where(valid, nearest.squeeze(-1), -1)
        # Integers in fp64: exact, so the order in which a device adds them does not matter. Masked points are zero.
        chosen_gtk = offsets.zero_().scatter_(-1, nearest, 1.0)
        sums.baddbmm_(chosen_gtk.mT, tile)
        counts.scatter_add_(1, nearest.squeeze(-1), valid.double())
    high = torch.floor(distance / HALF)
    halves = torch.stack([high.sum(1), (distance - high * HALF).sum(1)])
    whole = points.across.sum(torch.cat([sums.flatten(), counts.flatten(), halves.flatten()]))
    total, number, halved = torch.tensor_split(whole, (g * k * d, g * k * d + g * k))
    top, low = halved.view(2, g)
    return _Fit(assignment, distance, total.view(g, k, d), number.view(g, k), top * HALF + low)


def _means(points: _Points, fit: _Fit, centroids: torch.Tensor) -> torch.Tensor:
    """Return the means, or their directions; a cluster that could not be filled keeps its centroid."""
    if points.metric == "spherical":
        means = on_sphere(fit.sums_gkd, points.bits)
    else:
        means = torch.round(fit.sums_gkd / fit.counts_gk.clamp_min(1.0).unsqueeze(-1))
    return torch.where((fit.counts_gk > 0).unsqueeze(-1), means, centroids)


def _repair(points: _Points, fit: _Fit) -> None:
    """Give every empty cluster the point that is farthest from its centroid, from a cluster that has others."""
    k = fit.counts_gk.shape[1]
    groups = torch.arange(fit.counts_gk.shape[0], device=fit.counts_gk.device)
    for _ in range(k):
        empty = fit.counts_gk == 0
        if not bool(empty.any()):
            return
        crowded = fit.counts_gk.gather(1, fit.assignment_gn.clamp_min(0)) > 1
        usable = crowded & (fit.distance_gn > 0) & empty.any(1, keepdim=True)
        here, coordinates, top = points.best(torch.where(usable, fit.distance_gn, -math.inf))
        found = (top > -math.inf).to(torch.float64)
        if not bool(found.any()):
            return
        target = empty.to(torch.int64).argmax(1)
        source = points.across.max(torch.where(here, fit.assignment_gn, 0).sum(1))
        fit.counts_gk[groups, source] -= found
        fit.counts_gk[groups, target] += found
        fit.sums_gkd[groups, source] -= coordinates
        fit.sums_gkd[groups, target] += coordinates
        fit.assignment_gn = torch.where(here, target.unsqueeze(1), fit.assignment_gn)
        fit.distance_gn = fit.distance_gn.masked_fill(here, 0.0)


# ----------------------------------------------------------------------------------------------------- validation


def _check(
    points: torch.Tensor,
    ids: torch.Tensor,
    k: int,
    metric: str,
    init: torch.Tensor | None,
    iterations: int,
    tolerance: float,
    mask: torch.Tensor | None,
) -> None:
    """Refuse what does not fit, naming the argument, what it is and what it should be."""
    shape = tuple(points.shape)
    if points.ndim != 3 or not points.dtype.is_floating_point or shape[0] == 0 or shape[2] == 0:
        raise ConfigError(f"points have shape {shape} and dtype {points.dtype}: expected floats (groups, points, d)")
    g, n, d = shape
    if k < 1:
        raise ConfigError(f"k = {k}: expected at least 1 cluster")
    if metric not in ("euclidean", "spherical"):
        raise ConfigError(f"metric = {metric!r}: expected 'euclidean' or 'spherical'")
    if iterations < 0 or tolerance < 0:
        raise ConfigError(f"iterations = {iterations} and tolerance = {tolerance}: expected 0 or more of both")
    if tuple(ids.shape) != (n,) or ids.dtype != torch.int64:
        raise ConfigError(f"ids have shape {tuple(ids.shape)} and dtype {ids.dtype}: expected ({n},) of torch.int64")
    if init is not None and tuple(init.shape) != (g, k, d):
        raise ConfigError(f"init has shape {tuple(init.shape)}: expected (groups, k, d) = ({g}, {k}, {d})")
    if mask is not None and (tuple(mask.shape) != (g, n) or mask.dtype != torch.bool):
        raise ConfigError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: expected ({g}, {n}) of torch.bool, True for "
            "points that count"
        )
