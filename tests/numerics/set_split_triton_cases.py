"""The Triton kernels of the split form against PyTorch's; run by test_set_triton.py in a process of its own.

Ranks are threads, of which one computes at a time: Triton's interpreter is made for one. Every buffer starts as NaN, so
a number that no kernel wrote is seen.
"""

from __future__ import annotations

import threading
from types import ModuleType

import pytest
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import split_torch, split_triton, triton_kernels, triton_split_kernels
from setformer_dist.ops.set import triton as set_triton
from setformer_dist.ops.set.attention import SetAttentionConfig, set_attention
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem
from setformer_dist.ops.set.split import _implementation, traffic
from setformer_dist.ops.set.split_common import part_of
from setformer_dist.ops.sinkhorn import working_dtype
from setformer_dist.testing.threads import ThreadCollectives, ThreadParts, run_on_threads
from tests.numerics.set_triton_cases import (
    DEVICE,
    HALVES,
    TOLERANCE,
    WIDE,
    assert_near,
    buffers,
    by_reference,
    gradient_of,
    inputs,
    of_options,
    problem,
)

__all__ = ["buffers"]  # for pytest

COMPUTING = threading.Lock()
Found = tuple[torch.Tensor, Gradients]


class OneAtATime(ThreadParts):
    """A part whose thread holds the lock but while it waits for the others."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        COMPUTING.release()
        try:
            return super().sum(values)
        finally:
            COMPUTING.acquire()


def one_of(
    given: Inputs, p: SetProblem, dy: torch.Tensor, splits: int | None, how: ModuleType, comm: ThreadCollectives
) -> tuple[torch.Tensor, Gradients, tuple[int, int], tuple[int, int]]:
    """Return output, gradients and group of one rank."""
    rows = Rows(OneAtATime(comm))
    own = rows.own(given.x_bhnd.shape[2])
    features = None if given.features_bhnk is None else given.features_bhnk[:, :, own]
    part, whole = part_of(given._replace(x_bhnd=given.x_bhnd[:, :, own], features_bhnk=features), p, rows)
    dtype = working_dtype(given.x_bhnd.dtype, p.epsilon)
    assert dtype is not None
    more = {"splits": splits} if how is split_triton else {}
    with COMPUTING:
        y, kept = how.forward(part, whole, p, rows, dtype, **more)
        sent = rows.messages, rows.bytes
        found = how.backward(dy[:, :, own], part, whole, kept, p, rows, dtype, **more)
    return y, found, sent, (rows.messages - sent[0], rows.bytes - sent[1])


def by_parts(
    given: Inputs, p: SetProblem, dy: torch.Tensor, parts: int, splits: int | None = 1, by: tuple[ModuleType, ...] = ()
) -> tuple[torch.Tensor, Gradients]:
    """Return output and gradients put together; messages and bytes must be those of the formula."""
    assert set_triton.why_not(given, p) is None
    ways = by or (split_triton,)
    found = run_on_threads(
        parts, lambda comm: one_of(given, p, dy, splits, ways[comm.ranks.rank % len(ways)], comm), timeout_s=400
    )
    b, h, _, d = given.x_bhnd.shape
    expected = traffic(p, 1 if given.scatter_hmk is None else 2, given.gather_hmk.shape[1], d)
    dtype = working_dtype(given.x_bhnd.dtype, p.epsilon)
    assert dtype is not None
    for _, _, forward, backward in found:
        assert forward == (expected.forward_messages, dtype.itemsize * b * h * expected.forward)
        assert backward == (expected.backward_messages, dtype.itemsize * b * h * expected.backward)
    grads = [f[1] for f in found]
    features, scatter = ([getattr(g, name) for g in grads] for name in ("features", "scatter"))
    return torch.cat([f[0] for f in found], 2), Gradients(
        torch.cat([g.x for g in grads], 2),
        None if features[0] is None else torch.cat(features, 2),
        torch.stack([g.gather for g in grads]).sum(0),
        None if scatter[0] is None else torch.stack(scatter).sum(0),
    )


def assert_same(
    given: Inputs,
    p: SetProblem,
    parts: int,
    splits: int | None = 1,
    by: tuple[ModuleType, ...] = (),
    tolerance: float | None = None,
) -> None:
    dtype = given.x_bhnd.dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    dy = gradient_of(given.x_bhnd)
    y, gradients = by_parts(given, p, dy, parts, splits, by)
    expected_y, expected = by_reference(given, p, dy)
    assert y.dtype == gradients.x.dtype == dtype
    if given.mask_bn is not None:  # attention.py hides what is there
        y = y.masked_fill(~given.mask_bn[:, None, :, None], 0.0)
    assert_near(y, expected_y, tolerance)
    found = (gradients.x, gradients.features, gradients.gather, gradients.scatter)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_near(one, other, tolerance, at_least=0.1 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(("sets", "axes", "renormalise"), HALVES)
def test_parts_equal_the_whole(sets: int, axes: int, renormalise: bool) -> None:
    index, given, p = of_options(18, sets, axes, renormalise, most=2)
    assert_same(given, p, parts=(2, 3, 1)[index % 3], splits=1 + index % 2)


@pytest.mark.parametrize(
    ("n", "m", "d", "parts", "splits"),
    [
        *((3, 1, 8, 3, 1), (2, 9, 16, 2, 1), (42, 25, 7, 3, 2)),
        # More splits than tiles and than references; more than a tile of both.
        *(pytest.param(*size, marks=pytest.mark.drill) for size in ((60, 9, 16, 2, 32), (198, 49, 24, 2, None))),
    ],
)
def test_any_sizes(n: int, m: int, d: int, parts: int, splits: int | None) -> None:
    assert_same(inputs(n, m, d), problem(iterations=2), parts, splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    assert_same(inputs(n=48, m=9, d=24, masked=True, dtype=dtype), problem(sigma=0.6), parts=2, splits=2)


def test_small_epsilon_in_fp32_sends_fp64() -> None:
    # exp(100) is far beyond fp32: logarithms carry it within a rank, fp64 between ranks.
    assert_same(inputs(n=40, dtype=torch.float32), problem(epsilon=0.01), parts=2, tolerance=2e-4)
    whole = inputs(n=40, sets=1, dtype=torch.float32)
    assert_same(whole, problem(epsilon=0.02, renormalise=False), parts=2, tolerance=2e-4)


def test_a_narrow_filter_does_not_vanish_far_from_a_part() -> None:
    given = inputs(n=30, m=4, dtype=torch.float32)
    assert given.positions_bna is not None
    order = given.positions_bna[0, :, 0].argsort()  # parts lie apart, so that a part is far from some references
    ones = Inputs(torch.full_like(given.x_bhnd, 0.7), *given[1:4], given.positions_bna[:, order], *given[5:])
    p = problem(tau=0.02)
    y, gradients = by_parts(ones, p, gradient_of(given.x_bhnd), 3)
    torch.testing.assert_close(y, ones.x_bhnd, atol=1e-4, rtol=0)
    assert gradients.x.isfinite().all()
    assert gradients.gather.isfinite().all()
    assert_same(given._replace(positions_bna=ones.positions_bna), p, parts=3, tolerance=2e-4)


def test_a_part_may_have_no_valid_token() -> None:
    given = inputs(n=12, b=2, masked=True)
    assert given.mask_bn is not None
    given.mask_bn[0, :6] = False  # the first of two parts of the first image
    given.mask_bn[1, 6:] = False
    assert_same(given, problem(iterations=2), parts=2)
    hidden = ~given.mask_bn[:, None, :, None]
    dirty = Inputs(given.x_bhnd.masked_fill(hidden, torch.nan), *given[1:])
    y, gradients = by_parts(dirty, problem(iterations=1), gradient_of(given.x_bhnd).masked_fill(hidden, torch.nan), 2)
    assert (y.masked_select(hidden) == 0).all()
    assert (gradients.x.masked_select(hidden) == 0).all()
    assert gradients.x.isfinite().all()
    assert gradients.gather.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"renormalise": False}, {"epsilon": 0.02}, {"iterations": 1}])
@pytest.mark.parametrize("sets", [1, 2])
def test_ranks_of_a_group_may_differ_in_their_implementation(sets: int, options: dict) -> None:
    given = inputs(n=18, sets=sets)
    assert_same(given, problem(**options), parts=2, by=(split_triton, split_torch))


@pytest.mark.drill
def test_the_same_parts_give_the_same_bits_and_each_phase_may_be_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    given, dy = inputs(n=60, dtype=torch.float32), gradient_of(inputs(n=60, dtype=torch.float32).x_bhnd)
    one, its = by_parts(given, problem(), dy, 2, 2)
    monkeypatch.setattr(set_triton, "_may_wait", lambda device, splits: False)  # true on a GPU
    for _ in range(2):
        two, others = by_parts(given, problem(), dy, 2, 2)
        assert torch.equal(one, two)
        for a, b in zip(its, others, strict=True):
            assert a is b is None or torch.equal(a, b)


MET: list[tuple[int, int]] = []


def _note(arrived, meetings) -> None:  # type: ignore[no-untyped-def]
    MET.append((int(arrived.handle.data.item()), int(meetings)))


@triton.jit  # type: ignore[untyped-decorator]
def _meet_and_note(data, group, meetings, spec):  # type: ignore[no-untyped-def]
    _note(tl.atomic_add(data.gate + 1 + group, 1) + 1, meetings)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_programs_that_wait_count_their_meetings_rightly(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one split none would wait; too high a number would wait for ever on a GPU, too low a one not at all."""
    if DEVICE == "cuda":
        return  # where the other cases wait
    spec_of = set_triton._spec
    monkeypatch.setattr(set_triton, "_spec", lambda *given: spec_of(*given)._replace(TOGETHER=True))
    for module in (triton_kernels, triton_split_kernels):
        monkeypatch.setattr(module, "_meet", _meet_and_note)
    MET.clear()
    assert_same(inputs(n=6), problem(iterations=iterations), parts=2)
    assert {1} <= {met for met, _ in MET} <= {1, 2}
    assert all(arrived == meeting for arrived, meeting in MET)


