"""Models of timm with batch norms that do not train (model.frozen_batch_norm): trained, resumed, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from launch.run.config import load_run
from launch.testing.commands import DEMO, losses, setformer, train_words
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.models.build import build_model


def pretrained(folder: Path, name: str) -> Path:
    """Write weights of a model of timm, with statistics as training leaves them."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    safetensors.torch.save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnet10t"])
def test_a_frozen_model_is_timms_in_evaluation(name: str, tmp_path: Path) -> None:
    file = pretrained(tmp_path, name)
    ours = build_model(ModelConfig(name=name, weights=str(file), frozen_batch_norm=True), 7, 64, 0)
    weights = {n: t for n, t in safetensors.torch.load_file(file).items() if not n.endswith("num_batches_tracked")}
    ours.load_state_dict(weights)
    theirs = timm.create_model(name, num_classes=7).eval()
    theirs.load_state_dict(safetensors.torch.load_file(file))
    images = torch.randn(2, 3, 64, 64)
    ours.eval()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    ours.train()
    before = {n: p.clone() for n, p in ours.named_parameters() if not p.requires_grad}
    assert {n.rpartition(".")[2] for n in before} == {"weight", "bias", "running_mean", "running_var"}
    ours(images).sum().backward()
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters() if n in before)


@pytest.mark.drill
def test_it_trains_alike_on_any_ranks_resumes_and_is_exported(digits: Path, tmp_path: Path) -> None:
    file, out = pretrained(tmp_path, "test_resnet"), tmp_path / "runs"
    for ranks, stage in ((1, 0), (2, 3), (2, 2)):
        words = train_words(
            digits, out, "~model.args", "model.name=test_resnet", f"model.weights={file}", "ema.decay=0.9",
            "model.frozen_batch_norm=true", "model.drop_path=0", f"run.name=on{ranks}-{stage}", f"zero.stage={stage}",
            "optim.lr=3e-4", ranks=ranks,
        )  # fmt: skip
        ended = setformer(*words)
        assert ended.code == 0, ended.err
        assert "begins with the weights of" in ended.err
    alone, *others = (losses(out / name) for name in ("on1-0", "on2-3", "on2-2"))
    for shared in others:
        for place, (loss, averaged) in alone.items():
            assert shared[place][0] == pytest.approx(loss, rel=2e-4), place
            assert averaged is None or shared[place][1] == pytest.approx(averaged, rel=2e-4)
    shutil.copytree(out / "on2-2", out / "again" / "on2-2")
    shutil.rmtree(max((out / "again" / "on2-2" / "checkpoints").glob("step-*")))
    resumed = setformer(*[word if not word.startswith("run.out=") else f"run.out={out / 'again'}" for word in words])
    assert resumed.code == 0, resumed.err
    assert losses(out / "again" / "on2-2") == others[1]

    scored = setformer("eval", str(out / "on2-3"), "--weights", "plain", "--json")
    assert scored.code == 0, scored.err
    exported = setformer("ckpt", "export", str(out / "on2-3"), str(tmp_path / "exported"), "--weights", "plain")
    assert exported.code == 0, exported.err
    again = setformer("eval", str(tmp_path / "exported"), "--data", str(digits), "--json")
    assert again.code == 0, again.err
    figures = [json.loads(ended.out)["metrics"] for ended in (scored, again)]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-5)
    loaded = timm.create_model(
        "test_resnet", num_classes=10, checkpoint_path=tmp_path / "exported" / "model.safetensors"
    )
    first, now = safetensors.torch.load_file(file), loaded.state_dict()
    kept = [n for n in first if "running" in n]
    assert kept
    assert all(torch.equal(now[n], first[n]) for n in kept)


def test_what_cannot_be_frozen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.weights, which is not set: set it too"):
        load_run(Path(DEMO), ["model.frozen_batch_norm=true"])
    config = ModelConfig(name="setformer_nano", weights="x", frozen_batch_norm=True)
    with pytest.raises(ConfigError, match="model setformer_nano has no batch norms: remove the key"):
        build_model(config, 3, 32, 0)
    with pytest.raises(ConfigError, match=r"keeps running statistics .* or fine-tune it with model.frozen_batch_norm"):
        build_model(ModelConfig(name="test_resnet"), 3, 32, 0)
