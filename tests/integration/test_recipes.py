"""Recipes through the command line: optimizer, schedule, loss, layer decay, layout and a teacher; cut and resumed."""

from __future__ import annotations

import io
import json
import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from launch.testing.commands import Ended, losses, setformer, start, train_words, wait_for

RECIPE = (
    "optim.name=lion",
    "optim.lr=3e-4",
    "optim.layer_decay=0.8",
    "schedule.name=wsd",
    "schedule.decay_steps=6",
    "task.args.loss=focal",
    'task.args.class_weights={"3"=2.0}',
    "data.channels_last=true",
)

# Parts of DeiT III's recipe; of 22 steps, 8 mix.
DEIT = (
    "data.augment.policy=3augment",
    "data.augment.color_jitter=0.3",
    "data.augment.mixup=0.8",
    "data.augment.cutmix=1.0",
    "data.augment.mix_off_step=8",
    "data.augment.repeats=2",
    "model.drop_path=0.2",
)


@pytest.fixture(scope="module")
def teacher(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    ended = setformer(*train_words(digits, out, "optim.lr=2e-3", "schedule.epochs=3", ranks=1))
    assert ended.code == 0, ended.err
    return out / "demo"


@pytest.mark.drill
def test_a_recipe_with_a_teacher_continues_under_another_layout(digits: Path, teacher: Path, tmp_path: Path) -> None:
    learns = f"distill.teacher={teacher}"
    ended = setformer(*train_words(digits, tmp_path / "whole", *RECIPE, learns, ranks=2))
    assert ended.code == 0, ended.err
    moved = shutil.copytree(teacher, tmp_path / "moved")
    process = start(*train_words(digits, tmp_path / "parts", *RECIPE, learns, "zero.stage=3", ranks=2))
    wait_for(tmp_path / "parts" / "demo" / "checkpoints" / "step-00000005" / "manifest.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    again = (*RECIPE, f"distill.teacher={moved}", "zero.stage=1")
    ended = setformer(*train_words(digits, tmp_path / "parts", *again, ranks=1))
    assert ended.code == 0, ended.err
    ours, theirs = losses(tmp_path / "parts" / "demo"), losses(tmp_path / "whole" / "demo")
    assert ours.keys() == theirs.keys()
    for place, (loss, _) in theirs.items():
        assert ours[place][0] == pytest.approx(loss, rel=1e-4), place
    said = setformer("eval", str(tmp_path / "whole" / "demo"))
    assert said.code == 0, said.err
    without = refused(digits, tmp_path / "parts", *RECIPE)
    assert "was trained with teacher" in without.err
    assert "and this run has no teacher" in without.err
    refuse_another_teacher(digits, tmp_path)


def refuse_another_teacher(digits: Path, tmp_path: Path) -> None:
    """The student itself is a teacher of the same classes, but not the one that the run has."""
    other = refused(digits, tmp_path / "parts", *RECIPE, f"distill.teacher={tmp_path / 'whole' / 'demo'}")
    assert "put the same one back" in other.err


def refused(data: Path, out: Path, *words: str) -> Ended:
    ended = setformer(*train_words(data, out, *words, ranks=1))
    assert ended.code != 0
    assert "Traceback" not in ended.err
    return ended


@pytest.mark.drill
def test_a_teacher_that_does_not_fit_is_refused_before_training(digits: Path, teacher: Path, tmp_path: Path) -> None:
    for words, said in (
        (("distill.teacher=nowhere",), "nowhere"),
        (("distill.share=0.3",), "distill.teacher is missing"),
        ((f"distill.teacher={teacher}", "data.mean=[0.4,0.4,0.4]"), "was trained with data.mean"),
        ((f"distill.teacher={teacher}", "data.image_size=40", "data.augment.crop=none"), "data.image_size = 16"),
    ):
        assert said in refused(digits, tmp_path, *words).err


@pytest.mark.drill
def test_a_run_without_a_teacher_writes_nothing_of_one(teacher: Path) -> None:
    trainer = json.loads(next((teacher / "checkpoints").glob("step-*/trainer.json")).read_text())
    assert "teacher" not in trainer


@pytest.mark.drill
def test_soft_labels_are_trained_evaluated_and_inspected(digits: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_soft(digits / "images" / split, tmp_path / "shards" / split)
        packed = setformer("data", "pack", str(tmp_path / "shards" / split), str(tmp_path / "packed" / split))
        assert packed.code == 0, packed.err
    shown = setformer("data", "inspect", str(tmp_path / "packed" / "train"))
    assert shown.code == 0, shown.err
    assert "soft" in shown.out
    ended = setformer(*train_words(tmp_path / "packed", tmp_path / "runs", "data.augment.mixup=0.2", ranks=2))
    assert ended.code == 0, ended.err
    run = tmp_path / "runs" / "demo"
    assert min(loss for loss, _ in losses(run).values()) > 0.8  # the labels' entropy, which no model goes below
    assert setformer("eval", str(run)).code == 0
    image = sorted((digits / "images" / "val" / "2").iterdir())[0]
    assert setformer("predict", str(run), str(image), "--top", "3").code == 0


def write_soft(images: Path, root: Path) -> None:
    """Write a shard in which each digit is itself to 70 % and its neighbours to the rest."""
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(map(str, range(10))))
    with tarfile.open(root / "a.tar", "w") as tar:
        for number, path in enumerate(sorted(images.glob("*/*"))):
            label = int(path.parent.name)
            soft = {str(label): 0.7, str((label + 1) % 10): 0.2, str((label - 1) % 10): 0.1}
            members = (
                (path.suffix[1:], path.read_bytes()),
                ("cls", b"%d" % label),
                ("soft.json", json.dumps(soft).encode()),
            )
            for name, data in members:
                info = tarfile.TarInfo(f"{number:05d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_rectangular_images_train_and_predict(digits: Path, tmp_path: Path) -> None:
    own = ("data.image_width=24", "data.augment.crop=resized")
    ended = setformer(*train_words(digits, tmp_path, *own, ranks=1))
    assert ended.code == 0, ended.err
    image = sorted((digits / "images" / "val" / "2").iterdir())[0]
    shown = setformer("predict", str(tmp_path / "demo"), str(image), "--top", "3")
    assert shown.code == 0, shown.err
    exported = setformer("ckpt", "export", str(tmp_path / "demo"), str(tmp_path / "out"))
    assert exported.code == 0, exported.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 16, 24]


@pytest.mark.drill
def test_parts_of_deit_iii_resume_bit_by_bit_and_are_the_same_on_other_ranks(digits: Path, tmp_path: Path) -> None:
    for name, ranks, stage in (("whole", 2, 2), ("one", 1, 3)):
        ended = setformer(*train_words(digits, tmp_path / name, *DEIT, f"zero.stage={stage}", ranks=ranks))
        assert ended.code == 0, ended.err
    process = start(*train_words(digits, tmp_path / "parts", *DEIT, ranks=2))
    wait_for(tmp_path / "parts" / "demo" / "checkpoints" / "step-00000005" / "manifest.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    ended = setformer(*train_words(digits, tmp_path / "parts", *DEIT, ranks=2))
    assert ended.code == 0, ended.err
    whole, parts, one = (losses(tmp_path / name / "demo") for name in ("whole", "parts", "one"))
    assert parts == whole
    assert one.keys() == whole.keys()
    for place, (loss, _) in whole.items():
        assert one[place][0] == pytest.approx(loss, rel=1e-4), place
    shown = setformer(*train_words(digits, tmp_path / "new", *DEIT), "--dry-run")
    assert shown.code == 0, shown.err
    assert "in the first 8 steps, off in the last 14" in shown.out
