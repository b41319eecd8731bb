"""Holding out: exact shares by a rule of seed and names alone; two splits that share nothing but their classes."""

import hashlib
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataloaders.packing.hold_out import HoldOut, is_held_out, pack_held_out
from dataloaders.packing.pack import PackOptions, _write_shard, pack_image_folder, unfinished
from dataloaders.packing.verify import verify
from dataloaders.sources.shards import open_split
from setformer_dist.core.errors import ConfigError, DataError


class Interrupted(BaseException):
    """Stands for Ctrl-C, which must not be loose in the process that runs the tests."""


def names_held(names, how, label=0):
    held = is_held_out([(label, name) for name in names], how)
    return {name for name, out in zip(names, held, strict=True) if out}


def named(count, folder="ant"):
    return [f"{folder}/{number:04d}.jpg" for number in range(count)]


def write_images(root, **counts):
    for name, count in counts.items():
        for number in range(count):
            path = root / name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([*name.encode(), number]).integers(0, 256, (7, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", ant=23, bee=10, cow=4, dog=1)


def images_of(folder):
    split = open_split(folder)
    labels = split.labels(np.arange(split.num_samples)).tolist()
    return {split.read(i).image: split.classes[label] for i, label in enumerate(labels)}


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("share", "count", "held"),
    [(0.1, 1, 0), (0.1, 2, 1), (0.1, 4, 1), (0.1, 14, 1), (0.1, 15, 2), (0.1, 1000, 100), (0.5, 3, 2), (0.9, 2, 1),
     (0.999, 10, 9), (0.001, 10, 1)],
)  # fmt: skip
def test_each_class_gives_its_share_at_least_one_and_not_all(share, count, held):
    others = [(1, name) for name in named(40, "bee")]
    found = is_held_out([*others, *((0, name) for name in named(count))], HoldOut(share))
    assert found[40:].sum() == held


def test_the_rule_stays_what_it_is():
    """A split that was packed once is packed again on any machine, also by a later version."""
    assert names_held(named(30), HoldOut(0.1)) == {"ant/0007.jpg", "ant/0019.jpg", "ant/0023.jpg"}
    assert names_held(named(30), HoldOut(0.1, seed=7)) == {"ant/0002.jpg", "ant/0007.jpg", "ant/0019.jpg"}
    digest = {n: hashlib.sha256(b"7\0" + n.encode()).digest() for n in named(30)}
    assert names_held(named(30), HoldOut(0.1, seed=7)) == set(sorted(named(30), key=digest.__getitem__)[:3])


def test_neither_order_nor_other_classes_change_it():
    mine, others = [(0, name) for name in named(50)], [(3, name) for name in named(70, "bee")]
    mixed = [*mine, *others]
    random.Random(1).shuffle(mixed)
    held = {
        name for (label, name), out in zip(mixed, is_held_out(mixed, HoldOut(0.2)), strict=True) if out and not label
    }
    assert held == names_held(named(50), HoldOut(0.2))
    assert names_held(named(50), HoldOut(0.2), label=9) == held  # classes before it were added
    assert len(names_held(named(50), HoldOut(0.2, seed=1)) - held) > 3


@given(count=st.integers(1, 60), share=st.floats(0.001, 0.999), seed=st.integers(0, 5), new=st.text(max_size=8))
def test_one_image_more_moves_at_most_one_other(count, share, seed, new):
    names, how = named(count), HoldOut(share, seed)
    before, after = names_held(names, how), names_held([*names, new], how)
    assert len((before ^ after) - {new}) <= 1


def test_names_that_are_no_utf8():
    assert names_held(["a/\udcff.jpg", "a/b.jpg"], HoldOut(0.5)) in ({"a/\udcff.jpg"}, {"a/b.jpg"})


@pytest.mark.parametrize("share", [0, 1, -0.1, 10, float("nan"), float("inf")])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises(ConfigError, match=r"a share is above 0 and below 1, such as 0\.1"):
        HoldOut(share)


def test_a_seed_is_not_negative():
    with pytest.raises(ConfigError, match="--hold-out-seed must be at least 0"):
        HoldOut(0.1, -1)


# -------------------------------------------------------------------------------------------------------- packing


def test_two_whole_splits_that_share_only_classes(photos, tmp_path):
    done = []
    results = pack_held_out(
        photos, tmp_path / "train", tmp_path / "val", HoldOut(0.1), PackOptions(samples_per_shard=6), done.append,
        done.append
    )  # fmt: skip
    assert (done[0], sum(done[1:])) == (38, 38)
    train, val = images_of(tmp_path / "train"), images_of(tmp_path / "val")
    assert not train.keys() & val.keys()
    assert train | val == {path.read_bytes(): path.parent.name for path in photos.rglob("*.png")}
    assert sorted(val.values()) == ["ant"] * 2 + ["bee", "cow"]
    for result, name in zip(results, ("train", "val"), strict=True):
        split = open_split(tmp_path / name)
        assert split.classes == ("ant", "bee", "cow", "dog")
        assert split.index.options["hold_out"].items() >= {"share": 0.1, "seed": 0}.items()
        assert [split.key(i)[:10] for i in range(split.num_samples)] == [f"{i:09d}-" for i in range(split.num_samples)]
        assert not verify(str(tmp_path / name)).damaged
        assert result.index.fingerprint == split.fingerprint
    assert [result.notes for result in results] == [[], ["1 class has no images, the first 'dog'"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "train", "val"]


def test_the_same_two_from_folder_tar_workers_and_shuffled(photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as tar:
        tar.add(photos, arcname="2026/photos")
    pack_held_out(photos, tmp_path / "a", tmp_path / "b", HoldOut(0.2))
    pack_held_out(tmp_path / "photos.tar.gz", tmp_path / "c", tmp_path / "d", HoldOut(0.2), PackOptions(workers=2))
    pack_held_out(photos, tmp_path / "e", tmp_path / "f", HoldOut(0.2), PackOptions(shuffle_seed=1))
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    assert contents(tmp_path / "b") == contents(tmp_path / "d")
    assert images_of(tmp_path / "b") == images_of(tmp_path / "f")
    assert list(images_of(tmp_path / "a")) != list(images_of(tmp_path / "e"))


def test_more_images_leave_other_classes_as_they_were(photos, tmp_path):
    pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.2))
    before = images_of(tmp_path / "val")
    write_images(tmp_path / "more", aardvark=9, ant=24)
    for path in (tmp_path / "more").iterdir():
        for image in path.iterdir():
            if not (target := photos / path.name / image.name).exists():
                target.parent.mkdir(exist_ok=True)
                image.rename(target)
    pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.2), PackOptions(force=True))
    after = images_of(tmp_path / "val")
    assert {i for i, name in after.items() if name in ("bee", "cow")} == {
        i for i, name in before.items() if name in ("bee", "cow")
    }
    assert len({i for i, name in before.items() if name == "ant"} - after.keys()) <= 1
    assert sum(name == "aardvark" for name in after.values()) == 2


