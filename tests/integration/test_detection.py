"""Detection end to end: ranks, ZeRO, resume, images of several sizes, boxes, report, export, fine-tuning."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import setformer as library
from launch.testing.commands import losses, setformer, train_words

# Layouts add in other orders. An update by the sign of gradients near 0, as of small `eps`, makes steps of roundings.
STEADY = ("optim.lr=1e-3", "optim.eps=1e-3")
DETECT = (
    "task.name=detection", "task.args.channels=32", "checkpoint.best_metric=ap", "~model.args",
    "data.augment.smoothing=0", "data.augment.crop=scale_jitter", "data.augment.scale_jitter=[0.8,1.25]",
    "data.image_size=64", "data.bucket_multiple=8", "batch.global_size=8", "run.log_every=1",
)  # fmt: skip
COLOURS = {"square": (220, 40, 40), "disc": (40, 200, 60)}


def scene(seed: int, height: int, width: int) -> tuple[Image.Image, list[tuple[str, list[int], float]]]:
    """Return a noisy picture of one or two objects, and class, box (x, y, width, height) and area of each."""
    draw = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), (40, 60, 200), float)
    objects = []
    for half in range(2 if seed % 3 else 1):  # one in each half, so that none hides another
        side, name = int(draw.integers(22, 36)), ("square", "disc")[int(draw.integers(2))]
        left = int(draw.integers(half * width // 2, (half + 1) * width // 2 - side + 1))
        top = int(draw.integers(0, height - side))
        rows, columns = np.mgrid[:side, :side]
        inside = np.hypot(rows - side / 2, columns - side / 2) < side / 2 if name == "disc" else rows >= 0
        pixels[top : top + side, left : left + side][inside] = COLOURS[name]
        objects.append((name, [left, top, side, side], float(inside.sum())))
    pixels += draw.normal(0, 25, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return packed scenes: 48 of 72 x 80 to train on, 9 of three sizes to be scored; and their files."""
    place = tmp_path_factory.mktemp("scenes")
    sizes = {"train": [(72, 80)], "val": [(72, 80), (72, 112), (96, 76)]}
    for split, count in (("train", 48), ("val", 9)):
        folder = place / "files" / split
        folder.mkdir(parents=True)
        table: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        table["categories"] = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]
        for i in range(count):
            image, objects = scene(i + 1000 * (split == "val"), *sizes[split][i % len(sizes[split])])
            image.save(folder / f"{i:03d}.png")
            table["images"].append({"id": i, "file_name": f"{i:03d}.png"})
            for name, box, area in objects:
                number = len(table["annotations"]) + 1
                category = {"disc": 7, "square": 3}[name]
                table["annotations"].append({"id": number, "image_id": i, "category_id": category, "bbox": box,
                                             "area": area, "iscrowd": 0})  # fmt: skip
        (place / f"{split}.json").write_text(json.dumps(table))
        packed = setformer("data", "pack", str(folder), str(place / split), "--coco", str(place / f"{split}.json"))
        assert packed.code == 0, packed.err
    return place


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has learnt the scenes."""
    out = tmp_path_factory.mktemp("runs")
    ended = setformer(*train_words(scenes, out, *DETECT, "schedule.epochs=20", "optim.lr=3e-3", ranks=1))
    assert ended.code == 0, ended.err
    return out / "demo"


def test_it_learns_and_what_it_finds_is_what_was_scored(scenes: Path, run: Path, tmp_path: Path) -> None:
    figures = json.loads((run / "summary.json").read_text())["evaluation"]
    assert figures["ap50"] > 0.5
    assert {"ap75", "recall", "ap_small", "ap_of_square", "ap_of_disc"} <= set(figures)
    images = sorted((scenes / "files" / "val").iterdir())
    files = [str(image) for image in images]
    shown = setformer("predict", str(run), *files, "--weights", "plain", "--json", "--out", str(tmp_path / "boxes"))
    assert shown.code == 0, shown.err
    said = [json.loads(line) for line in shown.out.splitlines()]
    assert scored(said, scenes / "val.json") == pytest.approx(figures["ap"], abs=1e-5)
    assert [Image.open(tmp_path / "boxes" / image.name).size for image in images] == [
        Image.open(image).size for image in images
    ]
    drawn, plain = np.asarray(Image.open(tmp_path / "boxes" / "000.png")), np.asarray(Image.open(images[0]))
    assert 0 < (drawn != plain).any(axis=2).mean() < 0.5
    page = (run / "report.html").read_text()
    assert "Average precision" in page
    assert page.count('class="card triple"') == 8

    text = setformer("predict", str(run), files[0], "--weights", "plain", "--top", "1")
    best = said[0]["objects"][0]
    corners = ", ".join(f"{value:.0f}" for value in best["box"])
    assert text.out == f"{files[0]}: {best['class']} {best['score']:.1%} [{corners}]\n"
    listed = setformer("ckpt", "ls", str(run))
    assert "ap 0." in listed.out
    assert "ap_of_square" not in listed.out
    whole = setformer("eval", str(run), "--weights", "plain")
    assert "square  AP" in whole.out
    exported = setformer("ckpt", "export", str(run), str(tmp_path / "exported"), "--weights", "plain")
    assert exported.code == 0, exported.err
    again = setformer("eval", str(tmp_path / "exported"), "--data", str(scenes), "--json", "--batch", "2")
    assert again.code == 0, again.err
    assert json.loads(again.out)["metrics"]["ap"] == pytest.approx(figures["ap"], abs=1e-6)
    found = library.predict(library.load(tmp_path / "exported"), images[1])[0]
    assert found.objects is not None
    for ours, other in zip(found.objects, said[1]["objects"], strict=True):  # each process has threads of its own
        assert list(ours.box) == pytest.approx(other["box"], abs=1e-3)


def scored(said: list[dict[str, Any]], annotations: Path) -> float:
    """Return the average precision of lines of `predict --json`, by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        numbers = {image["file_name"]: number for number, image in truth.imgs.items()}
        categories = {category["name"]: number for number, category in truth.cats.items()}
        rows = [
            {"image_id": numbers[Path(line["image"]).name], "category_id": categories[o["class"]],
             "bbox": [o["box"][0], o["box"][1], o["box"][2] - o["box"][0], o["box"][3] - o["box"][1]],
             "score": o["score"]}
            for line in said
            for o in line["objects"]
        ]  # fmt: skip
        scoring = COCOeval(truth, truth.loadRes(rows), "bbox")
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return float(scoring.stats[0])


