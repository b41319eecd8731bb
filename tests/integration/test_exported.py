"""Exported models, ours and timm's: scored, used, taken as teachers, and refused where they are damaged or hostile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import setformer as setformer_library
from launch.run.exported import load_exported
from launch.testing.commands import setformer, train_words
from setformer_dist.core.errors import CheckpointError
from setformer_dist.models.arguments import model_arguments
from tests.integration.test_bad_input import assert_one_sentence

# Small enough to be built often; with batch norms, which a run may not train.
NAME, ARGS = "resnet10t", {"num_classes": 10}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm writes it, of a model whose running statistics are those of data."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, **ARGS)
    model(torch.randn(16, 3, 32, 32))
    folder = tmp_path_factory.mktemp("timm") / "model"
    save_for_hf(model, folder, safe_serialization=True, model_args=ARGS)
    return folder


def changed(folder: Path, dest: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, dest)
    table = json.loads((dest / "config.json").read_text())
    change(table)
    (dest / "config.json").write_text(json.dumps(table))
    return dest


def sees(size: int) -> Callable[[dict[str, Any]], None]:
    return lambda table: table["pretrained_cfg"].update(input_size=[3, size, size])


def test_a_model_of_timm_computes_what_timm_does(theirs: Path, digits: Path) -> None:
    trained = setformer_library.load(theirs)
    image = next((digits / "images" / "val" / "3").iterdir())
    model = timm.create_model(f"local-dir:{theirs}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    expected = model(transform(Image.open(image).convert("RGB")).unsqueeze(0)).softmax(1)[0]
    ended = setformer("predict", str(theirs), str(image), "--top", "10", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["classes"]
    # PIL resizes to uint8 in another rounding than torch.
    assert [found[str(k)] for k in range(10)] == pytest.approx(expected.tolist(), abs=2e-3)
    assert not trained.named
    assert trained.classes == tuple(map(str, range(10)))


def test_classes_of_one_name_are_told_apart(theirs: Path, tmp_path: Path) -> None:
    names = ["crane", *"abcdefgh", "crane"]
    found = load_exported(changed(theirs, tmp_path / "model", lambda table: table.update(label_names=names)))
    assert found.classes == ("crane (0)", *"abcdefgh", "crane (9)")
    assert found.task.outputs == found.classes


def test_a_model_of_timm_is_scored_and_probed(theirs: Path, digits: Path, tmp_path: Path) -> None:
    small = changed(theirs, tmp_path / "small", sees(32))
    scored = setformer("eval", str(small), "--data", str(digits), "--json")
    assert scored.code == 0, scored.err
    assert "names no classes: its outputs are taken for the classes of the data, in their order" in scored.err
    assert json.loads(scored.out)["samples"] == 360
    probed = setformer("probe", str(small), "--data", str(digits))
    assert probed.code == 0, probed.err
    assert "on 360 samples of 10 classes" in probed.out
    assert_one_sentence(setformer("eval", str(theirs)), 2, "names no data", "--data")
    assert_one_sentence(setformer("eval", str(theirs), "--data", str(digits), "--best"), 2, "one set of weights")


@pytest.mark.drill
def test_a_model_of_timm_teaches(theirs: Path, digits: Path, tmp_path: Path) -> None:
    inputs = ("data.mean=[0.485, 0.456, 0.406]", "data.std=[0.229, 0.224, 0.225]", "data.augment.crop=resized")
    teacher = changed(theirs, tmp_path / "teacher", sees(16))
    words = train_words(digits, tmp_path, f"distill.teacher={teacher}", *inputs, ranks=2)
    ended = setformer(*words)
    assert ended.code == 0, ended.err
    (teacher / "model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "demo" / "checkpoints")
    assert_one_sentence(setformer(*words), 4, "is not a complete .safetensors file")


def tensors_of(folder: Path, dest: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, dest)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, dest / "model.safetensors")
    return dest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(architecture="os.system"), "no model 'os.system'"),
        (lambda t: t.pop("architecture"), "architecture"),
        (lambda t: t.update(num_classes=7), "num_classes"),
        (lambda t: t.update(model_args={"checkpoint_path": "/etc/passwd"}), "would load or write files"),
        (lambda t: t.update(model_args={"pretrained": True}), "would load or write files"),
        (lambda t: t.update(model_args={"layers": [10**6] * 4}), ""),
        (lambda t: t.update(label_names=["a", "b"]), "names 2 classes, and num_classes is 10"),
        (lambda t: t["pretrained_cfg"].update(interpolation="nearest"), "interpolation"),
        (lambda t: t["pretrained_cfg"].update(crop_mode="squash"), "crop_mode"),
        (lambda t: t["pretrained_cfg"].update(crop_pct=0), "eval_crop"),
        (lambda t: t["pretrained_cfg"].update(mean=[0.5]), "input_size has 3 bands"),
        (lambda t: t["pretrained_cfg"].update(input_size=[3, 0, 16]), "image_size"),
        (lambda t: t.update(setformer_dist={"task": {"name": "nothing"}}), "task.name"),
        (lambda t: t.update(setformer_dist={"task": {"name": "mae"}}), ""),
        (lambda t: t.update(setformer_dist={"classes": ["a"]}), "num_classes"),
        (lambda t: t.pop("pretrained_cfg"), "pretrained_cfg"),
    ],
)
def test_a_hostile_config_is_refused(
    theirs: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    folder = changed(theirs, tmp_path / "model", change)
    with pytest.raises(CheckpointError) as refused:
        load_exported(folder)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_damaged_config_is_refused(theirs: Path, tmp_path: Path, text: str) -> None:
    folder = changed(theirs, tmp_path / "model", lambda table: None)
    (folder / "config.json").write_text(text)
    assert_one_sentence(setformer("predict", str(folder), "image.png"), 4, "config.json")


def test_weights_without_a_description_are_named_as_such(theirs: Path, tmp_path: Path) -> None:
    """As an export of token sequences has them."""
    folder = changed(theirs, tmp_path / "model", lambda table: None)
    (folder / "config.json").unlink()
    assert_one_sentence(setformer("eval", str(folder), "--data", "x"), 4, "no config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("fc.bias"), "disagree about fc.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "disagree about extra"),
        (lambda t: t.update({"fc.bias": torch.ones(3)}), "disagree about fc.bias"),
    ],
)
def test_weights_of_another_model_are_refused(
    theirs: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_exported(tensors_of(theirs, tmp_path / "model", change))
    cut = tmp_path / "model" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not a complete"):
        load_exported(tmp_path / "model")


def test_a_model_smaller_than_its_architectures_default_is_loaded(tmp_path: Path) -> None:
    """The names of a model's arguments come from the default model, which has more and larger parameters."""
    name, args = "vit_large_patch16_224", {"depth": 1, "embed_dim": 16, "num_heads": 1, "num_classes": 10}
    save_for_hf(timm.create_model(name, **args), tmp_path / "small", safe_serialization=True, model_args=args)
    model_arguments.cache_clear()
    assert load_exported(tmp_path / "small").classes == tuple(map(str, range(10)))