def test_other_kinds_of_sources(photos, tmp_path):
    pack_image_folder(photos, tmp_path / "whole")
    pack_held_out(tmp_path / "whole", tmp_path / "a", tmp_path / "b", HoldOut(0.1))  # a container
    assert images_of(tmp_path / "a") | images_of(tmp_path / "b") == images_of(tmp_path / "whole")
    assert len(images_of(tmp_path / "b")) == 4
    pack_held_out(photos, tmp_path / "c", tmp_path / "d", HoldOut(0.1), PackOptions(labels=False))
    assert [len(images_of(tmp_path / name)) for name in "cd"] == [34, 4]
    pack_held_out(photos, tmp_path / "e", tmp_path / "f", HoldOut(0.1), PackOptions(tiles=16))
    assert not verify(str(tmp_path / "f")).damaged
    listed = tmp_path / "classes.txt"
    listed.write_text("zebra\ndog\ncow\nbee\nant\n")
    pack_held_out(photos, tmp_path / "g", tmp_path / "h", HoldOut(0.1), PackOptions(classes_file=listed))
    assert open_split(tmp_path / "h").classes == ("zebra", "dog", "cow", "bee", "ant")


def test_masks_of_both_splits_have_the_same_classes(tmp_path):
    for number in range(6):
        for folder, mode, value in (("images", "RGB", 50 + number), ("masks", "L", number)):
            path = tmp_path / "streets" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (8, 8), value if mode == "L" else (value, 0, 0)).save(path)
    pack_held_out(tmp_path / "streets", tmp_path / "a", tmp_path / "b", HoldOut(0.3), PackOptions(masks="masks"))
    train, val = open_split(tmp_path / "a"), open_split(tmp_path / "b")
    assert (train.num_samples, val.num_samples) == (4, 2)
    assert train.classes == val.classes == tuple(f"class {number}" for number in range(6))


def test_an_image_that_is_there_twice_is_said(photos, tmp_path):
    held = names_held([f"ant/{i:02d}.png" for i in range(23)], HoldOut(0.1))
    train = next(p for p in sorted((photos / "ant").iterdir()) if f"ant/{p.name}" not in held)
    (photos / min(held)).write_bytes(train.read_bytes())
    _, result = pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.1))
    assert "1 validation image has the bytes of a training image (the first: " in result.notes[-1]


@pytest.mark.parametrize("failing", [1, 5, 7])  # in the training set, at its last shard, in the validation set
def test_a_stopped_packing_is_gone_on_with(photos, tmp_path, monkeypatch, failing):
    options = PackOptions(samples_per_shard=5)
    pack_held_out(photos, tmp_path / "a", tmp_path / "b", HoldOut(0.2), options)
    written = []

    def fails(origin, plan, *rest):
        if len(written) == failing:
            raise Interrupted
        written.append(plan.path)
        return _write_shard(origin, plan, *rest)

    train, val = tmp_path / "train", tmp_path / "val"
    monkeypatch.setattr("dataloaders.packing.pack._write_shard", fails)
    with pytest.raises(Interrupted):
        pack_held_out(photos, train, val, HoldOut(0.2), options)
    monkeypatch.undo()
    assert not train.exists()
    assert not val.exists()
    said = unfinished(train, val)
    assert said.startswith(f"{failing} finished shard")
    assert (".val.partial" in said) == (failing > 6)
    results = pack_held_out(photos, train, val, HoldOut(0.2), options)
    assert any("finished by an earlier packing" in note for note in results[failing > 6].notes)
    assert (contents(train), contents(val)) == (contents(tmp_path / "a"), contents(tmp_path / "b"))
    assert unfinished(train, val) == ""