@pytest.mark.drill
def test_it_trains_alike_on_any_ranks_and_resumes(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    layouts = ((1, 0, 8), (2, 3, 2), (2, 2, 4))
    for ranks, stage, micro in layouts:
        words = train_words(
            scenes, out, *DETECT, f"run.name=on{ranks}-{stage}", f"zero.stage={stage}", f"batch.micro={micro}",
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


def test_ranks_score_a_model_alike(scenes: Path, run: Path, tmp_path: Path) -> None:
    figures = []
    for ranks in (1, 2):
        words = train_words(
            scenes, tmp_path, *DETECT, f"model.weights={run}", f"run.name=on{ranks}", "optim.lr=1e-12",
            "schedule.epochs=1", "eval.every_epochs=1", ranks=ranks,
        )  # fmt: skip
        ended = setformer(*words)
        assert ended.code == 0, ended.err
        assert "drawn from the seed" not in ended.err
        figures.append(json.loads((tmp_path / f"on{ranks}" / "summary.json").read_text())["evaluation"])
    assert figures[0]["ap"] > 0.1
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)


@pytest.mark.drill
@pytest.mark.parametrize("task", ["classification", "mae"])
def test_it_begins_with_what_another_task_has_trained(task: str, digits: Path, scenes: Path, tmp_path: Path) -> None:
    first = ("~model.args", "data.augment.smoothing=0", "data.image_size=64")
    if task == "mae":
        first = (*first, "task.name=mae", "task.args.unit=16", "task.args.decoder_dim=32", "task.args.decoder_depth=1",
                 "checkpoint.best_metric=loss", "data.augment.crop=resized")  # fmt: skip
    else:
        first = (*first, "data.augment.crop=resized")
    ended = setformer(*train_words(digits, tmp_path, *first, "run.name=first", ranks=1))
    assert ended.code == 0, ended.err
    words = train_words(scenes, tmp_path, *DETECT, f"model.weights={tmp_path / 'first'}", "run.name=tuned",
                        "schedule.epochs=1", "eval.every_epochs=1", ranks=2)  # fmt: skip
    ended = setformer(*words)
    assert ended.code == 0, ended.err
    assert "drawn from the seed: further, head, norms, pyramid" in ended.err


def test_what_cannot_be_is_refused(digits: Path, scenes: Path, tmp_path: Path) -> None:
    def said(*overrides: str, data: Path = scenes) -> str:
        ended = setformer(*train_words(data, tmp_path, *DETECT, *overrides, ranks=1), "--dry-run")
        assert ended.code != 0
        assert "Traceback" not in ended.err
        return ended.err

    assert "task detection learns from boxes, and samples of" in said(data=digits)
    assert "learns from masks or boxes, and data.labels = false" in said("data.labels=false")
    assert "data.augment.mixup changes the class of an image" in said("data.augment.mixup=0.2")
    assert "task.args.channels = 100 must be a multiple of 8" in said("task.args.channels=100")
    assert "randaugment_ops = 2 shears, shifts and turns images" in said("data.augment.randaugment_ops=2")
    assert "distill.teacher" in said(f"distill.teacher={tmp_path}")
    assert "parallel.sequence" in said("parallel.sequence=2")
    assert 'eval_view = "whole"' in said("data.engine=ffcv")
