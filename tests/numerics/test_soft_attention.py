"""SOFT attention against the dense formula, finite differences, its masks, and what compilers make of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.soft_attention import (
    gaussian_kernel,
    newton_inverse,
    pool_grid,
    pool_sequence,
    soft_attention,
)


def operands(b=2, h=2, n=10, m=4, d=8, e=3, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(b, h, *shape, dtype=dtype) for shape in ((n, d), (n, e), (m, d))]


def dense(q, v, landmarks, ridge=0.0, normalise=False) -> torch.Tensor:
    """S V with S formed: distances pair by pair, the inverse by LAPACK."""

    def kernel(x, y):
        apart = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        return torch.exp(-apart / (2 * x.shape[-1] ** 0.5))

    among = kernel(landmarks, landmarks)
    middle = torch.linalg.inv(among + ridge * torch.eye(among.shape[-1], dtype=among.dtype))
    if normalise:
        degree = torch.diag_embed(among.sum(-1) ** -0.5)
        middle = degree @ middle @ degree
    tokens = kernel(q, landmarks)
    return (tokens @ middle @ tokens.mT) @ v


# -------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_equals_the_dense_formula_with_gradients(normalise, ridge):
    ours, theirs = ([x.clone().requires_grad_() for x in operands()] for _ in range(2))
    y = soft_attention(*ours, iterations=40, ridge=ridge, normalise=normalise)
    expected = dense(*theirs, ridge=ridge, normalise=normalise)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-9)
    weight = torch.randn_like(y)
    for mine, other in zip(
        torch.autograd.grad(y, ours, weight), torch.autograd.grad(expected, theirs, weight), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-8)


def test_landmarks_on_all_tokens_give_the_whole_kernel():
    """With l = q, S = A A^-1 A = A: nothing is approximated."""
    q, v, _ = operands(n=6)
    torch.testing.assert_close(soft_attention(q, v, q, iterations=40), gaussian_kernel(q, q) @ v, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(normalise, masked):
    torch.manual_seed(1)
    inputs = [x.requires_grad_() for x in operands(b=2, h=1, n=5, m=3, d=4, e=2)]
    masks = {}
    if masked:
        masks = {
            "mask_bn": torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool(),
            "landmark_mask_bm": torch.tensor([[1, 0, 1], [1, 1, 1]]).bool(),
        }

    def function(*tensors):
        return soft_attention(*tensors, iterations=40, normalise=normalise, **masks)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("normalise", [False, True])
def test_masked_tokens_and_landmarks_are_as_if_they_were_not_there(normalise):
    q, v, landmarks = operands(n=9, m=5)
    mask, landmark_mask = torch.ones(2, 9).bool(), torch.ones(2, 5).bool()
    mask[0, [2, 5, 8]] = False
    landmark_mask[0, [0, 3]] = False
    hidden = ~mask[:, None, :, None]
    leaves = [q.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf), landmarks]
    leaves = [x.requires_grad_() for x in leaves]
    y = soft_attention(*leaves, mask_bn=mask, landmark_mask_bm=landmark_mask, normalise=normalise, iterations=40)
    assert (y.masked_select(hidden) == 0).all()
    alone = soft_attention(
        q[:1, :, mask[0]], v[:1, :, mask[0]], landmarks[:1, :, landmark_mask[0]], normalise=normalise, iterations=40
    )
    torch.testing.assert_close(y[:1, :, mask[0]], alone, atol=1e-10, rtol=1e-9)
    whole = soft_attention(q[1:], v[1:], landmarks[1:], normalise=normalise, iterations=40)
    torch.testing.assert_close(y[1:], whole, atol=1e-10, rtol=1e-9)
    for gradient in torch.autograd.grad(y.square().sum(), leaves):
        assert torch.isfinite(gradient).all()


def test_nothing_valid_gives_zero_and_finite_gradients():
    q, v, landmarks = (x.requires_grad_() for x in operands())
    none = torch.zeros(2, 10).bool()
    y = soft_attention(q, v, landmarks, mask_bn=none, landmark_mask_bm=torch.zeros(2, 4).bool())
    assert (y == 0).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), (q, v, landmarks)))


def test_permuted_tokens_give_permuted_outputs():
    q, v, landmarks = operands()
    order = torch.randperm(10)
    plain = soft_attention(q, v, landmarks)
    torch.testing.assert_close(soft_attention(q[:, :, order], v[:, :, order], landmarks), plain[:, :, order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 200.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_narrow_dtypes_stay_finite_whatever_the_length_of_the_tokens(dtype, scale, normalise):
    q, v, landmarks = (
        x.mul(factor).to(dtype) for x, factor in zip(operands(n=40, m=9), (scale, 1, scale), strict=True)
    )
    leaves = [x.requires_grad_() for x in (q, v, landmarks)]
    y = soft_attention(*leaves, normalise=normalise)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.float().square().sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_tokens_alike_have_one_weight_each(dtype):
    """A and P are all ones: A+ = 1 1^T / m^2, so every output is the sum of the values."""
    q, v, landmarks = torch.ones(1, 1, 30, 8), torch.rand(1, 1, 30, 2), torch.ones(1, 1, 9, 8)
    y = soft_attention(q.to(dtype), v.to(dtype), landmarks.to(dtype))
    torch.testing.assert_close(y, v.to(dtype).sum(2, keepdim=True).expand_as(y), rtol=2e-2, atol=0)


def test_bf16_and_autocast_stay_close_to_fp32():
    wide = operands(n=49, m=9, d=32, dtype=torch.float32)
    exact = soft_attention(*wide)
    narrow = [x.bfloat16() for x in wide]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = soft_attention(*wide)
    torch.testing.assert_close(under_autocast, exact, atol=0, rtol=0)
    assert (soft_attention(*narrow).float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("normalise", [False, True])
def test_compiles_into_one_graph_with_its_backward(normalise):
    def function(q, v, landmarks, mask):
        return soft_attention(q, v, landmarks, mask_bn=mask, normalise=normalise)

    mask = torch.arange(10).expand(2, 10) < torch.tensor([[10], [7]])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = [x.clone().requires_grad_() for x in operands(dtype=torch.float32)]
        y = call(*leaves, mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, atol=1e-5, rtol=1e-4)


def test_memory_kept_for_backward_grows_with_tokens_not_with_their_square():
    def kept(n: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            soft_attention(*(x.requires_grad_() for x in operands(b=1, h=1, n=n, m=4)))
        return sum(sizes)

    assert kept(2000) < 2.2 * kept(1000)


# --------------------------------------------------------------------------------------------------- the inverse


@pytest.mark.parametrize("halve", [False, True])
def test_newton_inverse_converges_as_published(halve):
    """Residuals |A X A - A| / |A| of random landmarks in 32 dimensions: full precision after ten rounds and more."""
    torch.manual_seed(0)
    landmarks = torch.randn(3, 49, 32).double()
    kernel = gaussian_kernel(landmarks, landmarks)
    errors = []
    for rounds in (5, 10, 20):
        inverse = newton_inverse(kernel, rounds, halve=halve)
        errors.append(((kernel @ inverse @ kernel - kernel).norm() / kernel.norm()).item())
    assert halve or errors[0] < 1e-3
    assert errors[0] > errors[1]
    assert errors[2] < 1e-14


@pytest.mark.parametrize("halve", [False, True])
def test_newton_inverse_of_the_identity_which_landmarks_far_apart_approach(halve):
    identity = torch.eye(9).double()
    torch.testing.assert_close(newton_inverse(identity, 10, halve=halve), identity)


@pytest.mark.parametrize("halve", [False, True])
def test_newton_inverse_of_a_singular_matrix_is_the_pseudo_inverse(halve):
    torch.manual_seed(0)
    distinct = torch.randn(5, 6).double()
    landmarks = torch.cat([distinct, distinct[:2]])
    kernel = gaussian_kernel(landmarks, landmarks)
    torch.testing.assert_close(newton_inverse(kernel, 25, halve=halve), torch.linalg.pinv(kernel), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("halve", [False, True])
def test_newton_inverse_gradient_is_that_of_the_inverse(halve):
    torch.manual_seed(0)
    factor = torch.randn(2, 4, 4).double()
    matrix = (factor @ factor.mT + torch.eye(4).double()).requires_grad_()
    torch.testing.assert_close(newton_inverse(matrix, 40, halve=halve), torch.linalg.inv(matrix))
    assert torch.autograd.gradcheck(lambda a: newton_inverse(0.5 * (a + a.mT), 40, halve=halve), matrix)


def test_every_matrix_is_inverted_by_itself():
    """The authors' code takes one step size for the whole batch; ours must not."""
    torch.manual_seed(0)
    landmarks = torch.randn(2, 9, 8).double() * torch.tensor([1.0, 0.01]).view(2, 1, 1).double()
    kernel = gaussian_kernel(landmarks, landmarks)
    torch.testing.assert_close(
        newton_inverse(kernel, 6, halve=True)[:1], newton_inverse(kernel[:1], 6, halve=True), atol=0, rtol=0
    )


