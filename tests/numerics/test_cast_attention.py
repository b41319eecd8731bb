"""CAST attention: its invariants, the choice of clusters against a plain loop, gradients, masks, compilers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops import cast_attention as cast
from setformer_dist.ops.cast_attention import (
    Clusters,
    cast_attention,
    cluster_affinity,
    gather_members,
    scatter_members,
    single_assignment,
    top_k_assignment,
)


def operands(b=2, h=2, n=12, c=3, d=4, dtype=torch.float64, seed=0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    named = {f"{name}_bhnd": torch.randn(b, h, n, d, dtype=dtype) for name in "qkv"}
    return {**named, "surrogates_hcd": torch.randn(h, c, d, dtype=dtype), "gate_bn": torch.randn(b, n, dtype=dtype)}


def dense(q, k, v, surrogates, gate, clusters: Clusters) -> torch.Tensor:
    """The equations for one image and one head, token by token and cluster by cluster."""
    n, d = q.shape
    queries, keys = q @ surrogates.T, k @ surrogates.T
    members = [row[keep].tolist() for row, keep in zip(clusters.token_bck[0], clusters.member_bck[0], strict=True)]
    summaries, attended = [], []
    for c, tokens in enumerate(members):
        score = keys[tokens, c] * (F.softplus(-gate[tokens]) + 1) / d**0.5
        summaries.append(score.softmax(0) @ v[tokens])
        attended.append(dict(zip(tokens, (q[tokens] @ k[tokens].T / d**0.5).softmax(-1) @ v[tokens], strict=True)))
    share = (queries * (F.softplus(gate) + 1).unsqueeze(-1) / d**0.5).softmax(-1)
    rows = []
    for i in range(n):
        parts = [attended[c].get(i, summaries[c]) for c in range(len(members))]
        rows.append(sum(share[i, c] * part for c, part in enumerate(parts)))
    return torch.stack(rows)


# -------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize(("assignment", "size"), [("top_k", 5), ("top_k", 2), ("single", 4), ("single", 7)])
def test_equals_the_equations_written_as_loops(assignment, size):
    named = operands(b=1, h=1)
    q, k, v, surrogates, gate = (x[0, 0] if x.ndim == 4 else x[0] for x in named.values())
    affinity = cluster_affinity((q @ surrogates.T)[None, None], (k @ surrogates.T)[None, None], named["gate_bn"])
    choose = top_k_assignment if assignment == "top_k" else single_assignment
    y = cast_attention(**named, size=size, assignment=assignment)
    torch.testing.assert_close(y[0, 0], dense(q, k, v, surrogates, gate, choose(affinity, size)))


@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_one_cluster_of_all_tokens_is_softmax_attention(assignment):
    named = operands(c=1)
    q, k, v = (named[f"{name}_bhnd"] for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(
        cast_attention(**named, size=12, assignment=assignment), expected, atol=1e-14, rtol=1e-13
    )


@pytest.mark.parametrize("assignment", ["top_k", "single"])
@pytest.mark.parametrize("gated", [True, False])
def test_permuted_tokens_give_permuted_outputs(assignment, gated):
    named = operands(n=20)
    if not gated:
        del named["gate_bn"]
    plain = cast_attention(**named, size=7, assignment=assignment)
    order = torch.randperm(20)
    moved = {
        name: x[:, :, order] if name.endswith("bhnd") else x[:, order] if name == "gate_bn" else x
        for name, x in named.items()
    }
    torch.testing.assert_close(cast_attention(**moved, size=7, assignment=assignment), plain[:, :, order])


@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_every_row_of_weights_is_positive_and_sums_to_one(assignment):
    """Read off by linearity: with the identity as values the output is the matrix of weights."""
    named = operands(n=6, d=6, c=2)
    named["v_bhnd"] = torch.eye(6).double().expand(2, 2, 6, 6)
    weights = cast_attention(**named, size=3, assignment=assignment)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6).double())


@pytest.mark.parametrize("assignment", ["top_k", "single"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradcheck(assignment, gated, masked):
    named = {name: x.requires_grad_() for name, x in operands(b=2, n=6, c=2, d=3).items()}
    if not gated:
        del named["gate_bn"]
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool() if masked else None

    def function(*tensors):
        named_tensors = dict(zip(named, tensors, strict=True))
        return cast_attention(**named_tensors, size=4, assignment=assignment, mask_bn=mask)

    # The clusters must not change within a finite difference, which is far smaller than the gaps of random affinities.
    assert torch.autograd.gradcheck(function, tuple(named.values()))


def test_both_ways_to_take_and_add_tokens_are_the_same():
    """Of which GPUs take the one that has an order, in the gradient too."""
    rng = torch.Generator().manual_seed(0)
    x, y, upstream = (torch.randn(2, 3, n, 4, generator=rng, dtype=torch.float64) for n in (10, 30, 30))
    places = torch.randint(10, (2, 30), generator=rng)  # most tokens in several
    x.requires_grad_()
    y.requires_grad_()
    taken = [cast._taken(x, places, sorts) for sorts in (False, True)]
    assert torch.equal(*taken)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, upstream)[0] for t in taken))
    added = [cast._added(y, places, 10, sorts) for sorts in (False, True)]
    torch.testing.assert_close(*added)
    assert torch.equal(*(torch.autograd.grad(t, y, upstream[:, :, :10])[0] for t in added))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPUs have an order anyway")
def test_a_gpu_gives_the_same_bits_every_time():
    named = {name: x.cuda().float() for name, x in operands(n=512, d=32).items()}

    def run() -> list[torch.Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in named.items()}
        y = cast_attention(**leaves, size=400)
        return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_masked_tokens_are_as_if_they_were_not_there(assignment):
    named = operands(n=12)
    mask = torch.ones(2, 12).bool()
    mask[0, [1, 4, 5, 11]] = False
    hidden = ~mask[:, None, :, None]
    poisoned = {
        name: x if name == "surrogates_hcd" else x.masked_fill(hidden if x.ndim == 4 else ~mask, torch.nan)
        for name, x in named.items()
    }
    leaves = {name: x.requires_grad_() for name, x in poisoned.items()}
    y = cast_attention(**leaves, size=5, assignment=assignment, mask_bn=mask)
    assert (y.masked_select(hidden) == 0).all()
    alone = {
        name: x[:1, :, mask[0]] if x.ndim == 4 else x[:1, mask[0]] if name == "gate_bn" else x
        for name, x in named.items()
    }
    torch.testing.assert_close(y[:1, :, mask[0]], cast_attention(**alone, size=5, assignment=assignment))
    for gradient in torch.autograd.grad(y.square().sum(), list(leaves.values())):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_nothing_valid_gives_zero_and_finite_gradients(assignment):
    named = {name: x.requires_grad_() for name, x in operands().items()}
    y = cast_attention(**named, size=4, assignment=assignment, mask_bn=torch.zeros(2, 12).bool())
    assert (y == 0).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), list(named.values())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_narrow_dtypes_stay_finite_whatever_the_length_of_the_tokens(dtype, scale, assignment):
    named = {name: (x * scale).to(dtype).requires_grad_() for name, x in operands(n=30, d=16).items()}
    y = cast_attention(**named, size=10, assignment=assignment)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.float().sum(), list(named.values())))


def test_bf16_stays_close_to_fp32_with_the_same_clusters():
    narrow = {name: x.bfloat16() for name, x in operands(n=40, d=16).items()}
    exact = cast_attention(**{name: x.float() for name, x in narrow.items()}, size=14)
    assert (cast_attention(**narrow, size=14).float() - exact).abs().max() < 0.03


@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_compiles_into_one_graph_with_its_backward(assignment):
    def function(q_bhnd, k_bhnd, v_bhnd, surrogates_hcd, gate_bn, mask_bn):
        return cast_attention(
            q_bhnd, k_bhnd, v_bhnd, surrogates_hcd, size=5, assignment=assignment, gate_bn=gate_bn, mask_bn=mask_bn
        )

    mask = torch.arange(12).expand(2, 12) < torch.tensor([[12], [8]])
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in operands(dtype=torch.float32).values()]
        y = call(*leaves, mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- clusters


def greedy(affinity, size) -> list[int]:
    """One token after the other, the best affinity first; the best cluster that still has a place."""
    n, clusters = affinity.shape
    left = [size] * clusters
    chosen = [-1] * n
    for i in sorted(range(n), key=lambda i: (-affinity[i].max().item(), i)):
        best = max((c for c in range(clusters) if left[c]), key=lambda c: (affinity[i, c].item(), -c))
        chosen[i] = best
        left[best] -= 1
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 25),
    c=st.integers(1, 6),
    spare=st.integers(0, 3),
    levels=st.sampled_from([2, 5, 10_000]),
    seed=st.integers(0, 10_000),
)
def test_single_assignment_is_the_greedy_one_ties_included(n, c, spare, levels, seed):
    torch.manual_seed(seed)
    affinity = torch.randint(levels, (3, n, c)).double() / levels
    size = -(-n // c) + spare
    clusters = single_assignment(affinity, size)
    for image in range(3):
        chosen = {}
        for cluster in range(c):
            for token in clusters.token_bck[image, cluster][clusters.member_bck[image, cluster]].tolist():
                assert token not in chosen
                chosen[token] = cluster
        assert [chosen[i] for i in range(n)] == greedy(affinity[image], size)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 20), c=st.integers(1, 5), seed=st.integers(0, 1000))
def test_scattering_what_single_assignment_gathered_is_the_identity(n, c, seed):
    torch.manual_seed(seed)
    x, affinity = torch.randn(2, 3, n, 4), torch.rand(2, n, c)
    clusters = single_assignment(affinity, -(-n // c))
    assert (clusters.member_bck.flatten(1).sum(-1) == n).all()
    torch.testing.assert_close(scatter_members(gather_members(x, clusters), clusters, n), x, atol=0, rtol=0)


def test_top_k_takes_the_best_and_of_equal_tokens_the_first():
    affinity = torch.tensor([[0.5, 0.1], [0.9, 0.1], [0.5, 0.1], [0.1, 0.7]]).unsqueeze(0)
    clusters = top_k_assignment(affinity, 2)
    assert clusters.token_bck.tolist() == [[[1, 0], [3, 0]]]
    assert clusters.member_bck.all()
    masked = top_k_assignment(affinity, 2, torch.tensor([[False, True, False, False]]))
    assert masked.token_bck[0, :, 0].tolist() == [1, 1]
    assert masked.member_bck.tolist() == [[[True, False], [True, False]]]


def test_a_token_of_no_cluster_gets_summaries_alone():
    named = operands(b=1, h=1, n=5, c=1)
    y = cast_attention(**named, size=2)
    affinity = cluster_affinity(*(named[f"{x}_bhnd"] @ named["surrogates_hcd"].mT for x in "qk"), named["gate_bn"])
    outside = [i for i in range(5) if i not in top_k_assignment(affinity, 2).token_bck[0, 0].tolist()]
    assert len(outside) == 3
    torch.testing.assert_close(y[0, 0, outside[1:]], y[0, 0, outside[:1]].expand(2, -1))


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_bhnd": torch.zeros(2, 2, 11, 4)}, r"k_bhnd has shape \(2, 2, 11, 4\).*\(2, 2, 12, 4\)"),
        ({"surrogates_hcd": torch.zeros(3, 3, 4)}, r"surrogates_hcd has shape \(3, 3, 4\).*\(2, c, 4\)"),
        ({"gate_bn": torch.zeros(12)}, r"gate_bn has shape \(12,\): it must be \(2, 12\)"),
        ({"mask_bn": torch.ones(2, 12)}, "mask_bn is torch.float32"),
        ({"size": 0}, "size = 0 must be at least 1"),
        ({"size": 3, "assignment": "single"}, "9 places for 12 tokens: use size = 4 or more"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, message):
    with pytest.raises(ConfigError, match=message):
        cast_attention(**{**operands(dtype=torch.float32), "size": 4, **change})
