"""New reference sets against scikit-learn's K-means from the same start, on unit vectors."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from setformer_dist.ops.kernels import nystrom, unit
from setformer_dist.ops.refit import Layer, Problem, refit
from setformer_dist.ops.reservoir import Sample
from setformer_dist.ops.set.attention import SetAttentionConfig


def clouds(rows: int, heads: int, d: int, seed: int) -> torch.Tensor:
    """Tokens of each head in clouds of directions, (rows, heads, d)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, heads, d, generator=generator)
    return centres[torch.arange(rows) % 8] + 0.4 * torch.randn(rows, heads, d, generator=generator)


def problem_of(config: SetAttentionConfig, d: int, k: int, rows: int = 400) -> Problem:
    generator = torch.Generator().manual_seed(1)
    shapes = {"references": (2, 8, k), **({"anchors": (2, 5, d)} if config.kernel == "nystrom" else {})}
    layer = Layer("block.attn", 2, d, config, shapes)  # type: ignore[arg-type]
    present = {layer.parameter(kind): torch.randn(s, generator=generator) for kind, s in layer.shapes.items()}
    sample = Sample(torch.arange(rows), clouds(rows, 2, d, 0).flatten(1))
    kinds = ("references", "anchors")
    return Problem((layer,), {layer.name: sample}, present, kinds, "references", 300, 0)


def fit_of(features: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((unit(features) @ unit(centroids).mT).amax(-1).double().mean())


def scikit(features: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Lloyd's rounds on unit vectors, whose means are brought back to unit length after each."""
    x, centroids = unit(features.double()).numpy(), unit(start.double())
    for _ in range(300):
        one = KMeans(len(start), init=centroids.numpy(), n_init=1, max_iter=1, algorithm="lloyd").fit(x)
        means = unit(torch.from_numpy(one.cluster_centers_))
        if torch.allclose(means, centroids, atol=1e-9):
            break
        centroids = means
    return centroids


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_from_the_same_start_the_directions_of_scikit_learn() -> None:
    problem = problem_of(SetAttentionConfig(references=8, position_filter="none"), d=6, k=6)
    # From tokens, so that no cluster is empty: what is done with those differs.
    tokens = problem.samples["block.attn"].tokens_rc.view(-1, 2, 6).transpose(0, 1)
    problem.present["block.attn.references"].copy_(tokens[:, 3:11] * 1.7)  # type: ignore[attr-defined]
    new = refit(problem)["block.attn.references"]
    for head in range(2):
        theirs = scikit(tokens[head], problem.present["block.attn.references"][head])
        cosines = unit(new[head].double()) @ theirs.mT
        rows, columns = linear_sum_assignment(-cosines.numpy())
        assert float(cosines[rows, columns].min()) > 1 - 1e-6
        assert fit_of(tokens[head], new[head]) == pytest.approx(fit_of(tokens[head], theirs.float()), abs=1e-6)


def test_plus_plus_finds_all_clouds() -> None:
    problem = problem_of(SetAttentionConfig(references=8, position_filter="none"), d=6, k=6)
    tokens = problem.samples["block.attn"].tokens_rc.view(-1, 2, 6).transpose(0, 1)
    drawn = refit(Problem(**{**vars(problem), "start": "kmeans++"}))["block.attn.references"]
    theirs = KMeans(8, n_init=10, random_state=0).fit(unit(tokens[0]).numpy())
    best = fit_of(tokens[0], torch.from_numpy(theirs.cluster_centers_))
    assert fit_of(tokens[0], drawn[0]) > best - 0.02


def test_with_nystrom_references_live_in_the_space_of_the_new_anchors() -> None:
    problem = problem_of(SetAttentionConfig(references=8, kernel="nystrom", anchors=5, position_filter="none"), 6, 5)
    new = refit(problem)
    tokens = problem.samples["block.attn"].tokens_rc.view(-1, 2, 6).transpose(0, 1)
    assert fit_of(tokens, new["block.attn.anchors"]) > fit_of(tokens, problem.present["block.attn.anchors"])
    features = nystrom(unit(tokens), new["block.attn.anchors"], 0.6)
    again = Problem(**{**vars(problem), "present": {**problem.present, **new}, "sets": ("references",)})
    assert fit_of(features, new["block.attn.references"]) == pytest.approx(
        fit_of(features, refit(again)["block.attn.references"]), abs=1e-4
    )  # they are a fixed point there
