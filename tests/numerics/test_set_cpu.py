"""The C++ kernel against the reference: every option, odd sizes, all dtypes; its exponential, build and threads."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from setformer_dist.ops import cpp_library as cpp
from setformer_dist.ops.kernels import unit
from setformer_dist.ops.set import cpp as set_cpu
from setformer_dist.ops.set import in_torch as set_fast
from setformer_dist.ops.set import reference as set_reference
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem

PLAIN = SetProblem(epsilon=0.1, sigma=0.0, tau=0.25, iterations=5)


def make(
    b=3, h=2, n=29, m=9, d=6, features=0, two_sets=True, axes=0, own=False, masked=False, dtype=torch.float64, seed=0
) -> Inputs:
    """Random operands, references of many lengths; `features` is k, 0 for x itself."""
    torch.manual_seed(seed)
    x = torch.randn(b, h, n, d, dtype=torch.float64)
    compared = 0.9 * unit(torch.randn(b, h, n, features, dtype=torch.float64)) if features else None
    lengths = 2 ** torch.linspace(-2, 2, m, dtype=torch.float64).unsqueeze(-1)
    gather, scatter = (lengths * unit(torch.randn(h, m, features or d, dtype=torch.float64)) for _ in range(2))
    mask = torch.rand(b, n) > 0.3 if masked else None
    if mask is not None:
        mask[:, 0] = True
    positions = torch.rand(b if own else 1, n, axes, dtype=torch.float64) if axes else None
    places = torch.rand(m, axes, dtype=torch.float64) if axes else None
    small = torch.promote_types(dtype, torch.float32)
    return Inputs(
        x.to(dtype),
        None if compared is None else compared.to(dtype),
        gather.to(small),
        scatter.to(small) if two_sets else None,
        None if positions is None else positions.to(small),
        None if places is None else places.to(small),
        mask,
    )


def gradient_like(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A gradient of y; masked tokens get none, because what stands there has no meaning."""
    grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    return grad if mask is None else grad * mask[:, None, :, None]


def by_reference(inputs: Inputs, grad: torch.Tensor, problem: SetProblem) -> list[torch.Tensor]:
    """y and the gradients of x, features, gather and scatter, as far as they are there, by autograd in fp64."""
    wide = [None if t is None or t.dtype == torch.bool else t.double() for t in inputs]
    operands = [t.requires_grad_() for t in wide[:4] if t is not None]
    y = set_reference.forward(Inputs(*wide[:6], inputs.mask_bn), problem)
    return [y.detach(), *torch.autograd.grad(y, operands, grad.double())]


def as_list(y: torch.Tensor, gradients: Gradients) -> list[torch.Tensor]:
    return [y, *(g for g in gradients if g is not None)]


def by_kernel(
    inputs: Inputs, grad: torch.Tensor, problem: SetProblem, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    y, rounds = set_cpu.forward(inputs, problem, dtype)
    return as_list(y, set_cpu.backward(grad, inputs, rounds, problem, dtype)), rounds


def assert_near(
    got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float, mask: torch.Tensor | None = None
) -> None:
    """Largest error over largest number of each tensor; the first is y, whose masked tokens do not count.

    One reference or one token leave references without any gradient: there terms of the size of the other gradients
    over epsilon cancel, and are the measure of what may remain.
    """
    assert len(got) == len(expected)
    sizes = [theirs.double().abs().max().item() for theirs in expected]
    largest = max(sizes)
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert torch.isfinite(ours).all()
        apart = (ours.double() - theirs.double()).abs()
        if index == 0 and mask is not None:
            apart = apart * mask[:, None, :, None]
        size = sizes[index] if sizes[index] > 1e-9 * largest else largest / PLAIN.epsilon
        assert apart.max() <= tolerance * size, f"tensor {index} is {apart.max() / size:.1e} off"


def check(inputs: Inputs, problem: SetProblem, dtype: torch.dtype, tolerance: float) -> None:
    grad = gradient_like(inputs.x_bhnd, inputs.mask_bn)
    assert set_cpu.supports(inputs, problem) is None
    got, _ = by_kernel(inputs, grad, problem, dtype)
    assert_near(got, by_reference(inputs, grad, problem), tolerance, inputs.mask_bn)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("sets", "axes"), itertools.product((1, 2), (0, 1, 2)))
def test_equals_the_reference_with_every_option(sets, axes, dtype, tolerance):
    for masked, renormalise, sigma, features in itertools.product((False, True), (True, False), (0.0, 0.6), (0, 5)):
        problem = SetProblem(0.1, sigma, 0.25, 4, renormalise=renormalise)
        own = masked and axes == 1
        inputs = make(two_sets=sets == 2, axes=axes, own=own, masked=masked, features=features, dtype=dtype)
        # Without the division by row sums an error of the exponent is not divided out either.
        check(inputs, problem, dtype, tolerance if renormalise else 2 * tolerance)


@pytest.mark.parametrize("n", [1, 7, 197])
@pytest.mark.parametrize("m", [1, 9, 49, 65])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_reference_at_odd_sizes(n, m, dtype, tolerance):
    for d, rounds in ((24, 1), (33, 3), (3, 2)):
        check(make(n=n, m=m, d=d, axes=2, dtype=dtype), SetProblem(0.1, 0.0, 0.25, rounds), dtype, tolerance)


