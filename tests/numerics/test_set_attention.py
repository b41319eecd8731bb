"""The operators against published formulas, an independent solver (POT) and finite differences."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import (
    gaussian,
    grid_places,
    inverse_square_root,
    line_places,
    log_filter,
    nystrom,
    unit,
)
from setformer_dist.ops.set.attention import SetAttentionConfig, set_attention
from setformer_dist.ops.sinkhorn import sinkhorn_log, sinkhorn_scaling, transport_plan


def tokens() -> torch.Tensor:
    i, j = torch.meshgrid(torch.arange(8.0).double(), torch.arange(4.0).double(), indexing="ij")
    return unit(torch.sin(i + 2 * j))


def references() -> torch.Tensor:
    i, j = torch.meshgrid(torch.arange(3.0).double(), torch.arange(4.0).double(), indexing="ij")
    return unit(torch.sin(0.7 * i + 1.3 * j + 0.5))


def anchors() -> torch.Tensor:
    i, j = torch.meshgrid(torch.arange(4.0).double(), torch.arange(4.0).double(), indexing="ij")
    return unit(torch.sin(0.9 * i + 1.7 * j + 0.3))


# epsilon, P[0, :], 3 (P^T x)[0], S00 and S01 of S = 24 P P^T, (S x)[0]; computed by three independent codes.
TARGETS = [
    (
        0.1,
        [0.022395, 0.101074, 0.001532],
        [-0.448955, 0.261959, 0.230928, -0.454159],
        [0.257274, 0.092003],
        [0.037300, 0.304046, -0.290356, -0.062385],
    ),
    (
        0.5,
        [0.044568, 0.051473, 0.028959],
        [-0.202083, 0.213732, 0.024195, -0.233869],
        [0.131386, 0.116006],
        [0.021555, 0.133019, -0.132266, -0.022935],
    ),
    (
        1.0,
        [0.043990, 0.045450, 0.035561],
        [-0.088333, 0.168958, -0.052290, -0.125437],
        [0.126368, 0.122293],
        [0.041484, 0.116495, -0.138443, -0.001271],
    ),
]


@pytest.mark.parametrize(("epsilon", "plan_row", "pooled", "s_row", "output"), TARGETS)
def test_published_targets_of_plan_and_output(epsilon, plan_row, pooled, s_row, output):
    x, y = tokens(), references()
    plan = sinkhorn_scaling((x @ y.T)[None], epsilon, 1000)[0]
    glued = 24 * plan @ plan.T
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(plan[0], torch.tensor(plan_row).double(), **close)
    torch.testing.assert_close((3 * plan.T @ x)[0], torch.tensor(pooled).double(), **close)
    torch.testing.assert_close(glued[0, :2], torch.tensor(s_row).double(), **close)
    config = SetAttentionConfig(
        references=3, epsilon=epsilon, iterations=1000, position_filter="none", reference_sets=1
    )
    result = set_attention(x[None, None], y[None], config)[0, 0]
    torch.testing.assert_close(result[0], torch.tensor(output).double(), **close)
    torch.testing.assert_close(result, glued @ x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("solver", [sinkhorn_log, sinkhorn_scaling])
def test_plan_agrees_with_pot(epsilon, solver):
    x, y = tokens(), references()
    cost = -(x @ y.T).numpy()
    theirs = ot.sinkhorn(np.full(8, 1 / 8), np.full(3, 1 / 3), cost, epsilon, stopThr=1e-15, numItermax=10_000)
    ours = solver((x @ y.T)[None], epsilon, 2000)[0]
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


def test_position_filter_targets():
    m = torch.exp(log_filter(line_places(8, torch.double), line_places(3, torch.double), 0.1))
    torch.testing.assert_close(m[1, :2], torch.tensor([0.20961139, 0.01303291]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(m[3], torch.tensor([7.8e-7, 0.84062374, 2.0206e-4]).double(), atol=1e-6, rtol=0)
    assert m[1, 2] < 1e-8


def test_separable_filter_is_the_product_over_axes():
    rows = log_filter(line_places(5, torch.double), line_places(3, torch.double), 0.2)
    columns = log_filter(line_places(7, torch.double), line_places(3, torch.double), 0.2)
    joint = log_filter(grid_places((5, 7), torch.double), grid_places((3, 3), torch.double), 0.2)
    for r, c, i, j in itertools.product(range(5), range(7), range(3), range(3)):
        assert joint[r * 7 + c, i * 3 + j] == pytest.approx(float(rows[r, i] + columns[c, j]), rel=1e-14)


@pytest.mark.parametrize(
    ("sigma", "features", "error"),
    [
        (0.6, [0.708004, 0.211212, -0.001237, 0.006130], 0.5385),
        (1.0, [0.798280, 0.400096, 0.097676, 0.066639], 0.3147),
    ],
)
def test_nystrom_targets(sigma, features, error):
    x, z = tokens(), anchors()
    v = nystrom(x[None], z[None], sigma, ridge=0.0)[0]
    torch.testing.assert_close(v[0], torch.tensor(features).double(), atol=1e-6, rtol=0)
    exact = gaussian(x @ x.T, sigma)
    assert torch.linalg.norm(v @ v.T - exact) / torch.linalg.norm(exact) == pytest.approx(error, abs=1e-4)
    on_anchors = nystrom(z[None], z[None], sigma, ridge=0.0)[0]
    torch.testing.assert_close(on_anchors @ on_anchors.T, gaussian(z @ z.T, sigma), atol=1e-13, rtol=0)


def test_nystrom_kernel_row_and_ridge():
    x, z = tokens(), anchors()
    expected = torch.tensor([1, 0.281381, 0.029413, 0.005210]).double()
    torch.testing.assert_close(gaussian(z @ z.T, 0.6)[0], expected, atol=1e-6, rtol=0)
    v = nystrom(x[None], z[None], 0.6, ridge=1e-2)[0]
    exact = gaussian(x @ x.T, 0.6)
    assert torch.linalg.norm(v @ v.T - exact) / torch.linalg.norm(exact) == pytest.approx(0.5442, abs=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_inverse_square_root_gradient_survives_equal_eigenvalues(ridge):
    torch.manual_seed(0)
    spread = torch.randn(2, 4, 4).double()
    matrix = torch.cat([spread @ spread.mT + torch.eye(4), 2 * torch.eye(4).double()[None]]).requires_grad_()
    symmetric = lambda a: inverse_square_root(0.5 * (a + a.mT), ridge)  # noqa: E731
    assert torch.autograd.gradcheck(symmetric, matrix)
    if ridge == 0.0:
        root = inverse_square_root(matrix)
        torch.testing.assert_close(root @ matrix @ root, torch.eye(4).double().expand(3, 4, 4))


# ------------------------------------------------------------------------------------------- both Sinkhorn ways


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 9)),
    epsilon=st.floats(0.05, 2.0),
    iterations=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_scaling_equals_log_domain_with_gradients(shape, epsilon, iterations, seed):
    rng = torch.Generator().manual_seed(seed)
    similarity = (2 * torch.rand(shape, generator=rng).double() - 1).requires_grad_()
    weight = torch.randn(shape, generator=rng).double()
    plans = [solver(similarity, epsilon, iterations) for solver in (sinkhorn_log, sinkhorn_scaling)]
    grads = [torch.autograd.grad((plan * weight).sum(), similarity)[0] for plan in plans]
    torch.testing.assert_close(plans[0], plans[1], atol=1e-13, rtol=1e-9)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-11, rtol=1e-8)
    z, _, m = shape
    assert (plans[1] >= 0).all()
    torch.testing.assert_close(plans[1].sum(-2), torch.full((z, m), 1 / m).double())


@pytest.mark.parametrize("solver", [sinkhorn_log, sinkhorn_scaling])
@pytest.mark.parametrize(("epsilon", "bound"), [(0.1, 5e-3), (0.5, 3e-6)])
def test_five_iterations_meet_both_marginals(solver, epsilon, bound):
    torch.manual_seed(0)
    x, y = unit(torch.randn(196, 32)), unit(torch.randn(49, 32))
    plan = solver((x @ y.T)[None], epsilon, 5)[0]
    assert (plan.sum(1) * 196 - 1).abs().max() < bound
    assert (plan.sum(0) * 49 - 1).abs().max() < 1e-5


def test_scaling_in_fp32_at_its_smallest_epsilon_is_finite_on_extreme_similarities():
    similarity = torch.ones(1, 64, 16)
    similarity[:, 1:, 0] = -1.0  # one column that only one token likes
    similarity.requires_grad_()
    plan = transport_plan(similarity, 0.05, 50)
    exact = sinkhorn_log(similarity.detach().double(), 0.05, 50)
    torch.testing.assert_close(plan.double(), exact, atol=1e-7, rtol=1e-4)
    (plan * torch.arange(16.0)).sum().backward()
    assert torch.isfinite(similarity.grad).all()


def test_small_epsilon_takes_the_log_way_and_stays_finite():
    torch.manual_seed(0)
    similarity = (2 * torch.rand(1, 20, 4) - 1).requires_grad_()
    plan = transport_plan(similarity, 0.005, 30)
    plan.square().sum().backward()
    assert torch.isfinite(plan).all()
    assert torch.isfinite(similarity.grad).all()
    torch.testing.assert_close(plan.sum(-2), torch.full((1, 4), 0.25), atol=1e-5, rtol=0)


@pytest.mark.parametrize("epsilon", [0.02, 0.1])
def test_sinkhorn_is_fp32_under_autocast_and_for_bf16(epsilon):
    torch.manual_seed(0)
    similarity = (2 * torch.rand(2, 30, 9) - 1).bfloat16()
    expected = transport_plan(similarity.float(), epsilon, 5)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = transport_plan(similarity, epsilon, 5)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, expected, atol=0, rtol=0)


def test_backward_under_autocast_is_fp32_too():
    torch.manual_seed(0)
    similarity = (2 * torch.rand(2, 30, 9) - 1).requires_grad_()
    weight = torch.randn(2, 30, 9)
    (plain,) = torch.autograd.grad((transport_plan(similarity, 0.1, 5) * weight).sum(), similarity)
    with torch.autocast("cpu", torch.bfloat16):
        (mixed,) = torch.autograd.grad((transport_plan(similarity, 0.1, 5) * weight).sum(), similarity)
    torch.testing.assert_close(mixed, plain, atol=0, rtol=0)


# -------------------------------------------------------------------------------------------- the whole operator

COMBINATIONS = list(
    itertools.product(["similarity", "gaussian", "nystrom"], ["none", "separable"], [1, 2], [True, False])
)


def operands(config: SetAttentionConfig, h=2, b=2, n=6, d=3, dtype=torch.float64):
    torch.manual_seed(0)
    k = config.anchors or d
    m = config.references
    named = {
        "x_bhnd": torch.randn(b, h, n, d, dtype=dtype),
        "references_hmd": torch.randn(h, m, k, dtype=dtype),
        "return_references_hmd": torch.randn(h, m, k, dtype=dtype) if config.reference_sets == 2 else None,
        "anchors_hkd": torch.randn(h, k, d, dtype=dtype) if config.kernel == "nystrom" else None,
    }
    return {name: None if value is None else value.requires_grad_() for name, value in named.items()}


@pytest.mark.parametrize(("kernel", "position_filter", "sets", "renormalise"), COMBINATIONS)
def test_gradcheck(kernel, position_filter, sets, renormalise):
    config = SetAttentionConfig(
        references=4,
        kernel=kernel,
        anchors=2 if kernel == "nystrom" else 0,
        position_filter=position_filter,
        reference_sets=sets,
        renormalise=renormalise,
        epsilon=0.4,
        iterations=3,
        tau=0.5,
    )
    named = {name: value for name, value in operands(config).items() if value is not None}

    def function(*values):
        return set_attention(grid=(3, 2), config=config, **dict(zip(named, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(named.values()), fast_mode=True)


def attention_matrix(config: SetAttentionConfig, grid: tuple[int, int], seed: int) -> torch.Tensor:
    """The n x n matrix that the operator applies to one head's values, read off by linearity in the values.

    The operator's similarity and values come from one x, so the matrix is rebuilt with values of its own: the
    pieces must give the same output as the whole.
    """
    torch.manual_seed(seed)
    n, d, m = grid[0] * grid[1], 5, config.references
    x = torch.randn(1, 1, n, d).double()
    sets = [torch.randn(1, m, d).double() for _ in range(config.reference_sets)]
    extra = {"return_references_hmd": sets[1]} if len(sets) == 2 else {}
    output = set_attention(x, sets[0], config, grid=grid, **extra)
    plans = [transport_plan(unit(x[0, 0]) @ unit(y[0]).T, config.epsilon, config.iterations) for y in sets]
    gather, scatter = plans[0], plans[-1]
    if config.position_filter == "separable":
        side = math.isqrt(m)
        tokens, places = (grid_places(sides, torch.double, offset=0.5) for sides in (grid, (side, side)))
        factor = torch.exp(log_filter(tokens, places, config.tau))
        gather, scatter = gather * factor, scatter * factor
    matrix = (scatter / scatter.sum(1, keepdim=True)) @ (gather / gather.sum(0)).T
    torch.testing.assert_close(output[0, 0], matrix @ x[0, 0], atol=1e-7, rtol=1e-6)
    return matrix


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    side=st.integers(1, 4),
    epsilon=st.floats(0.05, 2.0),
    tau=st.floats(0.1, 1.0),
    position_filter=st.sampled_from(["none", "separable"]),
    sets=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_weights_are_non_negative_and_rows_sum_to_one(grid, side, epsilon, tau, position_filter, sets, seed):
    config = SetAttentionConfig(
        references=side**2, epsilon=epsilon, tau=tau, position_filter=position_filter, reference_sets=sets
    )
    matrix = attention_matrix(config, grid, seed)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(matrix.shape[0]).double(), atol=1e-5, rtol=0)


def test_constant_values_come_back_unchanged():
    for kernel, position_filter, sets, _ in COMBINATIONS:
        if kernel == "nystrom":
            continue
        config = SetAttentionConfig(references=9, kernel=kernel, position_filter=position_filter, reference_sets=sets)
        named = operands(config, n=20)
        named["x_bhnd"] = torch.full((2, 2, 20, 3), 0.7).double()
        output = set_attention(grid=(4, 5), config=config, **named)
        torch.testing.assert_close(output, named["x_bhnd"], atol=1e-9, rtol=0)


def test_one_set_without_filter_is_symmetric_and_positive_semidefinite():
    config = SetAttentionConfig(references=4, position_filter="none", reference_sets=1, iterations=300)
    matrix = attention_matrix(config, (4, 4), 3)
    torch.testing.assert_close(matrix, matrix.T, atol=1e-9, rtol=0)
    assert torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min() > -1e-9
    assert torch.linalg.matrix_rank(matrix, atol=1e-9) <= 4


def test_without_filter_permuted_tokens_give_permuted_outputs():
    config = SetAttentionConfig(references=4, position_filter="none")
    named = operands(config, n=12)
    order = torch.randperm(12)
    plain = set_attention(grid=(3, 4), config=config, **named)
    named["x_bhnd"] = named["x_bhnd"][:, :, order]
    torch.testing.assert_close(set_attention(grid=(3, 4), config=config, **named), plain[:, :, order])


def test_a_narrow_filter_on_a_coarse_grid_does_not_vanish():
    config = SetAttentionConfig(references=4, tau=0.02)
    named = operands(config, n=63, dtype=torch.float32)
    output = set_attention(grid=(9, 7), config=config, **named)
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert torch.isfinite(named["x_bhnd"].grad).all()


def test_bf16_stays_close_to_fp32():
    config = SetAttentionConfig(references=9)
    wide = operands(config, n=49, d=16, dtype=torch.float32)
    narrow = {name: value.bfloat16() for name, value in wide.items() if value is not None}
    exact = set_attention(grid=(7, 7), config=config, **{k: v for k, v in wide.items() if v is not None})
    rounded = set_attention(grid=(7, 7), config=config, **narrow)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [1.5, 50.0, 1e3])
def test_plans_of_similarities_beyond_one_go_by_logarithms(dtype, largest):
    torch.manual_seed(0)
    similarity = ((torch.rand(2, 12, 5) * 2 - 1) * largest).to(dtype).requires_grad_()
    plan = transport_plan(similarity, 0.05, 5)
    exact = sinkhorn_log(similarity.detach().double(), 0.05, 5)
    torch.testing.assert_close(plan.double(), exact, atol=1e-4 if dtype != torch.float64 else 1e-12, rtol=0.0)
    torch.testing.assert_close(plan.sum(-2), torch.full_like(plan.sum(-2), 1 / 5), atol=1e-4, rtol=0.0)
    assert torch.isfinite(torch.autograd.grad(plan.square().sum(), similarity)[0]).all()


@pytest.mark.parametrize(
    ("similarity", "epsilon", "more", "message"),
    [
        (torch.zeros(4, 0), 0.1, {}, "similarity is torch.float32 (4, 0)"),
        (torch.zeros(4, 3).long(), 0.1, {}, "give floats"),
        (torch.zeros(4, 3), 0.0, {}, "epsilon = 0.0 must be above 0"),
        (torch.full((4, 3), 50.0), 0.1, {"tolerance": 1e-3, "implicit": True}, "similarities within [-1, 1]"),
    ],
)
def test_what_has_no_plan_is_refused(similarity, epsilon, more, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        transport_plan(similarity, epsilon, 5, **more)


def test_counting_from_one_shifts_the_places_of_a_grid():
    """As OTK's filter on a grid does: the distances of i / n and j / m then differ by 1 / n - 1 / m along an axis."""
    n, m, tau = 6, 3, 0.25
    tokens, references = (torch.arange(count, dtype=torch.float64) for count in (n, m))
    from_one = -((((tokens[:, None] + 1) / n - (references + 1) / m) / tau) ** 2)
    ours = log_filter(line_places(n, torch.float64), line_places(m, torch.float64), tau)
    shifted = log_filter(line_places(n, torch.float64) + (1 / n - 1 / m), line_places(m, torch.float64), tau)
    torch.testing.assert_close(shifted, from_one)
    assert (ours.softmax(-1) - from_one.softmax(-1)).abs().max() > 0.1
    square = log_filter(line_places(n, torch.float64), line_places(n, torch.float64), tau)
    torch.testing.assert_close(square, -((((tokens[:, None] + 1) / n - (tokens + 1) / n) / tau) ** 2))
