"""What is computed again in the backward pass: the same bits, less memory, and the policy that a budget chooses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import setformer_dist.models  # noqa: F401
from launch.run.config import load_run, resolve
from launch.run.memory import check_evaluation_fits, check_images_fit, keep_within_budget, largest_batch, predicted
from launch.run.objective import build_for
from launch.testing.commands import DEMO
from setformer_dist.core.config import ConfigError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.models import host_memory
from setformer_dist.models.build import build_model
from setformer_dist.models.measure import measure_activations, measure_evaluation
from setformer_dist.models.recompute import ORDER, candidates, set_recompute
from setformer_dist.tasks.build import build_task

MIXED = ("block", "mlp", "cheap")


def small(**more) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depths": (1, 2, 1), "num_heads": (2, 2, 4), "stem_strides": (1, 2), "num_classes": 5}
    model = timm.create_model("setformer_nano", **{**shape, "drop_path_rate": 0.4, **more}).train()
    model.set_sample_keys(torch.arange(4))
    return model


def step(model: torch.nn.Module) -> list[torch.Tensor]:
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    output = model(image)
    output.square().sum().backward()
    found = [output.detach(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    return found


@pytest.mark.parametrize("policy", [*ORDER[1:], MIXED], ids=str)
@pytest.mark.parametrize("more", [{}, {"layer_scale": 0.5}, {"attention": "softmax"}], ids=str)
def test_no_policy_changes_a_bit(more, policy):
    model = small(**more)
    kept = step(model)
    model.set_recompute(policy)
    for a, b in zip(kept, step(model), strict=True):
        assert torch.equal(a, b)
    model.set_recompute("none")
    for a, b in zip(kept, step(model), strict=True):
        assert torch.equal(a, b)


def test_a_block_keeps_what_the_docs_say():
    """In token maps, MLP ratio 2 and layer scale: 12, 8, 5 and 1, besides what does not grow with the tokens."""
    kept = {}
    for policy in ORDER:
        sizes = []
        for depth in (1, 4):
            shape = {"embed_dim": 128, "depths": (depth,), "num_heads": (4,), "mlp_ratio": 2.0, "layer_scale": 0.5}
            model = small(**shape, drop_path_rate=0.0)
            model.set_recompute(policy)
            sizes.append(measure_activations(model, torch.float32, (2, 3, 128, 128)).kept)
        kept[policy] = (sizes[1] - sizes[0]) / 3 / (2 * 64 * 64 * 128 * 4)
    assert kept == pytest.approx({"none": 12, "cheap": 8, "mlp": 5, "block": 1, "offload": 1}, abs=0.1)


@pytest.fixture
def other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's memory counts as another than the host's, as a GPU's is; the copies are real."""
    monkeypatch.setattr("setformer_dist.models.host_memory.has_own_memory", lambda _tensor: True)
    monkeypatch.setattr("setformer_dist.models.host_memory._SMALLEST_BYTES", 1)


@pytest.mark.usefixtures("other_memory")
def test_inputs_that_went_to_host_memory_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    kept = step(model)
    model.set_recompute("offload")
    fetched = []
    fetch = host_memory._Sent.fetch
    monkeypatch.setattr(host_memory._Sent, "fetch", lambda sent: (fetched.append(id(sent)), fetch(sent))[1])
    for a, b in zip(kept, step(model), strict=True):
        assert torch.equal(a, b)
    assert len(set(fetched)) == 8, "an input and the factors of drop path of each of four blocks"


@pytest.mark.usefixtures("other_memory")
def test_what_lies_in_host_memory_is_predicted_apart(tmp_path: Path) -> None:
    """A block's input is one map of 2 x 64 x 64 x 128 numbers; the device keeps none of them."""
    model = small(embed_dim=128, depths=(4,), num_heads=(4,), drop_path_rate=0.0)
    model.set_recompute("block")
    block = measure_activations(model, torch.float32, (2, 3, 128, 128))
    model.set_recompute("offload")
    offload = measure_activations(model, torch.float32, (2, 3, 128, 128))
    each = 2 * 64 * 64 * 128 * 4
    assert (block.host, offload.host) == (0, 4 * each)
    assert block.kept - offload.kept == pytest.approx(4 * each, rel=0.3)
    assert block.peak > offload.peak + 2 * each


