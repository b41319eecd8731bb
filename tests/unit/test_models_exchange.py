"""What other programs ask of our models: timm's method set as its own tests ask, torch.func, export, ONNX."""

from __future__ import annotations

import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import FeatureInfo
from timm.models._features import FeatureGetterNet
from torch.func import functional_call, grad, vmap

import setformer_dist.models  # noqa: F401  (registers the models)
from setformer_dist.core.errors import ConfigError

NAMES = sorted([*timm.list_models("setformer_*"), *timm.list_models("soft_*")])
KINDS = ("set", "soft", "soft_norm", "cast", "softmax")
SHALLOW = {"setformer_nano": {}, **{name: {"depths": (1, 1, 1, 1)} for name in NAMES if name != "setformer_nano"}}
FORMS = ("NCHW", "NHWC", "NLC")


def shallow(name: str, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SHALLOW[name], num_classes=7, **more).eval()


def tiny(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind.startswith("soft_tiny"):
        shape = {"widths": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
        return timm.create_model(kind, **shape, num_classes=7).eval()
    return timm.create_model("setformer_nano", attention=kind, depths=(1, 1, 1), num_classes=7).eval()


# ------------------------------------------------------------------------------------------------------------ timm


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_intermediates_are_what_timm_asks_for(name):
    model, image = shallow(name), torch.randn(1, 3, 32, 32)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    final, maps = model.forward_intermediates(image)
    assert torch.allclose(final, model.forward_features(image))
    for y, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert y.shape == (1, channels, math.ceil(32 / reduction), math.ceil(32 / reduction))
        assert not y.isnan().any()
    last = len(maps) - 1
    for indices, stages in (
        (None, range(last + 1)),
        (2, (last - 1, last)),
        ([0, -1], (0, last)),
        ([-1, 0, 0], (0, last)),
    ):
        for form in FORMS:
            chosen = model.forward_intermediates(image, indices, output_fmt=form, intermediates_only=True)
            expected = [maps[i] for i in stages]
            if form != "NCHW":
                expected = [y.permute(0, 2, 3, 1) for y in expected]
            if form == "NLC":
                expected = [y.flatten(1, 2) for y in expected]
            assert len(chosen) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(chosen, expected, strict=True))
    normed = model.forward_intermediates(image, norm=True, intermediates_only=True, output_fmt="NLC")
    tokens = final.flatten(1, 2) if final.ndim == 4 else final[:, 1:]
    torch.testing.assert_close(normed[-1], tokens)
    assert torch.equal(normed[0], maps[0].flatten(2).mT)
    model.set_grad_checkpointing()
    with torch.enable_grad():
        again, _ = model.forward_intermediates(image)
    assert torch.allclose(final, again, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="must be NCHW, NHWC or NLC"):
        model.forward_intermediates(image, output_fmt="CHW")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_classifier_and_features_are_what_timm_asks_for(name):
    model, image = shallow(name), torch.randn(1, 3, 32, 32)
    before = model.forward_head(model.forward_features(image), pre_logits=True)
    assert before.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(image), before)
    model.reset_classifier(0, "")
    assert model(image).shape[-1] == model.num_features
    getter = shallow(name, features_only=True, feature_cls="getter")
    assert isinstance(getter, FeatureGetterNet)
    for y, channels in zip(getter(image), getter.feature_info.channels(), strict=True):
        assert y.shape[1] == channels
    state, cfg = shallow(name).state_dict(), model.default_cfg
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state


# ------------------------------------------------------------------------------------------------ torch's transforms


@pytest.mark.parametrize("kind", [*KINDS, "soft_tiny", "soft_tiny_norm"])
def test_a_batch_of_no_image_has_no_logits_and_gradients_of_zero(kind):
    model = tiny(kind).train()
    y = model(torch.randn(0, 3, 32, 32))
    assert y.shape == (0, 7)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", [*KINDS, "soft_tiny", "soft_tiny_norm"])
def test_gradients_per_image_by_vmap_are_those_of_each_image(kind):
    # In fp64 torch's convolution of the landmarks has no rule for vmap on CPUs.
    dtype, atol = (torch.float32, 1e-4) if kind.startswith("soft_tiny") else (torch.float64, 1e-7)
    model, images = tiny(kind).to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        expected = torch.autograd.grad(model(image[None]).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, atol=atol, rtol=10 * atol, msg=name)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["set", *[pytest.param(kind, marks=pytest.mark.drill) for kind in ("soft_tiny", "cast")]]
)
def test_an_exported_program_takes_any_batch(kind):
    model, image = tiny(kind), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), model(images))


@torch.no_grad()
@pytest.mark.drill  # half a minute each
@pytest.mark.parametrize("kind", [*KINDS, "soft_tiny", "soft_tiny_norm"])
def test_onnxruntime_computes_what_we_do_for_any_batch(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    model, images = tiny(kind), torch.randn(5, 3, 32, 32)
    path = tmp_path / "model.onnx"
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        model, (images[:2],), path, dynamo=True, dynamic_shapes=(batch,), input_names=["image"], verbose=False
    )
    session = runtime.InferenceSession(path)
    for count in (1, 5):
        (found,) = session.run(None, {"image": images[:count].numpy()})
        np.testing.assert_allclose(found, model(images[:count]).numpy(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("torch.jit.script cannot", torch.jit.script),
        ("torch.jit.trace would keep", lambda model: torch.jit.trace(model, torch.randn(1, 3, 16, 16))),
        ("torch.fx.symbolic_trace cannot", torch.fx.symbolic_trace),
    ],
)
@pytest.mark.parametrize("kind", ["set", "soft_tiny"])
def test_torchscript_and_fx_are_refused_with_what_to_use(kind, what, call):
    with pytest.raises(ConfigError, match=f"^{re.escape(what)}.*use torch.export.export"):
        call(tiny(kind))


@pytest.mark.drill
@torch.no_grad()
def test_the_snippet_of_the_docs_runs_and_onnxruntime_computes_what_set_attention_does(tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    text = (Path(__file__).parents[2] / "docs" / "operators.md").read_text()
    (snippet,) = re.findall(r"```python\n(import timm.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    names = types.ModuleType("snippet").__dict__
    exec(snippet, names)
    images = torch.randn(5, 3, 32, 32)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 5):
        (found,) = session.run(None, {"image": images[:count].numpy()})
        np.testing.assert_allclose(found, names["model"](images[:count]).numpy(), atol=1e-5, rtol=1e-4)
