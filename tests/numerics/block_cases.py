"""Both sides of a block's attention against PyTorch's operators; run by test_block.py in a process of its own.

Every buffer starts as NaN, so a number that no kernel wrote is seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.models.layers import Mlp, scale_branch
from setformer_dist.models.recompute import MadeAgain
from setformer_dist.ops import block
from setformer_dist.ops.block import Weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error relative to the largest number.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)
# Layer scale, drop path.
FLAGS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.requires_grad else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.isfinite(found).all()
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{error:.2e}"


def compared(
    ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], leaves: list[torch.Tensor | None]
) -> None:
    """Compare results and gradients with PyTorch's on the same numbers in fp64."""
    dtype = next(x.dtype for x in leaves if x is not None)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    y, expected = ours(*leaves), theirs(*wide)
    close(y, expected, TOLERANCE[dtype])
    dy = torch.randn_like(expected)
    dy = dy.to(dtype).double()
    found = torch.autograd.grad(y, [x for x in leaves if x is not None], dy.to(y.dtype))
    wanted = torch.autograd.grad(expected, [x for x in wide if x is not None], dy)
    for mine, other in zip(found, wanted, strict=True):
        close(mine, other, TOLERANCE[dtype])
        assert mine.dtype == dtype


def layers(channels: int, width: int, hidden: int, scaled: bool, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Return the norm that enters, and what leaves."""
    torch.manual_seed(channels)
    c = channels
    scales = [leaf(c, dtype=dtype) if scaled else None for _ in range(2)]
    vectors = [leaf(c, dtype=dtype) for _ in range(2)]
    matrices = [leaf(*shape, dtype=dtype) for shape in ((c, width), (hidden, c), (c, hidden))]
    biases = [leaf(n, dtype=dtype) for n in (c, hidden, c)]
    w = Weights(
        matrices[0], biases[0], scales[0], leaf(c, dtype=dtype), leaf(c, dtype=dtype), matrices[1], biases[1],
        matrices[2], biases[2], scales[1],
    )  # fmt: skip
    return [*vectors, *w]


def plainly(x, y, keep_2s, weight, shift, *weights):
    """Both parts by PyTorch's operators; attention multiplies what it gets by y."""
    w = Weights(*weights)
    c = x.shape[-1]
    y = y * F.layer_norm(x, (c,), weight, shift, 1e-5).repeat_interleave(y.shape[-1] // c, -1)
    branch = F.linear(y, w.output, w.output_bias)
    x = x + scale_branch(branch if w.scale1 is None else branch * w.scale1, keep_2s, 0)
    hidden = F.linear(F.layer_norm(x, (c,), w.norm, w.norm_bias, 1e-5), w.fc1, w.fc1_bias)
    branch = F.linear(F.gelu(hidden), w.fc2, w.fc2_bias)
    return x + scale_branch(branch if w.scale2 is None else branch * w.scale2, keep_2s, 1)


def by_parts(x, y, keep_2s, weight, shift, *weights):
    x, normed = block.enter(x, SimpleNamespace(weight=weight, bias=shift, eps=1e-5))
    y = y * normed.repeat_interleave(y.shape[-1] // x.shape[-1], -1)
    return block.leave(x, y, keep_2s, Weights(*weights), 1e-5)


SIZES = [(2, 7, 48, 1), (3, 5, 16, 2), (1, 1, 130, 1), (4, 90, 64, 1)]
CASES = [
    *((*SIZES[i], *flags, (torch.float64, torch.bfloat16)[i]) for i, flags in itertools.product((0, 1), FLAGS)),
    *((*size, True, True, dtype) for size, dtype in itertools.product(SIZES[2:], DTYPES)),
]


@pytest.mark.parametrize(("samples", "rows", "channels", "wider", "scaled", "dropped", "dtype"), CASES)
def test_both_parts(
    samples: int, rows: int, channels: int, wider: int, scaled: bool, dropped: bool, dtype: torch.dtype
) -> None:
    given = layers(channels, wider * channels, 72, scaled, dtype)
    x, y = (leaf(samples, rows, 1, c, dtype=dtype) for c in (channels, wider * channels))
    keep = torch.tensor([[0.0, 1.25, 1.25, 0.0], [2, 0, 2, 2]], device=DEVICE)[:, :samples] if dropped else None

    def ours(x, y, *given):
        return by_parts(x, y, keep, *given)

    def theirs(x, y, *given):
        return plainly(x, y, keep, *given)

    compared(ours, theirs, [x, y, *given])


def in_layouts(samples: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return x, y, factors and a gradient, each in an order in memory that is not its own."""
    wide = {"device": DEVICE, "dtype": torch.float64}
    factors = torch.tensor([[0.5, 2.0], [3.0, 0.0]], device=DEVICE)[:, :samples]
    return {
        "sliced": (
            torch.randn(samples, 4, 3, 48, **wide)[..., :24],
            torch.randn(samples, 4, 3, 48, **wide)[..., 24:],
            factors.repeat_interleave(3, 1)[:, ::3],
            torch.randn(samples, 4, 3, 48, **wide)[..., ::2],
        ),
        "permuted": (
            torch.randn(samples, 24, 4, 3, **wide).permute(0, 2, 3, 1),
            torch.randn(samples, 24, 4, 3, **wide).permute(0, 2, 3, 1),
            factors.t().contiguous().t(),
            torch.randn(samples, 24, 4, 3, **wide).permute(0, 2, 3, 1),
        ),
        "expanded": (
            torch.randn(1, 1, 1, 24, **wide).expand(samples, 4, 3, 24),
            torch.randn(1, 1, 3, 1, **wide).expand(samples, 4, 3, 24),
            factors[:, :1].expand(2, samples),
            torch.randn(1, **wide).expand(samples, 4, 3, 24),
        ),
    }


@pytest.mark.parametrize("layout", ["sliced", "permuted", "expanded"])
@pytest.mark.parametrize("samples", [1, 2])
def test_any_order_in_memory(layout: str, samples: int) -> None:
    given = layers(24, 24, 40, True, torch.float64)
    x, y, keep, dy = in_layouts(samples)[layout]
    of = [t for t in (x.requires_grad_(), y.requires_grad_(), *given) if t is not None]
    ours, theirs = by_parts(x, y, keep, *given), plainly(x, y, keep, *given)
    close(ours, theirs, 1e-12)
    for mine, other in zip(torch.autograd.grad(ours, of, dy), torch.autograd.grad(theirs, of, dy), strict=True):
        close(mine, other, 1e-12)


def test_a_sample_without_numbers_spoils_no_other() -> None:
    given = layers(24, 24, 40, True, torch.float32)
    x, y = (torch.randn(3, 7, 1, 24, device=DEVICE) for _ in range(2))
    expected = by_parts(x, y, None, *given)
    for worst in (torch.nan, torch.inf):
        x[1, 3, 0, 5] = worst
        of = x.clone().requires_grad_(), y.clone().requires_grad_()
        found = by_parts(*of, None, *given)
        assert torch.equal(found[::2], expected[::2])
        assert not torch.isfinite(found[1]).all()
        assert all(torch.isfinite(d[::2]).all() for d in torch.autograd.grad(found.sum(), of))


def test_gradients_are_the_derivatives() -> None:
    """Against finite differences."""
    given = layers(16, 16, 8, True, torch.float64)
    x, y = (leaf(2, 3, 16, dtype=torch.float64) for _ in range(2))
    keep = torch.tensor([[1.5, 0.0], [0.5, 1.0]])
    assert torch.autograd.gradcheck(lambda x, y, *given: by_parts(x, y, keep, *given), (x, y, *given), fast_mode=True)


def test_what_is_not_there() -> None:
    """Linear layers and norms without biases, weights that are frozen, a part whose norm nobody uses."""
    given = layers(32, 32, 40, False, torch.float64)
    weight, *others = given[:1] + [None if i in (1, 4, 6, 8) else w for i, w in enumerate(given[2:])]
    x, y = (leaf(2, 5, 32, dtype=torch.float64) for _ in range(2))
    frozen = [None if w is None else w.detach() for w in others]
    compared(
        lambda x, y, weight, fc2: by_parts(x, y, None, weight, None, *frozen[:7], fc2, *frozen[8:]),
        lambda x, y, weight, fc2: plainly(x, y, None, weight, None, *frozen[:7], fc2, *frozen[8:]),
        [x, y, weight, others[7]],
    )
    total, _ = block.enter(x, nn.LayerNorm(32, device=DEVICE, dtype=torch.float64))
    (dx,) = torch.autograd.grad(total.sum(), (x,))
    assert torch.equal(dx, torch.ones_like(x))


@pytest.mark.parametrize("attention", ["set", "softmax"])
@pytest.mark.parametrize(("layer_scale", "drop_path"), [(None, 0.0), (0.5, 0.5)])
def test_a_model_computes_the_same(attention: str, layer_scale: float | None, drop_path: float) -> None:
    """Losses and gradients of a whole model with these kernels and without; frozen weights stay without gradient."""
    size = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 5, "attention": attention}
    torch.manual_seed(0)
    model = timm.create_model("setformer_nano", **size, layer_scale=layer_scale, drop_path_rate=drop_path)
    model = model.to(DEVICE, torch.float64 if DEVICE == "cpu" else torch.float32).train()
    model.stages[0].blocks[0].norm1.weight.requires_grad_(False)
    image = torch.randn(3, 3, 16, 16, device=DEVICE, dtype=next(model.parameters()).dtype)
    found = {}
    for widest in (block.WIDEST, 0):
        model.set_sample_keys(torch.tensor([3, 5, 8], device=DEVICE))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block, "WIDEST", widest)
            loss = F.cross_entropy(model(image), torch.tensor([0, 1, 2], device=DEVICE))
        model.zero_grad()
        loss.backward()
        found[widest] = [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
    assert model.stages[0].blocks[0].norm1.weight.grad is None
    for mine, other in zip(*found.values(), strict=True):
        close(mine, other, 1e-9 if DEVICE == "cpu" else 1e-4)


def small(depth: int, width: int, policy: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"embed_dim": width, "depths": (depth,), "num_heads": (2,), "num_classes": 5, "stem_strides": (1, 2)}
    model = timm.create_model("setformer_nano", **size, **more).to(DEVICE).train()
    model.set_recompute(policy)
    return model


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_what_is_made_again_has_the_same_bits(layer_scale: float | None) -> None:
    found = {}
    image = torch.randn(2, 3, 8, 8, device=DEVICE)
    for policy in ("none", "cheap", "mlp", "block"):
        model = small(2, 16, policy, layer_scale=layer_scale, drop_path_rate=0.5)
        model.set_sample_keys(torch.tensor([3, 8], device=DEVICE))
        with mock.patch.object(block, "leave", wraps=block.leave) as leave:
            loss = F.cross_entropy(model(image), torch.tensor([0, 1], device=DEVICE))
        loss.backward()
        assert leave.call_count == 2
        found[policy] = [loss.detach(), *(p.grad for p in model.parameters())]
    for policy in ("cheap", "mlp", "block"):
        assert all(map(torch.equal, found["none"], found[policy])), policy


def test_a_block_keeps_what_the_docs_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_recompute.py says of PyTorch's operators."""
    sizes: dict[int, int] = {}
    packed = MadeAgain._pack

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def pack(again: MadeAgain, tensor: torch.Tensor) -> Any:
        kept = packed(again, tensor)
        return keep(kept) if isinstance(kept, torch.Tensor) else kept

    monkeypatch.setattr(MadeAgain, "_pack", pack)
    found = {}
    for policy in ("none", "cheap", "mlp"):
        of_depths = []
        for depth in (1, 3):
            model = small(depth, 128, policy, mlp_ratio=2.0, layer_scale=0.5)
            weights = {parameter.data_ptr() for parameter in model.parameters()}
            sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = model(torch.randn(2, 3, 32, 32, device=DEVICE))
            of_depths.append(sum(size for storage, size in sizes.items() if storage not in weights))
            del y
        found[policy] = (of_depths[1] - of_depths[0]) / 2 / (2 * 16 * 16 * 128 * 4)
    assert found == pytest.approx({"none": 12, "cheap": 8, "mlp": 5}, abs=0.3)


def bytes_kept(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what a model does, and the bytes that autograd keeps for it besides weights."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(image)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    return y, sum(size for storage, size in sizes.items() if storage not in weights)


@pytest.mark.parametrize("frozen", ["attn.output.weight scale1", "fc1.weight", "fc2.weight", "scale2", ""])
def test_frozen_weights(frozen: str) -> None:
    """Others have the same gradients, whatever is made again; no more is kept than by PyTorch's operators."""
    image = torch.randn(2, 3, 8, 8, device=DEVICE)
    found: dict[str, list[torch.Tensor]] = {}
    for policy in ("all", "none", "mlp"):
        model = small(1, 16, policy if policy != "all" else "none", layer_scale=0.5)
        left = {name: p for name, p in model.named_parameters() if not name.endswith(tuple(frozen.split(" ")))}
        if policy != "all":
            for parameter in model.parameters():
                parameter.requires_grad_(any(parameter is p for p in left.values()))
        y, kept = bytes_kept(model, image)
        if policy == "none":
            with mock.patch.object(block, "WIDEST", 0):
                assert kept <= bytes_kept(model, image)[1]
        found[policy] = list(torch.autograd.grad(y.square().sum(), list(left.values()))) if left else []
        assert left or policy == "all" or not kept
    for policy in ("none", "mlp"):
        assert all(map(torch.equal, found["all"], found[policy])), policy


def test_what_a_block_returns_may_be_changed_in_place() -> None:
    inner = small(1, 16, "none").stages[0].blocks[0]
    x, found = torch.randn(2, 4, 4, 16, device=DEVICE), []
    for widest in (block.WIDEST, 0):
        given = x.clone().requires_grad_()
        with mock.patch.object(block, "WIDEST", widest):
            y = inner(given)
        y.mul_(2)[0].relu_()
        found.append([y, *torch.autograd.grad(y.sum(), given)])
    assert all(itertools.starmap(torch.allclose, zip(*found, strict=True)))


def test_which_layers_are_taken_apart() -> None:
    x = torch.randn(2, 3, 8, device=DEVICE)
    plain, hooked = (nn.Linear(8, 8, device=DEVICE) for _ in range(2))
    hooked.register_forward_hook(lambda *_: None)
    own = type("Own", (nn.Linear,), {})(8, 8, device=DEVICE)
    kind = type("Kind", (torch.Tensor,), {})
    of_a_kind = nn.Linear(8, 8, device=DEVICE)
    of_a_kind.weight = nn.Parameter(of_a_kind.weight.detach().as_subclass(kind))
    half = nn.LayerNorm(8, device=DEVICE)
    half.bias = nn.Parameter(half.bias.detach().half())
    assert block.available(x, (plain, nn.LayerNorm(8, device=DEVICE)), (None, torch.ones(8, device=DEVICE)))
    for layer in (hooked, own, of_a_kind, half, nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(4)):
        assert not block.available(x, (layer,))
    for scale in (torch.ones(1), torch.ones(8).half(), torch.ones(16)[::2], torch.ones(1).expand(8)):
        assert not block.available(x, (plain,), (scale.to(DEVICE),))
    assert not block.available(x.to("meta"), (plain,))
    with torch.autograd.forward_ad.dual_level():
        assert not block.available(x, (plain,))


@pytest.mark.parametrize("where", ["attn", "attn.output", "norm1", "norm2", "mlp", "mlp.fc1", "mlp.fc2"])
def test_hooks_and_other_forwards_are_called(where: str) -> None:
    """Set before the first call and after it."""
    inner = small(1, 16, "none").stages[0].blocks[0]
    x, module, seen = torch.randn(2, 4, 4, 16, device=DEVICE), inner.get_submodule(where), []
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
    ):
        inner(x)
        handle = register(lambda *_: seen.append(where))
        inner(x.requires_grad_()).sum().backward()
        assert seen.pop() == where
        handle.remove()
    forward = module.forward
    module.forward = lambda *args, **more: seen.append(where) or forward(*args, **more)
    inner(x)
    assert seen == [where]


class Other(Mlp):
    def forward(self, x: torch.Tensor, again: MadeAgain | None = None) -> torch.Tensor:
        return self.fc1(x)


def test_other_modules_in_a_block_compute_as_they_do() -> None:
    def by(change: Callable[[nn.Module], object]) -> list[torch.Tensor]:
        x, found = torch.ones(2, 4, 4, 16, device=DEVICE).cumsum(3), []
        for widest in (block.WIDEST, 0):
            inner = small(1, 16, "none").stages[0].blocks[0]
            change(inner)
            with mock.patch.object(block, "WIDEST", widest):
                found.append(inner(x))
        return found

    for change in (
        lambda inner: setattr(inner.mlp, "approximate", "tanh"),
        lambda inner: setattr(inner, "mlp", Other(16, 1).to(DEVICE)),
        lambda inner: setattr(inner, "norm2", nn.Identity()),
        lambda inner: setattr(inner.attn, "output", nn.Identity()),
        lambda inner: parametrizations.weight_norm(inner.mlp.fc1),
        lambda inner: prune.l1_unstructured(inner.mlp.fc1, "weight", 0.5),
    ):
        assert torch.equal(*by(change))