def test_a_budget_sends_inputs_away_only_where_the_device_has_its_own_memory() -> None:
    assert not any("offload" in policies for policies in candidates(4, host_memory=False))
    assert candidates(2, host_memory=True)[-2:] == [("offload", "block"), ("offload", "offload")]


def test_each_candidate_holds_less_than_the_one_before():
    held = []
    for policies in candidates(3, host_memory=False):
        model = small(drop_path_rate=0.0)
        model.set_recompute(policies)
        held.append(measure_activations(model, torch.float32, (4, 3, 64, 64)).kept)
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == len(held) == 8


def test_policies_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=re.escape("names 2 stages, and the model has 3")):
        small().set_recompute(("none", "block"))
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1, embed_dim=12, num_heads=2)
    with pytest.raises(ConfigError, match="recompute whole blocks alone: use 'block' or 'none'"):
        set_recompute(vit, "mlp", "vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="needs model mine to have set_grad_checkpointing"):
        set_recompute(torch.nn.Linear(2, 2), "block", "mine")
    set_recompute(vit, "block", "vit_tiny_patch16_224")
    assert vit.grad_checkpointing


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"recompute": "mlp", "activation_checkpointing": True}, "both say what is recomputed"),
        ({"recompute": "mlp", "memory_budget": "1 GiB"}, "both say what is recomputed"),
        ({"memory_budget": "20GB"}, "is no size: write it as '20 GiB'"),
        ({"memory_budget": "0 GiB"}, "is no size"),
        ({"recompute": "all"}, "Input should be"),
    ],
)
def test_tables_that_mean_nothing_are_refused(table, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.model_validate(table)


def test_old_and_new_words_mean_the_same():
    assert ModelConfig(activation_checkpointing=True).policy == ModelConfig(recompute="block").policy == "block"
    assert ModelConfig.model_validate({"recompute": ["mlp", "none"]}).policy == ("mlp", "none")
    assert ModelConfig(memory_budget="1.5 GiB").budget_bytes == 3 * 2**29
    assert ModelConfig(memory_budget="900 MiB").budget_bytes == 900 * 2**20


def run_of(tmp_path: Path, *words: str):
    return resolve(load_run(Path(DEMO), [f"run.out={tmp_path}", "data.image_size=128", "batch.micro=32", *words]), 2)


def test_a_schedule_whose_largest_images_do_not_fit_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("model.name=setformer_nano", "~model.args", "model.drop_path=0.0")
    model = build_model(run_of(tmp_path, *words).config.model, 10, 128, 0)
    stages = "data.resolutions=[{epoch = 0, image_size = 128}, {epoch = 1, image_size = 512}]"
    growing = run_of(tmp_path, *words, stages, "data.augment.crop=resized")
    need = predicted(growing, model, (3, 128, 128), None).total
    check_images_fit(growing, model, (3, 128, 128), None, local_ranks=2)
    monkeypatch.setattr("launch.run.memory.memory_of_machine", lambda: int(2 * need / 1.1) + 2)
    check_images_fit(growing, model, (3, 128, 128), None, local_ranks=2)
    with pytest.raises(ConfigError, match=r"data\.resolutions comes to images of 512 x 512, 32 at a time"):
        check_images_fit(growing, model, (3, 128, 128), None, local_ranks=3)
    one_size = run_of(tmp_path, *words), model, (3, 128, 128), None
    check_images_fit(*one_size, local_ranks=1 << 40)  # too few pixels for a look
    with pytest.raises(ConfigError, match=r"the micro batch is images of 128 x 128, 64 at a time"):
        check_images_fit(run_of(tmp_path, *words, "batch.micro=64", "batch.global_size=128"), *one_size[1:], 1 << 40)


def test_whole_images_that_do_not_fit_in_evaluation_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("model.name=setformer_nano", "~model.args", "task.name=segmentation", "task.args.channels=64",
             "data.augment.smoothing=0", "data.augment.crop=window", "~checkpoint.best_metric")  # fmt: skip
    run = run_of(tmp_path, *words)
    model = build_for(run.config, build_task(run.config.task, ("sky", "road")), {})
    aerial = SimpleNamespace(sizes=lambda: np.array([[64, 64], [4096, 2048]]))
    need = measure_evaluation(model, torch.float32, (1, 3, 4096, 2048))
    monkeypatch.setattr("launch.run.memory.memory_of_machine", lambda: need)
    check_evaluation_fits(run, model, aerial, local_ranks=1)
    with pytest.raises(ConfigError, match=r"evaluation shows whole images, the largest as 4096 x 2048, .* per rank"):
        check_evaluation_fits(run, model, aerial, local_ranks=2)
    centred = run_of(tmp_path, *words, "data.eval_view=centre")
    check_evaluation_fits(centred, model, aerial, local_ranks=2)


@pytest.mark.parametrize("name", ["setformer_nano", "soft_tiny"])
def test_a_budget_takes_what_recomputes_least_and_fits(tmp_path: Path, name: str) -> None:
    model_words = [f"model.name={name}", "~model.args", "model.drop_path=0.0"]
    if name == "soft_tiny":
        model_words += ["model.args={widths = [16, 32], depths = [2, 1], num_heads = [1, 2]}"]
        model_words += ["model.args.soft={conv_stride = [2, 1], value_conv = [3, 0]}"]
    run = run_of(tmp_path, *model_words)
    model = build_model(run.config.model, 10, 128, 0)
    shape = (3, 128, 128)
    choices = candidates(len(model.stages), host_memory=False) if name == "setformer_nano" else ["none", "block"]
    totals = []
    for choice in choices:
        set_recompute(model, choice, name)
        totals.append(predicted(run, model, shape, None).total)
    for index, total in enumerate(totals):
        budget = f"{total / 2**20 + 0.01:.2f} MiB"
        line = keep_within_budget(run_of(tmp_path, *model_words, f"model.memory_budget={budget}"), model, shape, None)
        best = next(i for i, other in enumerate(totals) if other <= total + 10486)
        chosen = choices[best]
        assert line.startswith(f"{chosen if isinstance(chosen, str) else ', '.join(chosen)}: "), (index, line)
    least = run_of(tmp_path, *model_words, f"model.memory_budget={totals[-1] / 2**20 - 0.1:.2f} MiB")
    with pytest.raises(ConfigError, match=r"predicted to take with samples of 128 x 128 and batch\.micro = 32"):
        keep_within_budget(least, model, shape, None)
    assert keep_within_budget(run, model, shape, None) is None


@pytest.mark.parametrize("name", ["setformer_nano", "convnext_atto"])
@pytest.mark.parametrize("task", ["segmentation", "simmim"])
def test_a_budget_serves_models_around_an_encoder(tmp_path: Path, name: str, task: str) -> None:
    words = (f"model.name={name}", "~model.args", "model.drop_path=0.0", f"task.name={task}", "data.image_size=64",
             "data.augment.smoothing=0", "model.memory_budget=4 GiB", "~checkpoint.best_metric")  # fmt: skip
    run = run_of(tmp_path, *words)
    model = build_for(run.config, build_task(run.config.task, ("sky", "road")), {})
    line = keep_within_budget(run, model, (3, 64, 64) if task == "segmentation" else (4, 64, 64), None)
    assert line is not None
    assert line.startswith("none")


def test_memory_is_that_of_the_largest_size_of_the_schedule(tmp_path: Path) -> None:
    stages = "data.resolutions=[{step = 5, image_size = 256}, {step = 9, image_size = 64}]"
    run = run_of(tmp_path, "data.augment.crop=resized", stages)
    assert largest_batch(run, (3, 128, 128)) == (32, 3, 256, 256)
    within = run_of(tmp_path, "data.augment.crop=resized", stages, "batch.micro_pixels=500000")
    assert largest_batch(within, (3, 128, 128)) == (16, 3, 128, 128)