def test_many_rounds_many_features_and_more_axes_than_an_image_has():
    inputs = make(n=50, m=20, d=130, features=100, axes=3)
    check(inputs, SetProblem(0.1, 0.5, 0.25, 40), torch.float64, 1e-12)


def test_small_epsilon_in_fp64_for_fp32_tokens():
    inputs = make(n=197, m=49, d=32, axes=2, dtype=torch.float32)
    check(inputs, SetProblem(0.02, 0.0, 0.25, 5), torch.float64, 2e-7)


def test_a_narrow_filter_on_a_coarse_grid_does_not_vanish():
    inputs = make(n=63, m=4, d=8, axes=2, dtype=torch.float32)
    problem = SetProblem(0.1, 0.0, 0.02, 5)
    got, _ = by_kernel(inputs, gradient_like(inputs.x_bhnd, None), problem, torch.float32)
    y, _ = set_fast.forward(inputs, problem, torch.float32)
    assert_near(got[:1], [y], 1e-4)  # exponents in the hundreds: their rounding alone is 1e-5
    assert all(torch.isfinite(t).all() for t in got)


@pytest.mark.parametrize("layout", ["heads next to channels", "channels first", "one image for all", "every other one"])
def test_any_strides(layout):
    b, h, n, d = 3, 2, 37, 24
    torch.manual_seed(1)
    x = {
        "heads next to channels": lambda: (
            torch.randn(b, n, 3 * h * d)[..., : h * d].unflatten(-1, (h, d)).transpose(1, 2)
        ),
        "channels first": lambda: torch.randn(b, h, d, n).mT,
        "one image for all": lambda: torch.randn(1, h, n, d).expand(b, h, n, d),
        "every other one": lambda: torch.randn(b, h, n, 2 * d)[..., ::2],
    }[layout]()
    inputs = make(b, h, n, 9, d, axes=2, dtype=torch.float32)
    strided = Inputs(x, *inputs[1:])
    dense = Inputs(x.clone(memory_format=torch.contiguous_format), *inputs[1:])
    grad = torch.randn(b, h, d, n).mT
    got, _ = by_kernel(strided, grad, PLAIN, torch.float32)
    expected, _ = by_kernel(dense, grad.contiguous(), PLAIN, torch.float32)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [0, 16])
def test_narrow_inputs_are_computed_in_fp32_and_rounded_once(dtype, features):
    narrow = make(n=50, d=24, features=features, axes=2, dtype=dtype)
    operands = narrow._asdict()
    wide = Inputs(**operands | {k: operands[k].float() for k in ("x_bhnd", "features_bhnk") if operands[k] is not None})
    grad = gradient_like(narrow.x_bhnd, None)
    got, _ = by_kernel(narrow, grad, PLAIN, torch.float32)
    expected, _ = by_kernel(wide, grad.float(), PLAIN, torch.float32)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    assert got[0].dtype == got[1].dtype == dtype


@pytest.mark.parametrize("sets", [1, 2])
def test_either_forward_goes_with_either_backward(sets):
    inputs = make(n=60, m=16, d=8, two_sets=sets == 2, axes=2)
    grad = gradient_like(inputs.x_bhnd, None)
    ours, our_rounds = by_kernel(inputs, grad, PLAIN, torch.float64)
    y, their_rounds = set_fast.forward(inputs, PLAIN, torch.float64)
    torch.testing.assert_close(our_rounds, their_rounds, atol=0, rtol=1e-12)
    crossed = set_fast.backward(grad, inputs, our_rounds, PLAIN, torch.float64)
    assert_near(ours, as_list(y, crossed), 1e-12)
    crossed = set_cpu.backward(grad, inputs, their_rounds, PLAIN, torch.float64)
    assert_near(as_list(y, crossed), ours, 1e-12)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads():
    inputs = make(b=5, h=3, n=197, m=49, d=32, axes=2, masked=True, dtype=torch.float32)
    grad = gradient_like(inputs.x_bhnd, inputs.mask_bn)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(by_kernel(inputs, grad, PLAIN, torch.float32)[0])
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_nan_stays_in_its_head_and_is_not_hidden():
    inputs = make(n=40, axes=2, dtype=torch.float32)
    clean, _ = set_cpu.forward(inputs, PLAIN, torch.float32)
    inputs.x_bhnd[1, 0, 5, 2] = torch.nan
    y, _ = set_cpu.forward(inputs, PLAIN, torch.float32)
    assert torch.isnan(y[1, 0]).all()
    y[1, 0] = clean[1, 0]
    assert torch.equal(y, clean)


def test_references_of_zeros_and_of_tiny_length_have_the_gradient_of_unit():
    inputs = make(n=40, d=16, m=4)
    lengths = torch.tensor([0.0, 1e-9, 1e-6, 1.0], dtype=torch.float64).unsqueeze(-1)
    tiny = inputs._replace(gather_hmk=inputs.gather_hmk * lengths)
    check(tiny, PLAIN, torch.float64, 1e-12)


