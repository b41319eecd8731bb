"""A user's mistake: one clear sentence, a non-zero exit code, no traceback, nothing half-written."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from dataloaders.packing.pack import PackOptions, pack_image_folder
from launch.testing.commands import Ended, losses, setformer, train_words
from setformer_dist.engine.deepspeed_engine import supported_dtypes


def assert_one_sentence(ended: Ended, code: int, *parts: str) -> None:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert len(ended.error_lines) == 1, ended.err
    for part in parts:
        assert part in ended.error_lines[0]


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    """A copy of the packed digits to damage."""
    target = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(digits / split, target / split)
    return target


@pytest.mark.parametrize(
    ("override", "code", "parts"),
    [
        ("optim.lr=inf", 2, ["optim.lr = inf", "finite number"]),
        ("optim.learning_rate=1e-3", 2, ["unknown key 'optim.learning_rate': did you mean optim.lr?"]),
        ("data.img_size=32", 2, ["did you mean data.image_size?"]),
        ("model.pretrained=true", 2, ["did you mean model.weights?"]),
        ("optim.lrr=1", 2, ["unknown key 'optim.lrr': did you mean optim.lr?"]),
        ("optim.lr=fast", 2, ["optim.lr = 'fast': input should be a valid number"]),
        ("batch.micro=7", 2, ["batch.micro = 7", "possible micro batches are 1, 2, 4, 8, 16, 32, 64"]),
        ("batch.global_size=4096", 2, ["4096", "1437"]),
        ("data.root=/no/such/folder", 3, ["/no/such/folder/train does not exist", "setformer data pack"]),
        ("model.args.attn.epsilonn=1", 2, ["unknown key", "did you mean attn.epsilon?"]),
    ],
)
def test_config_mistakes(digits: Path, tmp_path: Path, override: str, code: int, parts: list[str]) -> None:
    assert_one_sentence(setformer(*train_words(digits, tmp_path, override, ranks=1)), code, *parts)
    assert not (tmp_path / "demo").exists()


def test_a_precision_that_the_processor_lacks(digits: Path, tmp_path: Path) -> None:
    if "fp16" in supported_dtypes():
        pytest.skip("this processor computes fp16")
    words = train_words(digits, tmp_path, "precision.dtype=fp16", ranks=1)
    assert_one_sentence(setformer(*words), 2, "this cpu does not compute fp16")
    assert not (tmp_path / "demo").exists()


def test_more_ranks_than_samples_per_step(digits: Path, tmp_path: Path) -> None:
    ended = setformer(*train_words(digits, tmp_path, "batch.global_size=1", ranks=2))
    assert_one_sentence(ended, 2, "fewer samples per step than the 2 ranks")
    assert not (tmp_path / "demo").exists()


def test_missing_config() -> None:
    assert_one_sentence(
        setformer("train", "configs/runs/nosuch.toml"), 2, "does not exist; configs there:", "demo.toml"
    )


def test_empty_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    ended = setformer(*train_words(tmp_path / "data", tmp_path / "runs", ranks=1))
    assert_one_sentence(ended, 3, str(tmp_path / "data" / "train"), "setformer data pack")


def test_images_without_class_folders(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    for image in (digits / "images" / "train" / "3").iterdir():
        shutil.copy(image, tmp_path / "data" / "train")
    ended = setformer(*train_words(tmp_path / "data", tmp_path / "runs", ranks=1))
    assert_one_sentence(ended, 3, str(tmp_path / "data" / "train"), "class folder")


def test_a_shard_cut_short(copy: Path, tmp_path: Path) -> None:
    shard = copy / "train" / "shard-000000.tar"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    assert_one_sentence(setformer(*train_words(copy, tmp_path / "runs", ranks=1)), 3, "shard-000000.tar", "pack")


def damage_images(split: Path, count: int) -> None:
    """Overwrite the middle of the first `count` PNG files of a shard; its size stays."""
    shard = split / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    place = -1
    for _ in range(count):
        place = data.index(b"\x89PNG", place + 1)
        data[place + 40 : place + 60] = bytes(20)
    shard.write_bytes(data)


def test_an_image_that_does_not_decode_is_named_replaced_and_counted(copy: Path, tmp_path: Path) -> None:
    damage_images(copy / "train", 1)
    out = tmp_path / "runs"
    ended = setformer(*train_words(copy, out, "data.max_bad_share=0.01"))
    assert ended.code == 0, ended.err
    assert "1 damaged sample replaced" in ended.err
    logs = "".join(log.read_text() for log in (out / "demo" / "logs").iterdir())
    assert "shard-000000.tar" in logs
    assert '"substitutions": 1' in (out / "demo" / "metrics.jsonl").read_text()
    assert losses(out / "demo")


def test_too_many_damaged_images_stop_the_run(copy: Path, tmp_path: Path) -> None:
    damage_images(copy / "train", 400)
    ended = setformer(*train_words(copy, tmp_path / "runs", "data.max_bad_share=0.01"))
    assert_one_sentence(ended, 3, "max_bad_share")


def test_a_damaged_validation_image_stops_the_evaluation(copy: Path, tmp_path: Path) -> None:
    damage_images(copy / "val", 1)
    ended = setformer(*train_words(copy, tmp_path / "runs", "schedule.epochs=1", "eval.every_steps=2"))
    assert_one_sentence(ended, 3, "shard-000000.tar", "bad_validation")


def test_class_maps_that_differ(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits / "train", data / "train")
    images = tmp_path / "images"
    shutil.copytree(digits / "images" / "val", images)
    (images / "7").rename(images / "seven")
    pack_image_folder(images, data / "val", PackOptions())
    assert_one_sentence(
        setformer(*train_words(data, tmp_path / "runs", ranks=1)), 3, "label 7 is '7' in", "--classes-from"
    )


def test_a_run_folder_of_another_config_and_a_checkpoint_of_another_model(digits: Path, tmp_path: Path) -> None:
    assert setformer(*train_words(digits, tmp_path, ranks=1)).code == 0
    other = setformer(*train_words(digits, tmp_path, "optim.lr=0.1", ranks=1))
    assert_one_sentence(other, 2, "holds a run of another config", "optim.lr is 0.003 there and 0.1 here", "run.name")
    (tmp_path / "fewer").mkdir()
    none = setformer("predict", str(tmp_path / "demo"), str(tmp_path / "fewer"))
    assert_one_sentence(none, 3, "fewer is a folder without an image")
    for split in ("train", "val"):
        shutil.copytree(digits / "val", tmp_path / "fewer" / split)
    (tmp_path / "demo" / "config.json").unlink()
    for more in ((), ("--dry-run",)):
        wider = setformer(*train_words(digits, tmp_path, "model.args.embed_dim=96", ranks=1), *more)
        assert_one_sentence(wider, 4, "of another model", "embed_dim")
        moved = setformer(*train_words(tmp_path / "fewer", tmp_path, ranks=1), *more)
        assert_one_sentence(moved, 4, "was written with fingerprint")


def test_a_dry_run_without_data_says_so_before_its_figures(tmp_path: Path) -> None:
    ended = setformer(*train_words(tmp_path / "nowhere", tmp_path), "--dry-run")
    assert_one_sentence(ended, 3, "nowhere")
    heading, said, *figures = ended.out[ended.out.index("predicted") :].splitlines()
    assert "─" in heading
    assert said.startswith("The data do not exist or cannot be opened")
    assert "1000 classes are assumed" in said
    assert any(line.strip().startswith("parameters") for line in figures)


def test_a_dry_run_says_that_validation_samples_are_trained_on(digits: Path, tmp_path: Path) -> None:
    ended = setformer(*train_words(digits, tmp_path, "data.val=train"), "--dry-run")
    assert ended.code == 0, ended.err
    assert "1,437 of 1,437 validation samples have the bytes of a training sample" in " ".join(ended.out.split())


def test_port_in_use(digits: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = setformer(*train_words(digits, tmp_path), "--port", str(port))
    assert_one_sentence(ended, 5, f"port {port}")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["eval", "/no/such/run"], 4, "/no/such/run"),
        (["ckpt", "ls", "/no/such/run"], 4, "holds no checkpoints"),
        (["predict", "/no/such/run", "x.png"], 4, "/no/such/run"),
        (["eval", "/no/such/run", "--weights", "best"], 2, "not one of plain, ema, auto"),
        (["data", "pack", "/no/such/images", "/tmp/never"], 3, "/no/such/images"),
        (["train", "demo", "--ranks", "0"], 2, "greater than or equal to 1"),
        (["demo", "--ranks", "0"], 2, "greater than or equal to 1"),
        (["train", "dmeo"], 2, "did you mean demo?"),
        (["train", "nothing"], 2, "one of ade20k_tiny, "),
    ],
)
def test_other_commands(words: list[str], code: int, part: str) -> None:
    assert_one_sentence(setformer(*words), code, part)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "demo", "--lr", "1e-3"], "keys of the run config are given as key=value, so optim.lr=..."),
        (["train", "demo", "--batch-size", "64"], "so batch.global_size=..."),
        (["train", "demo", "--batch.global_size=64"], "so batch.global_size=..."),
        (["train", "demo", "--num-classes", "5"], "the number of classes comes from the data"),
        (["train", "demo", "--nosuch", "5"], "such as optim.lr=1e-3"),
        (["train"], "Missing argument"),
        (["fit", "demo"], "did you mean train?"),
        (["validate", "runs/demo"], "did you mean eval?"),
        (["runs", "list"], "No such command 'list'. Did you mean 'ls'? ("),
        (["data", "packs"], "No such command 'packs'. Did you mean 'pack'? ("),
        (["train", "demo", "--model", "soft_tiny"], "so model.name=..."),
        (["drill", "--out=~/drill"], "--out=~/drill: ~ is not expanded here"),
        (["train", "demo", "trainer.max_epochs=5"], "'trainer' with 'max_epochs': did you mean schedule.epochs?"),
        (["train", "demo", "model.num_classes=5"], "the number of classes comes from the data"),
        (["train", "demo", "++optim.lr=1"], "leave the + out"),
        (
            ["train", "demo", "data=data/photos"],
            "data is a table of keys, not 'data/photos': name a key of it, such as",
        ),
        (["train", "demo", f"zero.stage={'x' * 5000}"], "(5002 characters)"),
    ],
)
def test_words_of_other_programs_get_the_right_ones(words: list[str], part: str) -> None:
    assert_one_sentence(setformer(*words), 2, part)


def test_a_folder_of_the_name_of_a_shipped_config_hides_it_not(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert_one_sentence(
        setformer("train", "photos", "data.root=nosuch", cwd=tmp_path), 3, "nosuch/train does not exist"
    )


def test_an_error_of_several_lines_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    for name in ("a.jpg", "b\x1b[2J.jpg", "c\n  x.jpg"):
        (tmp_path / "in" / "cat" / name).write_text("no image")
    ended = setformer("data", "pack", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0")
    assert ended.code == 3
    assert re.search(r"\n  cat/a\.jpg: .*\n  cat/b\\x1b\[2J\.jpg: .*\n  cat/c\\+n  x\.jpg: ", ended.err), ended.err


def test_help_everywhere() -> None:
    for words in (["train"], ["eval"], ["predict"], ["doctor"], ["demo"], ["data", "pack"], ["ckpt", "ls"]):
        ended = setformer(*words, "--help")
        assert ended.code == 0
        assert "xample" in ended.out or words == ["doctor"], words