# ---------------------------------------------------------------------------------------------------- landmarks


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cells=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pool_grid_is_the_mean_of_the_valid_tokens_of_each_cell(grid, cells, masked, seed):
    torch.manual_seed(seed)
    (rows, columns), b, d = grid, 2, 3
    x = torch.randn(b, 2, rows * columns, d).double()
    mask = torch.rand(b, rows * columns) < 0.6 if masked else torch.ones(b, rows * columns).bool()
    pooled, exists = pool_grid(x, grid, cells, mask if masked else None)
    r, c = min(cells[0], rows), min(cells[1], columns)
    assert pooled.shape == (b, 2, r * c, d)
    assert (exists is None) == (not masked)
    members = [[] for _ in range(r * c)]
    for i in range(rows):
        for j in range(columns):
            members[(i * r // rows) * c + j * c // columns].append(i * columns + j)
    for cell, tokens in enumerate(members):
        assert tokens
        for image in range(b):
            valid = [t for t in tokens if mask[image, t]]
            expected = x[image, :, valid].mean(1) if valid else torch.zeros(2, d).double()
            torch.testing.assert_close(pooled[image, :, cell], expected)
            assert exists is None or exists[image, cell] == bool(valid)


def test_pool_grid_equals_average_pooling_where_cells_are_even():
    x = torch.randn(2, 3, 8 * 12, 5)
    pooled, _ = pool_grid(x, (8, 12), (4, 3))
    image = x.view(2, 3, 8, 12, 5).permute(0, 1, 4, 2, 3).flatten(1, 2)
    expected = F.avg_pool2d(image, (2, 4)).view(2, 3, 5, 12).mT
    torch.testing.assert_close(pooled, expected)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), m=st.integers(1, 8), extra=st.integers(0, 6), seed=st.integers(0, 1000))