def test_a_kill_between_the_two_names_is_mended_by_the_next_packing(photos, tmp_path):
    train, val = tmp_path / "train", tmp_path / "val"
    pack_held_out(photos, train, val, HoldOut(0.2))
    before = contents(val)
    val.rename(tmp_path / ".val.partial")
    with pytest.raises(DataError, match="are complete now; replace them with --force"):
        pack_held_out(photos, train, val, HoldOut(0.2))
    assert contents(val) == before
    val.rename(tmp_path / ".val.partial")
    pack_held_out(photos, train, val, HoldOut(0.3), PackOptions(force=True))
    assert len(images_of(val)) == 7 + 3 + 1
    # A validation set of another training set gets no name next to this one.
    pack_held_out(photos, tmp_path / "other", tmp_path / ".val.partial", HoldOut(0.2, 1))
    for name in ("val", "other"):
        (tmp_path / name).rename(tmp_path / f"not {name}")
    with pytest.raises(DataError, match="train is not empty"):
        pack_held_out(photos, train, val, HoldOut(0.2))
    assert not val.exists()


@pytest.mark.parametrize("old", [False, True])
def test_both_get_their_names_or_none(photos, tmp_path, monkeypatch, old):
    train, val = tmp_path / "train", tmp_path / "val"
    before = {}
    if old:
        pack_held_out(photos, train, val, HoldOut(0.2))
        before = {folder: contents(folder) for folder in (train, val)}
    rename = Path.rename

    def fails(path, target):
        if path.name == ".val.partial":
            raise OSError(5, "a disk that fails")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(DataError, match="a disk that fails"):
        pack_held_out(photos, train, val, HoldOut(0.5), PackOptions(force=True))
    assert {folder: contents(folder) for folder in (train, val) if folder.exists()} == before


def test_another_seed_takes_over_nothing_of_a_stopped_packing(photos, tmp_path):
    (photos / "ant" / "00.png").write_bytes(b"no image")
    for seed in (0, 1):
        with pytest.raises(DataError, match="cannot be packed"):
            pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.3, seed))
    (photos / "ant" / "00.png").unlink()
    pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.3, 1))
    assert not images_of(tmp_path / "train").keys() & images_of(tmp_path / "val").keys()
    assert len(images_of(tmp_path / "train")) + len(images_of(tmp_path / "val")) == 37


def test_damaged_images_of_both_splits_are_named_at_once(photos, tmp_path):
    held = min(names_held([f"ant/{i:02d}.png" for i in range(23)], HoldOut(0.1)))
    others = [f"bee/{i:02d}.png" for i in range(10)]
    train = next(name for name in others if name not in names_held(others, HoldOut(0.1)))
    for name in (held, train):
        (photos / name).write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 38 images cannot be packed") as caught:
        pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.1))
    assert held in str(caught.value)
    assert train in str(caught.value)
    results = pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.1), PackOptions(skip_bad=True))
    assert [[name for name, _ in result.rejected] for result in results] == [[train], [held]]


def test_nothing_is_written_where_nothing_can_be_held_out(tmp_path):
    write_images(tmp_path / "photos", ant=1, bee=1)
    with pytest.raises(DataError, match="none of its classes has two images"):
        pack_held_out(tmp_path / "photos", tmp_path / "train", tmp_path / "val", HoldOut(0.5))
    write_images(tmp_path / "photos", bee=2)
    for name in names_held(["bee/00.png", "bee/01.png"], HoldOut(0.5)):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 1 images can be decoded"):
        pack_held_out(
            tmp_path / "photos", tmp_path / "train", tmp_path / "val", HoldOut(0.5), PackOptions(skip_bad=True)
        )
    assert not (tmp_path / "train").exists()
    assert not (tmp_path / "val").exists()


@pytest.mark.parametrize(("train", "val"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "x/../a")])
def test_two_folders_neither_within_the_other(photos, tmp_path, train, val):
    with pytest.raises(ConfigError, match="needs two folders, neither within the other"):
        pack_held_out(photos, tmp_path / train, tmp_path / val, HoldOut(0.1))


@pytest.mark.parametrize("taken", ["train", "val"])
def test_a_destination_in_use_is_refused_before_any_work(photos, tmp_path, taken):
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "own.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(DataError, match=r"not empty|which no packing wrote"):
            pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.1), PackOptions(force=force))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", taken]


def test_force_replaces_both(photos, tmp_path):
    pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.1))
    pack_held_out(photos, tmp_path / "train", tmp_path / "val", HoldOut(0.5), PackOptions(force=True))
    assert len(images_of(tmp_path / "val")) == 12 + 5 + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "train", "val"]
