"""`setformer data` as a user starts it: what it prints, how it ends, what it leaves behind."""

import hashlib
import io
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.sources.shards import open_split
from launch.cli.data import app
from launch.testing.commands import Ended, assert_gone, children, setformer, start
from setformer_dist.core.errors import SetformerError


def image(number, size=(40, 30), form="JPEG"):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


@pytest.fixture
def photos(tmp_path):
    for i in range(12):
        folder = tmp_path / "photos" / ("ant", "bee")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.jpg").write_bytes(image(i))
    return tmp_path / "photos"


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def data(*words):
    """Run a command within this process: each start of another would import torch again."""
    run = CliRunner().invoke(app, list(map(str, words)))
    error = run.exception if isinstance(run.exception, SetformerError) else None
    assert error or run.exception is None or isinstance(run.exception, SystemExit), run.exc_info
    errors = [f"error: {error}"] if error else []
    return Ended(error.exit_code if error else run.exit_code, run.stdout, "\n".join([run.stderr, *errors]))


def test_from_photographs_to_checked_data_and_back(photos, tmp_path):
    ended = data("pack", photos, tmp_path / "train", "--samples-per-shard", 5, "--workers", 0)
    assert (ended.code, ended.error_lines) == (0, [])
    assert "packed 12 images of 2 classes into 3 shards" in ended.out

    ended = data("verify", tmp_path / "train", photos, "--workers", 0)
    assert ended.code == 0
    assert ended.out.count("all whole (12 samples decoded") == 2

    ended = data("inspect", tmp_path / "train", "--sheet", tmp_path / "s.html", "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert (found["samples"], found["counts"], found["formats"]) == (12, [6, 6], {"JPEG": 12})
    assert (tmp_path / "s.html").read_text().count("data:image/jpeg") == 12

    assert data("convert", tmp_path / "train", tmp_path / "x.beton", "--workers", 0).code == 0
    assert data("convert", tmp_path / "x.beton", tmp_path / "again", "--workers", 0).code == 0
    one, two = open_split(tmp_path / "train"), open_split(tmp_path / "again")
    assert [one.read(i).image for i in range(12)] == [two.read(i).image for i in range(12)]

    ended = data("bench", tmp_path / "x.beton", "--seconds", 0.1, "--threads", 2, "--image-size", 32, "--json")
    measured = json.loads(ended.out)
    assert (ended.code, measured["images"], measured["image_size"]) == (0, 12, 32)
    assert "images/s" in data("bench", tmp_path / "train", "--seconds", 0.1, "--threads", 1, "--policy", "3augment").out


def test_a_share_is_held_out(photos, tmp_path):
    words = ("pack", photos, tmp_path / "train", "--hold-out", 0.25, tmp_path / "val", "--workers", 0)
    ended = data(*words)
    assert (ended.code, ended.error_lines) == (0, [])
    assert f"packed 8 images of 2 classes into 1 shard (0.0 MiB) in {tmp_path / 'train'}" in ended.out
    assert f"packed 4 images of 2 classes into 1 shard (0.0 MiB) in {tmp_path / 'val'}" in ended.out
    ended = data(*words)
    assert ended.code == 3
    assert "train is not empty" in ended.error_lines[0]
    before = contents(tmp_path / "val")
    assert data(*words, "--force").code == 0
    assert contents(tmp_path / "val") == before
    assert data(*words, "--force", "--hold-out-seed", 1).code == 0
    assert contents(tmp_path / "val") != before
    (photos / "cow").mkdir()
    (photos / "cow" / "1.jpg").write_bytes(image(99))
    ended = data(*words, "--force")
    assert "packed 9 images of 3 classes" in ended.out
    assert f"note: {tmp_path / 'val'}: 1 class has no images, the first 'cow'" in ended.out
    assert "packed 4 images of 2 of 3 classes" in ended.out


def test_shards_of_others_are_indexed(photos, tmp_path):
    pack_image_folder(photos, tmp_path / "p", PackOptions(samples_per_shard=6))
    for name in ("index.json", "index.safetensors"):
        (tmp_path / "p" / name).unlink()
    ended = data("index", f"{tmp_path}/p/shard-{{000000..000001}}.tar", "--workers", 0)
    assert (ended.code, ended.error_lines) == (0, [])
    assert "indexed 12 samples of 2 classes in 2 shards" in ended.out
    ended = data("index", f"{tmp_path}/p/train-*.tar")
    assert ended.code == 3
    assert "no shard matches" in ended.err


def test_verify_ends_with_4_for_damage_and_2_for_mistakes(photos, tmp_path):
    pack_image_folder(photos, tmp_path / "train", PackOptions())
    shard = tmp_path / "train" / "shard-000000.tar"
    place = int(open_split(tmp_path / "train").index.columns["offset"][7]) + 50
    changed = bytearray(shard.read_bytes())
    changed[place] ^= 1
    shard.write_bytes(changed)
    ended = data("verify", tmp_path / "train", "--workers", 0)
    assert ended.code == 4
    assert "damaged: shard-000000.tar 000000007-" in ended.out
    ended = data("verify", tmp_path / "train", "--workers", 0, "--json")
    assert ended.code == 4
    assert [row["kind"] for row in json.loads(ended.out)[0]["damaged"]] == ["shard", "checksum"]
    ended = setformer("data", "verify", str(tmp_path / "train"), "--workers", "2")
    assert (ended.code, ended.error_lines) == (4, [])
    (tmp_path / "train" / "index.json").write_text("{")
    assert data("verify", tmp_path / "train").code == 4
    for path in (tmp_path / "nowhere", tmp_path):
        ended = data("verify", path)
        assert (ended.code, len(ended.error_lines)) == (2, 1)


@pytest.mark.parametrize(
    ("words", "code", "fault"),
    [
        (("pack", "nowhere", "{photos}/../out", "--workers", "0"), 3, "source nowhere does not exist"),
        (("pack", "{photos}", "out", "--raw", "64"), 2, "--raw stores pixels"),
        (("pack", "{photos}", "out", "--length", "64"), 2, "--length is for texts"),
        (("pack", "{photos}", "out", "--void", "3"), 2, "--void is a value"),
        (("pack", "{photos}", "out", "--quality", "300"), 2, "--quality from 1 to 100"),
        (("pack", "{photos}", "out", "--split", "val"), 3, "no folder 'val'"),
        (("pack", "{photos}", "out", "--hold-out", "10", "val"), 2, "--hold-out 10: a share is above 0 and below 1"),
        (("pack", "{photos}", "out", "--hold-out", "0.1", "out"), 2, "needs two folders"),
        (("pack", "{photos}", "out", "--hold-out", "0.1", "val.beton"), 2, "name two folders"),
        (("pack", "{photos}", "out", "--hold-out", "0.1", "val", "--raw", "0"), 2, "name two folders"),
        (("pack", "{photos}", "out", "--hold-out-seed", "1"), 2, "--hold-out-seed is for --hold-out"),
        (("pack", "{photos}", "out", "--hold-out", "0.1", "val", "--hold-out-seed", "-1"), 2, "must be at least 0"),
        (("pack", "{photos}/../a.tsv", "out", "--hold-out", "0.1", "val"), 2, "--hold-out divides images"),
        (("inspect", "nowhere"), 3, "does not exist"),
        (("inspect", "{photos}", "--sheet", "x.gif"), 2, "must end in .html or .png"),
        (("convert", "{photos}/ant", "{photos}/out"), 3, "holds images and no shards"),
        (("bench", "nowhere"), 3, "does not exist"),
        (("bench", "{photos}", "--policy", "3a"), 2, "input should be 'none', 'trivialaugment' or '3augment'"),
        (("bench", "{photos}", "--image-size", "0"), 2, "--image-size must be from 1 to 65536"),
    ],
)
def test_mistakes_are_one_sentence(photos, words, code, fault):
    (photos.parent / "a.tsv").write_text("sentence\tlabel\na word\t0\n")
    ended = data(*(word.format(photos=photos) for word in words))
    assert ended.code == code, ended.err
    assert len(ended.error_lines) == 1
    assert fault in ended.error_lines[0]


@pytest.mark.parametrize(
    "words",
    [
        ("pack", "{photos}", "out", "--workers", "-1"),
        ("pack", "{photos}", "out.beton", "--raw", "-1"),
        ("pack", "{photos}", "out", "--length", "-1"),
        ("index", "{photos}/*.tar", "--workers", "-1"),
        ("verify", "{photos}", "--workers", "-1"),
        ("convert", "{photos}", "out.beton", "--workers", "-1"),
    ],
)
def test_numbers_below_zero_are_mistakes(photos, words):
    ended = data(*(word.format(photos=photos) for word in words))
    assert ended.code == 2
    assert words[-2] in ended.err


@pytest.mark.parametrize("command", ["pack", "index", "verify", "inspect", "convert", "bench"])
def test_help_has_examples(command):
    ended = data(command, "--help")
    assert ended.code == 0
    assert f"setformer data {command}" in ended.out


def test_ctrl_c_keeps_finished_shards_and_says_how_to_resume(tmp_path):
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    picture = image(0, (500, 500), "PNG")
    for i in range(160):
        (folder / f"{i:03d}.png").write_bytes(picture)
    words = ("data", "pack", str(tmp_path / "photos"), str(tmp_path / "out"), "--samples-per-shard", "20")
    process = start(*words)
    limit = time.monotonic() + 120
    while not list((tmp_path / ".out.partial").glob("shard-000002.rows")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.02)
    helpers = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert " kept in" in said
    assert "the same command resumes" in said
    assert "Traceback" not in said
    assert_gone(helpers)
    assert not (tmp_path / "out").exists()
    ended = setformer(*words)
    assert ended.code == 0
    assert "were finished by an earlier packing and taken over" in ended.out
    pack_image_folder(tmp_path / "photos", tmp_path / "whole", PackOptions(samples_per_shard=20))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
