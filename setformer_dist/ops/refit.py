"""New reference sets by K-means over sampled tokens: all blocks and heads at once, the same bits on any ranks.

    spherical K-means, warm-started from the present references     `kmeans.py`; one call for all sets of one shape
    matching of new to old                                          Hungarian, by the cosine: identities persist
    lengths                                                         each reference keeps the one that it has

A reference that no token is nearest to (a dead one) is put where the worst-fitted token is, by the K-means itself. The
order is anchors first: with the Nyström kernel, references live in the space of the features that the new anchors make.

Letters: h = heads, r = tokens of a sample, m = references, d = channels of one head, k = channels of a reference,
g = heads of all blocks of one shape.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from setformer_dist.core.model_config import SetKind
from setformer_dist.ops.kernels import nystrom, unit
from setformer_dist.ops.kmeans import KEPT, Across, Here, distributed_kmeans, on_sphere
from setformer_dist.ops.reservoir import Sample
from setformer_dist.ops.set.attention import SetAttentionConfig, marginal_error


@dataclass(frozen=True)
class Layer:
    """A SeT attention layer, as far as its sets are concerned.

    Attributes:
        name: of the module; its sets are the parameters `name.references` and so on.
        heads: h.
        width: d.
        config: of the layer, as `of_stage` returns it.
        shapes: (h, m, k) of each set that it has.
    """

    name: str
    heads: int
    width: int
    config: SetAttentionConfig
    shapes: Mapping[SetKind, tuple[int, int, int]]

    def parameter(self, kind: SetKind) -> str:
        """Return the name of a set's parameter."""
        return f"{self.name}.{kind}" if self.name else kind


