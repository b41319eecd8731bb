"""Segmentation end to end: ranks, ZeRO, resume, images of several sizes, masks, report, export, fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import setformer as library
from launch.run import memory
from launch.run.config import load_run
from launch.run.segmented import segmented_samples
from launch.run.trained import evaluate_checkpoint, open_named_split, predict
from launch.testing.commands import DEMO, losses, setformer, train_words
from setformer_dist.core.errors import ConfigError

COLOURS = np.array([[40, 60, 200], [220, 40, 40], [40, 200, 60]])  # of sky, square and disc
# Layouts add in other orders. An update by the sign of gradients near 0, as of small `eps`, makes steps of roundings.
STEADY = ("optim.lr=1e-3", "optim.eps=1e-3")
SEGMENT = (
    "task.name=segmentation", "task.args.channels=64", "checkpoint.best_metric=miou", "model.args.stem_strides=[1,2]",
    "data.augment.smoothing=0", "data.augment.crop=resized", "data.augment.scale=[0.5,1.0]", "data.image_size=32",
    "data.bucket_multiple=8", "batch.global_size=8", "run.log_every=1",
)  # fmt: skip


def scene(seed: int, height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """Return a noisy picture of a square and a disc, and its mask: 0 sky, 1 square, 2 disc, 255 around the disc."""
    draw = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    top, left = draw.integers(0, height - 16), draw.integers(0, width - 16)
    mask[top : top + 14, left : left + 14] = 1
    rows, columns = np.mgrid[:height, :width]
    far = np.hypot(rows - draw.integers(8, height - 8), columns - draw.integers(8, width - 8))
    mask[far < 9] = 255
    pixels = COLOURS[np.where(far < 9, 2, np.minimum(mask, 1))] + draw.normal(0, 25, (height, width, 3))
    mask[far < 7] = 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return packed scenes: 48 of 40 x 40 to train on, 9 of three sizes to be scored; and their files."""
    place = tmp_path_factory.mktemp("scenes")
    (place / "classes.txt").write_text("sky\nsquare\ndisc\n")
    sizes = {"train": [(40, 40)], "val": [(40, 40), (40, 64), (56, 36)]}
    for split, count in (("train", 48), ("val", 9)):
        for kind in ("images", "masks"):
            (place / "files" / split / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = scene(i + 1000 * (split == "val"), *sizes[split][i % len(sizes[split])])
            image.save(place / "files" / split / "images" / f"{i:03d}.png")
            mask.save(place / "files" / split / "masks" / f"{i:03d}.png")
        packed = setformer("data", "pack", str(place / "files" / split), str(place / split), "--masks", "masks",
                           "--classes", str(place / "classes.txt"))  # fmt: skip
        assert packed.code == 0, packed.err
    return place


def counted_miou(predicted: Path, truth: Path) -> float:
    """Return the mean IoU of files of masks, by plain counting."""
    hits, union = np.zeros(3), np.zeros(3)
    files = sorted(truth.iterdir())
    assert [file.name for file in sorted(predicted.iterdir())] == [file.name for file in files]
    for file in files:
        known, found = np.array(Image.open(file)), np.array(Image.open(predicted / file.name))
        assert known.shape == found.shape
        for k in range(3):
            counts = known != 255
            hits[k] += ((known == k) & (found == k) & counts).sum()
            union[k] += (((known == k) | (found == k)) & counts).sum()
    return float((hits / union).mean())


def test_it_learns_and_its_masks_are_what_was_scored(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = train_words(scenes, tmp_path / "runs", *SEGMENT, "schedule.epochs=6", "optim.lr=3e-3", ranks=1)
    ended = setformer(*words)
    assert ended.code == 0, ended.err
    run = tmp_path / "runs" / "demo"
    figures = json.loads((run / "summary.json").read_text())["evaluation"]
    assert figures["miou"] > 0.75
    assert {"pixel_accuracy", "class_accuracy", "iou_sky", "iou_square", "iou_disc"} <= set(figures)
    images = scenes / "files" / "val" / "images"
    shown = setformer("predict", str(run), str(images), "--weights", "plain", "--out", str(tmp_path / "masks"))
    assert shown.code == 0, shown.err
    assert "sky " in shown.out.splitlines()[0]
    found = counted_miou(tmp_path / "masks", scenes / "files" / "val" / "masks")
    assert found == pytest.approx(figures["miou"], abs=1e-6)
    page = (run / "report.html").read_text()
    assert "Intersection over union" in page
    assert page.count('class="card triple"') == 8

    again = setformer("predict", str(run), str(images), "--out", str(tmp_path / "masks"))
    assert again.code == 2
    assert "masks already exists: name a new or an empty folder" in again.err
    listed = setformer("ckpt", "ls", str(run))
    assert "miou 0." in listed.out
    assert "iou_sky" not in listed.out
    shutil.copytree(images, tmp_path / "same")
    twice = setformer("predict", str(run), str(images), str(tmp_path / "same"), "--out", str(tmp_path / "other"))
    assert twice.code == 2
    assert "000.png would both be written to" in twice.err
    assert not twice.out
    trained = library.load(run, weights="plain")
    data = trained.config.data.model_copy(update={"eval_view": "centre"})
    centred = dataclasses.replace(trained, config=trained.config.model_copy(update={"data": data}))
    for found in library.predict(centred, sorted(images.iterdir())):  # masks of whole images all the same
        assert found.mask is not None
        assert np.array_equal(found.mask, np.array(Image.open(tmp_path / "masks" / found.image.name)))
    sizes: list[tuple[int, ...]] = []
    hook = trained.model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    assert segmented_samples(centred, open_named_split(centred, str(scenes), "val"), 4) is not None
    hook.remove()
    assert sizes == [(1, 3, 32, 32)] * 4  # no whole image, which may be too large for the memory
    exported = setformer("ckpt", "export", str(run), str(tmp_path / "exported"), "--weights", "plain")
    assert exported.code == 0, exported.err
    scored = setformer("eval", str(tmp_path / "exported"), "--data", str(scenes), "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["metrics"]["miou"] == pytest.approx(figures["miou"], abs=1e-6)
    told: list[int] = []
    split = open_named_split(loaded := library.load(tmp_path / "exported"), str(scenes), "val")
    evaluate_checkpoint(loaded, split, 4, told.append)
    assert told == [1] * 9  # of several sizes one by one, however many are asked for
    monkeypatch.setattr(memory, "_FEW_PIXELS", 1)
    with monkeypatch.context() as small:
        small.setattr(memory, "memory_of_machine", lambda: 1 << 16)
        (refused,) = predict(loaded, [images / "001.png"], 1)
        assert "001.png: the model would see 32 x 48 pixels of it, for which it is predicted to take" in str(refused)
    one = library.predict(loaded, images / "001.png")[0]
    assert one.mask is not None
    assert one.mask.shape == (40, 64)
    assert sum(one.probabilities) == pytest.approx(1.0)


@pytest.mark.drill
def test_it_trains_alike_on_any_ranks_and_resumes(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    layouts = ((1, 0, 8), (2, 3, 2), (2, 2, 4))
    for ranks, stage, micro in layouts:
        words = train_words(
            scenes, out, *SEGMENT, f"run.name=on{ranks}-{stage}", f"zero.stage={stage}", f"batch.micro={micro}",
            "ema.decay=0.9", *STEADY, "schedule.epochs=2", "eval.every_epochs=1", ranks=ranks,
        )  # fmt: skip
        ended = setformer(*words)
        assert ended.code == 0, ended.err
    alone, *others = (losses(out / f"on{ranks}-{stage}") for ranks, stage, _ in layouts)
    for shared in others:
        assert shared.keys() == alone.keys()
        for place, (loss, averaged) in alone.items():
            assert shared[place][0] == pytest.approx(loss, rel=5e-5), place
            assert averaged is None or shared[place][1] == pytest.approx(averaged, rel=5e-5)
    shutil.copytree(out / "on2-2", out / "again" / "on2-2")
    shutil.rmtree(max((out / "again" / "on2-2" / "checkpoints").glob("step-*")))  # the run goes on from the step before
    there = [word if not word.startswith("run.out=") else f"run.out={out / 'again'}" for word in words]
    resumed = setformer(*there)
    assert resumed.code == 0, resumed.err
    assert losses(out / "again" / "on2-2") == others[1]


@pytest.mark.drill
@pytest.mark.parametrize("task", ["classification", "mae"])
def test_it_begins_with_what_another_task_has_trained(task: str, digits: Path, scenes: Path, tmp_path: Path) -> None:
    first = ("model.args.stem_strides=[1,2]", "data.augment.smoothing=0")
    if task == "mae":
        first = (*first, "task.name=mae", "task.args.unit=8", "task.args.decoder_dim=32", "task.args.decoder_depth=1",
                 "checkpoint.best_metric=loss")  # fmt: skip
    ended = setformer(*train_words(digits, tmp_path, *first, "run.name=first", ranks=1))
    assert ended.code == 0, ended.err
    refused = setformer("predict", str(tmp_path / "first"), str(tmp_path), "--out", str(tmp_path / "masks"))
    assert refused.code == 2
    assert "--out writes masks or boxes, and" in refused.err
    for name, weights in (("tuned", tmp_path / "first"), ("again", tmp_path / "tuned")):
        words = train_words(scenes, tmp_path, *SEGMENT, f"model.weights={weights}", f"run.name={name}",
                            "schedule.epochs=1", "eval.every_epochs=1", ranks=2)  # fmt: skip
        ended = setformer(*words)
        assert ended.code == 0, ended.err
        if name == "tuned":
            assert "drawn from the seed: auxiliary, head" in ended.err
    whole = setformer("train", *words[1:], "--dry-run")
    assert "drawn from the seed" not in whole.out
    back = train_words(digits, tmp_path, f"model.weights={tmp_path / 'tuned'}", "run.name=back", *first[:2], ranks=1)
    ended = setformer(*back)  # a classifier on the encoder that segmentation has trained
    assert ended.code == 0, ended.err
    assert "besides the encoder's are left out" in ended.err


def test_what_cannot_be_is_refused(digits: Path, scenes: Path, tmp_path: Path) -> None:
    def said(*overrides: str, data: Path = scenes) -> str:
        ended = setformer(*train_words(data, tmp_path, *SEGMENT, *overrides, ranks=1), "--dry-run")
        assert ended.code != 0
        assert "Traceback" not in ended.err
        return ended.err

    assert "task segmentation learns from masks, and samples of" in said(data=digits)
    assert "learns from masks or boxes, and data.labels = false" in said("data.labels=false")
    assert "data.augment.mixup changes the class of an image" in said("data.augment.mixup=0.2")
    swin = ("model.name=swin_tiny_patch4_window7_224", "~model.args", "model.args.embed_dim=24",
            "model.args.depths=[1,1,1,1]", "model.args.num_heads=[1,2,4,8]")  # fmt: skip
    assert "does not take images of 32 x 48, in which evaluation shows whole images" in said(*swin)
    assert "task.args.channels = 100 must be a multiple of 64" in said("task.args.channels=100")
    assert "has no classes of images to learn from a teacher" in said(f"distill.teacher={tmp_path}")
    assert "randaugment_ops = 2 shears, shifts and turns images" in said("data.augment.randaugment_ops=2")
    with pytest.raises(ConfigError, match='eval_view = "whole" shows images of any shape, and task classification'):
        load_run(Path(DEMO), ["data.eval_view=whole"])
