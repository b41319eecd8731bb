"""SeT attention of an image on several ranks equals that of one rank, and exchanges what the formula says."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import log_filter
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import split_common, split_cpp
from setformer_dist.ops.set.attention import SetAttentionConfig, problem_of, set_attention
from setformer_dist.ops.set.split import traffic
from setformer_dist.testing.threads import ThreadCollectives, ThreadParts, run_on_threads

CASES = [
    {"position_filter": nearness, "reference_sets": sets, "renormalise": renormalise, "gradient": gradient}
    for nearness, sets, renormalise, gradient in itertools.product(
        ["none", "linear", "separable"], [1, 2], [True, False], ["exact", "implicit"]
    )
]
IMPLEMENTED = list(itertools.product(["torch", "cpp"], CASES))
KERNELS = [{"kernel": "gaussian"}, {"kernel": "nystrom", "anchors": 5}]


def name_of(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


def operands(config: SetAttentionConfig, n: int, b=2, h=3, d=6, dtype=torch.float64):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(n))
    k, m = config.anchors or d, config.references_of(0)
    tensors = {
        "x_bhnd": draw(b, n, h, d).to(dtype).transpose(1, 2),
        "references_hmd": draw(h, m, k).to(dtype),
        "return_references_hmd": draw(h, m, k).to(dtype) if config.reference_sets == 2 else None,
        "anchors_hkd": draw(h, k, d).to(dtype) if config.kernel == "nystrom" else None,
    }
    upstream = draw(b, h, n, k).to(dtype)
    return {name: t for name, t in tensors.items() if t is not None}, upstream


def unsplit(config: SetAttentionConfig, tensors, upstream, **extra):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y = set_attention(config=config, **leaves, **extra)
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True))


def split(config: SetAttentionConfig, tensors, upstream, parts: int, by: tuple[str, ...] = ("auto",), **extra):
    """Return output and gradients put together from all parts, and the group of the first.

    `by`: implementations, one rank after the other and again from the first.
    """

    def one(comm: ThreadCollectives):
        rows = Rows(ThreadParts(comm))
        own = rows.own(upstream.shape[2])
        leaves = {
            name: (t[:, :, own] if name == "x_bhnd" else t).clone().requires_grad_() for name, t in tensors.items()
        }
        own_config = config.model_copy(update={"implementation": by[rows.index % len(by)]})
        y = set_attention(config=own_config, rows=rows, **leaves, **extra)
        sent = rows.messages, rows.bytes
        grads = torch.autograd.grad(y, list(leaves.values()), upstream[:, :, own])
        return y.detach(), dict(zip(leaves, grads, strict=True)), sent, (rows.messages - sent[0], rows.bytes - sent[1])

    found = run_on_threads(parts, one)
    y = torch.cat([part[0] for part in found], 2)
    grads = {name: sum(part[1][name] for part in found) for name in tensors if name != "x_bhnd"}
    grads["x_bhnd"] = torch.cat([part[1]["x_bhnd"] for part in found], 2)
    return (y, grads), found[0][2], found[0][3]


def assert_same(found, wanted, tolerance: float) -> None:
    for name, value in {"output": found[0], **found[1]}.items():
        expected = wanted[0] if name == "output" else wanted[1][name]
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((value - expected).abs().max()) / scale < tolerance, name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("how", "case"),
    itertools.product(["torch", "cpp"], [*CASES, *KERNELS]),
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_parts_equal_the_whole(how, case, masked):
    config = SetAttentionConfig(references=9, tau=0.1, **case)
    n, grid = 48, (12, 4)
    tensors, upstream = operands(config, n)
    mask = None
    if (
        masked
    ):  # an image whose upper half is hidden, so that whole parts have no valid token, and one hidden everywhere
        mask = torch.rand(2, n, generator=torch.Generator().manual_seed(5)) > 0.3
        mask[0, : n // 2] = False
        mask[1] = mask[1] if case.get("reference_sets") == 2 else False
    wanted = unsplit(config.model_copy(update={"implementation": "torch"}), tensors, upstream, grid=grid, mask_bn=mask)
    for parts in (1, 2, 3, 4):
        found, _, _ = split(config, tensors, upstream, parts, (how,), grid=grid, mask_bn=mask)
        assert_same(found, wanted, 1e-12)


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize(
    ("how", "case"),
    IMPLEMENTED[::2] + IMPLEMENTED[1::6],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_messages_and_bytes_are_those_of_the_formula_whatever_n(how, case, rounds):
    config = SetAttentionConfig(references=4, iterations=rounds, **case)
    b, h, d = 2, 3, 6
    expected = traffic(problem_of(config), config.reference_sets, 4, d)
    for grid in ((8, 2), (16, 4)):
        tensors, upstream = operands(config, grid[0] * grid[1])
        _, forward, backward = split(config, tensors, upstream, 2, (how,), grid=grid)
        assert forward == (expected.forward_messages, 8 * b * h * expected.forward)
        assert backward == (expected.backward_messages, 8 * b * h * expected.backward)
    assert expected.forward_messages == rounds
    assert expected.backward_messages == (rounds if case["gradient"] == "exact" else 2)


def test_the_shipped_form_sends_what_the_facts_say():
    """Two sets, renormalised, exact: m (2 (L - 1) + d + 2) numbers forward, m (2 (L - 1) + d + 1) backward."""
    found = traffic(problem_of(SetAttentionConfig()), 2, 49, 32)
    assert (found.forward, found.backward) == (49 * (8 + 34), 49 * (8 + 33))


@pytest.mark.parametrize("how", ["torch", "cpp"])
@pytest.mark.parametrize("gradient", ["exact", "implicit"])
@pytest.mark.parametrize("features", ["similarity", "nystrom"])
def test_fp32_and_bf16_parts_agree_with_the_whole_to_their_rounding(how, features, gradient):
    config = SetAttentionConfig(references=9, kernel=features, gradient=gradient)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        tensors, upstream = operands(config, 64, dtype=dtype)
        wanted = unsplit(config, tensors, upstream, grid=(16, 4))
        found, _, _ = split(config, tensors, upstream, 2, (how,), grid=(16, 4))
        assert found[0].dtype == dtype
        assert_same(found, wanted, tolerance)


@pytest.mark.parametrize("how", ["torch", "cpp"])
def test_the_same_parts_give_the_same_bits(how):
    config = SetAttentionConfig(references=9)
    tensors, upstream = operands(config, 48, dtype=torch.float32)
    one, two = (split(config, tensors, upstream, 3, (how,), grid=(12, 4))[0] for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[1][name], two[1][name]) for name in tensors)


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
@pytest.mark.parametrize("case", [{"reference_sets": 1}, {"reference_sets": 2}, {"renormalise": False}], ids=name_of)
def test_ranks_of_a_group_may_differ_in_their_implementation(case, gradient):
    config = SetAttentionConfig(references=9, gradient=gradient, **case)
    tensors, upstream = operands(config, 48)
    wanted = unsplit(config, tensors, upstream, grid=(12, 4))
    found, _, _ = split(config, tensors, upstream, 3, ("cpp", "torch"), grid=(12, 4))
    assert_same(found, wanted, 1e-12)


@pytest.mark.parametrize("case", CASES[::2] + CASES[1::6], ids=name_of)
def test_kernel_matrices_that_are_kept_change_no_bit(case, monkeypatch):
    """With memory for none, some and all of them."""
    config = SetAttentionConfig(references=9, **case)
    tensors, upstream = operands(config, 44, dtype=torch.float32)
    one = config.reference_sets * 32 * 16 * 4  # of a head: 22 tokens and 9 references, padded
    found = []
    for heads in (0, 4, 6):
        monkeypatch.setattr(split_cpp, "KEPT_BYTES", heads * one)
        found.append(split(config, tensors, upstream, 2, ("cpp",), grid=(11, 4))[0])
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert all(torch.equal(other[1][name], found[0][1][name]) for name in tensors)


def test_more_tokens_than_a_tile_and_parts_that_begin_within_a_row():
    """A row of the grid lies on two ranks, references and channels fill no vector, and fp16 works in fp32."""
    config = SetAttentionConfig(references=25, tau=0.1)
    tensors, upstream = operands(config, 9 * 34, d=19)
    wanted = unsplit(config, tensors, upstream, grid=(9, 34))
    found, _, _ = split(config, tensors, upstream, 2, ("cpp",), grid=(9, 34))
    assert_same(found, wanted, 1e-12)
    small = {name: t.half() if name == "x_bhnd" else t.float() for name, t in tensors.items()}
    found, _, _ = split(config, small, upstream.half(), 2, ("cpp",), grid=(9, 34))
    assert_same(found, wanted, 1e-2)


def test_cpp_that_cannot_is_refused_and_left_to_pytorch(monkeypatch):
    monkeypatch.setenv("SETFORMER_NO_CPP", "1")
    config = SetAttentionConfig(references=4)
    tensors, upstream = operands(config, 16)
    with pytest.raises(ConfigError, match="implementation = 'cpp' cannot compute this: SETFORMER_NO_CPP is set"):
        split(config, tensors, upstream, 1, ("cpp",), grid=(4, 4))
    split(config, tensors, upstream, 1, grid=(4, 4))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"tolerance": 1e-3, "gradient": "implicit"}, "tolerance = 0.001 stops rounds"),
        ({"epsilon": 0.001}, "epsilon = 0.001 is below 0.01"),
    ],
)
def test_what_the_split_form_cannot_compute_is_refused(choice, words):
    config = SetAttentionConfig(references=4, **choice)
    tensors, upstream = operands(config, 16)
    with pytest.raises(ConfigError, match=words):
        split(config, tensors, upstream, 1, grid=(4, 4))


def test_grid_and_mask_are_of_the_whole_image():
    config = SetAttentionConfig(references=4)
    tensors, upstream = operands(config, 16)
    with pytest.raises(ConfigError, match="2 parts like x have n = 16"):
        split(config, tensors, upstream, 2, grid=(2, 4))
    with pytest.raises(ConfigError, match=r"expected \(2, 16\)"):
        split(config, tensors, upstream, 2, grid=(4, 4), mask_bn=torch.ones(2, 8, dtype=torch.bool))


def test_what_is_kept_of_places_goes_with_them() -> None:
    positions, places = torch.rand(1, 100, 2), torch.rand(9, 2)
    held = len(split_common._found)
    with torch.inference_mode():
        found = split_common._kept_nearest(positions, places, 0.25, torch.float32)
    assert split_common._kept_nearest(positions, places, 0.25, torch.float32) is found
    assert split_common._kept_nearest(positions, places, 0.5, torch.float32) is not found
    assert not found.is_inference()
    assert torch.equal(found, log_filter(positions, places, 0.25).amax(-2, keepdim=True))
    assert len(split_common._found) == held + 1
    del positions
    assert len(split_common._found) == held
