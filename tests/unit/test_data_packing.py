"""Packing: reproducible, whole or absent, and plain WebDataset."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from dataloaders.packing.convert import pack_beton
from dataloaders.packing.pack import PackOptions, _write_shard, pack_image_folder, unfinished
from dataloaders.sources.shards import open_split
from launch.cli.data import app
from launch.testing.commands import allow_ctrl_c
from setformer_dist.core.errors import ConfigError, DataError


class Interrupted(BaseException):
    """Stands for Ctrl-C, which must not be loose in the process that runs the tests."""


SHARED = Path(os.environ.get("SETFORMER_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))

CLASSES = ("ant", "bee", "cow.boy")


def image_bytes(number, size=(12, 10), form="JPEG", mode="RGB"):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form, quality=90)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """20 images: per class six JPEG, in the second class also a PNG and a PNG that calls itself JPEG."""
    source = tmp_path / "photos"
    for label, name in enumerate(CLASSES):
        (source / name).mkdir(parents=True)
        for i in range(6):
            (source / name / f"img.{i}.JPEG").write_bytes(image_bytes(10 * label + i, (12 + i, 10 + label)))
    (source / "bee" / "real.png").write_bytes(image_bytes(91, form="PNG"))
    (source / "bee" / "false.jpg").write_bytes(image_bytes(92, form="PNG"))
    (source / "bee" / "notes.txt").write_text("no image")
    (source / "bee" / "._img.0.JPEG").write_bytes(b"what macOS leaves in archives")
    return source


def label_of(split, sample):
    return int(split.labels(np.array([sample])))


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def in_tar(folder, path, top=""):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        tar.add(folder, arcname=top or ".")
    return path


def test_original_bytes_labels_and_sizes_come_back(folder, tmp_path):
    result = pack_image_folder(folder, tmp_path / "out", PackOptions(samples_per_shard=6))
    assert not result.rejected
    assert result.notes == ["skipped: 1 file that is no image (1 .txt), 1 hidden or system file or folder (1 ._*)"]
    split = open_split(tmp_path / "out")
    assert split.classes == CLASSES
    assert split.num_samples == 20
    assert [shard.samples for shard in split.index.shards] == [6, 6, 6, 2]
    originals = sorted(p for p in folder.glob("*/*") if p.suffix != ".txt" and not p.name.startswith("."))
    for i, path in enumerate(originals):
        sample = split.read(i)
        assert sample.image == path.read_bytes()
        assert split.classes[label_of(split, i)] == path.parent.name
        assert "." not in split.key(i)
        with Image.open(path) as image:
            assert split.size(i) == (image.height, image.width)


@pytest.mark.parametrize("shuffle", [None, 3])
def test_same_bytes_whatever_workers_and_moment(folder, tmp_path, shuffle):
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        options = PackOptions(samples_per_shard=7, workers=workers, shuffle_seed=shuffle)
        pack_image_folder(folder, tmp_path / name, options)
        os.utime(folder / "ant" / "img.0.JPEG", (1, 1))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_directory_tar_and_tar_gz_pack_alike(folder, tmp_path):
    pack_image_folder(folder, tmp_path / "dir")
    pack_image_folder(in_tar(folder, tmp_path / "x.tar"), tmp_path / "tar")
    nested = pack_image_folder(in_tar(folder, tmp_path / "x.tar.gz", top="train"), tmp_path / "gz")
    assert contents(tmp_path / "dir") == contents(tmp_path / "tar") == contents(tmp_path / "gz")
    assert "class folders were found in train" in nested.notes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "gz", "photos", "tar", "x.tar", "x.tar.gz"]


def test_shuffle_packs_the_same_samples_in_another_order(folder, tmp_path):
    pack_image_folder(folder, tmp_path / "sorted")
    pack_image_folder(folder, tmp_path / "mixed", PackOptions(shuffle_seed=1))
    one, other = open_split(tmp_path / "sorted"), open_split(tmp_path / "mixed")
    bytes_of = [[split.read(i).image for i in range(20)] for split in (one, other)]
    assert bytes_of[0] != bytes_of[1]
    assert sorted(bytes_of[0]) == sorted(bytes_of[1])
    assert one.fingerprint != other.fingerprint


def test_shards_are_cut_by_size(tmp_path):
    (tmp_path / "s" / "a").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "s" / "a" / f"{i}.bmp").write_bytes(image_bytes(i, (500, 270), form="BMP"))  # 0.39 MiB
    pack_image_folder(tmp_path / "s", tmp_path / "out", PackOptions(mib_per_shard=1))
    assert [shard.samples for shard in open_split(tmp_path / "out").index.shards] == [2, 2, 1]


def test_stock_webdataset_reads_the_shards(folder, tmp_path):
    pack_image_folder(folder, tmp_path / "out", PackOptions(samples_per_shard=8))
    split = open_split(tmp_path / "out")
    urls = [str(tmp_path / "out" / shard.name) for shard in split.index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == split.num_samples
    for i, sample in enumerate(samples):
        ours = split.read(i)
        assert sample["__key__"] == split.key(i)
        assert sample["cls"] == label_of(split, i)
        (suffix,) = {"jpg", "png"} & set(sample)
        assert np.array_equal(np.asarray(sample[suffix]), np.asarray(Image.open(io.BytesIO(ours.image))))


def test_tar_listing_is_regular(folder, tmp_path):
    pack_image_folder(folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    stems = [m.name.split(".")[0] for m in members]
    assert stems == sorted(stems)
    assert {m.name.split(".", 1)[1] for m in members} == {"jpg", "png", "cls"}


def test_splits_are_chosen_by_name(folder, tmp_path):
    (tmp_path / "both" / "set").mkdir(parents=True)
    folder.rename(tmp_path / "both" / "set" / "train")
    (tmp_path / "both" / "set" / "test" / "bee").mkdir(parents=True)
    (tmp_path / "both" / "set" / "test" / "bee" / "0.jpg").write_bytes(image_bytes(5))
    with pytest.raises(DataError, match=r"several splits \(test, train\).*--split"):
        pack_image_folder(tmp_path / "both", tmp_path / "out")
    with pytest.raises(DataError, match="no folder 'val'"):
        pack_image_folder(tmp_path / "both", tmp_path / "out", PackOptions(split="val"))
    pack_image_folder(tmp_path / "both", tmp_path / "train", PackOptions(split="train"))
    options = PackOptions(split="test", classes_from=tmp_path / "train")
    result = pack_image_folder(in_tar(tmp_path / "both", tmp_path / "both.tar"), tmp_path / "test", options)
    assert result.index.classes == CLASSES
    assert result.notes[1:] == ["2 classes have no images, the first 'ant'"]
    assert label_of(open_split(tmp_path / "test"), 0) == 1


def test_class_map_from_a_file(folder, tmp_path):
    lines, listed = tmp_path / "classes.txt", tmp_path / "classes.json"
    lines.write_text("cow.boy\nant\nbee\n")
    listed.write_text(json.dumps(["cow.boy", "ant", "bee"]))
    for name, path in (("a", lines), ("b", listed)):
        pack_image_folder(folder, tmp_path / name, PackOptions(classes_file=path))
        assert label_of(open_split(tmp_path / name), 0) == 1
    for text, fault in (("ant\nbee\n", "'cow.boy' is not"), ("ant\nant\n", "twice"), ("\n", "must hold")):
        lines.write_text(text)
        with pytest.raises(DataError, match=fault):
            pack_image_folder(folder, tmp_path / "c", PackOptions(classes_file=lines))
    with pytest.raises(ConfigError, match="not both"):
        PackOptions(classes_file=lines, classes_from=tmp_path)


def test_damaged_images_fail_the_packing_by_name_or_are_left_out(folder, tmp_path):
    whole = (folder / "ant" / "img.1.JPEG").read_bytes()
    (folder / "ant" / "img.1.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "bee" / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 21 images cannot be packed(.|\n)*ant/img.1.JPEG(.|\n)*bee/empty.png"):
        pack_image_folder(folder, tmp_path / "out", PackOptions(samples_per_shard=4))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "photos"]
    result = pack_image_folder(folder, tmp_path / "out", PackOptions(skip_bad=True, samples_per_shard=4))
    assert "6 of 6 shards were finished by an earlier packing and taken over" in result.notes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "photos"]
    assert [name for name, _ in result.rejected] == ["ant/img.1.JPEG", "bee/empty.png"]
    split = open_split(tmp_path / "out")
    assert split.num_samples == 19
    assert [row[0] for row in split.index.options["rejected"]] == ["ant/img.1.JPEG", "bee/empty.png"]


def test_without_strict_only_headers_are_read(folder, tmp_path):
    path = folder / "ant" / "img.1.JPEG"
    path.write_bytes(path.read_bytes()[:-40])
    pack_image_folder(folder, tmp_path / "out", PackOptions(strict=False))
    assert open_split(tmp_path / "out").num_samples == 20


def test_destination_in_use_is_refused_and_force_replaces_only_our_files(folder, tmp_path):
    out = tmp_path / "out"
    pack_image_folder(folder, out)
    before = contents(out)
    with pytest.raises(DataError, match="not empty"):
        pack_image_folder(folder, out)
    pack_image_folder(folder, out, PackOptions(force=True, samples_per_shard=5))
    assert len(open_split(out).index.shards) == 4
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        pack_image_folder(folder, out, PackOptions(force=True))
    assert (out / "thesis.tex").exists()
    assert contents(out) != before


def test_nothing_to_pack(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        pack_image_folder(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        pack_image_folder(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "loose.jpg").write_bytes(image_bytes(0))
    with pytest.raises(DataError, match="none in a class folder"):
        pack_image_folder(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "text.tar").write_text("this is no archive")
    with pytest.raises(DataError, match="not a whole tar"):
        pack_image_folder(tmp_path / "text.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cut_archive_is_refused(folder, tmp_path):
    packed = in_tar(folder, tmp_path / "x.tar.gz")
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(DataError, match="not a whole tar"):
        pack_image_folder(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hard_links_in_a_tar_are_images_too(folder, tmp_path):
    os.link(folder / "ant" / "img.0.JPEG", folder / "ant" / "linked.jpg")
    pack_image_folder(in_tar(folder, tmp_path / "x.tar"), tmp_path / "tar")
    pack_image_folder(folder, tmp_path / "dir")
    assert open_split(tmp_path / "tar").num_samples == 21
    assert contents(tmp_path / "dir") == contents(tmp_path / "tar")


def test_what_cannot_be_read_is_not_skipped(folder, tmp_path):
    (folder / "ant" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.jpg in the source cannot be read"):
        pack_image_folder(folder, tmp_path / "out")


def test_full_disk_is_one_sentence_and_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"nothing was kept: .*No space left"):
        pack_image_folder(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("name", ["out", "out.beton"])
def test_full_disk_beneath_the_list_of_images_is_one_sentence(folder, tmp_path, name):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(DataError, match=rf"packing into .*{name} failed, nothing was kept: .*disk"):
            (pack_beton if name.endswith(".beton") else pack_image_folder)(folder, tmp_path / name, PackOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_damaged_compressed_archives_are_one_sentence(folder, tmp_path, kind):
    whole = tmp_path / f"x.tar.{kind}"
    with tarfile.open(whole, f"w:{kind}") as tar:
        for number in range(40):  # what is looked through before the first file
            empty = tarfile.TarInfo(f"empty-{number}")
            empty.type = tarfile.DIRTYPE
            tar.addfile(empty)
        tar.add(folder, arcname=".")
    data = whole.read_bytes()
    damaged = [data[:end] for end in (*range(0, 400, 30), *range(400, len(data) - 20, len(data) // 6))]
    damaged += [data[:place] + bytes(16) + data[place + 16 :] for place in range(20, len(data) - 40, len(data) // 6)]
    for content in damaged:
        whole.write_bytes(content)
        for name in ("out", "out.beton"):
            run = CliRunner().invoke(app, ["pack", str(whole), str(tmp_path / name), "--workers", "0"])
            assert isinstance(run.exception, DataError), run.exc_info
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", whole.name]


_KILLED = """
import os, signal, sys
from pathlib import Path
from dataloaders.packing.pack import PackOptions, pack_image_folder
if __name__ == "__main__":
    source, destination, die_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rename, renamed = Path.rename, []
    def counted(self, target):
        if {self, Path(target)} & {destination}:
            renamed.append(target)
            if len(renamed) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    Path.rename = counted
    pack_image_folder(source, destination, PackOptions(force=True, samples_per_shard=5))
