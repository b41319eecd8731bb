"""The Triton kernels against the reference; run by test_set_triton.py in a process of its own.

Every buffer starts as NaN, so a number that no kernel wrote is seen.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from setformer_dist.ops.kernels import at_least_fp32, unit
from setformer_dist.ops.set import reference as set_reference
from setformer_dist.ops.set import triton as set_triton
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The widest dtype that the kernels have; on a GPU, its products are sums of three of TF32.
WIDE = torch.float32 if DEVICE == "cuda" else torch.float64
# Largest error relative to the largest number, against the reference; and between two ways to the same number.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}[WIDE]
# Interpreting is slow: small heads are enough, as no program sees more than one.
HEADS = 2


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fill what is allocated with NaN; return the sizes."""
    sizes: list[int] = []
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            sizes.append(tensor.numel())
            tensor.fill_(torch.nan)
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    return sizes


def problem(
    epsilon: float = 0.1, sigma: float = 0.0, tau: float = 0.3, iterations: int = 3, renormalise: bool = True
) -> SetProblem:
    return SetProblem(epsilon, sigma, tau, iterations, renormalise=renormalise)


def inputs(
    n: int = 7, m: int = 9, d: int = 16, k: int = 0, sets: int = 2, axes: int = 2, masked: bool = False,
    b: int = 1, dtype: torch.dtype = WIDE,
) -> Inputs:  # fmt: skip
    generator = torch.Generator().manual_seed(n + 7 * m + 31 * d)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = at_least_fp32(torch.empty(0, dtype=dtype)).dtype  # references come in at least fp32
    references = [(0.3 * normal(HEADS, m, k or d)).to(wide) for _ in range(sets)]
    mask = None
    if masked:
        mask = torch.rand(b, n, generator=generator) < 0.7
        mask[:, n // 2] = True
    found = (
        normal(b, HEADS, n, d).to(dtype),
        (0.9 * unit(normal(b, HEADS, n, k))).to(dtype) if k else None,
        references[0],
        references[1] if sets == 2 else None,
        torch.rand(b, n, axes, generator=generator) if axes else None,
        torch.rand(m, axes, generator=generator) if axes else None,
        mask,
    )
    return Inputs(*(None if t is None else t.to(DEVICE) for t in found))


def gradient_of(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE, x.dtype)


def by_triton(given: Inputs, p: SetProblem, dy: torch.Tensor, splits: int | None) -> tuple[torch.Tensor, Gradients]:
    assert set_triton.why_not(given, p) is None
    y, kept = set_triton.forward(given, p, splits)
    assert kept.shape == set_triton.kept_shape(given, p)
    return y, set_triton.backward(dy, given, kept, p, splits)


def by_reference(given: Inputs, p: SetProblem, dy: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return y and gradients in fp64, with 0 at masked tokens."""
    tensors = (given.x_bhnd, given.features_bhnk, given.gather_hmk, given.scatter_hmk)
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    y = set_reference.forward(Inputs(*leaves, given.positions_bna, given.places_ma, given.mask_bn), p)
    if given.mask_bn is not None:
        y = y.masked_fill(~given.mask_bn[:, None, :, None], 0.0)
    y.backward(dy.double())
    return y.detach(), [None if t is None else t.grad for t in leaves]


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, at_least: float = 0.0) -> None:
    bound = tolerance * max(float(expected.abs().max()), at_least)
    assert float((found.double() - expected).abs().max()) <= bound  # NaN fails, too


def assert_same(given: Inputs, p: SetProblem, splits: int | None = 1, tolerance: float | None = None) -> None:
    dtype = given.x_bhnd.dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    dy = gradient_of(given.x_bhnd)
    y, gradients = by_triton(given, p, dy, splits)
    expected_y, expected = by_reference(given, p, dy)
    assert y.dtype == gradients.x.dtype == dtype
    assert gradients.gather.dtype == given.gather_hmk.dtype
    assert_near(y, expected_y, tolerance)
    found = (gradients.x, gradients.features, gradients.gather, gradients.scatter)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            # Where every exact gradient is zero (n or m = 1), rounding is measured against that of y, over epsilon.
            assert_near(one, other, tolerance, at_least=0.1 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(
    ("n", "m", "d", "splits"),
    [
        *((1, 1, 16, 1), (1, 9, 24, 2), (7, 1, 8, 1), (7, 49, 24, 1), (40, 9, 64, 4), (33, 9, 7, None)),
        # More splits than references, most without a token; more than a tile of both.
        *(pytest.param(*size, marks=pytest.mark.drill) for size in ((60, 9, 16, 32), (197, 49, 32, 2))),
    ],
)
def test_any_sizes(n: int, m: int, d: int, splits: int | None) -> None:
    assert_same(inputs(n, m, d, masked=n > 1), problem(), splits)


OPTIONS = list(itertools.product((1, 2), (0, 1, 2), (True, False)))
# Half of them, with every value of every option, is what `make test` can afford in the interpreter.
HALVES = [pytest.param(*option, marks=[pytest.mark.drill] if sum(option) % 2 else []) for option in OPTIONS]


def of_options(n: int, sets: int, axes: int, renormalise: bool, most: int = 1) -> tuple[int, Inputs, SetProblem]:
    """Return the place among the options, and inputs of `most` images at most and numbers that vary with it."""
    index = OPTIONS.index((sets, axes, renormalise))
    p = problem(
        epsilon=(0.1, 0.01, 0.5)[index % 3], sigma=(0.0, 0.6)[index // 2 % 2], iterations=1 + index % 4,
        renormalise=renormalise,
    )  # fmt: skip
    images = 1 + index % most
    return index, inputs(n, k=(0, 11)[index // 3 % 2], sets=sets, axes=axes, masked=index % 4 == 0, b=images), p


@pytest.mark.parametrize(("sets", "axes", "renormalise"), HALVES)
def test_any_options(sets: int, axes: int, renormalise: bool) -> None:
    index, given, p = of_options(20, sets, axes, renormalise)
    assert_same(given, p, splits=1 + index % 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.0, pytest.param(0.6, marks=pytest.mark.drill)])
def test_narrow_dtypes(dtype: torch.dtype, sigma: float) -> None:
    assert_same(inputs(n=50, m=9, d=24, masked=True, dtype=dtype), problem(sigma=sigma), splits=2)


def test_small_epsilon_in_fp32_and_bf16() -> None:
    # exp(100) is far beyond fp32: only logarithms carry this. An exponent is off by 2^-9 / epsilon at most in bf16.
    assert_same(inputs(n=40, dtype=torch.float32), problem(epsilon=0.01), tolerance=2e-4)
    assert_same(inputs(n=40, dtype=torch.bfloat16), problem(epsilon=0.01), tolerance=0.2)


@pytest.mark.drill
def test_many_images_with_positions_of_their_own_and_any_layout() -> None:
    given = inputs(n=18, b=3, k=5, masked=True)
    x = given.x_bhnd.transpose(1, 2).contiguous().transpose(1, 2)
    features = given.features_bhnk
    assert features is not None
    odd = Inputs(x, features.mT.contiguous().mT, *given[2:])
    assert_same(odd, problem(), splits=2)
    assert set_triton.forward(odd, problem())[0].stride() == x.stride()
    whole = torch.ones((), dtype=x.dtype, device=DEVICE).expand(x.shape)
    _, found = by_triton(odd, problem(), whole, 1)
    assert_near(found.x, by_reference(odd, problem(), whole)[1][0], TOLERANCE[WIDE])  # type: ignore[arg-type]


@pytest.mark.parametrize("splits", [2, None])
def test_masked_tokens_are_never_read_and_an_image_may_have_no_others(splits: int | None) -> None:
    given = inputs(n=20, b=2, masked=True)
    assert given.mask_bn is not None
    assert given.positions_bna is not None
    expected, expected_gradients = by_triton(given, problem(), gradient_of(given.x_bhnd), splits)
    hidden = ~given.mask_bn[:, None, :, None]
    dirty = given._replace(
        x_bhnd=given.x_bhnd.masked_fill(hidden, torch.nan),
        positions_bna=given.positions_bna.masked_fill(~given.mask_bn[..., None], torch.nan),
    )
    dy = gradient_of(given.x_bhnd).masked_fill(hidden, torch.nan)
    y, gradients = by_triton(dirty, problem(), dy, splits)
    assert torch.equal(y, expected)
    assert torch.equal(gradients.x, expected_gradients.x)
    assert (gradients.x.masked_select(hidden) == 0).all()
    assert torch.equal(gradients.gather, expected_gradients.gather)


def test_channels_may_lie_far_apart() -> None:
    """Further than 2^31 numbers, in memory of which next to nothing is touched."""
    given = inputs(n=5, axes=0, dtype=torch.float16)
    shape, strides = given.x_bhnd.shape, (1, 1 << 12, 1, 150_000_000)
    far = torch.empty(0, dtype=torch.float16, device=DEVICE)
    far.set_(torch.UntypedStorage(2 * 16 * strides[-1], device=DEVICE), 0, shape, strides)
    far.copy_(given.x_bhnd)
    dy = gradient_of(given.x_bhnd)
    for splits in (1, None):
        expected, gradients = by_triton(given, problem(), dy, splits)
        y, others = by_triton(given._replace(x_bhnd=far), problem(), dy, splits)
        assert torch.equal(y, expected)
        assert torch.equal(others.x, gradients.x)


@pytest.mark.parametrize("p", [problem(), problem(epsilon=0.01, sigma=0.6, renormalise=False)])
def test_an_image_with_no_valid_token_gets_zeros_and_disturbs_no_other(p: SetProblem) -> None:
    given = inputs(n=20, b=2, sets=1, masked=True)
    assert given.mask_bn is not None
    assert given.positions_bna is not None
    dy = gradient_of(given.x_bhnd)
    second = Inputs(given.x_bhnd[1:], None, given.gather_hmk, None, given.positions_bna[1:], given.places_ma,
                    given.mask_bn[1:].clone())  # fmt: skip
    expected, expected_gradients = by_triton(second, p, dy[1:], 1)
    given.mask_bn[0] = False
    y, gradients = by_triton(given, p, dy, 1)
    assert (y[0] == 0).all()
    assert (gradients.x[0] == 0).all()
    assert torch.equal(y[1:], expected)
    assert torch.equal(gradients.x[1:], expected_gradients.x)
    assert torch.equal(gradients.gather, expected_gradients.gather)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e30), (torch.float16, 6e4), (torch.float32, 1e-30)])
def test_tokens_of_any_length(dtype: torch.dtype, size: float) -> None:
    given = inputs(n=20, axes=0, dtype=dtype)
    x = torch.where(given.x_bhnd < 0, -size, size).to(dtype)
    x[0, 1, :] = x[0, 1, :1].clone()
    if dtype != torch.float16:  # whose range the gradient 1 / 1e-6 of the unit vector of zero leaves
        x[0, 0, 3] = 0.0
    y, gradients = by_triton(Inputs(x, *given[1:]), problem(0.01), gradient_of(x), 1)
    torch.testing.assert_close(y[0, 1], x[0, 1], rtol=0.02, atol=0)  # tokens all alike come back
    assert float(y.double().abs().max()) <= 1.02 * float(x.double().abs().max())  # rows of weights sum to 1
    assert gradients.x.isfinite().all()
    assert gradients.gather.isfinite().all()


def test_a_narrow_filter_on_a_coarse_grid_does_not_vanish() -> None:
    given = inputs(n=30, m=4, dtype=torch.float32)
    ones = Inputs(torch.full_like(given.x_bhnd, 0.7), *given[1:])
    y, gradients = by_triton(ones, problem(tau=0.01), gradient_of(given.x_bhnd), 2)
    torch.testing.assert_close(y, ones.x_bhnd, atol=1e-4, rtol=0)
    assert gradients.x.isfinite().all()


@pytest.mark.parametrize("epsilon", [0.05, 0.04])  # the last one that is added up as weights, and logarithms
def test_a_reference_far_from_all_tokens_gets_its_share(epsilon: float) -> None:
    given = inputs(n=20, axes=0, sets=1, dtype=torch.float32)
    x = given.gather_hmk[None, :, :1] + 0.01 * given.x_bhnd  # around the first reference
    references = given.gather_hmk.clone()
    references[:, 1] = -references[:, 0]
    assert_same(Inputs(x, None, references, *given[3:]), problem(epsilon), splits=2, tolerance=2e-4)


@pytest.mark.drill
def test_splits_change_rounding_only_and_repeats_change_nothing() -> None:
    given, p = inputs(n=70, m=33, sets=1), problem(iterations=2)
    dy = gradient_of(given.x_bhnd)
    y, gradients = by_triton(given, p, dy, 1)
    other, others = by_triton(given, p, dy, 8)  # 5 tiles: three splits have nothing to do
    assert_near(other, y, ROUNDING)
    assert_near(others.x, gradients.x, ROUNDING)
    assert_near(others.gather, gradients.gather, ROUNDING)
    again, agains = by_triton(given, p, dy, 8)
    assert torch.equal(again, other)
    assert torch.equal(agains.x, others.x)
    assert torch.equal(agains.gather, others.gather)


@pytest.mark.drill
def test_waiting_and_a_launch_for_each_phase_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given, dy = inputs(n=70, m=33), gradient_of(inputs(n=70, m=33).x_bhnd)
    y, gradients = by_triton(given, problem(), dy, 4)
    monkeypatch.setattr(set_triton, "_may_wait", lambda device, splits: False)  # true on a GPU
    other, others = by_triton(given, problem(), dy, 4)
    assert torch.equal(other, y)
    assert torch.equal(others.x, gradients.x)
    assert torch.equal(others.gather, gradients.gather)


@pytest.mark.drill
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_is_computed_alike_whatever_shares_its_batch(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_triton, "RUN", 32)
    monkeypatch.setattr(set_triton, "TILE_BYTES", 1024)
    three = inputs(n=150, m=9, masked=masked, b=3, dtype=torch.float32)
    assert set_triton._splits(three) == 4
    dy = gradient_of(three.x_bhnd)
    y, gradients = by_triton(three, problem(), dy, None)
    for image in range(3):
        own = slice(image, image + 1)
        assert three.positions_bna is not None
        mask = None if three.mask_bn is None else three.mask_bn[own]
        places = (three.positions_bna[own], three.places_ma)
        alone = Inputs(three.x_bhnd[own], None, three.gather_hmk, three.scatter_hmk, *places, mask)
        one, its = by_triton(alone, problem(), dy[own], None)
        assert torch.equal(one, y[own])
        assert torch.equal(its.x, gradients.x[own])


# The kernels for few tokens, which no number of splits asks for.


def assert_short(given: Inputs, p: SetProblem, tolerance: float | None = None) -> None:
    assert set_triton._is_short(given, p, None)
    assert_same(given, p, None, tolerance)


@pytest.mark.parametrize(("sets", "axes", "renormalise"), HALVES)
def test_few_tokens_with_any_options(sets: int, axes: int, renormalise: bool) -> None:
    assert_short(inputs(n=49, m=25, d=32, sets=sets, axes=axes), problem(renormalise=renormalise))


@pytest.mark.parametrize("masked", [False, True])
def test_as_many_tokens_as_fit(masked: bool) -> None:
    dtype = WIDE if DEVICE == "cpu" else torch.bfloat16
    assert_short(inputs(n=196, m=25, d=32, masked=masked, b=2, dtype=dtype), problem(renormalise=not masked))
    assert set_triton._is_short(inputs(n=256, m=25, d=32, dtype=torch.bfloat16), problem(), None)
    assert not set_triton._is_short(inputs(n=257, m=25, d=32, dtype=torch.bfloat16), problem(), None)
    assert not set_triton._is_short(inputs(n=129, m=25, d=32, dtype=torch.float32), problem(), None)
    assert not set_triton._is_short(inputs(), problem(0.01), None)


@pytest.mark.parametrize("size", [(1, 1, 16, 0), (1, 9, 24, 0), (7, 1, 8, 0), (33, 9, 7, 5), (60, 49, 24, 31)])
def test_few_tokens_of_any_sizes(size: tuple[int, int, int, int]) -> None:
    n, m, d, k = size
    assert_short(inputs(n, m, d, k), problem(sigma=0.6, iterations=1 + n % 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_few_tokens_in_narrow_dtypes(dtype: torch.dtype) -> None:
    assert_short(inputs(n=49, m=25, d=32, dtype=dtype, masked=True, b=2), problem())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e18), (torch.float32, 1e-18), (torch.float16, 6e4)])
def test_few_tokens_of_any_length(dtype: torch.dtype, size: float) -> None:
    given = inputs(n=9, m=9, dtype=dtype)
    x = given.x_bhnd.double()
    scaled = (x / x.abs().amax() * size).to(dtype)
    y, _ = set_triton.forward(given._replace(x_bhnd=scaled), problem())
    wide = [None if t is None else t.double() for t in given._replace(x_bhnd=scaled)[:4]]
    expected = set_reference.forward(Inputs(*wide, given.positions_bna, given.places_ma, None), problem())
    assert_near(y, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("renormalise", [False, True])
def test_either_backward_takes_what_either_forward_kept(renormalise: bool) -> None:
    given, p = inputs(n=33, m=9, masked=True, b=2), problem(renormalise=renormalise)
    dy = gradient_of(given.x_bhnd)
    found = []
    for forth, back in ((None, 1), (1, None), (None, None)):
        y, kept = set_triton.forward(given, p, forth)
        found.append((y, *set_triton.backward(dy, given, kept, p, back)))
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert (one is None) == (another is None)
            if one is not None and another is not None:
                assert_near(one, another, ROUNDING)


def test_an_image_of_few_tokens_is_computed_alike_whatever_shares_its_batch() -> None:
    three = inputs(n=49, m=9, masked=True, b=3, dtype=torch.float32)
    assert three.mask_bn is not None
    three.mask_bn[1] = False  # one has none that is valid
    dy = gradient_of(three.x_bhnd)
    y, gradients = by_triton(three, problem(), dy, None)
    assert not y[1].any()
    assert not gradients.x[1].any()
    assert three.positions_bna is not None
    for image in (0, 2):
        own = slice(image, image + 1)
        places = (three.positions_bna[own], three.places_ma)
        alone = Inputs(three.x_bhnd[own], None, three.gather_hmk, three.scatter_hmk, *places, three.mask_bn[own])
        one, its = by_triton(alone, problem(), dy[own], None)
        assert torch.equal(one, y[own])
        assert torch.equal(its.x, gradients.x[own])


def test_few_tokens_need_no_other_buffers(buffers: list[int]) -> None:
    given = inputs(n=49, m=25, d=32, dtype=torch.float32)
    buffers.clear()
    by_triton(given, problem(), gradient_of(given.x_bhnd), None)
    x, units, references = given.x_bhnd.numel(), 2 * HEADS * 32 * 32, given.gather_hmk.numel()
    kept = set_triton.kept_shape(given, problem())[0]
    assert sorted(buffers) == sorted([x, kept, x, units, references, references])


def test_nothing_of_the_size_of_the_plan_is_allocated(buffers: list[int]) -> None:
    given = inputs(n=300, m=49, d=16, sets=1, dtype=torch.bfloat16)
    buffers.clear()
    by_triton(given, problem(iterations=1), gradient_of(given.x_bhnd), 1)
    assert max(buffers) == given.x_bhnd.numel()


@pytest.mark.parametrize("sets", [1, 2])
def test_three_launches_and_no_other_kernel(sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # buffers are not to be filled
    monkeypatch.setattr(set_triton, "_may_wait", lambda device, splits: True)  # as on a GPU
    launched: list[str] = []
    for name in ("forward", "backward", "references_backward"):
        monkeypatch.setattr(set_triton.kernels, name, Unlaunched(name, launched))
    given = inputs(sets=sets, dtype=torch.float32)
    dy = gradient_of(given.x_bhnd)
    with Computing() as seen:
        _, kept = set_triton.forward(given, problem(), 1)
        set_triton.backward(dy, given, kept, problem(), 1)
    assert launched == ["forward", "backward", "references_backward"]
    assert seen.names <= {"aten.empty", "aten.empty_like", "aten.slice", "aten.promote_types"}


class Unlaunched:
    """A kernel that notes its launches instead."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self._note = lambda *args, **options: launched.append(name)

    def __getitem__(self, grid: object) -> Any:
        return self._note


class Computing(TorchDispatchMode):
    """Notes PyTorch's operators: what is not a view or an empty tensor is a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).rsplit(".", 1)[0])
        return func(*args, **(kwargs or {}))


def test_a_reference_without_a_length() -> None:
    given = inputs()
    given.gather_hmk[1, 3] = 0.0
    given.gather_hmk[0, 2] *= 1e-7  # divided by 1e-6, not by its length
    assert_same(given, problem(), tolerance=max(TOLERANCE[WIDE], 1e-8))  # the least length is a number of fp32


def test_references_of_two_dtypes_get_gradients_of_theirs() -> None:
    given = inputs(dtype=torch.float32)
    assert given.scatter_hmk is not None
    narrow = given._replace(gather_hmk=given.gather_hmk.bfloat16())
    wide = narrow._replace(gather_hmk=narrow.gather_hmk.float())
    dy = gradient_of(given.x_bhnd)
    y, gradients = by_triton(narrow, problem(), dy, 1)
    expected, others = by_triton(wide, problem(), dy, 1)
    assert torch.equal(y, expected)
    assert gradients.gather.dtype == torch.bfloat16
    assert torch.equal(gradients.gather, others.gather.bfloat16())
    assert gradients.scatter is not None
    assert others.scatter is not None
    assert torch.equal(gradients.scatter, others.scatter)


def test_a_program_of_some_references_and_one_of_all_add_up_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(m=9, b=3)
    dy = gradient_of(given.x_bhnd)
    _, gradients = by_triton(given, problem(), dy, 2)
    monkeypatch.setattr(set_triton, "_rows_of_program", lambda spec: 2)  # one on a GPU
    monkeypatch.setattr(set_triton, "PART_NUMBERS", 64)  # several turns, the last one not full
    _, others = by_triton(given, problem(), dy, 2)
    assert_near(others.gather, gradients.gather, 1e-12)
    assert gradients.scatter is not None
    assert others.scatter is not None
    assert_near(others.scatter, gradients.scatter, 1e-12)


def test_what_the_kernels_cannot_do_is_said() -> None:
    given = inputs()
    assert "implicit" in str(set_triton.why_not(given, SetProblem(0.1, 0.0, 1.0, 3, implicit=True)))
    assert "16384" in str(set_triton.why_not(inputs(m=200, d=65), problem()))
    # A product of fp32 has operands twice as large, and GPUs for desktops have less room.
    assert "take 32768 bytes" in str(set_triton.why_not(inputs(m=49, d=64, dtype=torch.float32), problem()))
    assert set_triton.why_not(inputs(m=49, d=32, dtype=torch.float32), problem()) is None or DEVICE == "cuda"
    whole = Inputs(given.x_bhnd.long(), *given[1:])
    assert "int64" in str(set_triton.why_not(whole, problem()))


@pytest.mark.parametrize(("kib", "expected"), [(227, 16384), (163, 16384), (99, 10137), (64, 6553)])
def test_a_set_takes_no_more_than_the_device_has(kib: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert set_triton._set_limit(torch.device("cuda")) == expected


@pytest.mark.parametrize(("m", "d", "k"), [(49, 32, 0), (16, 512, 0), (9, 256, 0), (16, 16, 512), (200, 16, 0)])
def test_no_operand_of_a_tile_is_larger_than_a_tile_may_be(m: int, d: int, k: int) -> None:
    block = set_triton._block(inputs(n=200, m=m, d=d, k=k, dtype=torch.bfloat16))
    widest = max(set_triton._padded(size) for size in (m, d, k or d))
    assert block == 16 or block * widest * 2 <= set_triton.TILE_BYTES


def test_a_precision_of_products_may_be_set_for_one_backend() -> None:
    given, before = inputs(n=5, dtype=torch.float32), torch.backends.cuda.matmul.fp32_precision
    assert set_triton._spec(given, problem(), 1).PRECISION == "tf32x3"
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # after which torch.get_float32_matmul_precision raises
    try:
        assert set_triton._spec(given, problem(), 1).PRECISION == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
