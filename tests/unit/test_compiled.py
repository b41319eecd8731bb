"""torch.compile in place: what is shared, what stays eager, what a failure does, and where compiled code may lie."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters

import setformer_dist.models  # noqa: F401
from launch.run.compiled import VARIABLE, cache_of
from launch.run.config import load_run
from launch.run.repeat import _outside
from launch.testing.commands import DEMO
from setformer_dist.core.errors import ConfigError
from setformer_dist.engine import compiled
from setformer_dist.engine.compiled import Compilation, blocks_of, check_compile, compile_model
from setformer_dist.engine.config import CompileConfig
from setformer_dist.models.masked import MaskedAutoencoder
from setformer_dist.models.reference_sets import watched_tokens

BLOCKS = CompileConfig(mode="blocks")


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made as always, but run by torch's operators: C++ takes a minute."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8), torch._functorch.config.patch({}):
        yield
    torch._functorch.config.force_non_lazy_backward_lowering = False
    torch._dynamo.reset()


def small(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2), "stem_strides": (1, 2), "num_classes": 5}
    return timm.create_model("setformer_nano", **{**shape, "drop_path_rate": 0.4, **more}).train()


def made(model: nn.Module, config: CompileConfig = BLOCKS, **more: Any) -> Compilation:
    compilation = compile_model(model, config, **more)
    assert compilation is not None
    return compilation


def step(model: nn.Module, side: int = 16) -> list[torch.Tensor]:
    image = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    model.set_sample_keys(torch.arange(4))
    output = model(image)
    output.square().sum().backward()
    found = [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def assert_alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "recompute", ["none", *(pytest.param(p, marks=pytest.mark.drill) for p in ("cheap", "mlp", "block"))]
)
def test_blocks_of_a_stage_share_a_graph_and_no_name_changes(recompute: str) -> None:
    model = small()
    model.set_recompute(recompute)
    names, eager = list(model.state_dict()), step(model)
    compilation = made(model)
    for _ in range(2):
        assert_alike(eager, step(model))
    assert compilation.graphs == 2  # of three blocks
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.drill
def test_every_size_is_compiled_once_and_no_more() -> None:
    sides = (16, 24, 32, 48, 64)
    model, eager = small(depths=(2,), num_heads=(2,)), {}
    for side in sides:
        eager[side] = step(model, side)
    compilation = made(model, sizes=len(sides))
    torch._dynamo.config.recompile_limit = max(3, torch._dynamo.config.recompile_limit)
    for side in (*sides, *sides):
        assert_alike(eager[side], step(model, side))
    assert compilation.graphs == len(sides)


def test_evaluation_of_images_of_any_size_is_left_to_torch() -> None:
    model = small(depths=(2,), num_heads=(2,))
    compilation = made(model, evaluated=False)
    step(model)
    assert compilation.graphs == 1
    model.eval()
    with torch.no_grad():
        for side in (16, 24, 32):
            model(torch.randn(1, 3, side, side))
    assert compilation.graphs == 1


def test_the_limit_of_graphs_grows_with_the_sizes() -> None:
    made(small(), sizes=20)
    assert torch._dynamo.config.recompile_limit >= 3 * 20 * 2


@pytest.mark.drill
def test_the_whole_model_is_one_graph() -> None:
    model = small()
    eager = step(model)
    compilation = made(model, CompileConfig(mode="model"))
    assert_alike(eager, step(model))
    assert compilation.graphs == 1


@pytest.mark.drill
def test_a_masked_autoencoder_too() -> None:
    def autoencoder() -> nn.Module:
        torch.manual_seed(0)
        return MaskedAutoencoder(small(num_classes=0), 8, 0.5, 32, 2)

    model, images = autoencoder(), torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    images[:, -1] = 0
    images[:, -1, :16] = 1
    model.set_sample_keys(torch.arange(2))
    eager = model(images)
    compilation = made(model)
    torch.testing.assert_close(model(images), eager, rtol=1e-5, atol=1e-6)
    assert compilation.graphs == 3  # two stages, and the decoder's two blocks


def test_blocks_whose_weights_lie_at_other_alignments_share_no_code() -> None:
    model = small(depths=(4,), num_heads=(2,))
    eager = step(model)
    for block in model.stages[0].blocks[2:]:  # as ZeRO's stages 1 and 2 lay them, behind a tensor of an odd size
        weight = block.norm1.weight
        weight.data = torch.cat([torch.zeros(1), weight.data])[1:]
    compilation = made(model)
    for _ in range(2):
        assert_alike(eager, step(model))
    assert compilation.graphs == 2
    aligned, _, other, last = (block.forward._compiled for block in model.stages[0].blocks)
    assert aligned is not other
    assert other is last


def test_who_watches_sees_every_block(caplog: pytest.LogCaptureFixture) -> None:
    model, seen = small(), []
    compilation = made(model)
    with watched_tokens(model, lambda name, tokens, mask: seen.append(name)):
        step(model)
    assert len(seen) == 3
    assert compilation.graphs == 0
    with caplog.at_level(logging.INFO):
        step(model)
    assert re.search(r"compiled stages\.0\.blocks\.0 for training of 4 × .* in [\d.]+ s \(1 graph in", caplog.text)


def test_a_copy_computes_with_its_own_weights() -> None:
    model = small().eval()
    made(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        image = torch.ones(1, 3, 16, 16)
        fresh = small().eval()
        fresh.load_state_dict(other.state_dict())
        torch.testing.assert_close(other(image), fresh(image))
        assert not torch.allclose(other(image), model(image))


def broken(graph: object, inputs: object) -> Any:
    raise RuntimeError("error: no registers left")


def test_a_failure_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", broken)
    model = small()
    made(model)
    with pytest.raises(ConfigError, match=r"blocks\.0 cannot be compiled here .*no registers.*fallback = true"):
        step(model)


def test_or_the_run_goes_on_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled, "BACKEND", broken)
    model = small()
    eager = step(model)
    compilation = made(model, CompileConfig(mode="blocks", fallback=True))
    for a, b in zip(eager, step(model), strict=True):
        assert torch.equal(a, b)
    assert compilation.off
    assert caplog.text.count("the run goes on without the compiler") == 1


def test_compiling_has_a_limit() -> None:
    model, beats = small(), []
    made(model, CompileConfig(mode="blocks", limit_s=1e-6), beat=lambda: beats.append(1))
    with pytest.raises(ConfigError, match=r"longer than compile.limit_s = 1e-06, and 1 graph done so far"):
        step(model)
    assert beats == [1]


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no block"):
        check_compile(BLOCKS, nn.Linear(2, 2), "Linear", "cpu")
    with pytest.raises(ConfigError, match="cudagraphs = true needs an NVIDIA GPU"):
        check_compile(CompileConfig(mode="blocks", cudagraphs=True), small(), "small", "cpu")
    model = nn.Linear(2, 2)
    model.forward = model.forward  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="set on the object itself"):
        check_compile(CompileConfig(mode="model"), model, "Linear", "cpu")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("zero.stage=3", "compile.mode=model"), "does not go with zero.stage = 3"),
        (("zero.stage=3", "compile.mode=blocks", "compile.cudagraphs=true"), "does not go with zero.stage = 3"),
        (("parallel.sequence=2", "compile.mode=blocks"), "which no graph holds"),
        (
            ("compile.mode=model", 'model.recompute=["none", "offload", "none"]'),
            "copies the inputs of blocks between graphs",
        ),
        (("compile.cudagraphs=true",), "needs something compiled"),
        *(
            (
                ("compile.mode=blocks", "compile.cudagraphs=true", "zero.overlap_comm=true", *keys),
                "where DeepSpeed reduces",
            )
            for keys in (
                ("zero.stage=1", "precision.dtype=bf16", "precision.grad_accum=fp32"),
                ("zero.offload=optimizer",),
                ("deepspeed.zero_optimization.round_robin_gradients=true",),
            )
        ),
        (
            ("compile.mode=blocks", "compile.cudagraphs=true", "model.recompute=offload"),
            "reads inputs of blocks beside the forward pass",
        ),
        (("compile.mode=blocks", "restart.start_after_s=60"), "must be below restart.start_after_s = 60"),
        (("compile.mode=all",), "input should be 'off', 'blocks' or 'model'"),
    ],
)
def test_configs_that_contradict_themselves(keys: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_run(Path(DEMO), keys)


def test_blocks_of_timm_models_are_found() -> None:
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224")
    assert len(blocks_of(swin)) == 12


def test_code_lies_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    found = cache_of(BLOCKS)
    assert found.is_relative_to(tmp_path / "home")
    assert found.stat().st_mode & 0o777 == 0o700
    named = cache_of(CompileConfig(mode="blocks", cache=str(tmp_path / "named")))
    assert named.parent == tmp_path / "named"
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(ConfigError, match="is a link"):
        cache_of(CompileConfig(mode="blocks", cache=str(tmp_path / "link")))
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with pytest.raises(ConfigError, match="where others can put another folder in its place"):
        cache_of(CompileConfig(mode="blocks", cache=str(loose / "cache")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made .*set compile\.cache"):
        cache_of(CompileConfig(mode="blocks", cache=str(tmp_path / "file" / "x")))


def test_the_cache_of_somebody_elses_config_is_not_taken() -> None:
    named = [key for key, _ in _outside(load_run(Path(DEMO), ("compile.cache=/there",)))]
    assert named == ["compile.cache"]
    assert not list(_outside(load_run(Path(DEMO))))


@pytest.mark.drill
def test_losses_with_compiled_code_agree_to_rounding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    losses: dict[str, list[float]] = {}
    for mode in ("off", "blocks"):
        model = small(depths=(2,), num_heads=(2,))
        compile_model(model, CompileConfig(mode=mode))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[mode] = []
        for k in range(5):
            model.set_sample_keys(torch.arange(4) + 10 * k)
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(k))
            loss = nn.functional.cross_entropy(model(images), torch.arange(4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[mode].append(loss.item())
    assert losses["blocks"] == pytest.approx(losses["off"], rel=1e-5)