"""


@pytest.mark.parametrize("die_at", [1, 2])
def test_a_kill_while_a_split_is_replaced_keeps_the_old_one(folder, tmp_path, die_at):
    out = tmp_path / "out"
    pack_image_folder(folder, out)
    before = contents(out)
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(out), str(die_at)], timeout=60)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="no folder 'nowhere'"):
        pack_image_folder(folder, out, PackOptions(force=True, split="nowhere"))
    assert contents(out) == before
    pack_image_folder(folder, out, PackOptions(force=True, samples_per_shard=5))
    assert len(open_split(out).index.shards) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "photos"]


def test_two_packings_into_one_destination_do_not_mix(folder, tmp_path):
    def pack_again(total):
        with pytest.raises(DataError, match="another process is packing"):
            pack_image_folder(folder, tmp_path / "out")

    pack_image_folder(folder, tmp_path / "out", on_start=pack_again)
    assert open_split(tmp_path / "out").num_samples == 20


def test_failure_half_way_is_gone_on_with(folder, tmp_path, monkeypatch):
    pack_image_folder(folder, tmp_path / "whole", PackOptions(samples_per_shard=5))
    written = []

    def fails_at_third(origin, plan, *rest):
        if len(written) == 2:
            raise Interrupted
        written.append(plan.path)
        return _write_shard(origin, plan, *rest)

    monkeypatch.setattr("dataloaders.packing.pack._write_shard", fails_at_third)
    with pytest.raises(Interrupted):
        pack_image_folder(folder, tmp_path / "out", PackOptions(samples_per_shard=5))
    assert len(written) == 2
    assert not (tmp_path / "out").exists()
    assert "2 finished shards are kept" in unfinished(tmp_path / "out")
    monkeypatch.undo()
    result = pack_image_folder(folder, tmp_path / "out", PackOptions(samples_per_shard=5))
    assert "2 of 4 shards were finished by an earlier packing and taken over" in result.notes
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert unfinished(tmp_path / "out") == ""


_PACK = """
import sys
from pathlib import Path
from dataloaders.packing.pack import PackOptions, pack_image_folder
if __name__ == "__main__":
    options = PackOptions(samples_per_shard=20, workers=int(sys.argv[3]))
    pack_image_folder(Path(sys.argv[1]), Path(sys.argv[2]), options)