def test_tokens_of_zeros_and_of_large_norm_give_finite_results():
    inputs = make(n=40, d=16, axes=2, dtype=torch.float32)
    inputs.x_bhnd[0] = 0.0
    inputs.x_bhnd[1] *= 1e15
    got, _ = by_kernel(inputs, gradient_like(inputs.x_bhnd, None), PLAIN, torch.float32)
    assert all(torch.isfinite(t).all() for t in got)
    assert not got[0][0].any()


@pytest.mark.parametrize(("dtype", "low", "high", "bound"), [
    (torch.float32, -87.0, 88.0, 2e-7),
    (torch.float64, -700.0, 700.0, 4e-16),
])  # fmt: skip
def test_exponential_is_accurate(dtype, low, high, bound):
    numbers = torch.linspace(low, high, 400_003, dtype=torch.float64).to(dtype)
    exact = numbers.double().exp() if dtype == torch.float32 else numbers.exp()
    assert (set_cpu.exponential(numbers).double() / exact - 1.0).abs().max() <= bound


def test_exponential_outside_its_range():
    assert set_cpu.exponential(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert (set_cpu.exponential(torch.tensor([-88.0, -1e4, -1e30, -torch.inf])) == 0).all()
    assert torch.isnan(set_cpu.exponential(torch.tensor([torch.nan]))).all()


# -------------------------------------------------------------------------------------------- what it cannot do


def test_supports_names_what_is_left_to_others(monkeypatch):
    inputs = make(n=5, m=4)
    assert set_cpu.supports(inputs, PLAIN) is None
    assert "tolerance" in str(set_cpu.supports(inputs, SetProblem(0.1, 0.0, 0.25, 5, tolerance=1e-3, implicit=True)))
    assert "implicit" in str(set_cpu.supports(inputs, SetProblem(0.1, 0.0, 0.25, 5, implicit=True)))
    elsewhere = Inputs(inputs.x_bhnd.to("meta"), *inputs[1:])
    assert "meta" in str(set_cpu.supports(elsewhere, PLAIN))
    monkeypatch.setenv(cpp.OFF, "1")
    assert cpp.OFF in str(set_cpu.supports(inputs, PLAIN))


ASK = """
import torch
from setformer_dist.ops.set import cpp as set_cpu
from setformer_dist.ops.set.problem import Inputs
from setformer_dist.ops.set.problem import SetProblem
one = torch.ones(1, 1, 4, 4)
inputs = Inputs(one, None, one[0], None, None, None, None)
problem = SetProblem(0.1, 0.0, 0.25, 2)
print("first:", set_cpu.supports(inputs, problem))
print("second:", set_cpu.supports(inputs, problem))
"""


def ask(folder: Path, **more: str) -> subprocess.Popen[str]:
    """A process of its own that asks `supports` twice, with an empty folder for what it builds."""
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, "-c", ASK]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/g++"])
def test_without_a_compiler_it_says_so_once(tmp_path, compiler):
    out, err = ask(tmp_path, CXX=compiler).communicate(timeout=120)
    first, second = out.splitlines()
    assert first.removeprefix("first: ") == second.removeprefix("second: ") != "None"
    assert err.count("slower than its own kernel") == 1
    assert not list(tmp_path.rglob("*.so"))


def broken_compiler(folder: Path) -> Path:
    """A compiler that tells its version, counts its calls and refuses every source."""
    path = folder / "g++-broken"
    path.write_text(
        f"#!/bin/sh\nif [ $1 = --version ]; then echo broken 1.0; exit; fi\necho x >> {folder}/calls\n"
        "echo 'x.cpp:1: error: no room in the registers' >&2; exit 1\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.drill
def test_a_build_that_fails_is_tried_by_one_rank_and_remembered(tmp_path):
    cache = tmp_path / "cache"
    compiler = broken_compiler(tmp_path)
    for _ in range(2):
        ranks = [ask(cache, CXX=str(compiler)) for _ in range(2)]
        for rank in ranks:
            out, err = rank.communicate(timeout=120)
            assert "first: the compiler failed: x.cpp:1: error: no room in the registers" in out
            assert err.count("slower than its own kernel") == 1
    assert (tmp_path / "calls").read_text() == "x\n"
    (record,) = cache.rglob("*.failed")
    # A day later, or with another compiler, it is tried again.
    os.utime(record, (0, 0))
    ask(cache, CXX=str(compiler)).communicate(timeout=120)
    assert (tmp_path / "calls").read_text() == "x\nx\n"
    compiler.write_text(compiler.read_text().replace("broken 1.0", "broken 1.1"))
    ask(cache, CXX=str(compiler)).communicate(timeout=120)
    assert (tmp_path / "calls").read_text() == "x\nx\nx\n"
    assert sorted(path.suffix for path in record.parent.iterdir()) == [".failed", ".failed", ".lock", ".lock"]


def test_ranks_that_start_together_build_one_file(tmp_path):
    ranks = [ask(tmp_path) for _ in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        assert out.splitlines() == ["first: None", "second: None"], err
        assert not err
    assert len(list(tmp_path.rglob("*.so"))) == 1
