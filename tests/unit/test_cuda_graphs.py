"""CUDA graphs in training, with their memory on a CPU: nothing is used after its time, and no input moves."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401
from setformer_dist.engine import compiled, cuda_graphs
from setformer_dist.engine.compiled import compile_model
from setformer_dist.engine.config import CompileConfig
from tests.graph_memory import graph_memory


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8), torch._functorch.config.patch({}):
        yield
    torch._functorch.config.force_non_lazy_backward_lowering = False
    torch._dynamo.reset()


def small(mode: str, recompute: str = "none", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2), "stem_strides": (1, 2), "num_classes": 5}
    model = timm.create_model("setformer_nano", **{**shape, "drop_path_rate": 0.4, **more}).train()
    model.set_recompute(recompute)
    compile_model(model, CompileConfig(mode=mode, cudagraphs=True))
    return model


def images(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, keys: Callable[[int], torch.Tensor], steps: int = 4) -> list[float]:
    """Return losses of training steps of two micro batches, and of the evaluations after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: list[float] = []
    for k in range(steps):
        losses = []
        for i in (2 * k, 2 * k + 1):
            model.set_sample_keys(keys(i))
            loss = F.cross_entropy(model(images(i)), torch.arange(4))
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            outputs = [model.eval()(images(100 + j)) for j in range(2)]
        model.train()
        found += [torch.stack(losses).sum().item(), torch.stack(outputs).sum().item()]
    return found


def in_one_place() -> Callable[[int], torch.Tensor]:
    place = torch.arange(4)
    return lambda i: place.copy_(torch.arange(4) + 100 * i)


def without_memory(monkeypatch: pytest.MonkeyPatch, mode: str, recompute: str = "none") -> list[float]:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    return trained(small(mode, recompute), in_one_place())


LONGER = [("model", "none"), ("blocks", "block"), ("blocks", "mlp")]


@pytest.mark.parametrize(
    ("mode", "recompute"), [("blocks", "none"), *(pytest.param(*one, marks=pytest.mark.drill) for one in LONGER)]
)
def test_what_lives_longer_than_a_micro_batch_has_memory_of_its_own(
    monkeypatch: pytest.MonkeyPatch, mode: str, recompute: str
) -> None:
    expected = without_memory(monkeypatch, mode, recompute)
    with graph_memory() as memory:
        model, keys = small(mode, recompute), in_one_place()
        assert trained(model, keys, steps=2) == expected[:4]  # to the last bit
        once = memory.recorded
        trained(model, keys)
    assert once > 0
    assert (memory.recorded, memory.moved, memory.overwritten) == (once, 0, 0)


@pytest.mark.drill
@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_that_memory_is_as_strict_as_it_should_be(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(cuda_graphs, "own_gradients", lambda model: None)
    with graph_memory() as memory:
        found = trained(small(mode), in_one_place(), steps=2)
    assert found[-1] != found[-1]  # NaN
    assert memory.overwritten > 0


@pytest.mark.drill
def test_attributes_of_modules_that_move_are_recorded_again_and_again() -> None:
    kept: list[torch.Tensor] = []
    with graph_memory() as memory:
        trained(small("model"), lambda i: kept.append(torch.arange(4) + 100 * i) or kept[-1])  # type: ignore[func-returns-value]
    assert memory.moved > 4


def test_outputs_may_be_kept_and_copies_begin_no_micro_batch() -> None:
    with graph_memory() as memory, torch.no_grad():
        model = small("model").eval()
        teacher = copy.deepcopy(model)
        outputs = [model(images(i)) for i in range(3)]
        kept = [output.clone() for output in outputs]
        begun: list[int] = []
        memory.begin = lambda: begun.append(1)  # type: ignore[method-assign]
        teacher(images(0))
        assert all(map(torch.equal, outputs, kept))
    assert begun == []


@pytest.mark.drill  # of minutes: tracing on the device without memory is slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("setformer_nano", "blocks"),
        ("setformer_nano", "model"),
        ("soft_tiny", "model"),
        ("swin_tiny_patch4_window7_224", "blocks"),
    ],
)
def test_no_graph_holds_a_tensor_of_the_host(monkeypatch: pytest.MonkeyPatch, name: str, mode: str) -> None:
    """Torch leaves such a graph out, or cuts it. The device without memory stands for a GPU."""
    seen: set[str] = set()

    def devices(module: torch.fx.GraphModule, inputs: object) -> Any:
        for node in module.graph.nodes:
            values = node.meta.get("val")
            tensors = values if isinstance(values, tuple | list) else [values]
            seen.update(t.device.type for t in tensors if isinstance(t, torch.Tensor))
        return make_boxed_func(module.forward)

    monkeypatch.setattr(compiled, "BACKEND", aot_autograd(fw_compiler=devices, bw_compiler=devices))
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5, drop_path_rate=0.1)
    compile_model(model.train(), CompileConfig(mode=mode))
    image = torch.randn(2, 3, *(model.pretrained_cfg["input_size"][1:]), device="meta")
    if hasattr(model, "set_sample_keys"):
        model.set_sample_keys(torch.arange(2, device="meta"))
    model(image).sum().backward()
    with torch.no_grad():
        model.eval()(image)
    assert seen == {"meta"}


def test_what_torch_leaves_out_is_said_once_and_so_are_graphs_that_are_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    utils = pytest.importorskip("torch._inductor.cudagraph_utils")
    before = cuda_graphs.skips()
    model = nn.Linear(2, 2)
    for _ in range(2):  # whoever fits a second model is not told twice
        cuda_graphs.fit(model)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            utils.log_cudagraph_skip_and_bump_counter("skipping cudagraphs due to cpu device (a). Found from : \n b")
        for _ in range(9):
            model(torch.ones(1, 2))
    reason = "without CUDA graphs: torch is skipping cudagraphs due to cpu device (a). Found from : b"
    assert caplog.text.count(reason) == 1
    assert caplog.text.count("no CUDA graph was recorded in 4 forward passes") == 2  # once a model's hook
    assert cuda_graphs.skips() - before == 2
