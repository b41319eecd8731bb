"""The Triton kernels of the split form against PyTorch's; run by test_set_triton.py in a process of its own.

Ranks are threads, of which one computes at a time: Triton's interpreter is made for one. Every buffer starts as NaN, so
a number that no kernel wrote is seen.
"""

from __future__ import annotations

import itertools
import threading
from types import ModuleType

import pytest
import torch

from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import split_triton
from setformer_dist.ops.set import triton as set_triton
from setformer_dist.ops.set.problem import Gradients, Inputs, SetProblem
from setformer_dist.ops.set.split import traffic
from setformer_dist.ops.set.split_common import part_of
from setformer_dist.ops.sinkhorn import working_dtype
from setformer_dist.testing.threads import ThreadCollectives, ThreadParts, run_on_threads
from tests.numerics.set_triton_cases import (
    TOLERANCE,
    assert_near,
    buffers,
    by_reference,
    gradient_of,
    inputs,
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


OPTIONS = list(itertools.product((1, 2), (0, 1, 2), (True, False)))
# Half of them, with every value of every option, is what `make test` can afford in the interpreter.
HALVES = [pytest.param(*option, marks=[pytest.mark.drill] if sum(option) % 2 else []) for option in OPTIONS]


@pytest.mark.parametrize(("sets", "axes", "renormalise"), HALVES)
def test_parts_equal_the_whole(sets: int, axes: int, renormalise: bool) -> None:
    index = OPTIONS.index((sets, axes, renormalise))
    p = problem(
        epsilon=(0.1, 0.01, 0.5)[index % 3], sigma=(0.0, 0.6)[index // 2 % 2], iterations=1 + index % 4,
        renormalise=renormalise,
    )  # fmt: skip
    given = inputs(n=18, k=(0, 11)[index // 3 % 2], sets=sets, axes=axes, masked=index % 4 == 0, b=1 + index % 2)
    assert_same(given, p, parts=(2, 3, 1)[index % 3], splits=1 + index % 2)
