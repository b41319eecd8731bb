"""Masked autoencoding end to end: ranks, ZeRO, resume, report, fine-tuning, export and the probe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
from torch import nn

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.sources.subset import SubsetSource
from launch.run.config import RunConfig, load_run, resolve
from launch.run.features import with_labels
from launch.run.inputs import inputs_of
from launch.run.memory import predicted
from launch.run.objective import build_for, check_objective
from launch.run.periodic_probe import probed_data
from launch.run.sequence import check_sequence
from launch.testing.commands import DEMO, losses, setformer, train_words
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.report.rows import read_run
from setformer_dist.tasks.build import build_task

MAE = ("task.name=mae", "task.args.unit=4", "task.args.decoder_dim=32", "task.args.decoder_depth=1",
       "data.augment.mixup=0", "data.augment.cutmix=0", "checkpoint.best_metric=loss",
       "model.args.stem_strides=[1,1]")  # fmt: skip


@pytest.mark.drill
def test_it_trains_alike_on_any_ranks_resumes_and_is_fine_tuned(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    for ranks, stage in ((1, 0), (2, 3)):
        words = train_words(digits, out, *MAE, f"run.name=on{ranks}", f"zero.stage={stage}", "ema.decay=0.9",
                            "eval.probe.every_epochs=1", "eval.probe.labels=0.5",
                            "checkpoint.best_metric=ema_probe_linear", ranks=ranks)  # fmt: skip
        ended = setformer(*words)
        assert ended.code == 0, ended.err
    alone, shared = losses(out / "on1"), losses(out / "on2")
    assert alone.keys() == shared.keys()
    for place, (loss, averaged) in alone.items():
        assert shared[place][0] == pytest.approx(loss, rel=1e-4), place
        assert averaged is None or shared[place][1] == pytest.approx(averaged, rel=1e-4)
    figures = [read_run(out / f"on{ranks}").evals[-1] for ranks in (1, 2)]
    for name in ("ema_probe_linear", "ema_probe_neighbours"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=0.02), name  # of 360 samples
    best = json.loads((out / "on2" / "summary.json").read_text())["best"]
    assert best["metric"] == "ema_probe_linear"
    assert best["value"] == max(row["ema_probe_linear"] for row in read_run(out / "on2").evals)
    again = setformer("probe", str(out / "on2"), "--labels", "0.5", "--weights", "ema")
    assert f"linear {figures[1]['ema_probe_linear']:.2%}, 20 nearest neighbours" in again.out
    assert f"{figures[1]['ema_probe_neighbours']:.2%} on" in again.out
    assert "linear probe" in (out / "on2" / "report.html").read_text()
    assert "Reconstructions" in (out / "on2" / "report.html").read_text()

    shutil.copytree(out / "on2", out / "again" / "on2")
    steps = sorted((out / "again" / "on2" / "checkpoints").glob("step-*"))
    shutil.rmtree(steps[-1])  # the run goes on from the step before
    there = [word if not word.startswith("run.out=") else f"run.out={out / 'again'}" for word in words]
    resumed = setformer(*there)
    assert resumed.code == 0, resumed.err
    assert losses(out / "again" / "on2") == shared

    tuned = setformer(*train_words(digits, out, f"model.weights={out / 'on2'}", "run.name=tuned",
                                   "model.args.stem_strides=[1,1]", ranks=1))  # fmt: skip
    assert tuned.code == 0, tuned.err
    assert "besides the encoder's are left out; left as drawn from the seed: head.fc.bias, head.fc.weight" in tuned.err
    probed = setformer("probe", str(out / "on2"), "--labels", "0.5")
    assert probed.code == 0, probed.err
    assert "nearest neighbours" in probed.out
    refused = setformer("predict", str(out / "on2"), str(next((digits / "images" / "val" / "2").iterdir())))
    assert "has no classes: fine-tune it" in refused.err
    exported = setformer("ckpt", "export", str(out / "on2"), str(tmp_path / "exported"))
    assert exported.code == 0, exported.err
    names = safetensors.torch.load_file(tmp_path / "exported" / "model.safetensors").keys()
    assert "stem.conv1.weight" in names
    assert not [name for name in names if name.startswith(("encoder.", "decoder.", "fusion."))]
    assert timm.is_model("setformer_nano")


@pytest.mark.drill
def test_latent_targets_are_those_of_the_averaged_weights_on_any_ranks_and_after_a_resume(
    digits: Path, tmp_path: Path
) -> None:
    out, found = tmp_path / "runs", []
    for ranks, stage in ((1, 0), (2, 3), (2, 1)):
        words = train_words(digits, out, *MAE, "task.args.target=latent", f"run.name=on{ranks}{stage}",
                            f"zero.stage={stage}", "ema.decay=0.9", "eval.every_epochs=1", ranks=ranks)  # fmt: skip
        ended = setformer(*words)
        assert ended.code == 0, ended.err
        found.append(losses(out / f"on{ranks}{stage}"))
    for place, (loss, _) in found[0].items():
        for other in found[1:]:
            assert other[place][0] == pytest.approx(loss, rel=1e-4), place

    shutil.copytree(out / "on21", out / "again" / "on21")
    steps = sorted((out / "again" / "on21" / "checkpoints").glob("step-*"))
    shutil.rmtree(steps[-1])
    resumed = setformer(*[word if not word.startswith("run.out=") else f"run.out={out / 'again'}" for word in words])
    assert resumed.code == 0, resumed.err
    assert losses(out / "again" / "on21") == found[2]
    refused = setformer("eval", str(out / "on21"))
    assert refused.code != 0
    assert "score the features with `setformer probe`" in refused.err


def run_of(*words: str) -> RunConfig:
    return load_run(Path(DEMO), [*MAE, *words])


def built(*words: str) -> nn.Module:
    config = run_of(*words)
    return build_for(config, build_task(config.task, ()), {})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["task.args.unit=6"], r"task\.args\.unit = 6 must be a multiple of the model's total stride of 4 pixels"),
        (["data.image_size=18"], r"images of 18 x 18 pixels are not made of whole units of 4 x 4"),
        (["model.args.attention=softmax"], r"task mae: attention = 'softmax' has no form"),
        (["data.augment.mixup=0.2"], r"data\.augment\.mixup blends two images"),
        (["distill.teacher=runs/x"], r"task mae has no classes of images to learn from a teacher"),
        (["eval.probe.every_epochs=1", "data.labels=false"], r"name labelled data in eval\.probe\.data"),
        (["eval.probe.every_epochs=1", "parallel.sequence=2"], r"eval\.probe takes whole images"),
        (
            ["eval.probe.every_epochs=1", "ema.decay=0.9", "checkpoint.best_metric=probe_linear"],
            r"the averaged weights are probed: use 'ema_probe_linear'",
        ),
        (
            ["task.args.target=latent", "ema.decay=0"],
            r"what averaged weights compute: set ema\.decay",
        ),
        (["task.args.target=latent", "ema.decay=0.9", "refresh.every=5"], r"remove the table"),
        (["task.args.target=words"], r"task\.args: target = 'words'"),
        (["parallel.sequence=2"], r"parallel\.sequence = 2: task mae has no form"),
        (["~model.args", "model.name=soft_tiny"], r"running statistics|SOFT has no encoder"),
        (["~model.args", "model.name=resnet18"], r"resnet18 keeps running statistics"),
    ],
)
def test_what_cannot_be_pretrained_is_refused_with_the_reason(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        built(*words)


def test_images_without_labels_are_read_by_a_task_that_needs_none(digits: Path, tmp_path: Path) -> None:
    flat = tmp_path / "train"
    flat.mkdir()
    for place, image in enumerate(sorted((digits / "images" / "val").rglob("*.png"))[:20]):
        shutil.copy(image, flat / f"{place}.png")
    config = DataConfig(root=str(tmp_path), labels=False, cache=str(tmp_path / "cache"))
    source = open_source(str(tmp_path), "train", config)
    assert (source.num_samples, source.classes) == (20, ("unlabelled",))
    with pytest.raises(DataError):
        open_source(str(tmp_path), "train", config.model_copy(update={"labels": True}))
    plain = load_run(Path(DEMO), ["data.labels=false"])
    with pytest.raises(ConfigError, match=r"task classification learns from labels, and data\.labels = false"):
        check_objective(plain, build_task(plain.task, ("a", "b")))


def test_images_at_any_depth_are_packed_without_labels(digits: Path, tmp_path: Path) -> None:
    flat = tmp_path / "photos"
    for place, image in enumerate(sorted((digits / "images" / "val").rglob("*.png"))[:6]):
        (folder := flat / ("deep/er" if place % 2 else "")).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"{place}.png")
    pack_image_folder(flat, tmp_path / "packed" / "train", PackOptions(labels=False, tiles=16))
    source = open_source(str(tmp_path / "packed"), "train", DataConfig(root=str(tmp_path / "packed")))
    assert (source.num_samples, source.classes) == (6, ("unlabelled",))
    pack_image_folder(flat, tmp_path / "deep", PackOptions(labels=False, split="er"))
    assert open_source(str(tmp_path), "deep", DataConfig(root=str(tmp_path))).num_samples == 3
    with pytest.raises(DataError, match="no images in a folder 'other'"):
        pack_image_folder(flat, tmp_path / "none", PackOptions(labels=False, split="other"))
    with pytest.raises(DataError, match=r"or read it without labels .*pack --no-labels"):
        pack_image_folder(flat / "deep" / "er", tmp_path / "none", PackOptions())
    with pytest.raises(ConfigError, match=r"--no-labels does not go with"):
        pack_image_folder(tmp_path / "deep", tmp_path / "none", PackOptions(labels=False))
    with pytest.raises(ConfigError, match=r"--no-labels packs images alone"):
        PackOptions(labels=False, coco="x.json")


def test_a_share_of_the_labels_is_a_source_of_its_own(digits: Path) -> None:
    config = DataConfig(root=str(digits))
    whole = open_source(str(digits), "train", config)
    _, part = with_labels(config, whole, 0.1, seed=0)
    assert isinstance(part, SubsetSource)
    ids = np.arange(part.num_samples)
    counts = part.labels(ids).bincount()
    wanted = whole.labels(np.arange(whole.num_samples)).bincount()
    assert counts.tolist() == [max(1, round(0.1 * int(n))) for n in wanted]
    assert part.read(5).image == whole.read(int(part.chosen[5])).image
    assert part.key(5) == whole.key(int(part.chosen[5]))
    assert part.labels(np.array([-1]))[0] == 0
    assert with_labels(config, whole, 1.0, seed=0) == (config, whole)
    assert part.fingerprint != with_labels(config, whole, 0.1, seed=1)[1].fingerprint


def test_costs_and_memory_are_predicted_for_the_whole_autoencoder() -> None:
    config = run_of()
    model = build_for(config, build_task(config.task, ()), {})
    assert inputs_of(config.data).tokens(model, None) > 0  # type: ignore[arg-type]
    check_sequence(config, None, model)
    latent = run_of("task.args.target=latent", "ema.decay=0.9")
    whole = build_for(latent, build_task(latent.task, ()), {})
    shape = (3, *latent.data.shape)  # type: ignore[union-attr]
    more = predicted(resolve(latent, 1), whole, shape, None).parameters
    weights = sum(p.numel() for p in whole.parameters())
    encoder = sum(p.numel() for p in whole.encoder.parameters())  # type: ignore[union-attr]
    assert more == 4 * (weights + encoder)


def test_labelled_data_of_a_probe_are_opened_before_training(digits: Path, tmp_path: Path) -> None:
    """A dry run does so as well."""
    words = ("eval.probe.every_epochs=1", "eval.probe.labels=0.5", "ema.decay=0")
    config = run_of(*words, f"eval.probe.data={digits}")
    model = build_for(config, build_task(config.task, ()), {})
    splits = [open_source(str(digits), name, DataConfig(root=str(digits))) for name in ("train", "val")]
    found = probed_data(resolve(config, 1), model, *splits)
    assert found is not None
    assert found[1].num_samples < splits[0].num_samples
    assert probed_data(resolve(run_of(), 1), model, *splits) is None
    missing = run_of(*words, f"eval.probe.data={tmp_path / 'none'}")
    with pytest.raises(DataError, match=r"eval\.probe\.data = .*none/train does not exist"):
        probed_data(resolve(missing, 1), model, *splits)