"""


@pytest.mark.parametrize(
    ("how", "workers"), [(signal.SIGKILL, 2), pytest.param(signal.SIGINT, 2, marks=pytest.mark.drill)]
)
def test_killed_packing_leaves_nothing_that_opens(tmp_path, how, workers):
    (tmp_path / "s" / "a").mkdir(parents=True)
    data = image_bytes(0, (600, 600), form="PNG")
    for i in range(200):
        (tmp_path / "s" / "a" / f"{i}.png").write_bytes(data)
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, "-c", _PACK, str(tmp_path / "s"), str(out), str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=allow_ctrl_c, start_new_session=True)
    deadline = time.monotonic() + 150
    while not list(work.glob("shard-000001.rows")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(timeout=60)
    process.stderr.close()
    assert not out.exists()
    with pytest.raises(DataError, match="does not exist"):
        open_split(out)
    with pytest.raises(DataError, match="no index"):
        open_split(work)
    # The helpers of the killed one must not write on; what it finished is taken over, the rest done again.
    result = pack_image_folder(tmp_path / "s", out, PackOptions(samples_per_shard=20))
    assert any("were finished by an earlier packing" in note for note in result.notes)
    pack_image_folder(tmp_path / "s", tmp_path / "whole", PackOptions(samples_per_shard=20))
    assert contents(out) == contents(tmp_path / "whole")
    assert not work.exists()


@pytest.mark.drill
def test_killed_at_any_moment_it_comes_to_the_same(tmp_path):
    """kill -9 at random moments, again and again, until a packing comes to its end."""
    (tmp_path / "s" / "a").mkdir(parents=True)
    for i in range(300):
        (tmp_path / "s" / "a" / f"{i:03d}.png").write_bytes(image_bytes(i, (300, 300), form="PNG"))
    pack_image_folder(tmp_path / "s", tmp_path / "whole", PackOptions(samples_per_shard=20))
    command = [sys.executable, "-c", _PACK, str(tmp_path / "s"), str(tmp_path / "out"), "2"]
    moments = np.random.default_rng(0).uniform(0.02, 0.6, 12)
    kills = 0
    for moment in [*moments.tolist(), None]:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        if moment is not None:
            while process.poll() is None and not (tmp_path / ".out.partial").exists():
                time.sleep(0.01)
            time.sleep(moment)
            kills += process.poll() is None
            process.kill()
        process.communicate(timeout=120)
        if (tmp_path / "out").exists():
            break
        time.sleep(1.0)  # its helpers notice within a second; until then they hold no lock but may finish a file
    assert kills >= 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_cifar10_packs_whole(tmp_path):
    archive = SHARED / "cifar10_test.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive.name} is absent: set SETFORMER_SHARED_DATA")
    result = pack_image_folder(archive, tmp_path / "val")
    assert result.notes == ["class folders were found in test"]
    split = open_split(tmp_path / "val")
    assert split.classes[0] == "airplane"
    assert np.bincount(split.index.columns["label"]).tolist() == [1000] * 10
    assert set(split.index.columns["width"].tolist()) == {32}


def test_command_line(folder, tmp_path):
    run = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "out"), "--workers", "0"])
    assert run.exit_code == 0, run.output
    assert "packed 20 images of 3 classes into 1 shard (" in run.output
    run = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "out"), "--workers", "0"])
    assert isinstance(run.exception, DataError)
    run = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert "all whole (20 samples decoded, 1 shard compared" in run.output
    help_text = CliRunner().invoke(app, ["pack", "--help"]).output
    assert "setformer data pack" in help_text
    assert "--classes-from" in help_text