def test_pool_sequence_shares_tokens_out_evenly_and_does_not_see_padding(n, m, extra, seed):
    torch.manual_seed(seed)
    x = torch.randn(1, 2, n, 3).double()
    plain, exists = pool_sequence(x, m)
    segments = min(m, n)
    assert exists is None
    assert plain.shape == (1, 2, segments, 3)
    parts = [x[:, :, [i for i in range(n) if i * segments // n == s]] for s in range(segments)]
    assert max(p.shape[2] for p in parts) - min(p.shape[2] for p in parts) <= 1
    torch.testing.assert_close(plain, torch.stack([p.mean(2) for p in parts], 2))

    places = torch.randperm(n + extra)[:n].sort().values
    padded = torch.full((1, 2, n + extra, 3), torch.nan).double()
    padded[:, :, places] = x
    mask = torch.zeros(1, n + extra).bool()
    mask[:, places] = True
    pooled, exists = pool_sequence(padded, m, mask)
    torch.testing.assert_close(pooled[:, :, exists[0]], plain)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 2, 9, 3)}, r"v_bhne has shape \(2, 2, 9, 3\).*\(2, 2, 10, e\)"),
        ({"landmarks": torch.zeros(2, 2, 4, 7)}, r"landmarks_bhmd has shape \(2, 2, 4, 7\).*\(2, 2, m, 8\)"),
        ({"landmarks": torch.zeros(2, 2, 0, 8)}, "m at least 1"),
        ({"mask_bn": torch.ones(2, 10)}, "mask_bn is torch.float32"),
        ({"mask_bn": torch.ones(10).bool()}, r"mask_bn is torch.bool \(10,\): it must be torch.bool \(2, 10\)"),
        ({"landmark_mask_bm": torch.ones(2, 5).bool()}, r"landmark_mask_bm .* \(2, 4\)"),
        ({"iterations": 0}, "iterations = 0 must be at least 1"),
        ({"ridge": -0.1}, "ridge = -0.1 must not be negative"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, message):
    q, v, landmarks = operands(dtype=torch.float32)
    tensors = {"v": v, "landmarks": landmarks, **change}
    v, landmarks = tensors.pop("v"), tensors.pop("landmarks")
    with pytest.raises(ConfigError, match=message):
        soft_attention(q, v, landmarks, **tensors)
