"""K-means against scikit-learn and against its own definition; the same bits however the work is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.ops import kmeans as module
from setformer_dist.ops.kernels import unit
from setformer_dist.ops.kmeans import Here, KMeansResult, distributed_kmeans, kmeans


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return torch.from_numpy(load_digits().data)


def blobs(g: int = 3, n: int = 200, d: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(g, 6, d, generator=generator)
    return centres[:, torch.arange(n) % 6] + torch.randn(g, n, d, generator=generator)


def same(left: KMeansResult, right: KMeansResult) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(left).values(), vars(right).values(), strict=True))


def test_from_the_same_start_the_same_as_scikit_learn(digits: torch.Tensor) -> None:
    start = digits[:10]
    theirs = KMeans(10, init=start.numpy(), n_init=1, tol=0, max_iter=300, algorithm="lloyd").fit(digits.numpy())
    ours = kmeans(digits[None], 10, init=start[None], tolerance=0.0, iterations=300)
    assert float(ours.inertia_g) == pytest.approx(theirs.inertia_, rel=1e-9)
    assert (ours.assignment_gn[0].numpy() == theirs.labels_).all()
    torch.testing.assert_close(ours.centroids_gkd[0], torch.from_numpy(theirs.cluster_centers_), atol=1e-5, rtol=0)


def test_plus_plus_is_as_good_as_scikit_learn(digits: torch.Tensor) -> None:
    theirs = KMeans(10, n_init=5, random_state=0).fit(digits.numpy()).inertia_
    ours = [float(kmeans(digits[None].float(), 10, seed=seed).inertia_g) for seed in range(5)]
    assert min(ours) < 1.02 * theirs
    assert len(set(ours)) > 1  # the seed matters
    assert ours[0] == float(kmeans(digits[None].float(), 10, seed=0).inertia_g)


def test_plus_plus_chooses_far_points() -> None:
    # Six tight, distant clouds: whatever the seed, one centre falls into each.
    points = torch.tensor([[0.0], [1e3], [2e3], [3e3], [4e3], [5e3]]).repeat(1, 20).view(1, -1, 1)
    points = points + torch.rand(points.shape, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        result = kmeans(points, 6, seed=seed, iterations=0)
        assert result.assignment_gn.view(6, 20).unique(dim=1).shape == (6, 1)
        assert result.rounds_g.tolist() == [0]


def test_plus_plus_draws_with_chances_like_squared_distances() -> None:
    points = torch.tensor([0.0, 1.0, 3.0]).view(1, 3, 1).repeat(4000, 1, 1)
    centroids = kmeans(points, 2, iterations=0).centroids_gkd.squeeze(-1)
    first = [(centroids[:, 0] == x).float().mean().item() for x in (0.0, 1.0, 3.0)]
    assert first == pytest.approx([1 / 3] * 3, abs=0.03)
    after_zero = centroids[centroids[:, 0] == 0.0, 1]
    assert (after_zero == 3.0).float().mean().item() == pytest.approx(0.9, abs=0.03)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(4, 40), d=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 99),
    metric=st.sampled_from(["euclidean", "spherical"]), size=st.sampled_from([1e-20, 1.0, 1e20]),
)  # fmt: skip
def test_what_is_returned_fits_together(n: int, d: int, k: int, seed: int, metric: str, size: float) -> None:
    points = blobs(2, n, d, seed).double() * size
    result = kmeans(points, k, metric=metric, tolerance=0.0, seed=seed)  # type: ignore[arg-type]
    compared = unit(points / size) if metric == "spherical" else points / size
    scale = 1.0 if metric == "spherical" else size
    centroids = result.centroids_gkd / scale
    apart = torch.cdist(compared, centroids).square()
    own = apart.gather(-1, result.assignment_gn.unsqueeze(-1)).squeeze(-1)
    assert (own <= apart.amin(-1) + 1e-5).all()
    torch.testing.assert_close(result.inertia_g / scale**2, own.sum(1), rtol=1e-4, atol=1e-6)
    for group in range(2):
        for j in range(k):
            members = compared[group, result.assignment_gn[group] == j]
            if len(members) == 0:  # only where every point lies on a centroid
                assert own[group].max() < 1e-6
                continue
            mean = members.mean(0)
            mean = unit(mean) if metric == "spherical" else mean
            torch.testing.assert_close(centroids[group, j], mean, atol=1e-5, rtol=0)


def test_groups_do_not_feel_each_other() -> None:
    points = blobs() * torch.tensor([1.0, 1e4, 1e-6]).view(3, 1, 1)
    start = points[:, :6]
    together = kmeans(points, 6, init=start)
    for group in range(3):
        alone = kmeans(points[group : group + 1], 6, init=start[group : group + 1])
        for whole, one in zip(vars(together).values(), vars(alone).values(), strict=True):
            assert torch.equal(whole[group : group + 1], one)
    assert len(set(together.rounds_g.tolist())) > 1  # one waits for another without moving on


@pytest.mark.parametrize("metric", ["euclidean", "spherical"])
def test_tiles_and_order_change_no_bit(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(d=24)
    whole = kmeans(points, 9, metric=metric, seed=3)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "TILE", 7 * 3 * 24)
    assert same(kmeans(points, 9, metric=metric, seed=3), whole)  # type: ignore[arg-type]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    mixed = distributed_kmeans(points[:, order], order, 9, across=Here(), metric=metric, seed=3)  # type: ignore[arg-type]
    assert torch.equal(mixed.centroids_gkd, whole.centroids_gkd)
    assert torch.equal(mixed.inertia_g, whole.inertia_g)
    assert torch.equal(mixed.assignment_gn, whole.assignment_gn[:, order])


def test_masked_points_do_not_count() -> None:
    points = blobs(1)
    mask = (torch.arange(200) % 3 > 0)[None]
    kept = distributed_kmeans(points[:, mask[0]], mask[0].nonzero().squeeze(1), 6, across=Here())
    result = kmeans(points.masked_fill(~mask.unsqueeze(-1), torch.nan), 6, mask_gn=mask)
    assert torch.equal(result.centroids_gkd, kept.centroids_gkd)
    assert torch.equal(result.inertia_g, kept.inertia_g)
    assert torch.equal(result.assignment_gn[mask], kept.assignment_gn[0])
    assert (result.assignment_gn[~mask] == -1).all()


def test_empty_clusters_take_the_points_that_fit_worst() -> None:
    points = torch.tensor([0.0, 1.0, 2.0, 10.0, 50.0, 60.0]).view(1, 6, 1)
    start = torch.tensor([1.0, 1e6, -1e6]).view(1, 3, 1)
    once = kmeans(points, 3, init=start, iterations=1)
    assert once.centroids_gkd.flatten().tolist() == pytest.approx([13 / 4, 60.0, 50.0], abs=0.1)
    result = kmeans(points, 3, init=start)
    assert len(result.assignment_gn.unique()) == 3
    assert float(result.inertia_g) == pytest.approx(62.75, abs=1e-3)  # {0, 1, 2, 10}, {60}, {50}
    # Two equally bad points: the one with the least number goes.
    ties = kmeans(
        torch.tensor([0.0, -5.0, 5.0, 0.0]).view(1, 4, 1), 2, init=torch.tensor([[[0.0], [99.0]]]), iterations=1
    )
    assert ties.centroids_gkd[0, 1].item() == pytest.approx(-5.0, abs=1e-4)


def test_more_clusters_than_different_points() -> None:
    result = kmeans(torch.full((2, 5, 3), 0.7), 4)
    assert result.centroids_gkd.isfinite().all()
    assert (result.inertia_g == 0).all()
    zero = kmeans(torch.zeros(1, 5, 3), 2, metric="spherical")
    assert (zero.centroids_gkd == 0).all()


def test_lengths_do_not_matter_to_the_spherical_metric() -> None:
    points = blobs()
    lengths = torch.rand(3, 200, 1, generator=torch.Generator().manual_seed(0)).add(0.1)
    start = unit(points[:, :6])
    plain = kmeans(points, 6, metric="spherical", init=start)
    stretched = kmeans(points * lengths, 6, metric="spherical", init=start)
    assert torch.equal(plain.assignment_gn, stretched.assignment_gn)
    torch.testing.assert_close(plain.centroids_gkd.norm(dim=-1), torch.ones(3, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    points = blobs().to(dtype)
    result = kmeans(points, 6, init=points[:, :6])
    assert result.centroids_gkd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = kmeans(points.double(), 6, init=points[:, :6])
    assert torch.equal(result.assignment_gn, wide.assignment_gn)


@pytest.mark.parametrize(
    ("error", "part", "arguments"),
    [
        (ConfigError, "k = 0", {"k": 0}),
        (ConfigError, "points have shape (2, 3)", {"points_gnd": torch.zeros(2, 3)}),
        (ConfigError, "torch.int64: expected floats", {"points_gnd": torch.zeros(1, 2, 3, dtype=torch.int64)}),
        (ConfigError, "metric = 'cosine'", {"metric": "cosine"}),
        (ConfigError, "iterations = -1", {"iterations": -1}),
        (ConfigError, "init has shape (1, 2, 2): expected (groups, k, d) = (1, 2, 3)", {"init": torch.zeros(1, 2, 2)}),
        (ConfigError, "mask has shape (4,)", {"mask_gn": torch.ones(4, dtype=torch.bool)}),
        (DataError, "k = 5 clusters", {"k": 5}),
        (DataError, "not finite", {"points_gnd": torch.full((1, 4, 3), torch.nan)}),
        (DataError, "not finite", {"init": torch.full((1, 2, 3), torch.inf)}),
    ],
)
def test_bad_input_is_named(error: type[Exception], part: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error) as caught:
        kmeans(**{"points_gnd": torch.ones(1, 4, 3), "k": 2, **arguments})  # type: ignore[arg-type]
    assert part in str(caught.value)