@dataclass(frozen=True)
class Problem:
    """All that new sets are computed from.

    Attributes:
        layers: of the model, in its order.
        samples: tokens of each layer, by its name.
        present: every set of every layer, fp32, by the name of its parameter.
        sets: which are to be computed.
        start: "references" starts K-means from the present ones, "kmeans++" from tokens drawn by the seed.
        iterations: rounds of K-means at most.
        seed: of K-means++.
    """

    layers: tuple[Layer, ...]
    samples: Mapping[str, Sample]
    present: Mapping[str, torch.Tensor]
    sets: tuple[SetKind, ...]
    start: Literal["references", "kmeans++"]
    iterations: int
    seed: int

    def to(self, device: torch.device) -> Problem:
        """Return the problem with all tensors on a device."""
        return dataclasses.replace(
            self,
            samples={n: Sample(s.keys_r.to(device), s.tokens_rc.to(device)) for n, s in self.samples.items()},
            present={name: vectors.to(device) for name, vectors in self.present.items()},
        )

    def asked(self, *kinds: SetKind) -> list[tuple[Layer, SetKind]]:
        """Return the sets of these kinds that are to be computed."""
        wanted = [kind for kind in kinds if kind in self.sets]
        return [(layer, kind) for layer in self.layers for kind in wanted if kind in layer.shapes]

    def too_few(self) -> str:
        """Return which layer has fewer tokens than references, "" where none has."""
        for layer, kind in self.asked("anchors", "references", "return_references"):
            if len(self.samples[layer.name]) < layer.shapes[kind][1]:
                found, needed = len(self.samples[layer.name]), layer.shapes[kind][1]
                return f"{layer.name} has {found} sampled tokens for {needed} {kind.replace('_', ' ')}"
        return ""

    def features(self, layer: Layer, kind: SetKind, sets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what a set of a layer is to be near, (h, r, k), with the anchors of `sets`."""
        tokens_rc = self.samples[layer.name].tokens_rc
        x_hrd = tokens_rc.view(len(tokens_rc), layer.heads, layer.width).transpose(0, 1)
        if kind == "anchors" or "anchors" not in layer.shapes:
            return x_hrd
        return nystrom(unit(x_hrd), sets[layer.parameter("anchors")], layer.config.sigma)


_PLANNED = 256  # tokens of the plan whose marginal error is reported: about those of an image


@torch.no_grad()
def refit(
    problem: Problem, across: Across | None = None, rank: int = 0, world_size: int = 1
) -> dict[str, torch.Tensor]:
    """Return the new sets, (h, m, k) fp32, by the name of their parameters. Collective.

    Args:
        problem: the same on all ranks; `too_few` is "".
        across: sums and maxima over the ranks, which share the work; None for one alone.
        rank: of this process.
        world_size: of all.
    """
    sets = dict(problem.present)
    new: dict[str, torch.Tensor] = {}
    kinds: tuple[tuple[SetKind, ...], ...] = (("anchors",), ("references", "return_references"))
    for these in kinds:
        alike: dict[tuple[int, ...], list[tuple[Layer, SetKind]]] = defaultdict(list)
        for layer, kind in problem.asked(*these):
            alike[(*layer.shapes[kind][1:], len(problem.samples[layer.name]))].append((layer, kind))
        for group in (part for all_alike in alike.values() for part in _parted(all_alike, problem)):
            # Every rank makes the features of the whole sample: a product of matrices may round otherwise in parts.
            features = torch.cat([problem.features(layer, kind, sets) for layer, kind in group])
            present = torch.cat([sets[layer.parameter(kind)] for layer, kind in group])
            found = _refitted(problem, features, present, across or Here(), slice(rank, None, world_size))
            heads = [layer.heads for layer, _ in group]
            for (layer, kind), part in zip(group, torch.split(found, heads), strict=True):
                new[layer.parameter(kind)] = part
        sets |= new
    return new


def _parted(group: list[tuple[Layer, SetKind]], problem: Problem) -> Iterator[list[tuple[Layer, SetKind]]]:
    """Cut sets of one shape into parts of which K-means keeps all points as integers: it is several times faster so."""
    part: list[tuple[Layer, SetKind]] = []
    for layer, kind in group:
        largest = KEPT // (len(problem.samples[layer.name]) * layer.shapes[kind][2])
        if part and sum(one.heads for one, _ in part) + layer.heads > largest:
            yield part
            part = []
        part.append((layer, kind))
    yield part


def _refitted(
    problem: Problem, features_grk: torch.Tensor, present_gmk: torch.Tensor, across: Across, mine: slice
) -> torch.Tensor:
    ids = torch.arange(features_grk.shape[1], device=features_grk.device)
    result = distributed_kmeans(
        features_grk[:, mine],
        ids[mine],
        present_gmk.shape[1],
        across=across,
        metric="spherical",
        init=present_gmk if problem.start == "references" else None,
        iterations=problem.iterations,
        tolerance=1e-6,
        seed=problem.seed,
    )
    return with_lengths_of(matched(result.centroids_gkd, present_gmk), present_gmk)


def matched(new_gmk: torch.Tensor, old_gmk: torch.Tensor) -> torch.Tensor:
    """Return the new vectors in the order in which the sum of their cosines with the old ones is largest.

    The cosines are products of integers, exact in fp64, so that every machine finds the same order.
    """
    optimize = importlib.import_module("scipy.optimize")  # half a second, which only a run with refreshes spends
    bits = (51 - math.ceil(math.log2(new_gmk.shape[-1]))) // 2
    new, old = (on_sphere(vectors.double(), bits) for vectors in (new_gmk, old_gmk))
    cosines = (old @ new.mT).cpu().numpy()
    orders = [torch.from_numpy(optimize.linear_sum_assignment(one, maximize=True)[1]) for one in cosines]
    order = torch.stack(orders).to(new_gmk.device)
    return new_gmk.gather(1, order.unsqueeze(-1).expand_as(new_gmk))


def with_lengths_of(new_gmk: torch.Tensor, old_gmk: torch.Tensor) -> torch.Tensor:
    """Return the new directions with the old lengths; 1 for one that has none.

    Attention sees directions alone. The length is what a step of the optimizer turns a reference against, so it stays.
    """
    lengths = old_gmk.double().square().sum(-1, keepdim=True).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    directions = new_gmk.double()
    directions = directions / directions.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-30)
    return (directions * lengths).to(old_gmk.dtype)


# ------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def figures(problem: Problem, new: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Return what a refresh did, means over blocks and heads, by kind of set.

    Figures with `_before` are of the present sets, with `_after` of the new ones, both on the sampled tokens:

        dead              share of references that no token is nearest to
        perplexity        exp of the entropy of how many tokens each is nearest to, divided by m: 1 where all have alike
        fit               mean cosine of a token and its nearest reference
        marginal_error    largest relative error of a token's share in the transport plan, of 256 tokens; not of anchors
        movement_degrees  mean angle between the old and the new one
    """
    found: dict[str, dict[str, float]] = {}
    after = {**problem.present, **new}
    for kind in problem.sets:
        rows = []
        for layer, _ in problem.asked(kind):
            row = {
                f"{name}_before": value for name, value in _figures_of(problem, layer, kind, problem.present).items()
            }
            row |= {f"{name}_after": value for name, value in _figures_of(problem, layer, kind, after).items()}
            name = layer.parameter(kind)
            row["movement_degrees"] = _angle(problem.present[name], after[name])
            rows.append(row)
        if rows:
            found[kind] = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return found


def _figures_of(problem: Problem, layer: Layer, kind: SetKind, sets: Mapping[str, torch.Tensor]) -> dict[str, float]:
    vectors = sets[layer.parameter(kind)]
    m = vectors.shape[1]
    nearest = (unit(problem.features(layer, kind, sets)) @ unit(vectors).mT).max(-1)
    counts = torch.zeros(vectors.shape[:2], dtype=torch.float64, device=vectors.device)
    counts.scatter_add_(1, nearest.indices, torch.ones_like(nearest.values, dtype=torch.float64))
    shares = counts / counts.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    row = {
        "dead": float((counts == 0).double().mean()),
        "perplexity": float(entropy.exp().mean()) / m,
        "fit": float(nearest.values.double().mean()),
    }
    if kind != "anchors":
        x = problem.features(layer, "anchors", sets)[:, :_PLANNED].unsqueeze(0)
        anchors = sets.get(layer.parameter("anchors"))
        error = marginal_error(x, vectors, layer.config, anchors_hkd=anchors)
        row["marginal_error"] = float(error.double().mean())
    return row


def _angle(old_hmk: torch.Tensor, new_hmk: torch.Tensor) -> float:
    cosines = (unit(old_hmk.double()) * unit(new_hmk.double())).sum(-1).clamp(-1.0, 1.0)
    return float(torch.rad2deg(cosines.acos()).mean())