@pytest.mark.parametrize("crop", ["window", "resized"])
def test_an_exported_run_sees_images_as_the_run_does(digits: Path, tmp_path: Path, crop: str) -> None:
    """Also windows of native scale, which timm's keys cannot say."""
    changes = ("data.image_size=8", f"data.augment.crop={crop}", "data.eval_crop=0.7", "~schedule.epochs",
               "schedule.steps=4", "schedule.warmup_epochs=0.0", "model.name=vit_tiny_patch16_224", "~model.args",
               "model.args={depth = 1, embed_dim = 16, num_heads = 1, patch_size = 4}")  # fmt: skip
    ended = setformer(*train_words(digits, tmp_path, *changes, ranks=1))
    assert ended.code == 0, ended.err
    run, export = str(tmp_path / "demo"), str(tmp_path / "out")
    assert setformer("ckpt", "export", run, export).code == 0
    scored, again = setformer("eval", run), setformer("eval", export, "--data", str(digits))
    assert again.code == 0, again.err
    assert again.out.partition(": ")[2] == scored.out.partition(": ")[2]


@pytest.mark.parametrize("task", ["mae", "simmim"])
def test_the_encoder_of_a_pretraining_is_not_evaluated(digits: Path, tmp_path: Path, task: str) -> None:
    """What it was trained with, the decoder and the loss, stays with the run."""
    words = (f"task.name={task}", "task.args={unit = 8}", "data.augment.mixup=0", "data.augment.cutmix=0",
             "checkpoint.best_metric=loss", "~schedule.epochs", "~schedule.warmup_epochs",
             "schedule.steps=1")  # fmt: skip
    ended = setformer(*train_words(digits, tmp_path, *words, ranks=1))
    assert ended.code == 0, ended.err
    run, export = str(tmp_path / "demo"), str(tmp_path / "out")
    assert setformer("ckpt", "export", run, export).code == 0
    assert_one_sentence(
        setformer("eval", export, "--data", str(digits)), 2, f"the encoder alone of a run of task {task}"
    )
    assert setformer("eval", run).code == 0
    elements = sum(
        tensor.numel() for tensor in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors").values()
    )
    assert f" {elements:,} parameters" in (tmp_path / "out" / "README.md").read_text()  # without the decoder's
