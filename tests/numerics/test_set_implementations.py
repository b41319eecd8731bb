"""Every implementation of SeT attention against the reference, and what holds for all of them."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import grid_places, line_places, unit, unit_backward
from setformer_dist.ops.set import attention as module
from setformer_dist.ops.set import reference as set_reference
from setformer_dist.ops.set.attention import SetAttentionConfig, marginal_error, set_attention
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.sinkhorn import transport_plan

CASES = [
    {"kernel": kernel, "position_filter": nearness, "reference_sets": sets, "renormalise": renormalise}
    for kernel, nearness, sets, renormalise in itertools.product(
        ["similarity", "gaussian", "nystrom"], ["none", "linear", "separable"], [1, 2], [True, False]
    )
]


def name_of(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


def operands(config: SetAttentionConfig, b=3, h=2, n=30, d=6, dtype=torch.float64, masked=False, seed=0):
    """Tensors of one call; every second case has strides as a model's view of (b, n, h d) has."""
    rng = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=rng)
    k = config.anchors or d
    m = config.references_of(0)
    tensors = {
        "x_bhnd": draw(b, n, h, d).to(dtype).transpose(1, 2),
        "references_hmd": draw(h, m, k).to(dtype),
        "return_references_hmd": draw(h, m, k).to(dtype) if config.reference_sets == 2 else None,
        "anchors_hkd": draw(h, k, d).to(dtype) if config.kernel == "nystrom" else None,
    }
    mask = torch.rand(b, n, generator=rng) > 0.3 if masked else None
    grid = next((r, n // r) for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    return tensors, {"mask_bn": mask, "grid": grid}


def run(config: SetAttentionConfig, tensors, extra, scale=1.0):
    """Return the output and the gradients of all tensors under one fixed upstream gradient of this scale."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items() if t is not None}
    y = set_attention(config=config, **leaves, **extra)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).mul(scale).to(y.dtype)
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True))


def assert_same(found, wanted, tolerance):
    """Compare output and gradients, each relative to its largest entry; some gradients are 0 but for rounding."""
    assert found[1].keys() == wanted[1].keys()
    for name, value in {"output": found[0], **found[1]}.items():
        expected = wanted[0] if name == "output" else wanted[1][name]
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((value.double() - expected.double()).abs().max()) / scale < tolerance, name


def variant(config: SetAttentionConfig, **changes) -> SetAttentionConfig:
    return SetAttentionConfig(**{**config.model_dump(), **changes})


# --------------------------------------------------------------------------------- equal to the reference


@pytest.mark.parametrize("implementation", ["torch", "cpp"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_scalings_equal_reference_in_fp64(case, masked, implementation):
    config = SetAttentionConfig(references=9, iterations=4, anchors=5 if case["kernel"] == "nystrom" else 0, **case)
    tensors, extra = operands(config, masked=masked)
    wanted = run(variant(config, implementation="reference"), tensors, extra)
    assert_same(run(variant(config, implementation=implementation), tensors, extra), wanted, 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("implementation", ["torch", "cpp"])
def test_scalings_in_lower_precision(dtype, tolerance, epsilon, implementation):
    config = SetAttentionConfig(references=16, epsilon=epsilon)
    tensors, extra = operands(config, n=64, d=16, dtype=dtype)
    exact = {name: None if t is None else t.double() for name, t in tensors.items()}
    wanted = run(variant(config, implementation="reference"), exact, extra)
    # At epsilon = 0.02 a rounding of the similarity by 2^-24 counts fifty times.
    found = run(variant(config, implementation=implementation), tensors, extra)
    assert_same(found, wanted, tolerance * max(1, 0.1 / epsilon))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 3, 24, 32])),
    side=st.integers(1, 7),
    epsilon=st.floats(0.01, 2.0),
    nearness=st.sampled_from(["none", "linear", "separable"]),
    sets=st.sampled_from([1, 2]),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape_equals_the_reference(shape, side, epsilon, nearness, sets, masked, seed):
    b, h, n, d = shape
    config = SetAttentionConfig(
        references=side**2, epsilon=epsilon, position_filter=nearness, reference_sets=sets, iterations=3
    )
    tensors, extra = operands(config, b, h, n, d, masked=masked, seed=seed)
    if masked and not extra["mask_bn"].any():
        extra["mask_bn"][0, 0] = True
    wanted = run(variant(config, implementation="reference"), tensors, extra)
    for implementation in ("torch", "cpp"):
        assert_same(run(variant(config, implementation=implementation), tensors, extra), wanted, 1e-8)


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
@pytest.mark.parametrize("sets", [1, 2])
def test_gradcheck(gradient, sets):
    iterations = 400 if gradient == "implicit" else 3
    config = SetAttentionConfig(
        references=4, epsilon=0.4, iterations=iterations, gradient=gradient, reference_sets=sets, tau=0.5
    )
    tensors, extra = operands(config, b=2, h=2, n=6, d=3, masked=True)
    names = [name for name, t in tensors.items() if t is not None]
    leaves = [tensors[name].clone().requires_grad_() for name in names]

    def function(*values):
        return set_attention(config=config, **dict(zip(names, values, strict=True)), **extra)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_implicit_gradient_is_the_unrolled_one_at_convergence_and_near_it_before():
    """The stated error: at epsilon 0.1 the largest relative error is below 20 times the marginal error."""
    config = SetAttentionConfig(references=16, epsilon=0.1, iterations=60)
    tensors, extra = operands(config, n=64, d=16, dtype=torch.float32)
    wanted = run(variant(config, implementation="reference"), tensors, extra)
    assert_same(run(variant(config, gradient="implicit"), tensors, extra), wanted, 1e-5)
    few = variant(config, iterations=3)
    left = float(marginal_error(tensors["x_bhnd"], tensors["references_hmd"], few).max())
    assert 1e-5 < left < 0.2  # so that there is something to bound
    wanted = run(variant(few, implementation="reference"), tensors, extra)
    assert_same(run(variant(few, gradient="implicit"), tensors, extra), wanted, 20 * left)


def test_the_gradient_keeps_nothing_that_grows_with_tokens_times_rounds():
    def kept(iterations: int, n: int) -> int:
        config = SetAttentionConfig(references=16, iterations=iterations)
        tensors, extra = operands(config, n=n, dtype=torch.float32)
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items() if t is not None}
        sizes: list[int] = []
        pack = lambda t: sizes.append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            set_attention(config=config, **leaves, **extra)
        return sum(sizes)

    b, h, m, sets = 3, 2, 16, 2
    assert kept(50, 400) - kept(5, 400) == kept(50, 100) - kept(5, 100) == 45 * sets * b * h * m


def test_rounds_end_at_the_tolerance_whatever_shares_the_batch():
    config = SetAttentionConfig(references=9, epsilon=0.05, iterations=500, tolerance=1e-4, gradient="implicit")
    tensors, extra = operands(config, b=4, n=64, d=8, dtype=torch.float32)
    converged = variant(config, tolerance=0.0)
    wanted, _ = run(converged, tensors, extra)
    together, _ = run(config, tensors, extra)
    assert float((together - wanted).abs().max()) < 1e-3
    assert not torch.equal(together, wanted)  # it did stop before
    alone, _ = run(config, {**tensors, "x_bhnd": tensors["x_bhnd"][2:3]}, extra)
    torch.testing.assert_close(alone[0], together[2], atol=1e-6, rtol=1e-5)


OPTIONS = {
    "exact": {},
    "until a tolerance": {"gradient": "implicit", "tolerance": 1e-3, "iterations": 30},
    "as it is": {"renormalise": False, "position_filter": "none"},
    "gaussian": {"kernel": "gaussian", "reference_sets": 1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "m", "d", "h"), [(49, 9, 32, 4), (49, 49, 64, 1), (17, 33, 7, 2), (784, 49, 32, 2)])
@pytest.mark.parametrize("implementation", ["cpp", "torch", "reference"])
def test_an_image_is_computed_alike_whatever_shares_its_batch(implementation, n, m, d, h, dtype, options):
    """Bit by bit, forward and backward, masks included; the reference, which takes products as they come, nearly."""
    if implementation != "torch" and "tolerance" in OPTIONS[options]:
        pytest.skip("only fast stops at a tolerance")
    fields = {"position_filter": "linear", **OPTIONS[options]}
    config = SetAttentionConfig(references=m, implementation=implementation, **fields)
    rng = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(8, h, n, d, generator=rng).to(dtype) for _ in range(2))
    sets = [torch.randn(h, m, d, generator=rng).to(dtype) for _ in range(2)]
    back = {"return_references_hmd": sets[1]} if config.reference_sets == 2 else {}
    mask = torch.rand(8, n, generator=rng) > 0.3
    mask[:, 0] = True
    mask[3:] = True

    def of(images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x[images].clone().requires_grad_()
        y = set_attention(leaf, sets[0], config, mask_bn=mask[images], **back)
        (grad,) = torch.autograd.grad(y, leaf, upstream[images])
        return y.detach(), grad

    together = of(slice(0, 8))
    for size in (1, 3):
        for begin in range(0, 8, size):
            images = slice(begin, begin + size)
            for alone, all_of_them in zip(of(images), together, strict=True):
                if implementation != "reference":
                    assert torch.equal(alone, all_of_them[images])
                    continue
                apart = (alone.double() - all_of_them[images].double()).abs().max()
                bound = 16 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else torch.finfo(dtype).eps
                assert apart <= bound * all_of_them.double().abs().max()


def test_the_fall_to_the_slower_implementation_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_said", set())
    config = SetAttentionConfig(references=9, gradient="implicit", iterations=3)
    tensors, extra = operands(config, dtype=torch.float32)
    for tolerance in (0.0, 0.0, 1e-3, 1e-3):
        run(variant(config, tolerance=tolerance), tensors, extra)
    run(variant(config, gradient="exact"), tensors, extra)  # this is what cpp is for
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("SeT attention runs as 'torch': gradient = 'implicit'")
    assert said[1].startswith("SeT attention runs as 'torch': tolerance = 0.001")


def test_marginal_error_is_that_of_the_plan():
    config = SetAttentionConfig(references=9, iterations=2, reference_sets=1)
    tensors, _ = operands(config)
    found = marginal_error(tensors["x_bhnd"], tensors["references_hmd"], config)
    plan = transport_plan(unit(tensors["x_bhnd"]) @ unit(tensors["references_hmd"]).mT, 0.1, 2)
    torch.testing.assert_close(found, (plan.sum(-1) * 30 - 1).abs().amax(-1))
    more = marginal_error(tensors["x_bhnd"], tensors["references_hmd"], variant(config, iterations=99))
    assert float((more / found).max()) < 1e-4


# ------------------------------------------------------------------------------------------------- safety


DANGERS = {
    "alike": lambda x, r: (torch.ones_like(x), r),
    "zero": lambda x, r: (torch.zeros_like(x), r),
    "huge": lambda x, r: ((x.double() * 3e4 / x.abs().max()).to(x.dtype), r),
    "tiny": lambda x, r: (x * 1e-6, r),
    "far reference": lambda x, r: (x.abs() + 1, torch.cat([-torch.ones_like(r[:, :1]), r[:, 1:].abs() + 1], 1)),
    "equal references": lambda x, r: (x, torch.ones_like(r)),
    "one token": lambda x, r: (x[:, :, :1], r),
    "fewer tokens than references": lambda x, r: (x[:, :, :3], r),
}


@pytest.mark.parametrize("danger", DANGERS)
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("iterations", [1, 5, 30])
def test_nothing_breaks_where_training_may_go(danger, epsilon, dtype, iterations):
    config = SetAttentionConfig(
        references=9, epsilon=epsilon, iterations=iterations, position_filter="linear", reference_sets=1
    )
    tensors, _ = operands(config, n=40, d=8, dtype=dtype)
    x, r = DANGERS[danger](tensors["x_bhnd"], tensors["references_hmd"])
    # The gradient of the references is as large as the tokens: beyond fp16 unless what comes from above is small.
    y, gradients = run(config, {"x_bhnd": x, "references_hmd": r}, {}, 1e-5 if danger == "huge" else 1.0)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in gradients.values())
    # Rows of weights that sum to 1 cannot leave the range of the values.
    low, high = x.amin(2, keepdim=True).float(), x.amax(2, keepdim=True).float()
    slack = 10 * torch.finfo(dtype).eps * x.abs().amax().float() + 1e-30
    assert (y.float() >= low - slack).all()
    assert (y.float() <= high + slack).all()


@pytest.mark.parametrize("implementation", ["reference", "torch", "cpp"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.5])
def test_rows_sum_to_one(implementation, dtype, bound, epsilon):
    """Values that are all 1 come back as the sums of the rows, whatever the features are."""
    rng = torch.Generator().manual_seed(0)
    features, gather, scatter = (
        unit(torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)
        for shape in [(2, 3, 200, 16), (3, 25, 16), (3, 25, 16)]
    )
    positions, places = grid_places((10, 20), dtype).unsqueeze(0), grid_places((5, 5), dtype)
    tensors = (torch.ones(2, 3, 200, 8, dtype=dtype), features, gather, scatter, positions, places, None)
    problem = SetProblem(epsilon, 0.0, 0.25, 5)
    if implementation == "reference":
        y = set_reference.forward(Inputs(*tensors), problem)
    else:
        y, _ = torch.ops.setformer.set_attention(*tensors, problem.numbers(), implementation)
    assert float((y - 1).abs().max()) < bound


@pytest.mark.parametrize("kernel", ["similarity", "gaussian", "nystrom"])
def test_fp16_of_any_length_is_what_fp32_says(kernel):
    config = SetAttentionConfig(references=9, kernel=kernel, position_filter="none")
    tensors, _ = operands(config, dtype=torch.float32)
    for scale in (0.0, 400.0):
        x = tensors["x_bhnd"] * scale
        wanted = set_attention(config=config, **{**tensors, "x_bhnd": x.half().float()})
        found = set_attention(config=config, **{**tensors, "x_bhnd": x.half()})
        assert float((found.float() - wanted).abs().max()) <= 5e-3 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("epsilon", [0.01, 0.05])
def test_the_implicit_gradient_survives_a_plan_in_blocks(noise, epsilon):
    rng = torch.Generator().manual_seed(0)
    centre = torch.randn(8, generator=rng)
    sign = torch.tensor([1.0, -1.0]).repeat(20).view(1, 1, 40, 1)
    x = sign * centre + noise * torch.randn(1, 1, 40, 8, generator=rng)
    references = torch.stack([centre, -centre, 2 * centre, -2 * centre]).unsqueeze(0)
    config = SetAttentionConfig(
        references=4, epsilon=epsilon, iterations=20, gradient="implicit", reference_sets=1, position_filter="none"
    )
    _, gradients = run(config, {"x_bhnd": x, "references_hmd": references}, {})
    assert all(torch.isfinite(g).all() for g in gradients.values())
    exact = run(variant(config, gradient="exact"), {"x_bhnd": x, "references_hmd": references}, {})[1]
    if epsilon == 0.05 and noise:  # the plan has converged; the references' gradient vanishes within its blocks
        torch.testing.assert_close(gradients["x_bhnd"], exact["x_bhnd"], atol=1e-3, rtol=1e-2)


# -------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("nearness", ["none", "linear"])
def test_padding_changes_nothing_and_may_hold_anything(nearness):
    config = SetAttentionConfig(references=9, position_filter=nearness)
    tensors, _ = operands(config, b=2, n=20)
    plain, gradients = run(config, tensors, {})
    longer = torch.full((2, 2, 33, 6), math.nan).double()
    longer[:, :, :20] = tensors["x_bhnd"]
    mask = torch.arange(33).expand(2, 33) < 20
    leaves = {name: t.clone().requires_grad_() for name, t in {**tensors, "x_bhnd": longer}.items() if t is not None}
    y = set_attention(config=config, **leaves, mask_bn=mask)
    torch.testing.assert_close(y[:, :, :20], plain)
    assert (y[:, :, 20:] == 0).all()
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y[:, :, :20].backward(upstream)
    torch.testing.assert_close(leaves["x_bhnd"].grad[:, :, :20], gradients["x_bhnd"])
    assert (leaves["x_bhnd"].grad[:, :, 20:] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "torch", "cpp"])
def test_an_image_without_tokens_gives_zeros_and_leaves_the_others(implementation):
    config = SetAttentionConfig(references=9, position_filter="linear", implementation=implementation)
    tensors, _ = operands(config, b=3)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[1] = False
    y, gradients = run(config, tensors, {"mask_bn": mask})
    assert (y[1] == 0).all()
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert (gradients["x_bhnd"][1] == 0).all()
    plain, _ = run(config, tensors, {})
    torch.testing.assert_close(y[[0, 2]], plain[[0, 2]])


# ---------------------------------------------------------------------------------------- a PyTorch operator


def op_arguments(masked=False, requires_grad=True, **changes):
    config = SetAttentionConfig(references=9, **changes)
    tensors, extra = operands(config, masked=masked, n=12)
    x = tensors["x_bhnd"].detach().requires_grad_(requires_grad)
    positions, places = module._places(x, 9, extra["grid"], extra["mask_bn"], config)
    r = tensors["references_hmd"].requires_grad_(requires_grad)
    s = tensors["return_references_hmd"].requires_grad_(requires_grad) if config.reference_sets == 2 else None
    return (x, None, r, s, positions, places, extra["mask_bn"], SetProblem(0.1, 0.0, 0.25, 3).numbers(), "torch")


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(sets, masked):
    arguments = op_arguments(masked, reference_sets=sets, position_filter="linear")
    torch.library.opcheck(torch.ops.setformer.set_attention.default, arguments)
    y, rounds = torch.ops.setformer.set_attention(
        *op_arguments(masked, False, reference_sets=sets, position_filter="linear")
    )
    plain = op_arguments(masked, False, reference_sets=sets, position_filter="linear")
    torch.library.opcheck(torch.ops.setformer.set_attention_backward.default, (torch.ones_like(y), rounds, *plain))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", ["torch", "cpp"])
def test_the_operator_and_the_way_around_it_give_the_same_bits(implementation, masked):
    config = SetAttentionConfig(references=9, implementation=implementation)
    tensors, extra = operands(config, dtype=torch.float32, masked=masked)
    around = run(config, tensors, extra)
    with FlopCounterMode(display=False) as counter:
        through = run(config, tensors, extra)
    counted = counter.get_flop_counts()["Global"]
    assert counted.keys() == {torch.ops.setformer.set_attention, torch.ops.setformer.set_attention_backward}
    assert torch.equal(around[0], through[0])
    assert all(torch.equal(around[1][name], through[1][name]) for name in around[1])


@pytest.mark.parametrize("implementation", ["torch", "cpp"])
def test_tensors_that_stand_for_others_and_batches_of_gradients(implementation):
    config = SetAttentionConfig(references=9, implementation=implementation)
    tensors, extra = operands(config, dtype=torch.float32)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items() if t is not None}
    y = set_attention(config=config, **leaves, **extra)
    upstream = torch.randn_like(y)
    wanted = torch.autograd.grad(y, list(leaves.values()), upstream, retain_graph=True)
    lazy = torch.complex(upstream, -upstream).conj().imag
    assert lazy.is_neg()
    found = torch.autograd.grad(y, list(leaves.values()), lazy, retain_graph=True)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    two = torch.stack([upstream, 2 * upstream])
    found = torch.autograd.grad(y, list(leaves.values()), two, retain_graph=True, is_grads_batched=True)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, torch.stack([w, 2 * w]))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y, list(leaves.values()), upstream)
    assert counter.get_flop_counts()["Global"].keys() == {torch.ops.setformer.set_attention_backward}

    x = tensors["x_bhnd"]
    rest = {name: t for name, t in tensors.items() if t is not None and name != "x_bhnd"}
    minus = torch.complex(x, -x).conj().imag
    assert minus.is_neg()
    assert torch.equal(set_attention(minus, config=config, **rest, **extra), y.detach())
    zeros = torch._efficientzerotensor(x.shape)
    assert not set_attention(zeros, config=config, **rest, **extra).any()


@pytest.mark.parametrize("implementation", ["torch", "cpp"])
def test_each_reference_set_has_a_gradient_of_its_own_dtype(implementation):
    config = SetAttentionConfig(references=9, implementation=implementation)
    tensors, extra = operands(config, dtype=torch.float32)
    tensors["return_references_hmd"][:, 0] *= 1e-6  # its gradient is beyond what fp16 holds
    mixed = {**tensors, "references_hmd": tensors["references_hmd"].half()}
    found = run(config, mixed, extra)
    wanted = run(config, {**mixed, "references_hmd": mixed["references_hmd"].float()}, extra)
    assert found[1]["references_hmd"].dtype == torch.float16
    assert torch.equal(found[1]["return_references_hmd"], wanted[1]["return_references_hmd"])
    assert float(wanted[1]["return_references_hmd"].abs().max()) > torch.finfo(torch.float16).max


def test_the_second_derivative_is_refused():
    config = SetAttentionConfig(references=9)
    tensors, extra = operands(config)
    x = tensors["x_bhnd"].requires_grad_()
    y = set_attention(config=config, **{name: t for name, t in tensors.items() if t is not None}, **extra)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_compiles_without_a_graph_break():
    config = SetAttentionConfig(references=9)
    tensors, extra = operands(config, n=12, dtype=torch.float32)
    compiled = torch.compile(set_attention, fullgraph=True, backend="aot_eager")
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items() if t is not None}
    y = compiled(config=config, **leaves, **extra)
    wanted, gradients = run(config, tensors, extra)
    torch.testing.assert_close(y, wanted)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, gradients[name])


@pytest.mark.parametrize("first", ["inference", "tracing", "transform"])
def test_places_kept_from_any_first_call_serve_training_and_tracing(first):
    """The first call of a size may come from anywhere; the next one must find places that it can use."""
    config = SetAttentionConfig(references=9)
    given, extra = operands(config, n=35, dtype=torch.float32)
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    call = functools.partial(set_attention, config=config, **extra)
    module._kept_places.cache_clear()
    if first == "inference":
        with torch.inference_mode():
            call(**tensors)
    elif first == "tracing":
        with FakeTensorMode(allow_non_fake_inputs=True):
            call(**tensors)
    else:
        torch.func.functionalize(call)(**tensors)
    assert module._kept_places.cache_info().currsize == 1
    x = tensors["x_bhnd"].detach().requires_grad_()
    call(**{**tensors, "x_bhnd": x}).sum().backward()
    assert module._kept_places.cache_info().hits == 1
    assert type(x.grad) is torch.Tensor
    assert not torch._is_functional_tensor(x.grad)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        assert call(**fake).shape == x.shape


def test_places_are_the_same_however_a_device_divides():
    for count in range(1, 300):
        at = torch.arange(count, dtype=torch.float64)
        kept = line_places(count, torch.float32).squeeze(1)
        assert torch.equal(kept, (at * (1 / count)).float())  # as a GPU does it
        assert torch.equal(kept, (at / count).float())


@pytest.mark.parametrize("length", [1.0, 1e-5, 1e-7, 0.0])  # the last two are shorter than what counts as a direction
def test_the_gradient_through_unit_length_is_that_of_autograd(length):
    x = (length * torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(3, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(unit(x), x, grad)
    torch.testing.assert_close(unit_backward(x.detach(), grad), expected, rtol=1e-10, atol=1e-10)


def test_activation_checkpointing_recomputes_the_same():
    config = SetAttentionConfig(references=9)
    tensors, extra = operands(config, n=12)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items() if t is not None}
    y = checkpoint(functools.partial(set_attention, config=config, **extra), use_reentrant=False, **leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(upstream)
    for name, gradient in run(config, tensors, extra)[1].items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=0, atol=0)


def test_products_are_counted():
    config = SetAttentionConfig(references=9, iterations=3)
    tensors, extra = operands(config, b=2, h=2, n=12, d=6)
    with FlopCounterMode(display=False) as counter:
        set_attention(config=config, **tensors, **extra)
    assert counter.get_total_flops() == 2 * 2 * 2 * 12 * 9 * (2 * 6 + 2 * 6 + 2 * 3 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # fp16: another narrow one than that of autocast
def test_the_work_is_done_in_fp32_under_autocast(dtype):
    config = SetAttentionConfig(references=9)
    tensors, extra = operands(config, dtype=dtype)
    plain = run(config, tensors, extra)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(config, tensors, extra)
    assert_same(mixed, plain, 1e-12)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_bhnd": torch.zeros(2, 30, 6)}, r"x has shape \(2, 30, 6\).*expected floats \(b, h, n, d\)"),
        ({"x_bhnd": torch.zeros(2, 2, 0, 6)}, "none empty but b"),
        ({"references_hmd": torch.zeros(2, 8, 6)}, r"references have shape \(2, 8, 6\): expected .* \(2, 9, 6\)"),
        ({"references_hmd": torch.zeros(2, 9, 6, device="meta")}, "references on device 'meta': expected 'cpu'"),
        ({"return_references_hmd": None}, "return_references are missing, but reference_sets = 2"),
        ({"anchors_hkd": torch.zeros(2, 5, 6)}, "anchors are given, but kernel = 'similarity'"),
        ({"grid": None}, "needs grid"),
        ({"grid": (4, 7)}, "grid is 4 x 7 = 28 tokens, but x has n = 30"),
        ({"mask_bn": torch.ones(3, 29, dtype=torch.bool)}, r"mask has shape \(3, 29\).*expected \(3, 30\)"),
        ({"mask_bn": torch.ones(3, 30)}, "torch.bool"),
        ({"mask_bn": torch.zeros(3, 30, dtype=torch.bool)}, "mask leaves no token"),
    ],
)
def test_bad_arguments_are_named(changes, words):
    config = SetAttentionConfig(references=9)
    tensors, extra = operands(config, dtype=torch.float32)
    with pytest.raises(ConfigError, match=words):
        set_attention(config=config, **{**tensors, **extra, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": -0.1}, "epsilon"),
        ({"iterations": 0}, "iterations"),
        ({"references": 10}, "not a square: use 9 or 16"),
        ({"tolerance": 1e-3}, "gradient = 'implicit'"),
    ],
)
def test_bad_choices_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        SetAttentionConfig(**changes)


def test_a_forced_implementation_refuses_what_it_cannot_compute():
    tensors, extra = operands(SetAttentionConfig(references=9), dtype=torch.float32)
    config = SetAttentionConfig(references=9, epsilon=0.005, implementation="fast")  # as older versions named it
    with pytest.raises(ConfigError, match=r"'torch' cannot compute this: epsilon = 0.005"):
        set_attention(config=config, **tensors, **extra)
    implicit = SetAttentionConfig(references=9, gradient="implicit", implementation="reference")
    with pytest.raises(ConfigError, match=r"'reference' cannot compute this: .*'implicit' is not for it"):
        set_attention(config=implicit, **tensors, **extra)
    with pytest.raises(ConfigError, match=r"nothing computes this: epsilon = 0.004"):
        set_attention(config=variant(implicit, implementation="auto", epsilon=0.004), **tensors, **extra)
    with pytest.raises(ConfigError, match="'triton' cannot compute this: device 'cpu'"):
        set_attention(config=SetAttentionConfig(references=9, implementation="triton"), **tensors, **extra)


def test_a_plan_by_logarithms_refuses_a_tolerance():
    with pytest.raises(ConfigError, match=r"epsilon = 0.005 leaves only logarithms"):
        transport_plan(torch.zeros(4, 3), 0.005, 5, tolerance=1e-3, implicit=True)


def test_epsilon_below_the_scalings_takes_the_reference():
    config = SetAttentionConfig(references=9, epsilon=0.004)
    tensors, extra = operands(config, dtype=torch.float32)
    y, gradients = run(config, tensors, extra)
    wanted = run(variant(config, implementation="reference"), tensors, extra)
    assert_same((y, gradients), wanted, 1e-9)


@pytest.mark.parametrize("kernel", ["similarity", "gaussian"])
@pytest.mark.parametrize("implementation", ["reference", "torch", "cpp"])
def test_zero_vectors_are_fine_and_a_bad_image_spoils_no_other(implementation, kernel):
    config = SetAttentionConfig(references=9, implementation=implementation, kernel=kernel, reference_sets=1)
    rng = torch.Generator().manual_seed(0)
    x, references = torch.randn(2, 2, 20, 8, generator=rng), torch.randn(2, 9, 8, generator=rng)

    def of(value: float, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone()
        leaf[0, :, tokens] = value
        leaf.requires_grad_()
        y = set_attention(leaf, references, config, grid=(4, 5))
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        return y.detach(), gradient

    clean, clean_gradient = of(0.5, slice(3, 4))
    for tokens in (slice(3, 4), slice(None)):
        assert all(t.isfinite().all() for t in of(0.0, tokens))
    for bad in (math.nan, math.inf, -math.inf):
        y, gradient = of(bad, slice(3, 4))
        assert not y[0].isfinite().all()  # visible in the loss, never hidden
        assert torch.equal(y[1], clean[1])
        assert torch.equal(gradient[1], clean_gradient[1])