def test_nothing_of_the_size_of_the_plan_is_allocated(buffers: list[int]) -> None:
    given = inputs(n=400, m=49, d=16, sets=1, dtype=torch.bfloat16)
    buffers.clear()
    by_parts(given, problem(iterations=2), gradient_of(given.x_bhnd), 2)
    assert max(buffers) <= given.x_bhnd.numel()


def attention(config: SetAttentionConfig) -> list[torch.Tensor]:
    """Return output and gradients of the operator on the only rank of a group."""
    draw = torch.Generator().manual_seed(3)
    x, first, second = (
        torch.randn(shape, generator=draw, dtype=WIDE).to(DEVICE).requires_grad_()
        for shape in ((1, 2, 16, 8), (2, 4, 8), (2, 4, 8))
    )

    def one(comm: ThreadCollectives) -> list[torch.Tensor]:
        y = set_attention(x, first, config, return_references_hmd=second, grid=(4, 4), rows=Rows(ThreadParts(comm)))
        return [y.detach(), *torch.autograd.grad(y, (x, first, second), gradient_of(y))]

    return run_on_threads(1, one)[0]


def test_the_operator_takes_the_kernels() -> None:
    taken = {"auto": "cpp" if DEVICE == "cpu" else "triton", "torch": "torch", "triton": "triton"}
    for wanted, name in taken.items():
        assert _implementation(inputs(n=4), problem(), wanted).__name__.endswith(f"split_{name}")
    found, expected = (attention(SetAttentionConfig(references=4, implementation=how)) for how in ("triton", "torch"))
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, TOLERANCE[WIDE])


def test_what_the_kernels_cannot_do_is_said() -> None:
    config = SetAttentionConfig(references=4, gradient="implicit", implementation="triton")
    with pytest.raises(ConfigError, match="implementation = 'triton' cannot compute this: its gradient is that of the"):
        attention(config)
